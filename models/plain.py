"""Plain networks of both zoos: ConvNet, AlexNet, VGG-11, LeNet and MLP.

The convolutional ones are tables of rows (convolution, norm, activation, pooling). The zoos differ in
norms, in the padding of single-channel images and in the names of layers.
"""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Classifier, Size, map_size
from models.fold import can_fold, folded_conv
from models.fused import fusable, fused
from utils.errors import pick


class AveragePool(nn.AvgPool2d):
    """Non-overlapping average pooling; on a CPU in the default layout, a depthwise convolution.

    torch 2.14 pools there without vector instructions: 128 maps of 32x32 of 100 images took 39 ms
    forwards and backwards on one core, the convolution 18. Otherwise torch's is as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        k = self.kernel_size
        slow = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
        if not slow or min(x.shape[2:]) < 8 or not torch.backends.mkldnn.is_available():
            return super().forward(x)
        weight = x.new_full((x.shape[1], 1, k, k), 1 / k**2)
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, weight, stride=k, groups=x.shape[1])


# (channels, size of the map) -> the norm that follows a convolution.
NORMS: dict[str, Callable[[int, Size], nn.Module | None]] = {
    "none": lambda c, size: None,
    "batch": lambda c, size: nn.BatchNorm2d(c),
    "layer": lambda c, size: nn.LayerNorm((c, *size)),
    "instance": lambda c, size: nn.GroupNorm(c, c),  # the DC zoo's spelling of instance norm
    "instance2d": lambda c, size: nn.InstanceNorm2d(c, affine=True),
    "group": lambda c, size: nn.GroupNorm(4, c),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leakyrelu": lambda: nn.LeakyReLU(0.01),
    "sigmoid": nn.Sigmoid,
    "swish": nn.SiLU,
}
POOLINGS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "max": lambda: nn.MaxPool2d(2),
    "avg": lambda: AveragePool(2),
}


class Row(NamedTuple):
    """One convolution of stride 1 with what follows it."""

    width: int
    kernel: int = 3
    padding: int = 1
    pool: str = "none"

    def conv_side(self, side: int) -> int:
        """Side of the map after the convolution."""
        return side + 2 * self.padding - self.kernel + 1

    def side(self, side: int) -> int:
        """Side of the map after convolution and pooling."""
        return self.conv_side(side) // (1 if self.pool == "none" else 2)


pooled = functools.partial(Row, pool="max")


def pad_single_channel(rows: Sequence[Row], channel: int) -> list[Row]:
    """The DC zoo pads single-channel images by 2 more on each side: 28x28 becomes 32x32."""
    rows = list(rows)
    if channel == 1:
        rows[0] = rows[0]._replace(padding=rows[0].padding + 2)
    return rows


def rows_side(rows: Sequence[Row], side: int) -> int:
    """Side of the feature map for images of `side`; 0 or less when they are too small."""
    for row in rows:
        side = row.side(side) if side > 0 else 0
    return side


def conv_blocks(
    channel: int, rows: Sequence[Row], im_size: Size, norm: str, act: str = "relu"
) -> list[list[nn.Module]]:
    """Modules of each row in the published order: conv, norm, activation, pooling.

    "none" is left out, not replaced by an identity: later modules move up in the state dict.
    """
    blocks, (height, width) = [], im_size
    make_norm, make_act = pick(NORMS, norm, "norm"), pick(ACTIVATIONS, act, "activation")
    for row in rows:
        conv = nn.Conv2d(channel, row.width, row.kernel, padding=row.padding)
        normed = make_norm(row.width, (row.conv_side(height), row.conv_side(width)))
        modules = [conv, normed, make_act(), pick(POOLINGS, row.pool, "pooling")()]
        blocks.append([module for module in modules if module is not None])
        channel, height, width = row.width, row.side(height), row.side(width)
    return blocks


class PlainNet(Classifier):
    """Rows of convolutions and a linear head on the flattened feature map.

    `name` is the published one, for error messages; `dc_padding` pads single-channel images as the DC
    zoo does; `nested` makes state-dict names `layers.{row}.block.{n}` instead of `features.{n}`.
    """

    ROWS: Sequence[Row] = ()

    def __init__(
        self,
        channel: int,
        num_classes: int,
        im_size: Size,
        *,
        name: str,
        norm: str,
        rows: Sequence[Row] | None = None,
        act: str = "relu",
        head_name: str = "fc",
        dropout: float = 0.0,
        dc_padding: bool = False,
        nested: bool = False,
    ) -> None:
        super().__init__()
        rows = rows or self.ROWS
        if dc_padding:
            rows = pad_single_channel(rows, channel)
        # Over a single pixel instance norm returns its bias, whatever the image shows.
        alone = norm.startswith("instance") and all(row.pool == "none" for row in rows)
        size = map_size(name, im_size, lambda s: rows_side(rows, s), least=2 if alone else 1)
        blocks = conv_blocks(channel, rows, im_size, norm, act)
        if nested:
            named = [OrderedDict(block=nn.Sequential(*block)) for block in blocks]
            self.layers = nn.Sequential(*map(nn.Sequential, named))
        else:
            self.features = nn.Sequential(*itertools.chain(*blocks))
        self.nested = nested
        self.set_head(num_classes, rows[-1].width, size, head_name=head_name, dropout=dropout)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map; BatchNorm that is a fixed affine map is folded into the convolutions."""
        trunk = self.layers if self.nested else self.features
        layers = [module for module in trunk.modules() if not list(module.children())]
        if not self.first_order and not any(itertools.starmap(can_fold, itertools.pairwise(layers))):
            return trunk(x)
        while layers:
            if self.first_order and fusable(layers, x):
                x = fused(layers, x)
                del layers[:4]
                continue
            layer = layers.pop(0)
            x = folded_conv(layer, layers.pop(0), x) if layers and can_fold(layer, layers[0]) else layer(x)
        return x


