"""Finished cells on disk, and the tables made of them."""

import json
import os

import numpy as np
import pytest
import torch

from evaluation.measure import CellStore, grouped, spread
from utils.errors import UserError
from utils.table import format_mean_std, markdown, mean_std

KEY = {"target": "cifar10", "seed": 0, "lr": 0.1, "recipe": {"epochs": 3}}


def test_a_finished_cell_is_found_again(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    store = CellStore(path)
    assert store.get(KEY) is None
    cell = store.add(KEY, accuracy=12.5)
    assert store.get(KEY) == cell and cell["accuracy"] == 12.5 and cell["target"] == "cifar10"
    assert CellStore(path).get(dict(reversed(KEY.items()))) == cell  # order does not matter
    assert json.loads(path.read_text()) == cell


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 0.2}, {"recipe": {"epochs": 4}}, {"more": None}])
def test_any_other_setting_is_another_cell(tmp_path, change):
    store = CellStore(tmp_path / "r.jsonl")
    store.add(KEY, accuracy=1.0)
    assert store.get({**KEY, **change}) is None


def test_a_finished_cell_is_not_measured_again(tmp_path, capsys):
    path, calls = tmp_path / "r.jsonl", []

    def measure(**changes):
        def compute():
            calls.append(changes)
            return {"accuracy": float(len(calls))}

        return CellStore(path).measure({**KEY, **changes}, compute, lambda c: f"{c['accuracy']:.0f} %")

    first = measure()
    assert (first["accuracy"], first["lr"]) == (1.0, 0.1) and first["seconds"] >= 0
    assert measure() == first and calls == [{}]
    changes = [{"seed": 1}, {"lr": 0.2}, {"recipe": {"epochs": 4}}, {"target": "dogs"}]
    assert [measure(**change)["accuracy"] for change in changes] == [2.0, 3.0, 4.0, 5.0]
    assert [measure(**change)["accuracy"] for change in changes] == [2.0, 3.0, 4.0, 5.0]
    assert calls == [{}, *changes]
    shown = ["1 %", "1 % (kept)", "2 %", "3 %", "4 %", "5 %"]
    assert capsys.readouterr().out.splitlines() == [*shown, *(f"{n} % (kept)" for n in "2345")]


def test_a_measurement_that_fails_leaves_no_cell(tmp_path):
    store = CellStore(tmp_path / "r.jsonl")
    with pytest.raises(ZeroDivisionError):
        store.measure(KEY, lambda: {"accuracy": 1 / 0}, str)
    assert store.get(KEY) is None
    assert store.measure(KEY, lambda: {"accuracy": 2.0}, str)["accuracy"] == 2.0


def test_what_cannot_be_kept_is_printed_and_what_could_not_is_not_begun(tmp_path, monkeypatch, capsys):
    store = CellStore(tmp_path / "log" / "r.jsonl")
    shown = lambda cell: f"{cell['accuracy']:g} % of seed {cell['seed']}"  # noqa: E731

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            store.measure({**KEY, "seed": 3}, lambda: {"accuracy": 2.5}, shown)
        tasks = [({**KEY, "seed": n}, lambda ready, n=n: {"accuracy": float(n)}) for n in (5, 6)]
        with pytest.raises(UserError, match="No space left"):
            store.measure_all(tasks, torch.device("cpu"), shown)
    kept = [f"{a:g} % of seed {n} (not kept)" for a, n in ((2.5, 3), (5, 5), (6, 6))]
    assert capsys.readouterr().out.splitlines() == kept
    monkeypatch.setattr(os, "access", lambda place, how: False)
    with pytest.raises(UserError, match="no permission in"):
        store.measure({**KEY, "seed": 4}, lambda: pytest.fail("measured in vain"), shown)


