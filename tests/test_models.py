"""Zoo A (KRR-ST): published keys, outputs recomputed by hand, sizes, errors."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision

from evaluation.target import Representation
from models import MODELS, get_model
from models.plain import AveragePool
from utils.checkpoint import apply_state
from utils.errors import UserError
from utils.seed import local_seed

ZOO_A = ["convnet_8_16_bn", "convnet_8_16_in", "convnet_8_16_none", "convnet_128_256_512_bn"]
ZOO_A += ["alexnet", "vgg", "resnet10", "resnet18", "mobilenet"]
FEATURES_A = dict(alexnet=192 * 16, vgg=512, resnet10=512, resnet18=512, mobilenet=1280)
FEATURES_A |= {f"convnet_8_16_{norm}": 16 * 64 for norm in ("bn", "in", "none")}
FEATURES_A["convnet_128_256_512_bn"] = 512 * 16
POOLED_A = FEATURES_A | dict(alexnet=192) | dict.fromkeys(ZOO_A[:3], 16)
POOLED_A["convnet_128_256_512_bn"] = 512


def build(name, channel=3, size=(32, 32)):
    with local_seed(0):
        return get_model(name, (channel, *size), 10)


def on_paper(*args, **kwargs):
    """A network without memory, where only names and shapes matter."""
    with torch.device("meta"):
        return build(*args, **kwargs)


def images(channel=3, size=(32, 32), n=2, seed=0):
    return torch.randn(n, channel, *size, generator=torch.Generator().manual_seed(seed))


def shapes(model):
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def bn_shapes(prefix, c):
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{n}": (c,) for n in names} | {f"{prefix}.num_batches_tracked": ()}


@pytest.mark.parametrize("name", ZOO_A)
def test_zoo_a_feature_widths(name):
    model = on_paper(name)
    assert (model.num_features, model.num_pooled) == (FEATURES_A[name], POOLED_A[name])
    assert model.head_name == "fc" and model.fc.out_features == 10


@pytest.mark.parametrize("norm", ["bn", "in", "none"])
def test_convnet_keys(norm):
    expected = {}
    for i, (c_in, c) in enumerate([(3, 8), (8, 16), (16, 4)]):
        conv = f"layers.{i}.block.0"
        expected |= {f"{conv}.weight": (c, c_in, 3, 3), f"{conv}.bias": (c,)}
        if norm == "bn":
            expected |= bn_shapes(f"layers.{i}.block.1", c)
        elif norm == "in":
            expected |= {f"layers.{i}.block.1.{n}": (c,) for n in ("weight", "bias")}
    expected |= {"fc.weight": (7, 4 * 16), "fc.bias": (7,)}
    assert shapes(get_model(f"convnet_8_16_4_{norm}", num_classes=7)) == expected


def test_convnet_output_by_hand():
    model, x = build("convnet_8_16_in").eval(), images()
    state = model.state_dict()
    for i in range(2):
        block = f"layers.{i}.block"
        x = F.conv2d(x, state[f"{block}.0.weight"], state[f"{block}.0.bias"], padding=1)
        x = F.instance_norm(x, weight=state[f"{block}.1.weight"], bias=state[f"{block}.1.bias"])
        x = F.avg_pool2d(x.relu(), 2)
    expected = x.flatten(1) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("sides", [(8, 8), (9, 11), (2, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_average_pool_is_torchs(sides, layout):
    """Values, gradient and second derivative in either layout, also of odd sides."""

    def derivatives(pool):
        x = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))
        x = x.to(memory_format=layout).requires_grad_()
        y = pool(x)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        return y, first, second

    for ours, torchs in zip(derivatives(AveragePool(2)), derivatives(torch.nn.AvgPool2d(2)), strict=True):
        torch.testing.assert_close(ours, torchs)
    x = torch.randn(2, 3, *sides).to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(AveragePool(2)(x), torch.nn.AvgPool2d(2)(x))
    with pytest.raises(RuntimeError, match="too small"):
        AveragePool(2)(torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("name", "convs", "width"),
    [
        (
            "alexnet",
            {0: (128, 3, 5), 4: (192, 128, 5), 8: (256, 192, 3), 11: (192, 256, 3), 14: (192, 192, 3)},
            192 * 16,
        ),
        (
            "vgg",
            {
                0: (64, 3, 3),
                4: (128, 64, 3),
                8: (256, 128, 3),
                11: (256, 256, 3),
                15: (512, 256, 3),
                18: (512, 512, 3),
                22: (512, 512, 3),
                25: (512, 512, 3),
            },
            512,
        ),
    ],
)
def test_alexnet_and_vgg_keys(name, convs, width):
    expected = {"fc.weight": (10, width), "fc.bias": (10,)}
    for i, (c, c_in, k) in convs.items():
        expected |= {f"features.{i}.weight": (c, c_in, k, k), f"features.{i}.bias": (c,)}
        expected |= bn_shapes(f"features.{i + 1}", c)
    assert shapes(on_paper(name)) == expected


def patched_torchvision(blocks):
    """The published recipe: torchvision's network with another stem, by hand."""
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, blocks, num_classes=10)
    model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    model.maxpool = torch.nn.Identity()
    return model


