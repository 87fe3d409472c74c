"""Work shared by processes: claims, the run-missing loop, and tables of any family."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.cells import CellStore, read_cells
from utils.errors import UserError
from utils.jobs import Job, claim_name, duration, run_missing
from utils.locks import Claims, this_host
from utils.paper_table import Entry, to_csv, to_latex, to_markdown, with_published_file

ROOT = Path(__file__).resolve().parents[1]

WORKER = """
import os, random, sys, time
from pathlib import Path
from utils.cells import CellStore, read_cells
from utils.jobs import Job, run_missing
from utils.locks import Claims

folder, count, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
path = folder / "results.jsonl"
(folder / f"ready{os.getpid()}").touch()
while len(list(folder.glob("ready*"))) < int(sys.argv[4]):
    time.sleep(0.01)

def work(number):
    with open(folder / "began", "a") as file:
        file.write(f"{number} {os.getpid()}\\n")
    time.sleep(seconds * random.random())
    CellStore(path).add({"number": number}, pid=os.getpid(), filling="x" * 5000)

def missing():
    done = {cell["number"] for cell in read_cells(path)}
    return [Job(f"job {n}", n, lambda n=n: work(n)) for n in range(count) if n not in done]

run_missing(missing, Claims(folder / "claims"))
"""


def worker(folder, count, seconds, together=1):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(count), str(seconds),
         str(together)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_processes_share_the_jobs(tmp_path):
    workers = [worker(tmp_path, 40, 0.04, 2) for _ in range(2)]
    printed = [w.communicate(timeout=60)[0] for w in workers]
    assert [w.returncode for w in workers] == [0, 0], printed
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    cells = [json.loads(line) for line in lines]  # every line is whole
    assert sorted(c["number"] for c in cells) == list(range(40))
    began = [line.split()[0] for line in (tmp_path / "began").read_text().splitlines()]
    assert len(began) == len(set(began)) == 40
    assert len({c["pid"] for c in cells}) == 2  # both did some
    assert [p.name for p in (tmp_path / "claims").iterdir()] == ["guard"]


def test_a_killed_process_leaves_its_job_to_the_others(tmp_path):
    killed = worker(tmp_path, 1, 1e6)
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    claims = Claims(tmp_path / "claims")
    assert claims.held_elsewhere("job-0")
    killed.kill()
    killed.communicate()
    assert not claims.held_elsewhere("job-0")
    other = worker(tmp_path, 1, 0)
    assert other.wait(timeout=30) == 0
    assert len(read_cells(tmp_path / "results.jsonl")) == 1


def lock(folder, host, pid, age=0.0):
    folder.mkdir(exist_ok=True)
    path = folder / "a.lock"
    path.write_text(json.dumps({"host": host, "pid": pid, "token": "theirs"}))
    os.utime(path, (time.time() - age, time.time() - age))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("host", "pid", "age", "free"),
    [
        ("here", "dead", 0, True),
        ("here", "alive", 30, False),
        ("here", "alive", 3600, True),  # it was not touched: another process got that number
        ("elsewhere", "dead", 30, False),
        ("elsewhere", "dead", 3600, True),
    ],
)
def test_when_a_claim_may_be_taken_over(tmp_path, host, pid, age, free):
    number = os.getppid() if pid == "alive" else dead_pid()
    lock(tmp_path / "claims", this_host() if host == "here" else "another host", number, age)
    claims = Claims(tmp_path / "claims")
    assert claims.held_elsewhere("a") != free
    with claims.claim("a") as ours:
        assert ours == free
    assert (tmp_path / "claims/a.lock").exists() != free  # released, or left to its owner


def test_an_unreadable_claim_is_respected_until_it_is_old(tmp_path):
    (tmp_path / "a.lock").write_text("")  # killed between creating and writing
    with Claims(tmp_path).claim("a") as ours:
        assert not ours
    with Claims(tmp_path, abandoned=-1).claim("a") as ours:
        assert ours


def test_a_held_claim_is_touched_and_a_lost_one_is_not_removed(tmp_path):
    claims = Claims(tmp_path, beat=0.02, abandoned=0.5)
    path = tmp_path / "a.lock"
    with claims.claim("a") as ours:
        assert ours
        os.utime(path, (0, 0))
        deadline = time.time() + 10
        while path.stat().st_mtime < 1 and time.time() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1
        with Claims(tmp_path).claim("a") as twice:
            assert not twice
        lock(tmp_path, "another host", 1)  # as if it had been taken over while we were stopped
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    claims = Claims(tmp_path / "file" / "claims")
    with pytest.raises(UserError, match=r"cannot write .*claims"), claims.claim("a"):
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
    assert stores[0].get({"i": 3, "k": 9}) is None
    stores[0].reload()
    assert stores[0].get({"i": 3, "k": 9})["k"] == 9


def test_jobs_run_cheapest_first_and_once(tmp_path, capsys):
    ran = []

    def fail():
        ran.append("bad")
        raise UserError("no data")

    jobs = [Job("dear", 9.0, lambda: ran.append("dear")), Job("cheap", 1.0, lambda: None),
            Job("bad", 0.0, fail)]  # fmt: skip
    # A job that leaves nothing behind stays missing; it is not tried for ever.
    assert run_missing(lambda: jobs, Claims(tmp_path)) == ["bad: no data"]
    assert ran == ["bad", "dear"]
    printed = capsys.readouterr().out
    assert re.findall(r"^\[(\d/\d)\] (\w+)", printed, re.M) == [
        ("1/3", "bad"), ("2/3", "cheap"), ("3/3", "dear"),
    ]  # fmt: skip
    assert "skipped: no data" in printed and " left" in printed.split("dear")[1]
    assert printed.endswith("could not be run:\nbad: no data\n\n")


def test_jobs_of_other_processes_are_left_alone(tmp_path, capsys):
    lock(tmp_path, "another host", 1)
    ran = []
    jobs = [Job("a", 1.0, lambda: ran.append("a")), Job("b", 2.0, lambda: ran.append("b"))]
    run_missing(lambda: jobs, Claims(tmp_path))
    assert ran == ["b"] and "jobs running in other processes: 1" in capsys.readouterr().out


def test_what_another_process_finished_before_our_claim_is_not_run(tmp_path):
    asked = []

    def missing():
        asked.append(1)
        return [Job("a", 1.0, lambda: pytest.fail("ran twice"))] if len(asked) == 1 else []

    assert run_missing(missing, Claims(tmp_path)) == []


def test_names_and_durations():
    assert claim_name("CIFAR10, 1 ipc: DM + CLoM cos, α 10") == "CIFAR10-1-ipc-DM-+-CLoM-cos-10"
    assert [duration(s) for s in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]


ENTRIES = [
    Entry("krr_st", "a & b", (80.0, 81.0, 82.0), True, (80.5, 0.2)),
    Entry("krr_st", "c", (), False, (12.0, None)),
    Entry("x", "a & b", (5.0,), False, None),
    Entry("x", "c", ()),
]


def test_markdown_latex_and_csv_hold_the_same_cells():
    shown = ["81.00 ± 0.82† [80.50 ± 0.20, +0.50]", "– [12.00]", "5.00", "–"]
    assert [entry.shown() for entry in ENTRIES] == shown
    assert [c.strip() for c in to_markdown(ENTRIES).splitlines()[2].split("|")[1:-1]] == [
        "krr_st", *shown[:2],
    ]  # fmt: skip
    latex = to_latex(ENTRIES).splitlines()
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
        ("t", "r", "c"): (2.0, None), ("t", "s", "c"): (3.0, None), ("t", "q", "c"): (4.0, 0.1),
    }  # fmt: skip
    assert with_published_file(known, None) == known
