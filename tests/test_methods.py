"""The contract over the whole registry: every method runs, resumes and explains itself alike."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import NET, plain, read_log, write_set, write_target
from test_cli import fails, listing
from test_clom_cli import main as main_command

import train
from clom.config import DistillFlags
from distillation.base import Distiller, RunFlags
from distillation.run import Setup
from krr_st.config import FRePoFlags, KIPFlags, TrainFlags
from methods import METHODS, find_method
from trajectory.mkdt import MKDTFlags
from trajectory.mtt import MTTFlags
from utils import checkpoint
from utils.errors import UserError

STEPS, IMAGES, CLASSES = 6, 8, 4
SHARED = (
    f"--data_name tiny --img_size 8 --device cpu --seed 4 --num_images {IMAGES} "
    f"--outer_iteration {STEPS} --print_every 2 --save_every 2"
)
# What makes the methods with these flags small; a method of another family adds its own.
STUDENT = (
    "--train_model convnet_4_in --num_experts 2 --max_start_epoch 2 --expert_epochs 1 --syn_steps 3 "
    "--lr_lr 1e-6 --lr_img 10 --eval_every 3"
)
SMALL = {
    MTTFlags: f"{STUDENT} --pre_epoch 1",
    MKDTFlags: f"{STUDENT} --target_model {NET} --pre_epoch 1 --test_iteration 1",
    TrainFlags: (
        f"--target_model {NET} --train_model {NET} --num_models 2 --online_iteration 3 "
        "--outer_batch_size 16 --eval_every 3 --pre_epoch 1 --test_iteration 1"
    ),
    FRePoFlags: (
        f"--train_model {NET} --num_models 2 --online_iteration 3 --outer_batch_size 16 --eval_every 3 "
        "--pre_iteration 2"
    ),
    KIPFlags: (
        "--train_model convnet_4_none --num_models 2 --num_batches 2 --outer_batch_size 8 --eval_every 3 "
        "--pre_iteration 2 --platt"
    ),
    DistillFlags: (
        "--model MLP --batch_real 4 --num_eval 1 --epoch_eval_train 1 --eval_interval 3 "
        "--outer_loop 2 --inner_loop 1"
    ),
}


def small(row):
    """Flags of the nearest class of `row`'s flags that SMALL knows."""
    return next(SMALL[c] for c in row.flags.__mro__ if c in SMALL)


def run(name, folder, *more):
    argv = ["--method", name, *SHARED.split(), *small(METHODS[name]).split()]
    return train.main([*argv, "--exp_name", folder, *more])


def made(folder):
    """All tensor files of a run."""
    paths = sorted((Path("results") / folder).glob("*.pt"))
    assert paths
    return {path.name: plain(checkpoint.load(path)) for path in paths}


@pytest.fixture
def tiny(workspace):
    folder = write_set("datasets", "tiny", train=32, test=8, classes=CLASSES)
    names = [f"class {c}" for c in range(CLASSES)]
    (folder / "meta.json").write_text(json.dumps({"class_names": names}))
    write_target()
    return workspace


def watch(patch, row, stop=None):
    """The steps of a method as they happen, (distiller, losses); may be cut short."""
    seen, real = [], row.distiller.step

    def step(self):
        if len(seen) + 1 == stop:
            raise KeyboardInterrupt
        seen.append((self, real(self)))
        return seen[-1][1]

    patch.setattr(row.distiller, "step", step)
    return seen


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("figures")
def test_a_run_finishes_and_its_steps_keep_the_contract(tiny, monkeypatch, name):
    row = METHODS[name]
    seen = watch(monkeypatch, row)
    assert run(name, "a") == 0
    assert len(seen) == STEPS and len({id(distiller) for distiller, _ in seen}) == 1
    distiller = seen[0][0]
    assert isinstance(distiller, row.distiller) and isinstance(distiller.flags, row.flags)
    x, y = distiller.x_syn, distiller.y_syn
    assert x.shape == (IMAGES, 3, 8, 8) and x.dtype == torch.float32 and x.isfinite().all()
    assert len(y) == IMAGES and y.dtype in (torch.int64, torch.float32)
    for _, losses in seen:
        assert tuple(losses) == row.distiller.losses
        assert all(v.shape == () and not v.requires_grad for v in losses.values())
    folder = Path("results/a")
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 4 and config["flags"]["method"] == row.name
    assert config["data_name"] == "tiny"
    entries = [e for e in read_log(folder) if row.distiller.losses[0] in e]
    assert len(entries) == 3 and all(set(row.distiller.losses) < set(e) for e in entries)
    assert (folder / "results.json").exists() and list(folder.glob("*.png"))
    assert not list(folder.glob("state*"))


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_decides_a_run_and_an_interrupted_one(tiny, monkeypatch, capsys, name):
    assert run(name, "whole") == run(name, "other", "--seed", "5") == 0
    whole, log = made("whole"), read_log("results/whole")
    assert whole != made("other")
    for stop in (2, 6):  # before the first save, after the second
        folder = f"stopped in {stop}"
        with monkeypatch.context() as patch:
            watch(patch, METHODS[name], stop)
            assert run(name, folder) == 130
        capsys.readouterr()
        assert run(name, folder) == 0
        assert ("resuming after" in capsys.readouterr().out) == (stop > 2)
        assert made(folder) == whole and read_log(f"results/{folder}") == log, stop
    assert run(name, folder) == 0
    assert "finished run" in capsys.readouterr().out


