"""Clocks that jump: no result, no save and no lock depends on the time of day."""

import ast
import itertools
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import NET, plain, write_set, write_target

import train
from clom import tables
from evaluation.measure import CellStore
from models import get_network
from utils import checkpoint, progress
from utils.checkpoint import is_left_over
from utils.progress import SaveTimer
from utils.run_folder import InUse, claim_run, is_claimed
from utils.seed import local_seed

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests", "benchmarks", ".venv")
JUMPS = (0, -86400, 3600, -5, 10**9, -(10**9))


@pytest.fixture
def jumping(monkeypatch):
    """The time of day leaps to and fro at every look."""
    real, jumps = time.time, itertools.cycle(JUMPS)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))


def test_nothing_asks_for_the_time_of_day():
    names = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime", "strftime"}
    found = []
    for path in (p for p in ROOT.glob("[!.]*/**/*.py") if p.relative_to(ROOT).parts[0] not in TESTS):
        for node in ast.walk(ast.parse(path.read_text())):
            owner = node.value if isinstance(node, ast.Attribute) and node.attr in names else None
            if isinstance(owner, ast.Name) and owner.id in ("time", "datetime", "date"):
                found.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_saves_by_the_second_under_a_jumping_clock(jumping, monkeypatch):
    """Only the steady clock counts: seconds go by, whatever the wall says."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    timer, due = SaveTimer("10s"), []
    for step in range(1, 31):
        now[0] += 3.0
        if timer.due(step):
            due.append(step)
    assert due == [4, 8, 12, 16, 20, 24, 28]


def test_a_run_under_a_jumping_clock_is_the_same(workspace, monkeypatch, capsys):
    write_set("datasets", "tiny", train=30, test=8)
    write_target("tiny")
    flags = (
        f"--data_name tiny --img_size 8 --device cpu --seed 4 --target_model {NET} --train_model {NET} "
        "--num_images 6 --num_models 2 --online_iteration 3 --outer_iteration 6 --outer_batch_size 16 "
        "--pre_epoch 1 --test_iteration 1 --save_every 1s"
    ).split()
    assert train.main([*flags, "--exp_name", "steady"]) == 0
    real, jumps = time.time, itertools.cycle(JUMPS)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + next(jumps))
        steady = itertools.count(0, 0.7)
        patch.setattr(progress.time, "monotonic", lambda: next(steady))
        assert train.main([*flags, "--exp_name", "jumping"]) == 0
    sets = [plain([torch.load(f"results/{n}/{k}_syn.pt") for k in "xy"]) for n in ("steady", "jumping")]
    assert sets[0] == sets[1]


def test_locks_and_left_overs_under_a_jumping_clock(tmp_path, jumping):
    with claim_run(tmp_path / "a"), pytest.raises(InUse), claim_run(tmp_path / "a", patience=0.1):
        pass
    with claim_run(tmp_path / "a"):
        assert is_claimed(tmp_path / "a")
    store = CellStore(tmp_path / "results.jsonl")
    store.add({"a": 1}, accuracy=2.0)
    for when in (0, 2**31):  # a file from before the clock was set back, or from its future
        path = tmp_path / f".x.pt.abcdef{when % 7}1"
        path.write_bytes(b"half")
        os.utime(path, (when, when))
        assert is_left_over(path)
    checkpoint.save(torch.ones(1), tmp_path / "x.pt")
    assert not list(tmp_path.glob(".x.pt.*"))


def test_a_model_replaced_at_the_same_time_of_day_is_another(workspace):
    """The clock was set back between two trainings: time and size of the file are the same."""
    path = Path("model.pth")
    prints = []
    for seed in (0, 1):
        with local_seed(seed):
            checkpoint.save(get_network("ConvNetD1", 3, 10, (8, 8)).state_dict(), path)
        os.utime(path, (1000, 1000))
        prints.append(tables._digest(path, tables._version(path)))
    assert prints[0] != prints[1]
