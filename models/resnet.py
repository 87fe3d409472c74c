"""torchvision's residual networks with the contract of the KRR-ST zoo.

Source: He et al., "Deep Residual Learning for Image Recognition", 2016.
"""

from collections.abc import Sequence

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.base import Classifier, Size, map_size


class _ResNet(Classifier, torchvision.models.ResNet):
    global_pool = True

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class SmallStemResNet(_ResNet):
    """ResNet-10 and -18 with torchvision's key names, stem conv 3x3 with padding 2, no max-pooling.

    Source: Lee et al., "Self-Supervised Dataset Distillation for Transfer Learning", 2024.
    """

    def __init__(
        self,
        channel: int,
        num_classes: int,
        im_size: Size,
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


class StandardResNet50(_ResNet):
    """torchvision's ResNet-50, the layout of the public Barlow Twins weights (arXiv 2103.03230)."""

    def __init__(self, channel: int) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3])
        if channel != 3:
            self.conv1 = nn.Conv2d(channel, 64, 7, stride=2, padding=3, bias=False)
        self.set_head(1, 2048)
