"""torchvision's residual networks with a small stem (KRR-ST zoo).

Source: He et al., "Deep Residual Learning for Image Recognition", 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from models.base import Classifier, map_size


class SmallStemResNet(Classifier, torchvision.models.ResNet):
    """KRR-ST zoo: torchvision's key names, stem conv 3x3 with padding 2, no max-pooling.

    Source: Lee et al., "Self-Supervised Dataset Distillation for Transfer Learning", 2024.
    """

    global_pool = True

    def __init__(
        self,
        channel: int,
        num_classes: int,
        im_size: tuple[int, int],
        *,
        blocks: Sequence[int],
        name: str,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(BasicBlock, list(blocks), zero_init_residual=True)
        map_size(name, im_size, lambda side: (side + 9) // 8)  # any size of 1 or more
        # Padding 2, not 1: 32x32 images give 34x34 maps in the published networks. Put in after
        # torchvision's Kaiming loop, so that it keeps PyTorch's default initialisation, as there.
        self.conv1 = nn.Conv2d(channel, 64, 3, padding=2, bias=False)
        self.maxpool = nn.Identity()
        self.set_head(num_classes, 512, dropout=dropout)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> (B, 512, h, w) before the global average."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
