"""Small data that the tests make themselves."""

import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

# One thread: the tests' tensors are tiny, and two cores that wait for each other only lose time.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from PIL import Image

from distillation.problem import Problem
from evaluation.target import Representation, Target
from krr_st.config import TrainFlags
from krr_st.krr_st import KRRST
from methods import find_method
from utils import checkpoint, plots
from utils.device import place
from utils.run_folder import claim_run
from utils.seed import local_seed

torch.set_num_threads(1)

CPU = torch.device("cpu")
NET, SHAPE = "convnet_4_bn", (3, 8, 8)  # zoo A at its smallest, and what `write_set` writes


def write_set(data_dir, name, *, size=8, train=48, test=24, classes=4, channels=3, labelled=True, seed=0):
    """A prepared set whose classes differ in brightness and in a bright corner."""
    generator = torch.Generator().manual_seed(seed)
    folder = Path(data_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("tr", train), ("te", test)):
        if not count:
            continue
        y = torch.arange(count) % classes
        x = torch.randint(0, 80, (count, channels, size, size), generator=generator)
        x += (y * (160 // classes))[:, None, None, None]
        for i, label in enumerate(y.tolist()):
            x[i, :, label % size, :] = 250
        checkpoint.save(x.to(torch.uint8), folder / f"X_{split}_{size}.pth")
        if labelled:
            checkpoint.save(y, folder / f"Y_{split}_{size}.pth")
    return folder


def make_target():
    """A target model with random weights."""
    with local_seed(77):
        return Representation(NET, SHAPE).eval().requires_grad_(False)


def write_target(name="tiny"):
    """The checkpoint in which KRR-ST looks for the target model of a set."""
    state = make_target().backbone.state_dict()
    checkpoint.save(state, f"teacher_ckpt/barlow_twins_{NET}_{name}.pt")


def resolved(method, flags_class=None, **changes):
    """The flags of a method as its run has them: defaults put in, presets resolved."""
    row = find_method(method)
    flags = (flags_class or row.flags)(method=row.name, **changes)
    given = {k: v for k, v in row.defaults.items() if getattr(flags, k) is None}
    return row.setup.resolve(row, dataclasses.replace(flags, **given))


def make_krrst(image_set, *, seed=0, loader=None, target_scale=None, device=CPU, **changes):
    """KRR-ST at its smallest; `loader` takes the place of that of the real batches."""
    settings = dict(
        num_images=6,
        train_model=NET,
        num_models=2,
        online_iteration=5,
        online_lr=0.05,
        online_wd=0.0,
        outer_batch_size=16,
        outer_lr=1e-2,
        outer_iteration=40,
        target_views="online",
    )
    target = Target(place(make_target(), device), "fp32", target_scale)
    problem = Problem(image_set, device, seed, target=target, target_scale=target_scale)
    distiller = KRRST(problem, TrainFlags(**{**settings, **changes}))
    distiller.loader = loader or distiller.loader
    distiller._batches = distiller.loader.forever()
    return distiller


def read_log(folder):
    """The entries of a run's log without the clock's."""
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(s).items() if k != "steps_per_second"} for s in lines]


def plain(value):
    """A saved value that compares with ==: tensors by what they hold, no clock times."""
    if isinstance(value, torch.Tensor):
        return checkpoint.fingerprint(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "seconds"}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty working folder; commands write their relative paths into it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _hold(path, held):
    with claim_run(path):
        held.set()
        time.sleep(1e6)


@pytest.fixture
def holder(tmp_path):
    """A process that has claimed the folder "a" of `tmp_path`."""
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    process = fork.Process(target=_hold, args=(tmp_path / "a", held), daemon=True)
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


_draw = plots._save


def _blank(figure, path):
    with checkpoint.atomic_path(path) as temporary:
        Image.new("RGB", (8, 8)).save(temporary, format="PNG")


@pytest.fixture(autouse=True, scope="session")
def blank_figures():
    """Figures are left blank: to draw one takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", _blank)
        yield


@pytest.fixture
def figures(monkeypatch):
    """For tests that want their figures drawn."""
    monkeypatch.setattr(plots, "_save", _draw)


def pytest_make_parametrize_id(config, val):
    """Functions by their name: an address would differ between the worker processes."""
    return getattr(val, "__name__", None) if callable(val) else None
