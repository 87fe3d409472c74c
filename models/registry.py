"""Published names -> networks, for both zoos, and the evaluation pools of the DC zoo."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from models.base import Classifier, Size
from models.cifar_resnet import CifarResNet18
from models.mobilenet import MobileNetV2
from models.plain import MLP, VGG11, AlexNet, ConvNet, LeNet
from utils.errors import UserError, pick

CONVNET_PATTERN = "convnet_{widths}_{bn|in|none}"
_CONVNET_NAME = re.compile(r"convnet((?:_[1-9][0-9]*)+)_(bn|in|none)")
_CONVNET_NORMS = {"bn": "batch", "in": "instance2d", "none": "none"}


def _named_convnet(*shape: Any, name: str, dropout: float) -> ConvNet:
    """KRR-ST zoo's ConvNet: the widths and the norm are part of the name."""
    match = _CONVNET_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name} is a pattern; write a name like convnet_128_256_512_bn")
    widths, norm = [int(width) for width in match[1].split("_")[1:]], _CONVNET_NORMS[match[2]]
    return ConvNet(*shape, widths=widths, norm=norm, nested=True, name=name, dropout=dropout)


def _small_stem_resnet(*shape: Any, **options: Any) -> Classifier:
    """KRR-ST zoo's ResNets; torchvision takes a second to import, so only they do."""
    from models.resnet import SmallStemResNet

    return SmallStemResNet(*shape, **options)


MODELS: dict[str, Callable[..., Classifier]] = {
    CONVNET_PATTERN: _named_convnet,
    "alexnet": partial(AlexNet, norm="batch"),
    "vgg": partial(VGG11, norm="batch"),
    "resnet10": partial(_small_stem_resnet, blocks=(1, 1, 1, 1)),
    "resnet18": partial(_small_stem_resnet, blocks=(2, 2, 2, 2)),
    "mobilenet": MobileNetV2,
}

# What differs from the default: three blocks of width 128, instance norm, ReLU, average pooling.
_CONVNETS: dict[str, dict] = {
    "ConvNet": {},
    **{f"ConvNetD{depth}": dict(widths=(128,) * depth) for depth in range(1, 7)},
    **{f"ConvNetW{width}": dict(widths=(width,) * 3) for width in (32, 64, 128, 256)},
    "ConvNetAS": dict(act="sigmoid"),
    "ConvNetAR": dict(act="relu"),
    "ConvNetAL": dict(act="leakyrelu"),
    "ConvNetASwish": dict(act="swish"),
    "ConvNetASwishBN": dict(act="swish", norm="batch"),
    "ConvNetNN": dict(norm="none"),
    "ConvNetBN": dict(norm="batch"),
    "ConvNetLN": dict(norm="layer"),
    "ConvNetIN": dict(norm="instance"),
    "ConvNetGN": dict(norm="group"),
    "ConvNetNP": dict(pool="none"),
    "ConvNetMP": dict(pool="max"),
    "ConvNetAP": dict(pool="avg"),
}
NETWORKS: dict[str, Callable[..., Classifier]] = {
    **{
        name: partial(ConvNet, head_name="classifier", dc_padding=True, **row)
        for name, row in _CONVNETS.items()
    },
    "MLP": MLP,
    "LeNet": LeNet,
    "AlexNet": partial(AlexNet, norm="none", dc_padding=True),
    "AlexNetBN": partial(AlexNet, norm="batch", dc_padding=True),
    "VGG11": partial(VGG11, norm="instance", head_name="classifier", dc_padding=True),
    "VGG11BN": partial(VGG11, norm="batch", head_name="classifier", dc_padding=True),
    "ResNet18": partial(CifarResNet18, norm="instance"),
    "ResNet18BN": partial(CifarResNet18, norm="batch"),
    "ResNet18BN_AP": partial(CifarResNet18, norm="batch", pool_down=True),
}

_EVAL_POOLS: dict[str, Callable[[str], list[str]]] = {
    "M": lambda model: ["MLP", "ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18"],
    "B": lambda model: ["ConvNetBN", "ConvNetASwishBN", "AlexNetBN", "VGG11BN", "ResNet18BN"],
    "W": lambda model: ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"],
    "D": lambda model: ["ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"],
    "A": lambda model: ["ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetASwish"],
    "P": lambda model: ["ConvNetNP", "ConvNetMP", "ConvNetAP"],
    "N": lambda model: ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"],
    # Cut at "BN" as published, so ResNet18BN_AP is evaluated on ResNet18.
    "S": lambda model: [model.partition("BN")[0]],
    "SS": lambda model: [model],
}
EVAL_MODES = tuple(_EVAL_POOLS)


def get_model(
    name: str, img_shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10, dropout: float = 0.0
) -> Classifier:
    """A freshly initialised network of the KRR-ST zoo for (C, H, W) images; its last layer is `fc`.

    `name` is a key of MODELS, or a ConvNet such as convnet_128_256_512_bn, in any case of letters;
    `dropout` is the probability in [0, 1) of the Dropout before `fc`. A UserError says that the
    name is unknown or the images are too small.
    """
    channel, *im_size = img_shape
    lower = name.lower()
    key = CONVNET_PATTERN if _CONVNET_NAME.fullmatch(lower) else lower
    build = pick(MODELS, key if key in MODELS else name, "model")  # an error shows what was given
    return build(channel, num_classes, tuple(im_size), name=lower, dropout=dropout)


def get_network(name: str, channel: int, num_classes: int, im_size: Size = (32, 32)) -> Classifier:
    """A freshly initialised network of NETWORKS; a UserError for unknown names and too small images."""
    return pick(NETWORKS, name, "network")(channel, num_classes, tuple(im_size), name=name)


def eval_pool(mode: str, model_name: str) -> list[str]:
    """Networks that evaluate a set distilled with `model_name`, for the published `--eval_mode`."""
    pick(NETWORKS, model_name, "network")
    return pick(_EVAL_POOLS, mode, "eval_mode")(model_name)
