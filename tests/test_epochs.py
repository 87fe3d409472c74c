"""Checkpoints made over epochs: what is never written over, and what is never saved."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_set
from torch import nn

from data.loader import TensorLoader
from evaluation import epochs
from evaluation.fit import Trainer
from evaluation.recipes import sgd_by_epochs
from krr_st import kd_teacher, target
from utils.progress import FiniteGuard
from utils.run_folder import RunFolder

NET, CPU = "convnet_4_8_bn", torch.device("cpu")
SHARED = [
    "--data_name",
    "tiny",
    "--img_size",
    "8",
    "--epochs",
    "1",
    "--device",
    "cpu",
    "--seed",
    "0",
    "--batch_size",
    "16",
]
COMMANDS = {
    f"barlow_twins_{NET}_tiny": (target, ["--target_model", NET, "--projector_dim", "8"]),
    "teacher_tiny": (kd_teacher, ["--arch", NET]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_checkpoint_from_elsewhere_is_kept(workspace, capsys, name):
    command, flags = COMMANDS[name]
    write_set("datasets", "tiny")
    path = Path("teacher_ckpt") / f"{name}.pt"
    path.parent.mkdir()
    path.write_bytes(b"downloaded")
    assert command.main([*SHARED, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "--overwrite" in line
    assert path.read_bytes() == b"downloaded" and not path.with_suffix("").exists()
    assert command.main([*SHARED, *flags, "--overwrite"]) == 0
    assert torch.load(path).keys() >= {"layers.0.block.0.weight"}


@pytest.mark.parametrize("name", COMMANDS)
def test_labels_of_the_training_images_alone(workspace, name):
    """Nothing to measure on then; the training itself is as ever."""
    command, flags = COMMANDS[name]
    (write_set("datasets", "tiny") / "Y_te_8.pth").unlink()
    assert command.main([*SHARED, *flags]) == 0
    result = json.loads(Path(f"teacher_ckpt/{name}/results.json").read_text())
    assert result.get("knn_accuracy") is None and result.get("test_accuracy") is None


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_network_writes_nothing(workspace, capsys, name):
    command, flags = COMMANDS[name]
    write_set("datasets", "tiny")
    assert command.main([*SHARED, flags[0], "vit"]) == 2
    assert "resnet18" in capsys.readouterr().err and not Path("teacher_ckpt").exists()


def test_a_loss_that_is_not_finite_yet_unseen_is_not_saved(tmp_path, monkeypatch):
    """On a GPU the loop learns of a loss one step late, when the save has been due already."""
    monkeypatch.setattr(FiniteGuard, "check", lambda *args: None)
    run = RunFolder(tmp_path / "run", {}, seed=0, device=CPU)
    loader = TensorLoader(
        torch.ones(4, 2),
        torch.zeros(4, 1),
        batch_size=2,
        device=CPU,
        generator=torch.Generator(),
        drop_last=True,
    )
    network, steps, saves = nn.Linear(2, 1), [], []

    def loss_fn(model, x, y):
        steps.append(1)
        return model(x).mean() * (float("nan") if len(steps) > 4 else 1)  # from the third epoch on

    monkeypatch.setattr(epochs, "save_run", lambda path, step, parts: saves.append(step))
    trainer = Trainer(network, loader, sgd_by_epochs(4, 0.1, 0.0, 0.0, 2), loss_fn=loss_fn)
    epochs.train_epochs(trainer, run, save_every=1, what="test")
    assert len(steps) == 8 and saves == [2, 4]


@pytest.mark.parametrize("name", COMMANDS)
def test_weights_that_are_not_finite_are_no_checkpoint(workspace, capsys, monkeypatch, name):
    """The loss of a step is taken before it: after the last step only the weights show."""
    command, flags = COMMANDS[name]
    write_set("datasets", "tiny")
    real = Trainer.run

    def diverged(self, *args, **kwargs):
        real(self, *args, **kwargs)
        next(iter(self.model.parameters())).data.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "run", diverged)
    assert command.main([*SHARED, *flags]) == 2
    assert "not finite" in capsys.readouterr().err
    assert not Path(f"teacher_ckpt/{name}.pt").exists()


@pytest.mark.parametrize(
    ("name", "given", "arch"),
    [("imagenette", [], "resnet50"), ("cifar100", [], "resnet18"), ("imagenette", [NET], NET)],
)
def test_target_is_the_one_train_looks_for(workspace, monkeypatch, name, given, arch):
    classes = {"imagenette": 10, "cifar100": 100}[name]
    write_set("datasets", name, classes=classes, train=classes, test=classes)
    argv = ["--data_name", name, "--img_size", "8", "--device", "cpu", "--seed", "0"]
    asked = []

    def train_target(flags, *args):
        asked.append(flags.target_model)
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "train_target", train_target)
    assert target.main([*argv, *(["--target_model", *given] if given else [])]) == 130
    folder = Path(f"teacher_ckpt/barlow_twins_{arch}_{name}")
    assert asked == [arch]
    assert json.loads((folder / "config.json").read_text())["flags"]["target_model"] == arch
