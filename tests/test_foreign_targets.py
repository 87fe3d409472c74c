"""Target models from transformers and torchvision, and the public Barlow Twins layout."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers
from conftest import write_set

import train
from data.load import load_set
from data.specs import Stats
from evaluation.presets import resolve_preset
from evaluation.target import Representation, load_target, resolve_checkpoint
from krr_st import baselines
from models.foundation import IMAGENET
from utils import checkpoint
from utils.errors import UserError

CPU, SHAPE = torch.device("cpu"), (3, 8, 8)
STATS = Stats((0.3, 0.4, 0.5), (0.2, 0.25, 0.3))
OWN = Stats((0.4, 0.5, 0.6), (0.3, 0.2, 0.1))
LAYERS = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
SMALL = LAYERS | dict(image_size=16, patch_size=8)
PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "resample": 2},
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 20},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 20},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 24, "width": 24},
    },
    "convnext": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 32},
        "resample": 2,
    },
}
PROCESSORS["swin"] = PROCESSORS["mae"] = PROCESSORS["vit"]
PROCESSORS["resnet"] = PROCESSORS["convnext"]
MODES = {2: "bilinear", 3: "bicubic"}
SIDES = {"vit": 16, "clip": 16, "dinov2": 24, "convnext": 32, "swin": 16, "mae": 16, "resnet": 32}


def build(kind):
    """A tiny network of random weights."""
    torch.manual_seed(0)
    if kind == "clip":
        vision = dict(SMALL, intermediate_size=16)
        text = LAYERS | dict(intermediate_size=16, vocab_size=20, bos_token_id=0, eos_token_id=1)
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=4)
        return transformers.CLIPModel(config).eval()
    if kind == "vit":  # without the pooler, as many checkpoints are
        config = transformers.ViTConfig(**SMALL, intermediate_size=16)
        return transformers.ViTModel(config, add_pooling_layer=False).eval()
    if kind == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=1)).eval()
    if kind == "swin":
        config = transformers.SwinConfig(
            image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
        )
        return transformers.SwinModel(config).eval()
    if kind == "mae":
        config = transformers.ViTMAEConfig(**SMALL, intermediate_size=16)
        return transformers.ViTMAEModel(config).eval()
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1])
        return transformers.ResNetModel(config).eval()
    config = transformers.ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1])
    return transformers.ConvNextModel(config).eval()


def expected(kind, network, x):
    """The features by hand, of images already normalised with the network's values."""
    if kind == "clip":
        return network.visual_projection(network.vision_model(pixel_values=x).pooler_output)
    if kind == "mae":  # all patches, in a random order: attention does not mind
        network.config.mask_ratio = 0.0
    hidden = network(pixel_values=x).last_hidden_state
    if kind in ("convnext", "resnet"):
        mean = hidden.mean((2, 3))
        return network.layernorm(mean) if kind == "convnext" else mean
    return hidden.mean(1) if kind == "swin" else hidden[:, 0]


def save(kind, folder):
    network = build(kind)
    network.save_pretrained(folder)
    assert (folder / "model.safetensors").exists()
    own = {"image_mean": OWN.mean, "image_std": OWN.std, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSORS[kind], **own}))
    return network


def rows(values):
    return torch.tensor(values).view(1, 3, 1, 1)


def prepared(x, side, own, mode="bilinear"):
    pixels = x * rows(STATS.std) + rows(STATS.mean)
    pixels = F.interpolate(pixels, (side, side), mode=mode, antialias=True)
    return (pixels - rows(own.mean)) / rows(own.std)


def load(name, path=None, shape=SHAPE, stats=STATS):
    images = SimpleNamespace(img_shape=shape, stats=stats)
    return load_target(name, path, images, CPU, data_name="tiny", data_dir=Path("datasets"))