@pytest.mark.parametrize(("name", "blocks"), [("resnet10", [1] * 4), ("resnet18", [2] * 4)])
def test_resnet_is_torchvisions(name, blocks):
    with local_seed(1):
        reference = patched_torchvision(blocks)
        for module in reference.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    model = get_model(name)
    assert list(model.state_dict()) == list(reference.state_dict())
    model.load_state_dict(reference.state_dict(), strict=True)
    model.eval(), reference.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images()), reference(images()))
        assert model.forward_features(images()).shape == (2, 512, 5, 5)  # 32 -> 34 -> 17 -> 9 -> 5


def test_resnet_initialisation():
    model = build("resnet18")
    last = [m.bn2.weight for m in model.modules() if hasattr(m, "bn2")]
    assert len(last) == 8 and not any(weight.any() for weight in last)
    std = model.layer3[1].conv1.weight.std().item()
    assert std == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "model",
    [
        lambda: build("resnet10").conv1,
        lambda: build("resnet18").conv1,
        lambda: Representation("resnet18", (3, 32, 32)).backbone.conv1,
    ],
)
def test_the_stem_has_the_default_initialisation(model):
    """Uniform within 1/sqrt(fan in), as PyTorch documents; Kaiming fan-out is half as wide."""
    with local_seed(0):
        weight = model().weight
    bound = 27**-0.5
    assert 0.99 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def mobilenet_blocks():
    """(index, in, inner, out, stride) written out from the table of the zoo."""
    rows = [(1, 16, 1, 1), (2, 24, 2, 1), (2, 32, 3, 2), (2, 64, 4, 2), (2, 96, 3, 1)]
    rows += [(2, 160, 3, 2), (2, 320, 1, 1)]
    index, c_in = 0, 32
    for expansion, c, n, stride in rows:
        for i in range(n):
            yield index, c_in, expansion * c_in, c, stride if i == 0 else 1
            index, c_in = index + 1, c


def test_mobilenet_keys():
    expected = {"conv1.weight": (32, 3, 3, 3), "conv2.weight": (1280, 320, 1, 1)}
    expected |= bn_shapes("bn1", 32) | bn_shapes("bn2", 1280)
    expected |= {"fc.weight": (10, 1280), "fc.bias": (10,)}
    for i, c_in, inner, c, stride in mobilenet_blocks():
        at = f"layers.{i}"
        expected[f"{at}.conv1.weight"] = (inner, c_in, 1, 1)
        expected[f"{at}.conv2.weight"] = (inner, 1, 3, 3)
        expected[f"{at}.conv3.weight"] = (c, inner, 1, 1)
        expected |= bn_shapes(f"{at}.bn1", inner) | bn_shapes(f"{at}.bn2", inner)
        expected |= bn_shapes(f"{at}.bn3", c)
        if stride == 1 and c_in != c:
            expected[f"{at}.shortcut.0.weight"] = (c, c_in, 1, 1)
            expected |= bn_shapes(f"{at}.shortcut.1", c)
    assert shapes(on_paper("mobilenet")) == expected


