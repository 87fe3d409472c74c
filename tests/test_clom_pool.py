"""Pre-trained models: where they are found, how they are fed, that they stay as they are."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU

from clom.config import DistillFlags, pair_pool
from clom.loss import CLoM
from clom.pool import Teacher, load_foundation, load_networks
from data.space import Space, convert
from data.specs import DC_SPECS, Stats
from models import get_network
from utils import checkpoint
from utils.errors import UserError

STATS = Stats((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GRAY = Stats((0.1307,), (0.3081,))
SMALL = Space(STATS, (8, 8))


def save_model(name, source="CIFAR10", index=0, epoch=5, channel=3, size=32):
    torch.manual_seed(index)
    model = get_network(name, channel, 10, (size, size))
    folder = f"pretrained_model/{source}/original/{name}/index_{index}"
    checkpoint.save(model.state_dict(), f"{folder}/{source}_{name}_original_epoch{epoch}.pth")
    return model.eval()


def load(name="ConvNetD1", source="CIFAR10", given=None, count=1, stats="own", **more):
    if given is None:
        spec = DC_SPECS[source]
        size = spec.sizes[0]
        given = Space(spec.stats[size], (size, size))
    flags = DistillFlags(source_dataset=source, epoch=5, model_num=count, CLoM_teacher_stats=stats, **more)
    return load_networks(flags, name, given, CPU)


def test_found_models_are_the_saved_ones(workspace):
    saved = [save_model("ConvNetBN", index=i) for i in (0, 2, 10)]
    family, classes = load("ConvNetBN", count=3)
    assert classes == 10
    x = torch.randn(2, 3, 32, 32)
    for teacher, model in zip(family, saved, strict=True):
        torch.testing.assert_close(teacher(x), model(x))
        torch.testing.assert_close(teacher.embed(x), model.embed(x))


def test_too_few_models(workspace):
    for index in (0, 1):
        save_model("ConvNetD1", index=index)
    save_model("ConvNetD1", index=2, epoch=4)
    with pytest.raises(UserError) as caught:
        load(count=3)
    text = str(caught.value)
    for word in (
        "looked for 3 x pretrained_model/CIFAR10/original/ConvNetD1/index_*/"
        "CIFAR10_ConvNetD1_original_epoch5.pth and found 2",
        "index_2",
        "[4]",
        "--dataset CIFAR10 --model ConvNetD1 --num 1 --epochs 5",
    ):
        assert word in text, text
    with pytest.raises(UserError, match=r"found 0; there are: CIFAR10/original/ConvNetD1;"):
        load("ConvNetD2")
    # The command writes where it was looked for; another set than the distilled one has its own size.
    elsewhere = dict(pretrained_path=Path("elsewhere"), data_path=Path("sets"), img_size=16)
    program = "python train_original_models.py --normalize_data --dataset"
    for source, size in (("CIFAR10", " --img_size 16"), ("SVHN", "")):
        with pytest.raises(UserError, match="nothing in elsewhere") as caught:
            load(source=source, **elsewhere)
        flags = f"{source} --model ConvNetD1 --num 1 --epochs 5{size}"
        wanted = f"{program} {flags} --pretrained_path elsewhere --data_path sets"
        assert str(caught.value).endswith(wanted)


def test_damaged_models_are_named(workspace):
    save_model("ConvNetD1")
    path = "pretrained_model/CIFAR10/original/ConvNetD1/index_0/"
    path += "CIFAR10_ConvNetD1_original_epoch5.pth"
    checkpoint.save(get_network("ConvNetD2", 3, 10).state_dict(), path)
    with pytest.raises(UserError, match="does not fit"):
        load()
    with open(path, "w") as file:
        file.write("x")
    with pytest.raises(UserError, match="index_0"):
        load()


def test_alphas():
    def alphas(*values):
        pool = DistillFlags(models_pool=("ConvNet", "MLP"), alphas=values)
        return pair_pool(pool)

    assert alphas(3.0) == [("ConvNet", 3.0), ("MLP", 3.0)]
    assert alphas(3.0, 4.0) == [("ConvNet", 3.0), ("MLP", 4.0)]
    with pytest.raises(UserError, match="3 values for the 2 names"):
        alphas(1.0, 2.0, 3.0)


def test_teachers_do_not_drift_and_take_no_gradient(workspace):
    save_model("ConvNetBN")
    family, _ = load("ConvNetBN")
    x_real, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 10
    clom = CLoM([family[0].train()], real=(x_real, torch.arange(8)), batch_size=8)
    before = {k: v.clone() for k, v in family[0].state_dict().items()}
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    clom(x, y[:4]).backward()
    after = family[0].state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.grad is None and not p.requires_grad for p in family[0].parameters())
    assert x.grad.abs().sum() > 0


def test_convert_goes_through_pixels():
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (STATS.mean, STATS.std))
    x = (pixels - mean) / std
    other = Space(Stats((0.1, 0.2, 0.3), (1.0, 1.0, 2.0)), (8, 8))
    shift = torch.tensor([0.1, 0.2, 0.3]).double().view(1, 3, 1, 1)
    scale = torch.tensor([1.0, 1.0, 2.0]).double().view(1, 3, 1, 1)
    torch.testing.assert_close(convert(x, SMALL, other), (pixels - shift) / scale, rtol=0, atol=1e-6)
    assert convert(x, SMALL, SMALL) is x
    gray = convert(x, SMALL, Space(Stats((0.0,), (1.0,)), (8, 8)))
    torch.testing.assert_close(gray, pixels.mean(1, keepdim=True), rtol=0, atol=1e-6)
    back = convert(gray, Space(Stats((0.0,), (1.0,)), (8, 8)), SMALL)
    torch.testing.assert_close((back * std + mean)[:, 2:], gray, rtol=0, atol=1e-6)
    big = convert(x, SMALL, Space(STATS, (16, 16)))
    expected = F.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(big * std + mean, expected, rtol=0, atol=1e-6)
    small = Space(STATS, (2, 2))
    x = x[:1, :, :4, :4].clone().requires_grad_()
    from_4 = Space(STATS, (4, 4))
    assert torch.autograd.gradcheck(lambda v: convert(v, from_4, small), (x,))


def test_sources_of_another_size_and_channel_count(workspace):
    model = save_model("ConvNetD1", "MNIST", channel=1, size=28)
    family, _ = load(source="MNIST", given=SMALL)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    own = convert(x, SMALL, Space(GRAY, (28, 28)))
    torch.testing.assert_close(family[0](x), model(own))
    family[0](x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_images_in_the_statistics_of_the_source_or_of_the_target(workspace):
    """The released code gives models of another source the target's images as they are."""
    model, cifar = save_model("ConvNetD1", "SVHN"), DC_SPECS["CIFAR10"].stats[32]
    given, x = Space(cifar, (32, 32)), torch.randn(2, 3, 32, 32)
    own, target = (load(source="SVHN", given=given, stats=s)[0][0] for s in ("own", "target"))
    mean, std, to_mean, to_std = (
        torch.tensor(v).view(1, 3, 1, 1)
        for stats in (cifar, DC_SPECS["SVHN"].stats[32])
        for v in (stats.mean, stats.std)
    )
    moved = (x * std + mean - to_mean) / to_std
    for ask in ("embed", "forward"):
        expected, released = getattr(model, ask)(moved), getattr(model, ask)(x)
        torch.testing.assert_close(getattr(own, ask)(x), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(getattr(target, ask)(x), released)
        assert (expected - released).abs().max() > 0.01
    gray = save_model("ConvNetD1", "MNIST", channel=1, size=32)
    facts = {"img_shape": [1, 32, 32], "mean": GRAY.mean, "std": GRAY.std, "num_classes": 10}
    path = "pretrained_model/MNIST/original/ConvNetD1/index_0/config.json"
    checkpoint.write_text(path, json.dumps(facts))
    (target,) = load(source="MNIST", given=given, stats="target")[0]
    torch.testing.assert_close(target(x), gray(x.mean(1, keepdim=True)))


def test_config_beside_the_checkpoint_states_the_space(workspace):
    model = save_model("ConvNetD1", "mine", size=8)
    with pytest.raises(UserError, match="image size of mine is unknown"):
        load(source="mine", given=SMALL)
    facts = {"img_shape": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "num_classes": 10}
    path = "pretrained_model/mine/original/ConvNetD1/index_0/config.json"
    checkpoint.write_text(path, json.dumps(facts))
    family, classes = load(source="mine", given=SMALL)
    assert classes == 10
    x = torch.randn(2, 3, 8, 8)
    unit = Space(Stats((0.0,) * 3, (1.0,) * 3), (8, 8))
    torch.testing.assert_close(family[0](x), model(convert(x, SMALL, unit)))


def _vit(hf):
    return hf.ViTModel(hf.ViTConfig(**_TINY)), hf.ViTImageProcessor(size=dict(height=12, width=12))


def _dino(hf):
    processor = hf.BitImageProcessor(
        size={"shortest_edge": 14},
        crop_size=dict(height=12, width=12),
        do_center_crop=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return hf.Dinov2Model(hf.Dinov2Config(**_TINY)), processor


def _convnext(hf):
    config = hf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=12)
    return hf.ConvNextModel(config), hf.ConvNextImageProcessor(size={"shortest_edge": 12})


def _clip(hf):
    text = dict(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=20,
        max_position_embeddings=8,
    )
    config = hf.CLIPConfig(text_config=text, vision_config=_TINY, projection_dim=6)
    processor = hf.CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=dict(height=12, width=12))
    return hf.CLIPModel(config), processor


