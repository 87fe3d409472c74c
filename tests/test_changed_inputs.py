"""Data or models that were changed since a run began: it is refused, not mixed of both."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import NET, write_set, write_target
from test_stop import CODES, COMMANDS, inputs, signal_at  # noqa: F401

import train
from clom.pool import checkpoint_name
from data.specs import DC_SPECS
from methods import find_method
from models import get_network
from trajectory import experts
from utils import checkpoint
from utils.seed import local_seed

TARGET = Path(f"teacher_ckpt/barlow_twins_{NET}_tiny.pt")
POOL = Path("pretrained_model/CIFAR10/original/ConvNetD1/index_0") / checkpoint_name(
    "CIFAR10", "ConvNetD1", 1
)
CLOM = " --CLoM --models_pool ConvNetD1 --model_num 1 --epoch 1 --CLoM_batch_size 8"


def folder_of(name):
    return Path("datasets") / ("cifar10" if name in ("main.py", "originals") else "tiny")


def one_pixel(name):
    path = folder_of(name) / "X_tr_8.pth"
    images = checkpoint.load_tensor(path)
    images[7, 1, 2, 3] ^= 1
    checkpoint.save(images, path)


def one_label(name):
    path = folder_of(name) / "Y_tr_8.pth"
    labels = checkpoint.load_tensor(path)
    labels[5] = (labels[5] + 1) % 3
    checkpoint.save(labels, path)


def one_image_less(name):
    for letter in "XY":
        path = folder_of(name) / f"{letter}_tr_8.pth"
        checkpoint.save(checkpoint.load_tensor(path)[:-1].clone(), path)


def mirrored_no_more(name):
    (folder_of(name) / "meta.json").write_text(json.dumps({"hflip": False}))


def slightly_other(path):
    def change(name):
        state = checkpoint.load_state(path)
        noise = torch.Generator().manual_seed(0)
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = value * (1 + 0.01 * torch.randn(value.shape, generator=noise))
        checkpoint.save(state, path)

    return change


CHANGES = [
    *((name, one_pixel, "data set") for name in COMMANDS),
    ("train", one_label, "data set"),
    ("main.py", one_label, "data set"),
    ("kd_teacher", one_image_less, "data set"),
    ("train", one_image_less, "data set"),
    ("target", mirrored_no_more, "data set"),
    ("train", mirrored_no_more, "data set"),
    ("train", slightly_other(TARGET), "target model"),
    ("main.py", slightly_other(POOL), "CLoM pool"),
]


def begin(monkeypatch, folder, name):
    """Start a run and stop it in its fifth step; returns its command and flags."""
    monkeypatch.chdir(folder / "stopped")
    command, flags, step, _ = COMMANDS[name]
    if name == "main.py":
        flags += CLOM
        with local_seed(5):
            checkpoint.save(get_network("ConvNetD1", 3, 10, (8, 8)).state_dict(), POOL)
        facts = {"img_shape": [3, 8, 8], "num_classes": 10}
        stats = DC_SPECS["CIFAR10"].stats[32]
        facts |= {"mean": stats.mean, "std": stats.std}
        (POOL.parent / "config.json").write_text(json.dumps(facts))
    with monkeypatch.context() as patch:
        signal_at(patch, *step, signal.SIGTERM)
        assert command.main(flags.split()) == CODES[signal.SIGTERM]
    return command, flags.split()


def contents():
    """All files but the inputs."""
    return {
        path: path.read_bytes()
        for path in Path().rglob("*")
        if path.is_file() and path.parts[0] != "datasets" and path not in (TARGET, POOL)
    }


@pytest.mark.parametrize(("name", "change", "what"), CHANGES)
def test_changed_between_stop_and_resume(inputs, monkeypatch, capsys, name, change, what):  # noqa: F811
    command, flags = begin(monkeypatch, inputs, name)
    before = contents()
    change(name)
    capsys.readouterr()
    assert command.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"began with another {what}" in line
    assert contents() == before
    if name == "originals":  # it has no --overwrite: each network has a folder of its own
        assert "delete this folder" in line
    else:
        assert "--overwrite" in line
        assert command.main([*flags, "--overwrite"]) == 0
        assert "resuming" not in capsys.readouterr().out
        assert command.main(flags) == 0  # it is finished


def test_put_back_it_is_resumed(inputs, monkeypatch, capsys):  # noqa: F811
    """The weights count, not the file: written again, in another order, they are the same."""
    command, flags = begin(monkeypatch, inputs, "train")
    state = checkpoint.load_state(TARGET)
    slightly_other(TARGET)("train")
    assert command.main(flags) == 2
    checkpoint.save(dict(reversed(state.items())), TARGET)
    capsys.readouterr()
    assert command.main(flags) == 0
    assert "resuming after step 5 of 8" in capsys.readouterr().out


def test_a_finished_run_is_not_that_of_other_data(inputs, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(inputs / "whole")
    command, flags, *_ = COMMANDS["target"]
    assert command.main(flags.split()) == 0
    write_set("datasets", "tiny", train=30, test=8, seed=1)
    capsys.readouterr()
    assert command.main(flags.split()) == 2
    assert "another data set" in capsys.readouterr().err


def test_a_run_of_before_is_resumed_unchecked(inputs, monkeypatch, capsys):  # noqa: F811
    """Runs did not always record what they read."""
    command, flags = begin(monkeypatch, inputs, "train")
    path = Path("results/run/config.json")
    config = json.loads(path.read_text())
    assert set(config.pop("inputs")) == {"data set", "target model"}
    path.write_text(json.dumps(config))
    one_pixel("train")
    capsys.readouterr()
    assert command.main(flags) == 0
    assert "resuming after step 5 of 8" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["mtt", "mkdt"])
def test_other_experts_are_noticed(workspace, monkeypatch, capsys, method):
    write_set("datasets", "tiny")
    write_target()
    shared = "--data_name tiny --img_size 8 --train_model convnet_4_in --device cpu --seed 0"
    shared += f" --target_model {NET}" if method == "mkdt" else ""
    targets = "classes" if method == "mtt" else "features"
    made = (
        f"{shared} --targets {targets} --train_epochs 3 --num_experts 2 --batch_train 16 --buffer_dir experts"
    )
    assert experts.main(made.split()) == 0
    argv = (
        f"--method {method} {shared} --num_images 8 --outer_iteration 3 --syn_steps 2 --expert_epochs 1 "
        "--max_start_epoch 2 --pre_epoch 1 --save_every 1 --buffer_dir experts --exp_name run"
    ).split()
    with monkeypatch.context() as patch:
        signal_at(patch, find_method(method).distiller, "step", signal.SIGTERM, call=2)
        assert train.main(argv) == CODES[signal.SIGTERM]
    path = Path("experts/replay_buffer_1.pt")
    kept = path.read_bytes()
    trajectories = torch.load(path)
    trajectories[0][1][0] = trajectories[0][1][0] * 1.01
    torch.save(trajectories, path)
    capsys.readouterr()
    assert train.main(argv) == 2
    assert "began with another set of experts" in capsys.readouterr().err
    path.write_bytes(kept)
    assert train.main(argv) == 0
    assert "resuming after step 2 of 3" in capsys.readouterr().out
