"""Every network of both zoos against published parameter counts and state-dict entries.

The numbers are of the released code's networks: 3 channels, 10 outputs.
"""

import pytest
import torch

from models import MODELS, NETWORKS, get_model, get_network

# name, side of the images -> (parameters, entries of the state dict)
ZOO_A = {
    ("convnet_128_256_512_bn", 32): (1562634, 23),
    ("convnet_64_128_256_512_bn", 64): (1634826, 30),
    ("convnet_32_64_128_256_512_bn", 224): (1821450, 37),
    ("vgg", 32): (9231114, 58),
    ("vgg", 64): (9246474, 58),
    ("alexnet", 32): (1874122, 37),
    ("alexnet", 64): (1966282, 37),
    ("mobilenet", 32): (1092314, 344),
    ("mobilenet", 224): (1092314, 344),
    ("resnet10", 32): (4903242, 74),
    ("resnet10", 64): (4903242, 74),
    ("resnet18", 32): (11173962, 122),
    ("resnet18", 224): (11173962, 122),
}
_DEFAULT = (
    "ConvNet",
    "ConvNetD3",
    "ConvNetW128",
    "ConvNetAS",
    "ConvNetAR",
    "ConvNetAL",
    "ConvNetASwish",
    "ConvNetIN",
    "ConvNetGN",
    "ConvNetMP",
    "ConvNetAP",
)
ZOO_B = {
    **dict.fromkeys(_DEFAULT, (320010, 14)),
    "MLP": (411146, 6),
    "LeNet": (62006, 10),
    "AlexNet": (1872202, 12),
    "AlexNetBN": (1874122, 37),
    "VGG11": (9231114, 34),
    "VGG11BN": (9231114, 58),
    "ResNet18": (11173962, 62),
    "ResNet18BN": (11173962, 122),
    "ResNet18BN_AP": (11250762, 122),
    "ConvNetASwishBN": (320010, 23),
    "ConvNetBN": (320010, 23),
    "ConvNetNN": (319242, 8),
    "ConvNetLN": (663306, 14),
    "ConvNetNP": (1610250, 14),
    "ConvNetD1": (331530, 6),
    "ConvNetD2": (233610, 10),
    "ConvNetD4": (452490, 18),
    "ConvNetD5": (596490, 22),
    "ConvNetW32": (24714, 14),
    "ConvNetW64": (86282, 14),
    "ConvNetW256": (1229834, 14),
}


def size_of(build):
    with torch.device("meta"):
        model = build()
    return sum(p.numel() for p in model.parameters()), len(model.state_dict())


@pytest.mark.parametrize(("name", "side"), ZOO_A)
def test_zoo_a(name, side):
    assert size_of(lambda: get_model(name, (3, side, side), 10)) == ZOO_A[name, side]
    assert name.startswith("convnet_") or name in MODELS


@pytest.mark.parametrize("name", ZOO_B)
def test_zoo_b(name):
    assert size_of(lambda: get_network(name, 3, 10, (32, 32))) == ZOO_B[name]


def test_convnet_d6_needs_64_pixels():
    """Six convolutions of 128 with their norms, and a head on the one pixel that is left of 64."""
    convs = (9 * 3 * 128 + 128) + 5 * (9 * 128 * 128 + 128)
    expected = convs + 6 * 2 * 128 + 128 * 10 + 10, 6 * 4 + 2
    assert size_of(lambda: get_network("ConvNetD6", 3, 10, (64, 64))) == expected


def test_no_network_is_left_out():
    assert set(ZOO_B) | {"ConvNetD6"} == set(NETWORKS)
    assert {name for name, _ in ZOO_A if not name.startswith("convnet_")} == {
        name for name in MODELS if not name.startswith("convnet_")
    }