_TINY = dict(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    image_size=12,
    patch_size=4,
)


@pytest.mark.parametrize(
    ("make", "width"),
    [(_vit, 8), (_dino, 8), (_convnext, 8), (_clip, 6)],
    ids=["vit", "dinov2", "convnext", "clip"],
)
def test_foundation_models(workspace, make, width):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, processor = make(transformers)
    model.save_pretrained("foundation")
    processor.save_pretrained("foundation")
    teacher = load_foundation("hf:foundation", SMALL, CPU)
    assert isinstance(teacher, Teacher) and teacher.own.size == (12, 12)
    assert teacher.own.stats.mean == tuple(processor.image_mean)
    clom = CLoM(teacher, real=(torch.randn(6, 3, 8, 8), torch.arange(6) % 3), batch_size=6)
    x = torch.randn(3, 3, 8, 8, requires_grad=True)
    clom(x, torch.arange(3)).backward()
    assert x.grad.abs().sum() > 0 and torch.isfinite(x.grad).all()
    assert teacher.embed(x).shape == (3, width)
    own = convert(x, SMALL, teacher.own, {2: "bilinear", 3: "bicubic"}[int(processor.resample)])
    model.eval()
    ask = getattr(model, "get_image_features", model)
    out = ask(pixel_values=own)
    expected = out if isinstance(out, torch.Tensor) else out.pooler_output
    torch.testing.assert_close(teacher.embed(x), expected)


