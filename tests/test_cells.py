"""Finished cells on disk, and the tables made of them."""

import json

import numpy as np
import pytest

from utils.cells import CellStore
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


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lr": 0.2}, {"recipe": {"epochs": 4}}, {"more": None}]
)
def test_any_other_setting_is_another_cell(tmp_path, change):
    store = CellStore(tmp_path / "r.jsonl")
    store.add(KEY, accuracy=1.0)
    assert store.get({**KEY, **change}) is None


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
    [([95.0, 96.0], 2, "95.50 ± 0.50"), ([1.0, 2.0, 4.5], 1, "2.5 ± 1.5"), ([95.204], 2, "95.20"),
     ([], 2, "–")],
)  # fmt: skip
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