@pytest.mark.parametrize("kind", PROCESSORS)
def test_transformers_networks(kind, tmp_path):
    network, x = save(kind, tmp_path), torch.randn(3, *SHAPE)
    target, mode = load(f"hf:{tmp_path}"), MODES[PROCESSORS[kind]["resample"]]
    with torch.no_grad():
        got, wanted = target(x), expected(kind, network, prepared(x, SIDES[kind], OWN, mode))
    assert got.shape == (3, target.dim) and torch.allclose(got, wanted, atol=1e-5)
    assert not torch.allclose(got[0], got[1], atol=1e-4)
    with torch.no_grad():
        assert torch.equal(target(x), got)
    assert not target.training and not any(p.requires_grad for p in target.parameters())
    assert not any(part.training for part in target.modules())


def test_image_tower_alone_without_a_processor(tmp_path, capsys):
    network = build("clip")
    tower = transformers.CLIPVisionModel(network.config.vision_config).eval()
    tower.save_pretrained(tmp_path)
    x = torch.randn(2, *SHAPE)
    target = load(f"hf:{tmp_path}")  # ImageNet's values, the network's size
    assert "ImageNet" in capsys.readouterr().out
    with torch.no_grad():
        wanted = tower(pixel_values=prepared(x, 16, Stats(*IMAGENET), "bicubic")).pooler_output
        assert torch.allclose(target(x), wanted, atol=1e-5)


RESCALING = [
    ({"rescale_factor": 1 / 127.5}, Stats((0.2, 0.25, 0.3), (0.15, 0.1, 0.05))),
    ({"do_normalize": False}, Stats((0.0,) * 3, (1.0,) * 3)),
]


@pytest.mark.parametrize(("change", "own"), RESCALING)
def test_rescaling_of_the_processor(tmp_path, change, own):
    network, x = save("vit", tmp_path), torch.randn(2, *SHAPE)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with torch.no_grad():
        wanted = expected("vit", network, prepared(x, 16, own))
        assert torch.allclose(load(f"hf:{tmp_path}")(x), wanted, atol=1e-4)


def test_grey_images_and_gradients(tmp_path):
    save("vit", tmp_path)
    grey = load(f"hf:{tmp_path}", shape=(1, 8, 8), stats=Stats((0.5,), (0.25,)))
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    colour = load(f"hf:{tmp_path}", stats=Stats((0.5,) * 3, (0.25,) * 3))
    assert torch.allclose(grey(x), colour(x.expand(-1, 3, -1, -1)), atol=1e-6)
    grey(x)[:, 0].sum().backward()  # all of them always sum to zero after a LayerNorm
    assert x.grad.abs().sum() > 1e-3


