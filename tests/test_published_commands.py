"""The commands that the KRR-ST release prints are accepted word for word."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch

import test as test_command
import test_kd
import test_scratch
import train
from evaluation.kd import KdFlags
from evaluation.presets import FULL_TARGETS, resolve_preset, resolve_targets
from evaluation.recipes import KD, pretrain_recipe
from evaluation.transfer import TestFlags
from models import get_model

METHODS = ("random", "kmeans", "dsa", "dm", "mtt", "kip", "frepo", "krr_st")
NETWORKS = ("base", "vgg", "alexnet", "mobilenet", "resnet10", "resnet18")
# (source, side, synthetic images, rate) of the released train.py.
SOURCES = (
    ("cifar100", 32, 1000, "1e-4"),
    ("tinyimagenet", 64, 2000, "1e-5"),
    ("imagenet", 64, 1000, "1e-5"),
    ("imagenette", 224, 10, "1e-5"),
)


@pytest.fixture
def parsed(monkeypatch):
    """Runs a command line up to its driver; returns the flags that the driver is given."""
    seen, ended = [], SimpleNamespace(run=lambda: 0)
    for command, driver in (
        (test_command, "Transfer"),
        (test_scratch, "Transfer"),
        (test_kd, "Distillation"),
    ):
        monkeypatch.setattr(command, driver, lambda flags: seen.append(flags) or ended)

    def run(command, line):
        assert command.main(shlex.split(line)) == 0
        return seen[-1]

    return run


@pytest.mark.parametrize(("source", "size", "count", "rate"), SOURCES)
def test_train(workspace, capsys, source, size, count, rate):
    line = f"--exp_name EXP --data_name {source} --outer_lr {rate} --gpu_id 0 --dry_run"
    assert train.main(line.split()) == 0
    plain = capsys.readouterr().out
    assert "has no effect" not in plain
    assert train.main([*line.split(), "--num_workers", "8"]) == 0
    said, rest = capsys.readouterr().out.split("\n", 1)
    assert said.startswith("--num_workers has no effect: ") and rest == plain
    config = json.loads(plain[: plain.index("\n}") + 2])
    found = (config["img_size"], config["num_images"], config["outer_lr"])
    assert found == (size, count, float(rate)) and "num_workers" not in config


@pytest.mark.parametrize("source", FULL_TARGETS)
def test_test_and_test_scratch(workspace, parsed, source):
    line = f"--source_data_name {source} --target_data_name full"
    for gpu in ("", " --gpu_id 3"):
        flags = parsed(test_scratch, line + gpu)
        assert resolve_targets(flags.source_data_name, "full", flags.data_dir)
    for method in METHODS:
        for network in NETWORKS:
            ours = f"{line} --method {method} --test_model {network} --gpu_id 0"
            flags = parsed(test_command, ours)
            preset = resolve_preset(source, flags.data_dir, flags.img_size)
            arch = preset.network if network == "base" else flags.test_model
            assert pretrain_recipe(flags.method, source, arch).lr > 0
            with torch.device("meta"):
                get_model(arch, (3, preset.size, preset.size), 10)


def test_test_kd(workspace, parsed):
    for method in ("gaussian", *METHODS):
        for network in NETWORKS:
            line = f"--source_data_name tinyimagenet --method {method} --test_model {network}"
            flags = parsed(test_kd, f"{line} --gpu_id 1")
            assert KD[flags.method] and flags.target_data_name == "cifar10"


def test_fine_grained_targets_and_the_other_flags(workspace, parsed):
    line = "--source_data_name tinyimagenet --target_data_name aircraft_cars_cub2011_dogs_flowers"
    shared = "--num_test 3 --data_dir ./datasets --log_dir ./test_log --seed 7 --dropout 0.0"
    folder = "--synthetic_data_dir ./synthetic_data"
    for command in (test_command, test_scratch):
        flags = parsed(command, f"{line} {shared} {folder}")
        names = resolve_targets(flags.source_data_name, flags.target_data_name, flags.data_dir)
        assert names == ("aircraft", "cars", "cub2011", "dogs", "flowers")
    parsed(test_kd, f"--source_data_name tinyimagenet {shared} {folder}")


def test_a_flag_without_an_effect_says_so_once(workspace, parsed, capsys):
    parsed(test_scratch, "--synthetic_data_dir elsewhere")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--synthetic_data_dir has no effect: ")
    parsed(test_command, "--synthetic_data_dir elsewhere")
    parsed(test_scratch, "")
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as stop:
        test_scratch.main(["--help"])
    assert stop.value.code == 0
    assert "--synthetic_data_dir" in capsys.readouterr().out


def test_default_sources(workspace, parsed):
    assert parsed(test_scratch, "").source_data_name == "cifar100"
    assert parsed(test_command, "").source_data_name == "tinyimagenet"
    assert parsed(test_kd, "").source_data_name == "tinyimagenet"
    assert TestFlags().source_data_name == KdFlags().source_data_name == "tinyimagenet"
