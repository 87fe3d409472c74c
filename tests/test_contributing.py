"""The worked examples of CONTRIBUTING.md, executed: each says all the steps there are."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import write_set

import train
from clom import tables
from data.load import load_set
from data.specs import KRR_SPECS
from evaluation import recipes
from methods import METHODS
from models import get_model, registry

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()
TABLES = (KRR_SPECS, registry.MODELS, METHODS, recipes.PRETRAIN)
TINY = [
    "--method",
    "pixel_mean",
    "--dataset",
    "tiny",
    "--model",
    "ConvNetD1",
    "--ipc",
    "1",
    "--batch_real",
    "8",
    "--num_eval",
    "1",
    "--epoch_eval_train",
    "1",
    "--device",
    "cpu",
    "--seed",
    "0",
    "--save_every",
    "1",
]


@pytest.fixture
def examples(workspace):
    """Run every example; the tables they add to are put back afterwards."""
    before = [dict(table) for table in TABLES]
    space = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(compile(block, "CONTRIBUTING.md", "exec"), space)
    yield space
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.update(content)


def test_data_set(examples):
    write_set("datasets", "leaves", size=32, train=20, test=4)
    image_set = load_set("leaves", 32, "datasets")
    assert image_set.stats.mean == (0.42, 0.47, 0.33) and image_set.num_classes == 4


def test_network(examples):
    model = get_model("patchify", (3, 32, 32), 5, 0.1)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 5) and model.embed(x).shape == (2, model.num_features)


def result(folder):
    return torch.load(Path(folder) / "res_PIXEL_MEAN_tiny_ConvNetD1_1ipc.pt", weights_only=True)


def test_method_appears_runs_and_resumes(examples, monkeypatch, capsys):
    write_set("datasets", "tiny")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert re.search(r"pixel_mean +mean pixels per class", capsys.readouterr().out)
    run = [*TINY, "--outer_iteration", "4"]
    assert train.main([*run, "--exp_name", "whole"]) == 0
    kind, calls = examples["PixelMean"], []
    step = kind.step

    def fragile(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "step", fragile)
        assert train.main([*run, "--exp_name", "parts"]) == 130
    assert train.main([*run, "--exp_name", "parts"]) == 0
    assert "resuming after iteration 2 of 4" in capsys.readouterr().out
    whole, parts = result("results/whole"), result("results/parts")
    assert torch.equal(whole["data"][0][0], parts["data"][0][0])
    assert whole["accs_all_exps"] == parts["accs_all_exps"]
    log = [json.loads(line) for line in Path("results/whole/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] or len(losses) == 1


def test_method_fills_a_row_of_the_table(examples):
    write_set("datasets", "tiny")
    argv = [
        "--run",
        "--datasets",
        "tiny",
        "--ipcs",
        "1",
        "--methods",
        "PIXEL_MEAN",
        "--variants",
        "none",
        "--num_exp",
        "1",
        "--model",
        "ConvNetD1",
        "--Iteration",
        "2",
        "--num_eval",
        "1",
        "--epoch_eval_train",
        "1",
        "--batch_real",
        "8",
        "--device",
        "cpu",
    ]
    assert tables.main(argv) == 0
    table = Path("test_log/clom/table.md").read_text()
    assert re.search(r"\| PIXEL_MEAN +\| +\d+\.\d\d", table)
