"""Zoo B (DC): published keys, outputs recomputed by hand, sizes, errors."""

import pytest
import torch
import torch.nn.functional as F

from models import NETWORKS, get_network
from utils.errors import UserError
from utils.seed import local_seed

# name -> (widths, activation, norm, pooling), written out from the published table.
CONVNETS = {
    "ConvNet": ([128] * 3, "relu", "instance", "avg"),
    "ConvNetD1": ([128], "relu", "instance", "avg"),
    "ConvNetD2": ([128] * 2, "relu", "instance", "avg"),
    "ConvNetD3": ([128] * 3, "relu", "instance", "avg"),
    "ConvNetD4": ([128] * 4, "relu", "instance", "avg"),
    "ConvNetD5": ([128] * 5, "relu", "instance", "avg"),
    "ConvNetD6": ([128] * 6, "relu", "instance", "avg"),
    "ConvNetW32": ([32] * 3, "relu", "instance", "avg"),
    "ConvNetW64": ([64] * 3, "relu", "instance", "avg"),
    "ConvNetW128": ([128] * 3, "relu", "instance", "avg"),
    "ConvNetW256": ([256] * 3, "relu", "instance", "avg"),
    "ConvNetAS": ([128] * 3, "sigmoid", "instance", "avg"),
    "ConvNetAR": ([128] * 3, "relu", "instance", "avg"),
    "ConvNetAL": ([128] * 3, "leaky", "instance", "avg"),
    "ConvNetASwish": ([128] * 3, "swish", "instance", "avg"),
    "ConvNetASwishBN": ([128] * 3, "swish", "batch", "avg"),
    "ConvNetNN": ([128] * 3, "relu", "none", "avg"),
    "ConvNetBN": ([128] * 3, "relu", "batch", "avg"),
    "ConvNetLN": ([128] * 3, "relu", "layer", "avg"),
    "ConvNetIN": ([128] * 3, "relu", "instance", "avg"),
    "ConvNetGN": ([128] * 3, "relu", "group", "avg"),
    "ConvNetNP": ([128] * 3, "relu", "instance", "none"),
    "ConvNetMP": ([128] * 3, "relu", "instance", "max"),
    "ConvNetAP": ([128] * 3, "relu", "instance", "avg"),
}
OTHERS = ["MLP", "LeNet", "AlexNet", "AlexNetBN", "VGG11", "VGG11BN"]
OTHERS += ["ResNet18", "ResNet18BN", "ResNet18BN_AP"]
HEADS = dict(MLP="fc_3", LeNet="fc_3", AlexNet="fc", AlexNetBN="fc")
ACTS = {
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "leaky": lambda x: torch.where(x > 0, x, 0.01 * x),
    "swish": lambda x: x * torch.sigmoid(x),
}
POOLS = {"avg": F.avg_pool2d, "max": F.max_pool2d, "none": lambda x, _: x}
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def published_side(name):
    """32 pixels, but five poolings leave nothing of them for ConvNetD6's sixth."""
    return 64 if name == "ConvNetD6" else 32


def build(name, channel=3, num_classes=10, size=None):
    size = size or (published_side(name),) * 2
    with local_seed(0):
        return get_network(name, channel, num_classes, size).eval()


def with_biases(weights):
    return {f"{n}.weight": s for n, s in weights.items()} | {f"{n}.bias": s[:1] for n, s in weights.items()}


def on_paper(*args, **kwargs):
    """A network without memory, where only names and shapes matter."""
    with torch.device("meta"):
        return build(*args, **kwargs)


def images(channel=3, size=(32, 32)):
    return torch.randn(2, channel, *size, generator=torch.Generator().manual_seed(0))


def paper_images(channel, size):
    return torch.empty(2, channel, *size, device="meta")


def shuffled(model):
    """Give every tensor random content so that an exchanged weight and bias cannot hide."""
    generator = torch.Generator().manual_seed(3)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        noise = torch.rand(value.shape, generator=generator)
        value.copy_(value + 0.1 * noise if value.dim() > 1 else 0.5 + noise)
    return model.state_dict()


def normalise(x, groups, weight, bias):
    """Group norm from its definition; `groups` of C channels each over its own pixels."""
    flat = x.reshape(x.shape[0], groups, -1)
    mean, var = flat.mean(2, keepdim=True), flat.var(2, unbiased=False, keepdim=True)
    flat = (flat - mean) / (var + 1e-5).sqrt()
    if weight.dim() == 1:
        weight, bias = weight[:, None, None], bias[:, None, None]
    return flat.reshape(x.shape) * weight + bias


def apply_norm(x, state, at, norm):
    if norm == "none":
        return x
    weight, bias = state[f"{at}.weight"], state[f"{at}.bias"]
    if norm == "batch":
        return F.batch_norm(x, state[f"{at}.running_mean"], state[f"{at}.running_var"], weight, bias)
    return normalise(x, dict(instance=x.shape[1], group=4, layer=1)[norm], weight, bias)


