"""Commands killed at any moment, started again, end as if nothing had happened.

The full versions, with real processes and all commands, are in the soak (`make soak`).
"""

import multiprocessing
import os
import random
import select
import shutil
import signal
import time

import pytest
from fault_commands import COMMANDS, differing, results
from fault_kills import OUTPUT, Changes, Forked, spawn, survive_kills, uninterrupted

from data.prepare import write

SEED = 20240607
SHORT = {
    "train.py": COMMANDS["train.py"].but(outer_iteration=8, eval_every=4, print_every=2),
    "krr_st.target": COMMANDS["krr_st.target"].but(epochs=6),
    "main.py DM": COMMANDS["main.py DM"].but(Iteration=6, num_exp=1),
    "data.prepare": COMMANDS["data.prepare"],
}


@pytest.fixture(scope="module", params=SHORT)
def whole(request, tmp_path_factory):
    """A command, what its uninterrupted run leaves, its changes to files, its seconds."""
    command = SHORT[request.param]
    return command, *uninterrupted(command, tmp_path_factory.mktemp("whole"))


def left_overs(folder):
    return [str(p) for p in folder.rglob(".*") if p.name != ".locks" and p.parent.name != ".locks"]


def test_killed_before_a_change_to_its_files(whole, tmp_path):
    """Twice in a row, at places drawn from the whole run: between any two file operations."""
    command, wanted, changes, _ = whole
    rng = random.Random(SEED)
    command.prepare(tmp_path)
    for number in (rng.randint(changes * 2 // 5, changes // 2), rng.randint(1, changes // 6)):
        assert Forked(command, tmp_path, Changes(number)).wait() in (-9, 0), number
    assert Forked(command, tmp_path).wait() == 0, (tmp_path / OUTPUT).read_text()
    assert differing(wanted, results(command, tmp_path)) == []
    if command.name != "data.prepare":  # the same result from a new start would prove nothing
        assert "resuming after" in (tmp_path / OUTPUT).read_text()
    assert left_overs(tmp_path) == []  # a killed writer's temporary files are as large as its saves


def test_killed_at_random_moments(whole, tmp_path):
    command, wanted, _, seconds = whole
    if command.name != "train.py":
        pytest.skip("the soak kills the others")
    command.prepare(tmp_path)
    output = tmp_path / OUTPUT
    hit = survive_kills(lambda: Forked(command, tmp_path), output, 3, random.Random(SEED), seconds / 2)
    assert hit, "no kill hit: the run is too short"
    assert differing(wanted, results(command, tmp_path)) == []


@pytest.mark.parametrize("name", ["x_syn.pt", "log.jsonl"])
def test_the_harness_sees_a_lost_byte(tmp_path, name):
    command = SHORT["train.py"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        command.prepare(tmp_path / folder)
        run = tmp_path / folder / "results/run"
        run.mkdir(parents=True)
        for path in ("config.json", "log.jsonl", "results.json"):
            (run / path).write_text('{"step": 1, "seconds": 1.5}\n')
        for path in ("x_syn.pt", "y_syn.pt"):
            source = tmp_path / folder / "synthetic_data/tiny/krr_st" / path
            (run / path).write_bytes(source.read_bytes())
        (run / "x_syn.png").write_bytes(b"")
        (run / "loss.png").write_bytes(b"")
    first = results(command, tmp_path / "one")
    assert differing(first, results(command, tmp_path / "two")) == []
    path = tmp_path / "two/results/run" / name
    if name == "x_syn.pt":
        path.write_bytes((tmp_path / "two/results/run/y_syn.pt").read_bytes())
    else:
        path.write_text('{"step": 2, "seconds": 1.5}\n')
    assert differing(first, results(command, tmp_path / "two")) == [f"results/run/{name}"]
    path.unlink()
    with pytest.raises(AssertionError, match="does not exist"):
        results(command, tmp_path / "two")


def die_beside_workers():
    """Let this process die when the first rows reach it from one of its workers."""

    def update(bar, count):
        assert len(multiprocessing.active_children()) == 2
        os.kill(os.getpid(), signal.SIGKILL)

    write._Bar.update = update


def test_workers_end_with_the_process_they_work_for(tmp_path):
    command = COMMANDS["data.prepare"].but(workers=2)
    command.prepare(tmp_path)
    for picture in (tmp_path / "pictures/class0").glob("*.png"):
        for number in range(20):
            shutil.copy(picture, picture.with_name(f"{picture.stem}_{number}.png"))
    mine, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    assert Forked(command, tmp_path, die_beside_workers).wait() == -9
    os.close(theirs)
    ready, _, _ = select.select([mine], [], [], 4)
    assert ready and os.read(mine, 1) == b""  # nobody holds the other end any more
    os.close(mine)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_real_processes_killed_at_random_moments(tmp_path, name):
    command = COMMANDS[name]
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        command.prepare(folder)
    began = time.monotonic()
    assert spawn(command, folders[0]).wait() == 0
    seconds = time.monotonic() - began
    survive_kills(
        lambda: spawn(command, folders[1]), folders[1] / OUTPUT, 3, random.Random(SEED), seconds / 3
    )
    assert differing(*(results(command, folder) for folder in folders)) == []
