"""Claims of folders, the run-missing loop, and tables of any family."""

import csv
import io
import json
import os
import re
import signal
import threading
from dataclasses import replace

import pytest

from evaluation.jobs import Job, file_name, run_missing, why_failed
from evaluation.measure import CellStore
from evaluation.tables import Entry, Place, crossed, to_csv, to_latex, with_published_file
from utils.errors import UserError
from utils.progress import duration
from utils.run_folder import InUse, claim_run, is_claimed
from utils.table import markdown


def test_a_claim_ends_with_its_process(tmp_path, holder):
    assert is_claimed(tmp_path / "a")
    holder.kill()
    holder.join()
    assert not is_claimed(tmp_path / "a")


def test_a_claim_is_one_process_and_one_block(tmp_path):
    path = tmp_path / "runs" / "a"
    assert not is_claimed(path)
    with claim_run(path):
        assert is_claimed(path)
        with pytest.raises(InUse, match=rf"\(process {os.getpid()} on "), claim_run(path):
            pass
    assert not is_claimed(path)
    with claim_run(path):
        pass


def test_another_name_of_the_folder_is_the_same_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with claim_run(tmp_path / "real" / "a"), pytest.raises(InUse), claim_run(tmp_path / "link" / "a"):
        pass


def test_a_suspended_process_keeps_its_claim(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    assert is_claimed(tmp_path / "a")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*a\.lock"), claim_run(tmp_path / "file" / "a"):
        pass


def test_threads_append_whole_lines(tmp_path):
    path = tmp_path / "r.jsonl"
    stores = [CellStore(path) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda s=s, i=i: [s.add({"i": i, "k": k}) for k in range(10)])
        for i, s in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(x) for x in path.read_text().splitlines()]) == 40
    assert stores[0].get({"i": 3, "k": 9}) is None  # read when it was opened
    assert CellStore(path).get({"i": 3, "k": 9})["k"] == 9


def test_jobs_run_cheapest_first_and_once(capsys):
    ran = []

    def fail():
        ran.append("bad")
        raise UserError("no data")

    jobs = [
        Job("dear", 9.0, lambda: ran.append("dear")),
        Job("cheap", 1.0, lambda: None),
        Job("bad", 0.0, fail),
    ]
    # A job that leaves nothing behind stays missing; it is not tried for ever.
    assert run_missing(lambda: jobs) == ["bad: no data"]
    assert ran == ["bad", "dear"]
    printed = capsys.readouterr().out
    assert re.findall(r"^\[(\d/\d)\] (\w+)", printed, re.M) == [
        ("1/3", "bad"),
        ("2/3", "cheap"),
        ("3/3", "dear"),
    ]
    assert "skipped: no data" in printed and " left" in printed.split("dear")[1]
    assert printed.endswith("could not be run:\nbad: no data\n\n")


def test_why_a_process_failed(tmp_path):
    log = tmp_path / "a.log"
    assert why_failed(1, log) == "it wrote no log"
    log.write_text("iteration 0: 35 %\n\n")
    assert why_failed(1, log) == f"iteration 0: 35 % ({log})"
    assert why_failed(-9, log) == f"killed by SIGKILL, perhaps out of memory ({log})"
    assert why_failed(-11, log) == f"killed by SIGSEGV ({log})"


def test_names_and_durations():
    assert file_name("CIFAR10, 1 ipc: DM + CLoM cos, α 10") == "CIFAR10-1-ipc-DM-+-CLoM-cos-10"
    assert [duration(s) for s in (40, 720, 12600, 450000)] == ["40 s", "12 min", "3.5 h", "5.2 days"]


ENTRIES = [
    Entry("krr_st", "a & b", (80.0, 81.0, 82.0), True, (80.5, 0.2)),
    Entry("krr_st", "c", (), False, (12.0, None)),
    Entry("x", "a & b", (5.0,), False, None),
    Entry("x", "c", ()),
]


