"""MobileNetV2 with strides for 32x32 images (KRR-ST zoo).

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Classifier, Size, map_size

# (expansion, width, blocks, stride of the first block)
STAGES = (
    (1, 16, 1, 1),
    (2, 24, 2, 1),
    (2, 32, 3, 2),
    (2, 64, 4, 2),
    (2, 96, 3, 1),
    (2, 160, 3, 2),
    (2, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1; a residual when the stride is 1."""

    def __init__(self, in_width: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * in_width
        self.residual = stride == 1
        self.conv1 = nn.Conv2d(in_width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if self.residual and in_width != width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.residual else out


class MobileNetV2(Classifier):
    """Stem of 32, the stages of STAGES, 1x1 conv of 1280, global average."""

    global_pool = True

    def __init__(
        self, channel: int, num_classes: int, im_size: Size, *, name: str, dropout: float = 0.0
    ) -> None:
        super().__init__()
        map_size(name, im_size, lambda side: (side + 7) // 8)  # any size of 1 or more
        self.conv1 = nn.Conv2d(channel, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks, in_width = [], 32
        for expansion, width, count, first_stride in STAGES:
            for stride in (first_stride, *[1] * (count - 1)):
                blocks.append(InvertedResidual(in_width, width, expansion, stride))
                in_width = width
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(in_width, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.set_head(num_classes, 1280, dropout=dropout)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 1280, h, w) before the global average."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(x)))