def save_foundation(model, size=12):
    import transformers

    model.save_pretrained("foundation")
    transformers.ViTImageProcessor(size=dict(height=size, width=size)).save_pretrained("foundation")


def load_features(x):
    """Features of two loads, between which the global random state differs."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        teacher = load_foundation("hf:foundation", SMALL, CPU)
        found.append(teacher.embed(x))
    return found


def test_features_hold_nothing_untrained_or_random(workspace):
    """A classifier's checkpoint has no pooler; a masked autoencoder would drop patches."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    classifier = hf.ViTForImageClassification(hf.ViTConfig(**_TINY)).eval()
    save_foundation(classifier)
    first, second = load_features(x)
    own = load_foundation("hf:foundation", SMALL, CPU).own
    expected = classifier.vit(convert(x, SMALL, own, "bilinear")).last_hidden_state[:, 0]
    torch.testing.assert_close(first, expected)
    assert torch.equal(first, second)
    for model in (hf.ViTMAEModel(hf.ViTMAEConfig(**_TINY)), hf.IJepaModel(hf.IJepaConfig(**_TINY))):
        save_foundation(model)
        first, second = load_features(x)
        assert torch.equal(first, second)
    tokens = model.eval()(convert(x, SMALL, own, "bilinear")).last_hidden_state
    torch.testing.assert_close(first, tokens.mean(1))  # no class token: all positions count
    state = torch.nn.Module.state_dict(model)
    model.save_pretrained("foundation", state_dict={k: state[k] for k in list(state)[1:]})
    with pytest.raises(UserError, match="hf:foundation: the checkpoint lacks 1 weights"):
        load_features(x)


def test_foundation_models_that_cannot_be_had(workspace):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"hf:\./nowhere: the folder nowhere does not exist"):
        load_foundation("hf:./nowhere", SMALL, CPU)
    (workspace / "empty").mkdir()
    with pytest.raises(UserError, match=r"hf:\./empty cannot be loaded"):
        load_foundation("hf:./empty", SMALL, CPU)
