"""Encoders pre-trained on a set: what is written is what test.py trains, and loads without running code."""

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import NET, SHAPE, write_set
from test_cli import fails

from data.augment import normalize
from data.load import load_set
from data.specs import Stats
from data.synthetic import SyntheticSet, TrainingSettings
from data.synthetic.__main__ import main as convert
from data.target_scale import TargetScale
from data.whitening import Whitening
from evaluation import export
from evaluation.export import load_encoder
from evaluation.transfer import TestFlags as Flags
from evaluation.transfer import Transfer
from utils.errors import UserError

STATS = Stats((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
ARGV = [
    *("--source_data_name", "tiny", "--img_size", "8", "--test_model", NET, "--device", "cpu"),
    *("--synthetic_path", "set", "--pre_epoch", "2", "--seed", "3"),
]


@pytest.fixture
def made(workspace):
    """A set of features that is whitened and learned standardised: the hardest case."""
    write_set("datasets", "tiny")
    x = normalize(load_set("tiny", 8, "datasets").train.images[:10], STATS)
    y = 3 * torch.randn(10, 5, generator=torch.Generator().manual_seed(0)) + 1
    whitening = Whitening.fit(torch.rand(20, *SHAPE), STATS, torch.device("cpu"))
    training = TrainingSettings(whitening=whitening, targets=TargetScale(y.mean(0), y.std(0)))
    SyntheticSet(x, y, STATS, "tiny", training=training).save("set")
    return workspace


def test_what_is_loaded_is_what_test_py_trains(made, capsys):
    assert export.main([*ARGV, "--out", "encoder"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    found = {}
    exec(line, found)  # the line that the command prints
    encoder = found["encoder"]
    flags = dict(source_data_name="tiny", img_size=8, test_model=NET, device="cpu", pre_epoch=2)
    transfer = Transfer(Flags(**flags, synthetic_path=Path("set"), target_data_name="tiny"))
    backbone = transfer.backbone(3, SHAPE)
    pixels = torch.randint(256, (4, *SHAPE), dtype=torch.uint8)
    with torch.no_grad():
        x = normalize(pixels, STATS)
        for given in (pixels, pixels.float() / 255):
            torch.testing.assert_close(encoder(given), backbone.embed(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(encoder.outputs(given), backbone(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(encoder(pixels), load_encoder("encoder")(pixels))
    assert encoder.num_features == encoder(pixels).shape[1] and not encoder.training
    with pytest.raises(ValueError, match=r"expected \(3, 8, 8\)"):
        encoder(torch.zeros(1, 3, 16, 16))
    config = json.loads(Path("encoder/config.json").read_text())
    assert (config["seed"], config["source"], config["mean"]) == (3, "tiny", list(STATS.mean))
    assert config["pretraining"]["epochs"] == 2 and len(config["synthetic_set"]) == 16


def test_bad_flags_are_one_line_and_write_nothing(made, capsys):
    fails(capsys, export, [*ARGV, "--method", "dm"], "set holds float vectors", "class indices")
    synthetic = SyntheticSet.load("set")
    SyntheticSet(synthetic.images, synthetic.targets).save("bare")
    bare = [{"set": "bare"}.get(word, word) for word in ARGV]
    fails(capsys, export, bare, "mean and std", "convert SET NEW --form pair --data_name tiny")
    assert convert(["convert", "bare", "full", "--form", "pair", "--data_name", "tiny"]) == 0
    full = [{"set": "full"}.get(word, word) for word in ARGV]
    assert export.main([*full, "--out", "other"]) == 0
    assert export.main([*ARGV, "--dry_run"]) == 0 and not Path("encoder").exists()
    assert export.main(ARGV) == 0
    fails(capsys, export, ARGV, "encoder", "--overwrite")
    assert export.main([*ARGV, "--overwrite"]) == 0
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    fails(
        capsys, export, [*ARGV, "--out", "run", "--overwrite"], "run holds a run or another program's files"
    )
    assert Path("run/config.json").read_text() == "{}"


def test_damaged_encoders_are_one_line(made):
    assert export.main([*ARGV, "--out", "encoder"]) == 0
    weights, config = Path("encoder/model.safetensors"), Path("encoder/config.json")
    whole, facts = weights.read_bytes(), json.loads(config.read_text())

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            load_encoder("encoder")
        assert "encoder" in str(error.value) and "\n" not in str(error.value)

    for change, message in (
        ({"version": 2}, "version 1"),
        ({"model": "convnet_400000_400000_bn"}, "values, model.safetensors holds"),
        ({"model": "convnet_999999999999999999_bn"}, "config.json"),
        ({"model": "os.system"}, "unknown model"),
        ({"img_shape": [3, 8]}, "does not describe an encoder"),
        ({"img_shape": [3, 8, 1e9]}, "does not describe an encoder"),
        ({"img_shape": [1, 8, 8]}, "do not fit images of 1 channels"),
        ({"img_shape": [3, 4, 4]}, "whitening does not fit"),
        ({"num_outputs": True}, "does not describe an encoder"),
        ({"num_outputs": 6}, "values, model.safetensors holds"),
        ({"dropout": 2}, "dropout"),
        ({"std": [0, 0, 0]}, "std above 0"),
        ({"mean": None}, "does not describe an encoder"),
    ):
        config.write_text(json.dumps(facts | change))
        refused(message)
    config.write_text(json.dumps(facts))
    tensors = safetensors.torch.load(whole)
    name = next(key for key in tensors if key.endswith("fc.weight"))
    for changed, message in (
        ({name: tensors[name] * torch.inf}, "NaN or infinity"),
        ({name: tensors[name].T.contiguous()}, r"fc.weight is"),
        ({"whitening.matrix": torch.zeros(2, 2)}, "whitening does not fit"),
    ):
        weights.write_bytes(safetensors.torch.save(tensors | changed))
        refused(message)
    for content in (whole[:-5], b"", pickle.dumps(print)):
        weights.write_bytes(content)
        refused("truncated or not a safetensors file")
    weights.unlink()
    refused("model.safetensors does not exist")