def test_markdown_latex_and_csv_hold_the_same_cells():
    shown = ["81.00 ± 0.82† [80.50 ± 0.20, +0.50]", "– [12.00]", "5.00", "–"]
    assert [entry.shown() for entry in ENTRIES] == shown
    assert [c.strip() for c in markdown(*crossed(ENTRIES)).splitlines()[2].split("|")[1:-1]] == [
        "krr_st",
        *shown[:2],
    ]
    latex = to_latex(*crossed(ENTRIES)).splitlines()
    assert latex[0] == "\\begin{tabular}{lrr}" and latex[1] == "method & a \\& b & c \\\\"
    assert latex[3] == (
        "krr\\_st & 81.00 $\\pm$ 0.82$^\\dagger$ [80.50 $\\pm$ 0.20, $+$0.50] & -- [12.00] \\\\"
    )
    records = list(csv.DictReader(io.StringIO(to_csv(ENTRIES))))
    assert [r["n"] for r in records] == ["3", "0", "1", "0"]
    assert float(records[0]["difference"]) == pytest.approx(0.5) and records[1]["mean"] == ""


def test_published_file_goes_on_top(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"t": {"r": {"c": [2, None]}, "s": {"c": 3}}}))
    known = {("t", "r", "c"): (1.0, 0.1), ("t", "q", "c"): (4.0, 0.1)}
    assert with_published_file(known, path) == {
        ("t", "r", "c"): (2.0, None),
        ("t", "s", "c"): (3.0, None),
        ("t", "q", "c"): (4.0, 0.1),
    }
    assert with_published_file(known, None) == known


PLACE = Place(
    "row",
    "column",
    {"method": "a", "bn": None, "shots": "all"},
    origin=("data", "model"),
    rank=lambda cell: cell["distance"],
    fits=lambda cell: cell.get("lr") != 9,
)


def measured(seed, accuracy, data="x", model="m", **more):
    return {
        "method": "a",
        "seed": seed,
        "accuracy": accuracy,
        "data": data,
        "model": model,
        "distance": 0,
        **more,
    }


def accuracies(*cells):
    return [cell["accuracy"] for cell in PLACE.choose(cells)]


def test_a_place_takes_its_own_cells_alone():
    mine = measured(0, 1.0)
    others = [
        measured(1, 2.0, method="b"),
        measured(2, 3.0, bn="batch"),
        measured(3, 4.0, lr=9),
        measured(4, 5.0, shots="10"),
    ]
    assert accuracies(mine, *others) == [1.0] and accuracies(*others) == []
    assert accuracies({**mine, "bn": None, "shots": "all", "more": 3}) == [1.0]


def test_a_place_shows_the_latest_cell_of_each_seed_by_seed():
    cells = [measured(2, 1.0), measured(0, 2.0), measured(2, 3.0), measured(1, 4.0)]
    assert accuracies(*cells) == [2.0, 4.0, 3.0]


@pytest.mark.parametrize("change", [{"data": "y"}, {"model": "n"}, {"data": None}])
def test_a_place_never_mixes_origins(change):
    old = [measured(s, 1.0) for s in (0, 1, 2)]
    new = [measured(s, 2.0, **change) for s in (0, 1)]
    assert accuracies(*old, *new) == [2.0, 2.0]  # of equal ranks the latest, though it is shorter
    assert accuracies(*new, *old) == [1.0] * 3
    assert accuracies(old[0], *new, *old[1:]) == [1.0] * 3  # the latest cell decides


def test_of_several_origins_the_best_rank_is_shown():
    near, far = measured(0, 1.0, data="near"), measured(0, 2.0, data="far", distance=3)
    assert accuracies(near, far) == accuracies(far, near) == [1.0]


def test_an_entry_holds_the_values_of_the_chosen_cells():
    cells = [measured(1, 3.0), measured(0, 5.0, steps_scale=0.1), measured(0, 9.0, method="b")]
    entry = PLACE.entry(cells)
    assert (entry.row, entry.column, entry.values) == ("row", "column", (5.0, 3.0))
    assert entry.scaled and entry.published is None
    assert not PLACE.entry(cells[:1]).scaled
    assert PLACE.entry([]) == Entry("row", "column", (), False, None)
    several = replace(PLACE, field="accuracies", published=(4.0, 0.5))
    assert several.entry([{**cells[0], "accuracies": [1.0, 2.0]}]) == Entry(
        "row", "column", (1.0, 2.0), False, (4.0, 0.5)
    )
