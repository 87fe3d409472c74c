"""Killing commands: real processes at random moments, forked ones also at a chosen file operation.

A forked child has torch imported already, so that dozens of starts a minute are possible.
"""

from __future__ import annotations

import importlib
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fault_commands import ROOT, Command, module, results

# What a child's operations on its own files look like to Python's auditing.
_CHANGES = {"os.rename", "os.remove", "os.chmod", "os.mkdir", "os.rmdir", "os.truncate"}
OUTPUT = "output.txt"
# What the commands import late; a fork should find it in memory.
_LATE_IMPORTS = (
    "torch._dynamo",
    "torchvision.transforms.v2",
    "kornia.augmentation",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
)


class Process(Protocol):
    """A started command: the part of Popen that is used here."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def wait(self) -> int:
        """The exit code, at the end."""

    def send_signal(self, number: int) -> None:
        """As `kill -number`."""


def spawn(command: Command, folder: Path) -> subprocess.Popen:
    """The command as a user starts it; it writes into `folder`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (folder / OUTPUT).open("ab") as out:
        return subprocess.Popen(command.line, cwd=folder, env=env, stdout=out, stderr=out)


def preload(command: Command) -> None:
    """Import all that the command needs into this process."""
    module(command.script)
    for name in _LATE_IMPORTS:
        importlib.import_module(name)


class Forked:
    """The command in a fork of this process.

    Args:
        command: what to run.
        folder: its working folder.
        before: called in the child first; it may limit resources or add an audit hook.
    """

    def __init__(self, command: Command, folder: Path, before: Callable[[], object] = lambda: None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                _redirect(folder)
                before()
                code = command.main()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # nothing of the parent is to be tidied up twice

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._ask(os.WNOHANG)

    def wait(self) -> int:
        """The exit code, at the end."""
        return self._ask(0)

    def send_signal(self, number: int) -> None:
        """As `kill -number`; an ended child is left alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ask(self, how: int) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code


def _redirect(folder: Path) -> None:
    """Output of this process goes to `folder`, which becomes its working folder."""
    handle = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Changes:
    """A `before` for Forked that counts the child's changes to its files, and acts at one of them.

    Changes are files below the working folder opened for writing, renamed, removed and so on.

    Args:
        number: which change, from 1; 0: only count.
        then: called in the child just before that change.
    """

    def __init__(self, number: int = 0, then: Callable[[], object] | None = None) -> None:
        self.number, self.then = number, then or die
        self._shared = mmap.mmap(-1, 8)  # the parent sees what the child writes

    def __call__(self) -> None:
        """Watch this process from now on; there is no way back."""
        folder = os.getcwd()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if _changes_a_file(event, arguments) and _is_inside(arguments[0], folder):
                count = self.count + 1
                self._shared[:] = struct.pack("q", count)
                if count == self.number:
                    self.then()

        sys.addaudithook(hook)

    @property
    def count(self) -> int:
        """Changes so far."""
        return struct.unpack("q", self._shared[:])[0]


def _changes_a_file(event: str, arguments: tuple[Any, ...]) -> bool:
    if event != "open":
        return event in _CHANGES
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else bool(set(mode) & {*"wax+"})


def _is_inside(path: object, folder: str) -> bool:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str | os.PathLike) or Path(path).name == OUTPUT:
        return False
    return not os.path.isabs(path) or str(path).startswith(folder)


def die() -> None:
    """End this process as the power does."""
    os.kill(os.getpid(), signal.SIGKILL)


def uninterrupted(command: Command, folder: Path) -> tuple[dict[str, Any], int, float]:
    """Run to the end in a fork: the results, the number of changes to files, seconds.

    Raises:
        AssertionError: it failed.
    """
    preload(command)
    command.prepare(folder)
    began, changes = time.monotonic(), Changes()
    code = Forked(command, folder, changes).wait()
    assert code == 0, f"{command.name}: exit code {code}: {(folder / OUTPUT).read_text()[-2000:]}"
    return results(command, folder), changes.count, time.monotonic() - began


def kill_at_random(start: Callable[[], Process], output: Path, rng: random.Random, longest: float) -> bool:
    """Start, and kill after a random time; returns whether the process was still running.

    Args:
        start: starts the process.
        output: grows once the process is past its imports; the clock starts then, except in one
            case of eight: there has to be a kill in the imports, too.
        rng: of the moment.
        longest: seconds from the first output to the latest kill.
    """
    before = output.stat().st_size if output.exists() else 0
    process = start()
    if rng.random() > 1 / 8:
        while process.poll() is None and (not output.exists() or output.stat().st_size == before):
            time.sleep(0.002)
    moment = time.monotonic() + rng.uniform(0, longest)
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.002)
    alive = process.poll() is None
    if alive:
        process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise AssertionError(f"exit code {code}: {output.read_text()[-2000:]}")
    return alive and code == -signal.SIGKILL


def survive_kills(
    start: Callable[[], Process], output: Path, kills: int, rng: random.Random, longest: float
) -> int:
    """Kill and start again until `kills` have hit, then let it end.

    A run that ends by itself before it is killed ends the series.

    Args:
        start: starts the process.
        output: what it prints, appended.
        kills: at most so many.
        rng: of the moments.
        longest: see `kill_at_random`.

    Returns:
        How many kills have hit.

    Raises:
        AssertionError: a start failed, or printed a traceback.
    """
    hit, code = 0, None
    while hit < kills and kill_at_random(start, output, rng, longest):
        hit += 1
    if hit == kills:
        code = start().wait()
    text = output.read_text(errors="replace")
    if code or "Traceback" in text:
        raise AssertionError(f"after {hit} kills: exit code {code}: {text[-2000:]}")
    return hit