def test_the_table_is_complete():
    assert set(NETWORKS) == set(CONVNETS) | set(OTHERS)
    for name in NETWORKS:
        assert on_paper(name).head_name == HEADS.get(name, "classifier")


@pytest.mark.parametrize("name", CONVNETS)
def test_convnet_keys_and_output(name):
    widths, act, norm, pool = CONVNETS[name]
    model = build(name)
    keys, at, c_in, side = {}, 0, 3, published_side(name)
    state, x = shuffled(model), images(size=(side, side))
    given = x
    for c in widths:
        keys |= {f"features.{at}.weight": (c, c_in, 3, 3), f"features.{at}.bias": (c,)}
        x = F.conv2d(x, state[f"features.{at}.weight"], state[f"features.{at}.bias"], padding=1)
        x = apply_norm(x, state, f"features.{at + 1}", norm)
        x = POOLS[pool](ACTS[act](x), 2)
        if norm != "none":
            shape = (c, side, side) if norm == "layer" else (c,)
            names = BN if norm == "batch" else BN[:2]
            keys |= {f"features.{at + 1}.{n}": shape for n in names}
            if norm == "batch":
                keys[f"features.{at + 1}.num_batches_tracked"] = ()
        at += 2 + (norm != "none") + (pool != "none")  # conv, [norm], activation, [pooling]
        c_in, side = c, side if pool == "none" else side // 2
    keys |= {"classifier.weight": (10, c_in * side * side), "classifier.bias": (10,)}
    assert {k: tuple(v.shape) for k, v in state.items()} == keys
    assert model.num_features == c_in * side * side and model.num_pooled == c_in
    expected = x.flatten(1) @ state["classifier.weight"].T + state["classifier.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(given), expected, rtol=1e-4, atol=1e-4)


def test_mlp_and_lenet_keys_and_output():
    mlp, lenet, x = build("MLP"), build("LeNet"), images()
    layers = dict(fc_1=(128, 3072), fc_2=(128, 128), fc_3=(10, 128))
    keys = with_biases(layers)
    assert {k: tuple(v.shape) for k, v in mlp.state_dict().items()} == keys
    assert get_network("MLP", 1, 10, (28, 28)).fc_1.in_features == 784
    layers = {"features.0": (6, 3, 5, 5), "features.3": (16, 6, 5, 5)}
    layers |= dict(fc_1=(120, 400), fc_2=(84, 120), fc_3=(10, 84))
    keys = with_biases(layers)
    assert {k: tuple(v.shape) for k, v in lenet.state_dict().items()} == keys
    with torch.no_grad():
        hidden = mlp.fc_2(mlp.fc_1(x.reshape(2, -1)).relu()).relu()
        torch.testing.assert_close(mlp.embed(x), hidden)
        for i in (0, 3):
            conv = [lenet.state_dict()[f"features.{i}.{n}"] for n in ("weight", "bias")]
            x = F.max_pool2d(F.conv2d(x, *conv).relu(), 2)
        hidden = lenet.fc_2(lenet.fc_1(x.flatten(1)).relu()).relu()
        torch.testing.assert_close(lenet.embed(images()), hidden)


@pytest.mark.parametrize(
    ("name", "norm", "convs", "pools"),
    [
        ("AlexNet", "none", [0, 3, 6, 8, 10], [0, 1, 4]),
        ("AlexNetBN", "batch", [0, 4, 8, 11, 14], [0, 1, 4]),
        ("VGG11", "instance", [0, 4, 8, 11, 15, 18, 22, 25], [0, 1, 3, 5, 7]),
        ("VGG11BN", "batch", [0, 4, 8, 11, 15, 18, 22, 25], [0, 1, 3, 5, 7]),
    ],
)
def test_alexnet_and_vgg_output(name, norm, convs, pools):
    model, x = build(name), images()
    state = model.state_dict()
    used = {f"{model.head_name}.{n}" for n in ("weight", "bias")}
    for i, at in enumerate(convs):
        weight = state[f"features.{at}.weight"]
        x = F.conv2d(x, weight, state[f"features.{at}.bias"], padding=weight.shape[2] // 2)
        x = apply_norm(x, state, f"features.{at + 1}", norm).relu()
        x = F.max_pool2d(x, 2) if i in pools else x
        used |= {f"features.{at}.{n}" for n in ("weight", "bias")}
        names = dict(none=(), batch=BN, instance=BN[:2])[norm]
        used |= {f"features.{at + 1}.{n}" for n in names}
    assert used == set(state)
    with torch.no_grad():
        torch.testing.assert_close(model.embed(images()), x.flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "norm"), [("ResNet18", "instance"), ("ResNet18BN", "batch"), ("ResNet18BN_AP", "batch")]
)
def test_resnet_keys_and_output(name, norm):
    model, x, pooling = build(name), images(), name.endswith("AP")
    state, used = shuffled(model), set()

    def conv(x, at, **kwargs):
        used.add(f"{at}.weight")  # no bias
        return F.conv2d(x, state[f"{at}.weight"], **kwargs)

    def normed(x, at):
        used.update(f"{at}.{n}" for n in (BN if norm == "batch" else BN[:2]))
        return apply_norm(x, state, at, norm)

    x = normed(conv(x, "conv1", padding=1), "bn1").relu()
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            down = stage > 1 and block == 0
            stride = 2 if down and not pooling else 1
            out = normed(conv(x, f"{at}.conv1", padding=1, stride=stride), f"{at}.bn1").relu()
            if down and pooling:
                out = F.avg_pool2d(out, 2)
            out = normed(conv(out, f"{at}.conv2", padding=1), f"{at}.bn2")
            if down:
                x = conv(x, f"{at}.shortcut.0", stride=stride)
                x = F.avg_pool2d(x, 2) if pooling else x
                x = normed(x, f"{at}.shortcut.{2 if pooling else 1}")
            x = (out + x).relu()
    assert x.shape == (2, 512, 4, 4)
    assert used | {"classifier.weight", "classifier.bias"} == set(state)
    x = x.flatten(1) if pooling else x.mean((2, 3))
    with torch.no_grad():
        embedded = model.embed(images())
        torch.testing.assert_close(embedded / x.abs().max(), x / x.abs().max(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_28x28_single_channel(name):
    """The first convolution pads to 32; ResNet18BN_AP does not and keeps 3x3."""
    size = (published_side(name) - 4,) * 2
    model = on_paper(name, 1, 10, size)
    colour = on_paper(name).num_features
    assert model.num_features == (512 * 9 if name == "ResNet18BN_AP" else colour)
    assert model.embed(paper_images(1, size)).shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("ConvNet", (16, 16), 128 * 4),
        ("ConvNet", (96, 64), 128 * 12 * 8),
        ("ConvNet", (28, 28), 128 * 9),
        ("ConvNetD5", (64, 64), 128 * 4),
        ("ConvNetLN", (20, 16), 128 * 4),
        ("ConvNetNP", (16, 16), 128 * 256),
        ("MLP", (64, 32), 128),
        ("LeNet", (64, 48), 84),
        ("AlexNet", (16, 16), 192 * 4),
        ("VGG11", (64, 96), 512 * 6),
        ("ResNet18", (64, 64), 512 * 4),
        ("ResNet18", (28, 28), 512),
        ("ResNet18BN", (16, 16), 512),
        ("ResNet18BN", (16, 64), 512 * 2),
        ("ResNet18BN", (48, 48), 512),  # 6x6 map: AvgPool 4 leaves one value
        ("ResNet18BN_AP", (16, 16), 512 * 4),
    ],
)
def test_other_sizes(name, size, features):
    model = on_paper(name, 3, 10, size)
    assert model.num_features == features
    embedded = model.embed(paper_images(3, size))
    assert embedded.shape == (2, features) and model.head(embedded).shape == (2, 10)


@pytest.mark.parametrize("name", ["ConvNet", "AlexNet", "VGG11", "LeNet", "ResNet18", "ConvNetLN"])
def test_single_channel_of_other_sizes(name):
    model = on_paper(name, 1, 10, (32, 32))
    assert model(paper_images(1, (32, 32))).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "channel", "size", "smallest"),
    [
        ("ConvNetD5", 3, (16, 16), 32),
        ("ConvNetD5", 1, (16, 16), 28),
        ("ConvNetD6", 3, (32, 32), 64),
        ("ConvNet", 3, (32, 7), 8),
        ("ConvNetNP", 3, (1, 1), 2),
        ("VGG11", 3, (16, 16), 32),
        ("VGG11BN", 3, (28, 28), 32),
        ("AlexNet", 3, (4, 4), 8),
        ("LeNet", 3, (14, 14), 16),
        ("ResNet18", 3, (8, 8), 9),
        ("ResNet18BN_AP", 3, (7, 7), 8),
        ("MLP", 3, (0, 4), 1),
    ],
)
def test_too_small(name, channel, size, smallest):
    message = rf"^{name} .*{size[0]}x{size[1]}.*{smallest}x{smallest}$"
    with pytest.raises(UserError, match=message):
        get_network(name, channel, 10, size)
    model = on_paper(name, channel, 10, (smallest, smallest))
    assert model(paper_images(channel, (smallest, smallest))).shape == (2, 10)


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(UserError, match="unknown network 'convnet'; valid: AlexNet, ") as caught:
        get_network("convnet", 3, 10)
    assert all(name in str(caught.value) for name in NETWORKS)