def test_networks_of_one_channel(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, intermediate_size=16, num_channels=1)
    network = transformers.ViTModel(config, add_pooling_layer=False).eval()
    network.save_pretrained(tmp_path)
    own = {"image_mean": [0.4], "image_std": [0.3], **PROCESSORS["vit"]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    grey, x = load(f"hf:{tmp_path}", shape=(1, 16, 16), stats=Stats((0.5,), (0.25,))), draw_grey()
    with torch.no_grad():
        wanted = network(pixel_values=(x * 0.25 + 0.5 - 0.4) / 0.3).last_hidden_state[:, 0]
        assert torch.allclose(grey(x), wanted, atol=1e-5)


def draw_grey():
    return torch.randn(2, 1, 16, 16)


def test_masked_pretraining_is_not_taken_for_a_masked_autoencoder(tmp_path):
    torch.manual_seed(0)
    config = transformers.HieraConfig(
        image_size=[32, 32],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 1],
        masked_unit_size=[2, 2],
        query_stride=[2, 2],
        num_query_pool=1,
    )
    transformers.HieraModel(config).save_pretrained(tmp_path)
    assert load(f"hf:{tmp_path}")(torch.randn(3, *SHAPE)).shape == (3, 16)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_checkpoints_run_no_code(workspace):
    save("vit", workspace / "m")
    (workspace / "m" / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, workspace / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="hf:m cannot be loaded"):
        load("hf:m")
    (workspace / "m" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(), 2))
    with pytest.raises(UserError, match="hf:m cannot be loaded"):
        load("hf:m")
    config = json.loads((workspace / "m/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (workspace / "m/config.json").write_text(json.dumps(config))
    (workspace / "m/evil.py").write_text("open('exploded', 'w')")
    with pytest.raises(UserError, match="hf:m cannot be loaded"):
        load("hf:m")
    assert not (workspace / "exploded").exists()


def test_pickled_weights_that_are_plain_tensors_load(workspace):
    network, x = save("vit", workspace / "m"), torch.randn(2, *SHAPE)
    (workspace / "m" / "model.safetensors").unlink()
    torch.save(network.state_dict(), workspace / "m" / "pytorch_model.bin")
    with torch.no_grad():
        wanted = expected("vit", network, prepared(x, 16, OWN))
        assert torch.allclose(load("hf:m")(x), wanted, atol=1e-5)


def test_missing_weights_are_an_error(workspace):
    network = save("vit", workspace / "m")
    state = {k: v for k, v in network.state_dict().items() if "layernorm" not in k}
    network.save_pretrained("m", state_dict=state)
    with pytest.raises(UserError, match=r"hf:m: the checkpoint lacks \d+ weights, such as .*layernorm"):
        load("hf:m")


def test_broken_weights_and_processors_are_one_line(workspace):
    network = save("vit", workspace / "m")
    path, whole = Path("m/preprocessor_config.json"), network.state_dict()
    given = json.loads(path.read_text())
    for value in (0.5, None, ["a", "b", "c"], [0.5, 0.5], [0.5, 0.5, float("nan")]):
        path.write_text(json.dumps({**given, "image_mean": value}))
        with pytest.raises(UserError, match="hf:m: its image processor has image_mean") as error:
            load("hf:m")
        shown = tuple(value) if isinstance(value, list) else value
        assert f"image_mean {shown}, image_std" in str(error.value)
    for change in ({"image_std": [0, 0.5, 0.5]}, {"rescale_factor": 0}, {"rescale_factor": None}):
        path.write_text(json.dumps({**given, **change}))
        with pytest.raises(UserError, match=r"hf:m: its image processor has .* rescale_factor"):
            load("hf:m")
    path.write_text(json.dumps(given))
    network.save_pretrained("m", state_dict={k: v * torch.nan for k, v in whole.items()})
    with pytest.raises(UserError, match="hf:m: its features are not finite"):
        load("hf:m")
    with pytest.raises(UserError, match="followed by a folder or a name"):
        load("hf:")  # not this folder


def test_torchvision_state_that_needs_more_than_tensors(tmp_path):
    state = torchvision.models.mnasnet0_5().state_dict()
    checkpoint.save(dict(state), tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"net\.pt cannot be put into torchvision:mnasnet0_5"):
        load("torchvision:mnasnet0_5", tmp_path / "net.pt")


def test_networks_that_do_not_take_images(workspace):
    config = transformers.BertConfig(**LAYERS, intermediate_size=16, vocab_size=20)
    transformers.BertModel(config).save_pretrained("bert")
    with pytest.raises(UserError, match="hf:bert cannot take images"):
        load("hf:bert")


def test_only_names_that_are_no_folders_ask_the_hub(workspace, monkeypatch):
    def offline(name, **kwargs):
        assert kwargs["trust_remote_code"] is False
        assert kwargs["local_files_only"] is (name == "folder")
        raise OSError("We couldn't connect to the hub\nand a page of advice")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", offline)
    with pytest.raises(UserError, match=r"hf:some/vit cannot be .*couldn't connect") as error:
        load("hf:some/vit")
    assert "\n" not in str(error.value) and "advice" not in str(error.value)
    Path("folder").mkdir()
    with pytest.raises(UserError, match="hf:folder"):
        load("hf:folder")


def test_torchvision_from_a_state_dict_or_the_net(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=7).eval()  # the head is another one
    path, x = tmp_path / "net.pt", torch.randn(2, *SHAPE)
    checkpoint.save(network.state_dict(), path)
    target = load("torchvision:resnet18", path)
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(target(x), network(prepared(x, 224, Stats(*IMAGENET))), atol=1e-4)
    assert target.dim == 512 and not target.training
    state = {k: v for k, v in network.state_dict().items() if k != "layer1.0.conv1.weight"}
    checkpoint.save(state, path)
    with pytest.raises(UserError, match=r"net\.pt does not fit .*missing layer1\.0\.conv1"):
        load("torchvision:resnet18", path)

    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"torchvision:resnet18 cannot be fetched.*no route"):
        load("torchvision:resnet18")


def test_resnet50_reads_the_public_barlow_twins_layout(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet50().eval()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    checkpoint.save(state, tmp_path / "resnet50.pth")
    target = load("resnet50", tmp_path / "resnet50.pth", (3, 64, 64))
    assert Representation("resnet50", (3, 64, 64)).backbone.state_dict().keys() == state.keys()
    network.fc, x = torch.nn.Identity(), torch.randn(1, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():  # BatchNorm is folded into the convolutions in float32
        assert torch.allclose(target.double()(x), network.double()(x), rtol=1e-5, atol=1e-4)
    assert target.dim == 2048


def test_default_target_by_data_name(workspace, capsys):
    for size in (None, 64):
        assert resolve_preset("imagenette", Path("datasets"), size).target_model == "resnet50"
    assert train.main(["--data_name", "imagenette", "--device", "cpu", "--dry_run"]) == 0
    assert '"teacher_ckpt/barlow_twins_resnet50_imagenette.pt"' in capsys.readouterr().out
    assert train.main(["--data_name", "cifar100", "--device", "cpu", "--dry_run"]) == 0
    assert '"target_model": "resnet18"' in capsys.readouterr().out
    assert resolve_checkpoint("hf:a/b", None, "tiny") is None
    assert resolve_checkpoint("hf:a", Path("x"), "tiny") == Path("x")
    with pytest.raises(UserError, match="--target_ckpt x"):
        load("hf:a", Path("x"))


def test_train_and_baselines_with_a_foreign_target(workspace):
    write_set("datasets", "tiny")
    save("dinov2", workspace / "m")
    shared = [
        "--data_name",
        "tiny",
        "--img_size",
        "8",
        "--device",
        "cpu",
        "--seed",
        "0",
        "--num_images",
        "6",
        "--target_model",
        "hf:m",
    ]
    small = "--train_model convnet_4_8_bn --num_models 1 --outer_iteration 2 --outer_batch_size 8"
    argv = [*shared, *small.split(), "--pre_epoch", "1", "--test_iteration", "1"]
    assert train.main(argv) == 0
    assert torch.load("results/tiny/y_syn.pt").shape == (6, 16)
    assert baselines.main([*shared, "--method", "random_features"]) == 0
    folder = Path("synthetic_data/tiny/random_features")
    x, y = torch.load(folder / "x_syn.pt"), torch.load(folder / "y_syn.pt")
    target = load("hf:m", stats=load_set("tiny", 8).stats)
    with torch.no_grad():
        assert torch.allclose(target(x), y, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:vit", ("timm", "hf, torchvision")),
        ("hf:./nowhere", ("hf:./nowhere", "does not exist")),
        ("hf:empty", ("hf:empty", "cannot be loaded")),
        ("torchvision:resnet19", ("resnet19", "resnet18, resnet34")),
        ("torchvision:squeezenet1_0", ("squeezenet1_0", "no linear layer")),
    ],
)
def test_errors_are_one_line_and_exit_2(workspace, capsys, monkeypatch, name, words):
    write_set("datasets", "tiny")
    Path("empty").mkdir()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda *a, **k: torchvision.models.squeezenet1_0().state_dict(),
    )
    argv = ["--data_name", "tiny", "--img_size", "8", "--device", "cpu", "--num_images", "6"]
    assert train.main([*argv, "--target_model", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and all(word in line for word in words), line
    assert not Path("results").exists()
