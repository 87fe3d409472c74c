"""The pre-2015 CIFAR residual network (DC zoo).

Source: He et al., "Deep Residual Learning for Image Recognition", 2016.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Classifier, Size, map_size
from models.plain import NORMS
from utils.errors import pick


class CifarBlock(nn.Module):
    """Two convolutions 3x3 and a shortcut; the norms are called bn1 and bn2 whatever they are.

    With `pool_down` a stride of 2 is that of an AvgPool after a convolution of stride 1.
    """

    def __init__(self, in_width: int, width: int, stride: int, norm: str, pool_down: bool = False) -> None:
        super().__init__()
        make_norm = pick(NORMS, norm, "norm")
        conv_stride = 1 if pool_down else stride
        self.pool_main = pool_down and stride == 2
        self.conv1 = nn.Conv2d(in_width, width, 3, conv_stride, padding=1, bias=False)
        self.bn1 = make_norm(width, (0, 0))
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = make_norm(width, (0, 0))
        self.shortcut = nn.Sequential()
        if stride != 1 or in_width != width:
            conv = nn.Conv2d(in_width, width, 1, conv_stride, bias=False)
            pool = [nn.AvgPool2d(2)] if self.pool_main else []
            self.shortcut = nn.Sequential(conv, *pool, make_norm(width, (0, 0)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        if self.pool_main:
            out = F.avg_pool2d(out, 2)  # published order: after the activation
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet18(Classifier):
    """DC zoo: stem 3x3, four stages of two blocks, AvgPool 4, head `classifier`.

    With `pool_down` (ResNet18BN_AP) strides become average pooling and the last AvgPool goes.

    Source: Zhao et al., "Dataset Condensation with Gradient Matching", 2021.
    """

    def __init__(
        self, channel: int, num_classes: int, im_size: Size, *, name: str, norm: str, pool_down: bool = False
    ) -> None:
        super().__init__()
        # Strided convolutions round up (28 -> 4), poolings down (28 -> 3).
        # Over a single pixel instance norm returns its bias: the last map needs two.
        up, least = 0 if pool_down else 7, 2 if norm == "instance" else 1
        height, width = map_size(name, im_size, lambda side: (side + up) // 8, least)
        # Maps smaller than the published 4x4 (images below 25x25) are averaged whole.
        self.pool = (1, 1) if pool_down else (min(4, height), min(4, width))
        self.conv1 = nn.Conv2d(channel, 64, 3, padding=1, bias=False)
        self.bn1 = pick(NORMS, norm, "norm")(64, (0, 0))

        def stage(in_width: int, width: int, stride: int) -> nn.Sequential:
            first = CifarBlock(in_width, width, stride, norm, pool_down)
            return nn.Sequential(first, CifarBlock(width, width, 1, norm, pool_down))

        self.layer1, self.layer2 = stage(64, 64, 1), stage(64, 128, 2)
        self.layer3, self.layer4 = stage(128, 256, 2), stage(256, 512, 2)
        size = (height // self.pool[0], width // self.pool[1])
        self.set_head(num_classes, 512, size, head_name="classifier")

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 512, h, w) after the last AvgPool."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return F.avg_pool2d(x, self.pool)
