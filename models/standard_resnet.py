"""torchvision's ResNet-50 with the contract of this zoo: a target model for 224-pixel sets."""

from __future__ import annotations

import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from models.base import Classifier
from models.resnet import SmallStemResNet


class StandardResNet50(Classifier, torchvision.models.ResNet):
    """torchvision's ResNet-50 with its usual stem: the layout of the public Barlow Twins weights.

    Source: Zbontar et al., "Barlow Twins", arXiv 2103.03230; 2048 features.
    """

    global_pool = True
    forward_features = SmallStemResNet.forward_features  # with torchvision's own stem

    def __init__(self, channel: int) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3])
        if channel != 3:
            self.conv1 = nn.Conv2d(channel, 64, 7, stride=2, padding=3, bias=False)
        self.set_head(1, 2048)
