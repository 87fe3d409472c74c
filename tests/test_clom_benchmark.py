"""DC, DSA, DM and the evaluation against the plain re-statement of the published loops."""

import os

import pytest
import torch

from benchmarks import clom as benchmark
from benchmarks.common import medians_apart
from clom import layout

CPU = torch.device("cpu")


def test_both_sides_compute_the_same(monkeypatch):
    monkeypatch.setattr(layout, "CPU_PIXELS", 3 * 64)  # batches of 4 real images come in two parts
    image_set = benchmark.random_set(8, 50, 8)
    found = benchmark.differences(image_set, CPU, model="ConvNetW32", batch_real=4)
    assert found["DC"] < 1e-2 and found["DSA"] < 1e-3 and found["DM"] < 1e-3
    assert found["evaluation"] <= 0.021  # one of 50 test images


def sides_that_differ():
    """The plain side takes longer."""
    return {"plain": lambda: torch.randn(300_000).sort(), "ours": lambda: None}


def dies():
    """A side that does not come back."""
    return {"plain": lambda: None, "ours": lambda: os._exit(3)}


def test_sides_in_processes_of_their_own():
    seconds = medians_apart(sides_that_differ, torch.device("cpu"), repeats=3)
    assert seconds["plain"] > 5 * seconds["ours"] > 0
    with pytest.raises(RuntimeError, match="the ours side died with exit code 3"):
        medians_apart(dies, torch.device("cpu"), repeats=1)
