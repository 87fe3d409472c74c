"""DC, DSA, DM and the evaluation against the plain re-statement of the published loops."""

import json
import os

import pytest
import torch

from benchmarks import clom as benchmark
from benchmarks.common import KEPT, contest, measure_sections
from models import layout

CPU = torch.device("cpu")


def test_both_sides_compute_the_same(monkeypatch):
    monkeypatch.setattr(layout, "CPU_PIXELS", 3 * 64)  # batches of 4 real images come in two parts
    image_set = benchmark.random_set(8, 50, 8)
    found = benchmark.differences(image_set, CPU, model="ConvNetW32", batch_real=4)
    assert found["DC"] < 1e-2 and found["DSA"] < 1e-3 and found["DM"] < 1e-3
    assert found["evaluation"] <= 0.021  # one of 50 test images


def test_a_section_that_fails_is_said_and_costs_no_other(tmp_path, capsys):
    sections = {"a": lambda: [][1], "b": lambda: 1}
    results, done = measure_sections(sections, CPU, tmp_path / "out.json")
    assert not done and results == json.loads((tmp_path / "out.json").read_text())
    assert results["failed"] == ["a"] and results["b"] == 1 and "a" not in results
    assert "IndexError" in capsys.readouterr().err


def sort():
    """A side that takes long."""
    return lambda: torch.randn(300_000).sort()


def nothing():
    """A side that takes no time."""
    return lambda: None


def die():
    """A side that does not come back."""
    return lambda: os._exit(3)


@pytest.mark.slow
def test_sides_in_processes_of_their_own():
    found = contest(sort, {"ours": nothing}, CPU, repeats=3)
    assert list(found) == ["plain", KEPT, "ours"]
    for name in ("plain", KEPT):
        assert found[name].median > 5 * found["ours"].median > 0
    assert all(len(timing.times) == 3 for timing in found.values())
    assert benchmark.ratios(found)["plain"] > 5
    with pytest.raises(RuntimeError, match="the side 'ours' died with exit code 3"):
        contest(nothing, {"ours": die}, CPU, repeats=1)


def hold_memory():
    """A side that once holds 200 MB."""
    return lambda: torch.ones(50_000_000).sum()


@pytest.mark.slow
def test_each_side_has_a_peak_of_its_own():
    found = contest(nothing, {"large": hold_memory}, CPU, repeats=1)
    if found["plain"].peak is not None:
        assert found["large"].peak > found["plain"].peak + 150e6
