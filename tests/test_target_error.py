"""The error of predicted target features and probes of the outputs, computed a second time."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_set
from test_transfer import SHARED, SHORT, cells, fails

import test as test_command
import test_scratch
from data.load import load_set
from data.synthetic import SyntheticSet
from evaluation.pretraining import Measurement
from evaluation.probe import feature_error
from evaluation.target import Representation
from evaluation.transfer import ScratchFlags, TestFlags, Transfer
from utils import checkpoint
from utils.seed import local_seed

NET = "convnet_4_8_bn"
ERROR = [*SHARED, "--target_model", NET, "--target_error", "--protocol", "linear"]


@pytest.fixture
def tiny(workspace):
    """A target model, and six real images with its features as the set."""
    write_set("datasets", "tiny")
    with local_seed(3):
        model = Representation(NET, (3, 8, 8)).eval()
    checkpoint.save(model.backbone.state_dict(), f"teacher_ckpt/barlow_twins_{NET}_tiny.pt")
    x = normalized("train")[:6]
    with torch.no_grad():
        SyntheticSet(x, model(x)).save(Path("synthetic_data/tiny/krr_st"))
    return model


def normalized(split):
    image_set = load_set("tiny", 8, "datasets")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image_set.stats.mean, image_set.stats.std))
    return (getattr(image_set, split).images.float() / 255 - mean) / std


def by_hand(network, target):
    """Plain loops over images and dimensions in float64."""
    with torch.no_grad():
        train = target(normalized("train")).double()
        test, predicted = target(normalized("test")).double(), network(normalized("test")).double()
    total, count = 0.0, 0
    for d in range(train.shape[1]):
        mean = sum(train[:, d].tolist()) / len(train)
        variance = sum((v - mean) ** 2 for v in train[:, d].tolist()) / len(train)
        if variance < 1e-12:
            continue
        for a, b in zip(predicted[:, d].tolist(), test[:, d].tolist(), strict=True):
            total, count = total + (a - b) ** 2 / variance, count + 1
    return total / count


def test_its_value(tiny):
    shared = dict(source_data_name="tiny", target_data_name="tiny", img_size=8, test_model=NET, device="cpu")
    flags = TestFlags(**shared, pre_epoch=40, pre_lr=0.02, method="krr_st")
    argv = [*ERROR, "--pre_epoch", "40", "--pre_lr", "0.02", "--num_test", "2"]
    assert test_command.main(argv) == 0
    transfer = Transfer(flags)
    found = [c for c in cells() if c["protocol"] == "target_error"]
    assert [c["seed"] for c in found] == [0, 1]
    for cell in found:
        network = transfer.backbone(cell["seed"], (3, 8, 8))
        assert cell["error"] == pytest.approx(by_hand(network, tiny), rel=1e-4)
        assert "accuracy" not in cell
    path = Path(f"test_log/tiny/krr_st/{NET}/linear/results.json")
    summary = json.loads(path.read_text())["summary"]
    assert [(s["protocol"], s["n"]) for s in summary] == [("linear", 2), ("target_error", 2)]
    assert summary[1]["mean"] == pytest.approx(sum(c["error"] for c in found) / 2)


def test_predicting_the_mean_gives_one():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(50, 7, generator=draw) * torch.arange(1, 8) + 3
    features[:, 2] = 4.0  # a constant dimension says nothing
    mean = features.mean(0).expand(50, 7).clone()
    assert feature_error(mean, features, features) == pytest.approx(1.0, rel=1e-5)
    assert feature_error(features, features, features) == 0
    mean[:, 2] = -100.0
    assert feature_error(mean, features, features) == pytest.approx(1.0, rel=1e-5)


def test_outputs_and_body_of_one_network(tiny, capsys):
    argv = [*ERROR, *SHORT, "--shots", "2_all", "--probe_on", "both"]
    assert test_command.main(argv) == 0
    printed = capsys.readouterr().out
    for heading in ("| 2 labels per class |", "| outputs, all labels |", "| error of target features |"):
        assert heading in " ".join(printed.split())
    found = [(c["protocol"], c["shots"], c.get("probe_on")) for c in cells()]
    assert found == [
        ("linear", "2", None),
        ("linear", "all", None),
        ("linear", "2", "outputs"),
        ("linear", "all", "outputs"),
        ("target_error", "all", "outputs"),
    ]
    # Asked for alone, each of them is the same cell.
    alone = [*SHARED, *SHORT, "--protocol", "linear"]
    assert test_command.main([*alone, "--shots", "2_all"]) == 0
    assert test_command.main([*alone, "--shots", "2_all", "--probe_on", "outputs"]) == 0
    assert len(cells()) == 5


def test_a_network_that_is_not_pretrained(tiny):
    assert test_scratch.main([*SHARED, "--protocol", "linear"]) == 0
    more = [*SHARED, "--target_model", NET, "--protocol", "linear", "--log_dir", "more"]
    assert test_scratch.main([*more, "--target_error", "--probe_on", "both"]) == 0
    body, _, error = map(json.loads, Path("more/results.jsonl").read_text().splitlines())
    assert body["accuracy"] == cells()[0]["accuracy"]  # the wider head changes nothing below it
    untrained = Measurement(ScratchFlags(source_data_name="tiny", img_size=8, test_model=NET, device="cpu"))
    untrained.width = 8
    network = untrained.backbone(0, (3, 8, 8))
    assert error["error"] == pytest.approx(by_hand(network, tiny), rel=1e-4)


def test_what_cannot_be_measured(tiny, capsys):
    fails(capsys, test_command, [*SHARED, "--probe_on", "outputs"], "--probe_on", "linear")
    SyntheticSet(torch.zeros(6, 3, 8, 8), torch.zeros(6, 5)).save("synthetic_data/tiny/krr_st")
    fails(capsys, test_command, ERROR, "--target_error", "5 outputs", "8 features", NET)
    labels = torch.arange(6) % 4
    SyntheticSet(torch.zeros(6, 3, 8, 8), labels).save("synthetic_data/tiny/random")
    fails(capsys, test_command, [*ERROR, "--method", "random"], "--target_error", "class labels")
    Path(f"teacher_ckpt/barlow_twins_{NET}_tiny.pt").unlink()
    fails(capsys, test_scratch, ERROR, "barlow_twins", "python -m krr_st.target --data_name tiny")
