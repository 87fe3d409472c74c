"""Whole commands whose saves are damaged, or whose disk is too small."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from fault_commands import Command, differing, results
from fault_damage import random_damage
from fault_kills import OUTPUT, Changes, Forked

STATE = "**/state.pt"


def stopped(command: Command, folder: Path, changes: int, rng: random.Random) -> None:
    """Prepare `folder` and kill the command at a place where a save and the one before are there.

    Raises:
        AssertionError: no such place was found.
    """
    for _ in range(20):
        command.prepare(folder)
        Forked(command, folder, Changes(rng.randint(changes // 4, changes // 2))).wait()
        if list(folder.glob(STATE)) and list(folder.glob("**/state.prev.pt")):
            return
        shutil.rmtree(folder)
        folder.mkdir()
    raise AssertionError(f"{command.name} was never caught with two saves")


def recover_damaged(command: Command, folder: Path, changes: int, wanted: dict, rng: random.Random) -> str:
    """Damage the last save of a stopped run, go on; returns what was damaged and how.

    Raises:
        AssertionError: the run failed, or its results differ from `wanted`.
    """
    stopped(command, folder, changes, rng)
    (state,) = folder.glob(STATE)
    how = random_damage(state, rng)
    return finish(command, folder, wanted, f"{state.name} {how}")


def finish(command: Command, folder: Path, wanted: dict, about: str) -> str:
    """Run to the end and compare."""
    code = Forked(command, folder).wait()
    text = (folder / OUTPUT).read_text()
    assert code == 0, f"{command.name}, {about}: exit code {code}: {text[-1500:]}"
    assert "Traceback" not in text, f"{command.name}, {about}: {text[-1500:]}"
    lost = differing(wanted, results(command, folder))
    assert not lost, f"{command.name}, {about}: {lost} differ"
    return about


def small_disk(size: int) -> Callable[[], None]:
    """A `before` for Forked: no file may grow beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def survive_small_disk(command: Command, folder: Path, changes: int, wanted: dict, rng: random.Random) -> int:
    """Let the disk be too small for a stopped run, then large enough; returns the limit in bytes.

    Raises:
        AssertionError: no clear line, a lost save, or other results in the end.
    """
    stopped(command, folder, changes, rng)
    (state,) = folder.glob(STATE)
    previous = state.with_name("state.prev.pt")
    saves = {path: path.read_bytes() for path in (state, previous)}
    before = len((folder / OUTPUT).read_text())
    limit = rng.randint(before + 2000, len(saves[state]) - 1)
    code = Forked(command, folder, small_disk(limit)).wait()
    printed = (folder / OUTPUT).read_text()[before:]
    if code == 0:  # the last save was that of the last step: what remained fitted
        finish(command, folder, wanted, f"disk of {limit} bytes")
        return limit
    assert code == 2, f"{command.name}, {limit} bytes: exit code {code}: {printed[-1500:]}"
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "cannot write" in lines[0], f"{command.name}: {printed[-1500:]}"
    assert "Traceback" not in printed
    finished = list(folder.glob("**/exp*_res_*.pt"))  # an experiment that needs no save any more
    for path, content in saves.items():
        kept = path.read_bytes() == content if path.exists() else finished
        assert kept, f"{command.name}: {path.name} is not the last save"
    finish(command, folder, wanted, f"disk of {limit} bytes")
    return limit
