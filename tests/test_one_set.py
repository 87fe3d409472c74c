"""Runs of one set with classes as labels, and what goes wrong before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from conftest import NET, read_log, write_set
from test_cli import fails

import train
from distillation.base import Distiller
from distillation.one_set import ClassFlags, SetSetup
from distillation.run import Method
from evaluation.recipes import PRETRAIN
from methods import METHODS
from utils import checkpoint

ARGV = (
    f"--method mean --data_name tiny --img_size 8 --device cpu --seed 4 --train_model {NET} "
    "--outer_iteration 4 --eval_every 2 --print_every 2 --save_every 2 --pre_epoch 1 --num_eval 2"
).split()


class Mean(Distiller):
    """Each image moves to the mean image of its class."""

    parts = ()

    def __init__(self, problem, flags):
        super().__init__(problem, flags)
        ipc = flags.num_images // problem.real.num_classes
        self.x_syn, self.y_syn = problem.start_by_class(ipc, flags.init)
        real = problem.real
        self.mean = torch.stack([real.at(index).mean(0) for index in real.index_of_class])

    def rate(self):
        return 0.5

    def step(self):
        gap = self.mean[self.y_syn] - self.x_syn
        self.x_syn += 0.5 * gap
        return {"loss": gap.square().mean()}


@pytest.fixture
def mean(workspace, monkeypatch):
    monkeypatch.setitem(METHODS, "mean", Method("MEAN", Mean, SetSetup, ClassFlags, "class means, for tests"))
    monkeypatch.setitem(PRETRAIN, "mean", PRETRAIN["dm"])
    write_set("datasets", "tiny", train=32, test=8)
    return workspace


def test_a_run_with_classes_writes_the_pair_and_is_judged_by_networks(mean, capsys):
    assert train.main([*ARGV, "--num_images", "8", "--exp_name", "a"]) == 0
    folder = Path("results/a")
    x, y = (checkpoint.load(folder / f"{name}_syn.pt") for name in "xy")
    assert x.shape == (8, 3, 8, 8) and y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    tested = [e for e in read_log(folder) if "test_accuracy" in e]
    assert [e["step"] for e in tested] == [2, 4]
    assert all(len(e["test_accuracy"]) == 2 and min(e["test_accuracy"]) >= 0 for e in tested)
    assert json.loads((folder / "results.json").read_text())["evaluations"] == tested
    assert (folder / "x_syn.png").exists() and (folder / "curves.png").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["data_name"] == "tiny" and config["flags"]["test_model"] == NET


def test_the_number_of_images_is_a_multiple_of_the_classes(mean, capsys):
    assert train.main([*ARGV, "--dry_run"]) == 0
    assert '"num_images": 100,' in capsys.readouterr().out  # of 16 pixels, four classes
    write_set("datasets", "seven", train=35, classes=7)
    assert train.main([*ARGV, "--data_name", "seven", "--dry_run"]) == 0
    assert '"num_images": 98,' in capsys.readouterr().out
    fails(capsys, train, [*ARGV, "--num_images", "6"], "--num_images 6", "multiple of the 4 classes", "tiny")
    fails(capsys, train, [*ARGV, "--num_images", "400"], "--num_images 400", "32 images")
    fails(capsys, train, [*ARGV, "--num_images", "8", "--pre_dsa", "magic"], "magic", "color")
    fails(capsys, train, [*ARGV, "--num_images", "8", "--recipe", "short"], "--recipe")
    fails(capsys, train, [*ARGV, "--target_model", NET], "--target_model")


def test_without_labels_it_says_so(mean, capsys):
    write_set("datasets", "bare", labelled=False)
    fails(capsys, train, [*ARGV, "--data_name", "bare"], "bare", "no labels", "MEAN", "krr_st")
    (write_set("datasets", "half") / "Y_te_8.pth").unlink()
    fails(capsys, train, [*ARGV, "--data_name", "half", "--num_images", "8"], "half", "labels in each split")
    fails(capsys, train, [*ARGV, "--img_size", "12"], "X_tr_12.pth", "does not exist")
    assert not Path("results").exists()


def test_a_run_is_the_same_wherever_its_files_lie(mean, capsys):
    """Data and folders may move; what the data are is checked by their fingerprint."""
    argv = [*ARGV, "--num_images", "8", "--exp_name", "a"]
    assert train.main(argv) == 0
    config = Path("results/a/config.json")
    kept = json.loads(config.read_text())
    kept["flags"] |= {"data_dir": "datasets", "save_dir": "results", "exp_name": "a"}  # as older versions do
    config.write_text(json.dumps(kept))
    Path("datasets").rename("elsewhere")
    Path("results").rename("moved")
    capsys.readouterr()
    moved = [*argv, "--data_dir", str(Path("elsewhere").resolve()), "--save_dir", "moved"]
    assert train.main(moved) == 0 and "holds the finished run" in capsys.readouterr().out
    fails(capsys, train, [*moved, "--train_model", "convnet_8_bn"], "other flags", "train_model")
    write_set("elsewhere", "tiny", train=32, test=8, seed=1)
    fails(capsys, train, moved, "another data set")


def test_what_needs_one_process_says_so(mean, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    argv = [*ARGV, "--num_images", "8"]
    fails(capsys, train, [*argv, "--cost"], "--cost", "without torchrun")
    fails(capsys, train, [*argv, "--device", "cuda:0"], "--device cuda:0", "use --device cuda")