class ConvNet(PlainNet):
    """Blocks of conv 3x3, norm, activation, pooling; further arguments as in PlainNet.

    Source: Gidaris & Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", 2018, as
    used by Zhao et al., "Dataset Condensation with Gradient Matching", 2021 (DC zoo) and by
    Lee et al., "Self-Supervised Dataset Distillation for Transfer Learning", 2024 (KRR-ST zoo).
    """

    def __init__(
        self, *shape: Any, widths: Sequence[int] = (128,) * 3, norm="instance", pool="avg", **options: Any
    ) -> None:
        super().__init__(*shape, rows=[Row(width, pool=pool) for width in widths], norm=norm, **options)


class AlexNet(PlainNet):
    """AlexNet for 32x32 images.

    Source: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks",
    2012, as reduced by Zhao et al., "Dataset Condensation with Gradient Matching", 2021.
    """

    ROWS = (pooled(128, 5, 2), pooled(192, 5, 2), Row(256), Row(192), pooled(192))


class VGG11(PlainNet):
    """VGG-11 with one linear layer; without the DC zoo's AvgPool(1), which changes nothing.

    Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", 2015.
    """

    ROWS = (pooled(64), pooled(128), Row(256), pooled(256), Row(512), pooled(512), Row(512), pooled(512))


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

    ROWS = (pooled(6, 5, 0), pooled(16, 5, 0))

    def __init__(self, channel: int, num_classes: int, im_size: Size, *, name: str = "LeNet") -> None:
        super().__init__()
        rows = pad_single_channel(self.ROWS, channel)
        height, width = map_size(name, im_size, lambda side: rows_side(rows, side))
        blocks = conv_blocks(channel, rows, im_size, norm="none")
        self.features = nn.Sequential(*itertools.chain(*blocks))
        self.fc_1 = nn.Linear(16 * height * width, 120)
        self.fc_2 = nn.Linear(120, 84)
        self.set_head(num_classes, 84, head_name="fc_3")

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc_1(self.features(x).flatten(1)))
        return F.relu(self.fc_2(x))
