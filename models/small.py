"""The two networks of the DC zoo with several linear layers: MLP and LeNet.

Source: Zhao et al., "Dataset Condensation with Gradient Matching", 2021, where they have no
`embed`; here it is the input of the last linear layer.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Classifier, Size, map_size
from models.plain import Row, conv_blocks, pad_single_channel, rows_side


class MLP(Classifier):
    """Three linear layers with ReLU between them."""

    def __init__(self, channel: int, num_classes: int, im_size: Size, *, name: str = "MLP") -> None:
        super().__init__()
        height, width = map_size(name, im_size, lambda side: side)
        self.fc_1 = nn.Linear(channel * height * width, 128)
        self.fc_2 = nn.Linear(128, 128)
        self.set_head(num_classes, 128, head_name="fc_3")

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc_1(x.flatten(1)))
        return F.relu(self.fc_2(x))


class LeNet(Classifier):
    """LeNet-5 with ReLU and max pooling.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998.
    """

    ROWS = (Row(6, 5, 0, "max"), Row(16, 5, 0, "max"))

    def __init__(self, channel: int, num_classes: int, im_size: Size, *, name: str = "LeNet") -> None:
        super().__init__()
        rows = pad_single_channel(self.ROWS, channel)
        height, width = map_size(name, im_size, lambda side: rows_side(rows, side))
        blocks = conv_blocks(channel, rows, im_size, norm="none")
        self.features = nn.Sequential(*(module for block in blocks for module in block))
        self.fc_1 = nn.Linear(16 * height * width, 120)
        self.fc_2 = nn.Linear(120, 84)
        self.set_head(num_classes, 84, head_name="fc_3")

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc_1(self.features(x).flatten(1)))
        return F.relu(self.fc_2(x))