def test_of_several_cells_the_missing_ones_are_measured(tmp_path, capsys):
    store, calls = CellStore(tmp_path / "r.jsonl"), []

    def compute(seed):
        def task(wait):
            calls.append(seed)
            return {"accuracy": 10.0 * seed + len(calls)}

        return {**KEY, "seed": seed}, task

    def measure(*seeds, **options):
        cells = store.measure_all(
            [compute(seed) for seed in seeds], torch.device("cpu"), lambda c: f"{c['seed']}", **options
        )
        return [(c["seed"], c["accuracy"]) for c in cells]

    assert measure(2) == [(2, 21.0)]
    assert measure(1, 2, 3) == [(1, 12.0), (2, 21.0), (3, 33.0)] and calls == [2, 1, 3]
    assert capsys.readouterr().out.split() == ["2", "1", "3"]
    again = {"again": [{**KEY, "seed": 2}]}
    assert measure(1, 2, **again) == [(1, 12.0), (2, 24.0)] and measure(2) == [(2, 24.0)]


def test_groups_keep_their_order_and_spread_is_over_the_field():
    cells = [{"t": t, "error": e} for t, e in (("b", 1.0), ("a", 5.0), ("b", 2.0), ("b", 4.5))]
    groups = grouped(cells, lambda cell: cell["t"])
    assert list(groups) == ["b", "a"] and [c["error"] for c in groups["b"]] == [1.0, 2.0, 4.5]
    found, values = spread(groups["b"], "error"), [1.0, 2.0, 4.5]
    assert found["n"] == 3 and found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=0))


@pytest.mark.parametrize("keep", [1, 20, -2, -1])
def test_a_torn_last_line_runs_again(tmp_path, keep):
    path = tmp_path / "r.jsonl"
    store = CellStore(path)
    whole = store.add({"seed": 0}, accuracy=1.0)
    length = path.stat().st_size
    store.add({"seed": 1}, accuracy=2.0)
    raw = path.read_bytes()
    path.write_bytes(raw[: length + keep] if keep > 0 else raw[:keep])
    store = CellStore(path)
    assert store.get({"seed": 0}) == whole
    complete = keep == -1  # only the newline is missing
    assert (store.get({"seed": 1}) is not None) == complete
    if not complete:
        store.add({"seed": 1}, accuracy=3.0)
    store.add({"seed": 2}, accuracy=4.0)
    store = CellStore(path)
    found = [store.get({"seed": s})["accuracy"] for s in range(3)]
    assert found == [1.0, 2.0 if complete else 3.0, 4.0]


def test_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / "r.jsonl"
    CellStore(path).add(KEY, accuracy=1.0)
    path.write_text("\n[1, 2]\n3\nnull\n{}\n" + path.read_text() + "not json\n")
    assert CellStore(path).get(KEY)["accuracy"] == 1.0


def test_the_last_of_equal_cells_counts(tmp_path):
    path = tmp_path / "r.jsonl"
    CellStore(path).add(KEY, accuracy=1.0)
    CellStore(path).add(KEY, accuracy=2.0)
    assert CellStore(path).get(KEY)["accuracy"] == 2.0


def test_unreadable_and_unwritable_files_are_named(tmp_path):
    folder = tmp_path / "r.jsonl"
    folder.mkdir()
    with pytest.raises(UserError, match=r"cannot read .*r\.jsonl"):
        CellStore(folder)
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .*b\.jsonl"):
        CellStore(binary)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        CellStore(tmp_path / "file" / "r.jsonl").add(KEY)


def test_mean_and_population_std():
    values = [1.0, 2.0, 4.5]
    mean, std = mean_std(values)
    assert mean == pytest.approx(np.mean(values)) and std == pytest.approx(np.std(values, ddof=0))
    assert mean_std([3.0]) == (3.0, 0.0)


@pytest.mark.parametrize(
    ("values", "digits", "shown"),
    [
        ([95.0, 96.0], 2, "95.50 ± 0.50"),
        ([1.0, 2.0, 4.5], 1, "2.5 ± 1.5"),
        ([95.204], 2, "95.20"),
        ([], 2, "–"),
    ],
)
def test_shown_numbers(values, digits, shown):
    assert format_mean_std(values, digits) == shown


def test_markdown_is_aligned():
    assert markdown(["set", "acc"], [["a", "1.00"], ["longer", "10.00 ± 1"]]).splitlines() == [
        "| set    |       acc |",
        "|--------|----------:|",
        "| a      |      1.00 |",
        "| longer | 10.00 ± 1 |",
    ]


def test_markdown_without_rows():
    assert markdown(["a", "b"], []).splitlines() == ["| a | b |", "|---|--:|"]