def test_a_part_without_tensors_is_saved_and_resumed(tiny, monkeypatch):
    """KIP whose transform is not learned: an empty ParameterDict, which is false."""
    monkeypatch.setitem(SMALL, KIPFlags, SMALL[KIPFlags].replace("--platt", "--lr_transform 0"))
    assert run("kip", "whole") == 0
    with monkeypatch.context() as patch:
        watch(patch, METHODS["kip"], 6)
        assert run("kip", "parts") == 130
    assert run("kip", "parts") == 0
    assert made("whole") == made("parts")


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for name, row in METHODS.items():
        (line,) = [text for text in shown.splitlines() if text.split()[:1] == [name]]
        assert row.about in line and len(row.about) > 20


@pytest.mark.parametrize("name", METHODS)
def test_help_of_a_method_shows_its_flags(capsys, name):
    for spelt in (name, METHODS[name].name):
        with pytest.raises(SystemExit) as stop:
            train.main(["--method", spelt, "--help"])
        shown = capsys.readouterr().out
        assert stop.value.code == 0
        for field in dataclasses.fields(METHODS[name].flags):
            assert f"--{field.name} " in shown, field.name


@pytest.mark.parametrize("name", METHODS)
def test_rows(name):
    row = METHODS[name]
    assert find_method(row.name) is find_method(name.upper()) is row
    assert issubclass(row.distiller, Distiller) and issubclass(row.setup, Setup)
    assert issubclass(row.flags, RunFlags) and row.flags.__dataclass_params__.frozen
    names = {field.name for field in dataclasses.fields(row.flags)}
    assert row.defaults.keys() <= names
    assert all(values.keys() <= names for values in row.recipes.values())


def test_an_unknown_method_lists_the_known_ones(tiny, capsys):
    fails(capsys, train, ["--method", "magic"], "--method", "magic", *METHODS)
    fails(capsys, train, ["--method"], "--method")
    with pytest.raises(UserError, match="krr_st"):
        find_method("magic")
    assert not Path("results").exists()


# ------------------------------------------------------------------ one command for all of them


def test_the_names_of_train_py_mean_those_of_main_py(tiny):
    assert run("dm", "a") == 0
    argv = (
        f"--method DM --dataset tiny --img_size 8 --device cpu --seed 4 --ipc {IMAGES // CLASSES} "
        f"--Iteration {STEPS} --print_every 2 --save_every 2 {SMALL[DistillFlags]} --save_path b"
    )
    assert main_command.main(argv.split()) == 0
    name = f"res_DM_tiny_MLP_{IMAGES // CLASSES}ipc.pt"
    found, wanted = (checkpoint.load(folder / name) for folder in (Path("results/a"), Path("b")))
    assert found["data"][0][0].shape == (IMAGES, 3, 8, 8) and plain(found) == plain(wanted)
    assert read_log("results/a") == read_log("b")
    # The published names work in train.py, too, and the run is one and the same.
    argv = argv.replace("--save_path b", "--save_path results/a").split()
    before = listing(tiny)
    assert train.main(argv) == 0 and listing(tiny) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--num_images 6", ("--num_images 6", "multiple of the 4 classes", "tiny")),
        ("--num_images 0", ("--num_images", "at least 1")),
        ("--num_images many", ("--num_images", "int", "many")),
        ("--num_images 400 --init real", ("class 0", "8 training images")),
        ("--data_name nothing", ("nothing",)),
        ("--num_models 3", ("--num_models",)),
    ],
)
def test_bad_flags_of_dm(tiny, capsys, given, words):
    argv = [*SHARED.split(), *SMALL[DistillFlags].split(), "--exp_name", "a", *given.split()]
    fails(capsys, train, ["--method", "dm", *argv], *words)
    assert not Path("results").exists()


def test_a_set_that_names_no_classes(tiny, capsys):
    """Its labels say how many there are."""
    Path("datasets/tiny/meta.json").unlink()
    assert run("dm", "a", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert f'"ipc": {IMAGES // CLASSES},' in printed and not Path("datasets/tiny/meta.json").exists()
    argv = ["--method", "dm", *SHARED.split(), *SMALL[DistillFlags].split()]
    fails(capsys, train, [*argv, "--num_images", "9"], "--num_images 9", f"{CLASSES} classes")
    labels = sorted(Path("datasets/tiny").glob("Y_*"))
    for path in labels:
        path.unlink()
    fails(capsys, train, argv, "--num_images", "no labelled training images")