def test_mobilenet_output_by_hand():
    model = build("mobilenet").eval()
    state = model.state_dict()

    def conv_bn(x, conv, bn, **kwargs):
        x = F.conv2d(x, state[f"{conv}.weight"], **kwargs)
        stats = [state[f"{bn}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *stats)

    with torch.no_grad():
        x = conv_bn(images(), "conv1", "bn1", padding=1).relu()
        for i, c_in, inner, c, stride in mobilenet_blocks():
            at, out = f"layers.{i}", x
            out = conv_bn(out, f"{at}.conv1", f"{at}.bn1").relu()
            depthwise = dict(stride=stride, padding=1, groups=inner)
            out = conv_bn(out, f"{at}.conv2", f"{at}.bn2", **depthwise).relu()
            out = conv_bn(out, f"{at}.conv3", f"{at}.bn3")
            if stride == 1:
                out = out + (x if c_in == c else conv_bn(x, f"{at}.shortcut.0", f"{at}.shortcut.1"))
            x = out
        assert x.shape == (2, 320, 4, 4)
        x = conv_bn(x, "conv2", "bn2").relu().mean((2, 3))
        torch.testing.assert_close(model.embed(images()), x)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    convnet, c_in = 0, 3
    for c in (128, 256, 512):
        convnet, c_in = convnet + 9 * c_in * c + c + 2 * c, c
    assert count(on_paper("convnet_128_256_512_bn")) == convnet + 512 * 16 * 10 + 10
    # torchvision documents 11 689 512 for resnet18: other stem (7x7 -> 3x3), other head.
    stem, head = 3 * 64 * (9 - 49), 512 * 10 + 10 - (512 * 1000 + 1000)
    assert count(on_paper("resnet18")) == 11_689_512 + stem + head
    # torchvision documents 9 220 480 for the convolutions of VGG-11, 2 * 2752 for its norms.
    assert count(on_paper("vgg")) == 9_220_480 + 2 * 2752 + 512 * 10 + 10


@pytest.mark.parametrize("name", [*ZOO_A, "convnet_128_256_512_bn"])
def test_dropout_names_the_head_as_the_release_does(name):
    """A Dropout `fc.0` and a Linear `fc.1`; all other keys, and what loads, stay the same."""
    plain, dropping = build(name), get_model(name, dropout=0.5)
    keys = [re.sub(r"^fc\.(?=weight|bias)", "fc.1.", key) for key in plain.state_dict()]
    assert list(dropping.state_dict()) == keys and keys[-2:] == ["fc.1.weight", "fc.1.bias"]
    with torch.no_grad():
        expected = plain.eval()(images())
        for load in (
            lambda model, state: model.load_state_dict(state, strict=True),
            lambda model, state: apply_state(model, state, origin="file"),
        ):
            first, back = get_model(name, dropout=0.5).eval(), get_model(name).eval()
            load(first, plain.state_dict())
            assert torch.equal(first(images()), expected)
            load(back, first.state_dict())
            assert torch.equal(back(images()), expected)
            load(first, first.state_dict())
    with pytest.raises(RuntimeError, match=r"[Uu]nexpected key.*fc.1.weight"):
        plain.load_state_dict(plain.state_dict() | {"fc.1.weight": plain.fc.weight}, strict=True)


def test_a_part_of_another_module_loads_either_head():
    whole = torch.nn.ModuleDict({"net": get_model("convnet_8_in", dropout=0.5)})
    state = {f"net.{k}": v for k, v in get_model("convnet_8_in").state_dict().items()}
    whole.load_state_dict(state, strict=True)
    assert torch.equal(whole["net"].head.weight, state["net.fc.weight"])


def test_dropout_acts_in_training_only():
    model = get_model("convnet_8_16_none", dropout=0.999999)
    torch.testing.assert_close(model.train()(images())[0], model.head.bias)
    assert not torch.allclose(model.eval()(images())[0], model.head.bias)


@pytest.mark.parametrize(
    ("spelt", "name"), [("VGG", "vgg"), ("ResNet10", "resnet10"), ("ConvNet_8_16_BN", "convnet_8_16_bn")]
)
def test_zoo_a_names_without_case(spelt, name):
    assert shapes(on_paper(spelt)) == shapes(on_paper(name))


@pytest.mark.parametrize("name", ZOO_A)
@pytest.mark.parametrize(("channel", "size"), [(3, (64, 64)), (1, (40, 32))])
def test_zoo_a_other_sizes(name, channel, size):
    model = on_paper(name, channel, size).eval()
    h, w = size
    per_pixel = dict(alexnet=192 * (h // 8) * (w // 8), vgg=512 * (h // 32) * (w // 32))
    expected = per_pixel.get(name, FEATURES_A[name])
    if name.startswith("convnet"):
        blocks = name.count("_") - 1
        expected = POOLED_A[name] * (h >> blocks) * (w >> blocks)
    embedded = model.embed(images(channel, size).to("meta"))
    assert embedded.shape == (2, expected) and model.fc(embedded).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "size", "smallest"),
    [("vgg", 16, 32), ("alexnet", 7, 8), ("convnet_4_4_4_4_bn", 15, 16), ("resnet18", 0, 1)],
)
def test_zoo_a_too_small(name, size, smallest):
    with pytest.raises(UserError, match=rf"^{name} .*{size}x{size}.*{smallest}x{smallest}$"):
        get_model(name, (3, size, size))
    assert on_paper(name, size=(smallest, smallest)).num_features > 0


@pytest.mark.parametrize(
    "name", ["resnet50", "", "convnet", "convnet_bn", "convnet_128_gn", "convnet_0_bn", "ConvNet"]
)
def test_zoo_a_unknown_name_lists_the_valid_ones(name):
    with pytest.raises(UserError) as caught:
        get_model(name)
    for valid in MODELS:
        assert valid in str(caught.value)
    assert "convnet_{widths}_{bn|in|none}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zoo_a_bad_arguments():
    with pytest.raises(UserError, match=re.escape("convnet_128_256_512_bn")):
        get_model("convnet_{widths}_{bn|in|none}")
    with pytest.raises(UserError, match="dropout is 1"):
        get_model("convnet_4_bn", dropout=1.0)
    with pytest.raises(UserError, match="num_classes is 0"):
        get_model("convnet_4_bn", num_classes=0)
