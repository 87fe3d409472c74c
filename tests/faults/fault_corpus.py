"""A corpus of malformed inputs; each has to give one line and code 2, and nothing written."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

from fault_commands import module
from fault_damage import MARKER, Damage

# Written before the inputs are looked at, and of no consequence.
_HARMLESS = {"guard", ".locks"}


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        script: as Command.script.
        flags: separated by spaces; a space inside a value is written as ␣.
        name: what is wrong with it.
        path: the file that is damaged, a pattern relative to the working folder; None: the flags
            are.
        damage: how.
        words: one of these has to be in the line; default: the file's name.
        guards: the path flag under attack, where code hides in the file.
    """

    script: str
    flags: str
    name: str
    path: str | None = None
    damage: Damage | None = None
    words: tuple[str, ...] = ()
    guards: str | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """Two cases of one identity are one."""
        return self.script, self.flags, self.name, self.path or ""

    def __str__(self) -> str:
        return " | ".join(self.identity)


def listing(folder: Path) -> dict[str, tuple[int, int] | str]:
    """Every file and folder below: size and time of change, which any writing shows."""
    found = {}
    for base, folders, files in os.walk(folder):
        folders[:] = {*folders} - _HARMLESS
        for name in {*folders, *files} - _HARMLESS:
            path = os.path.join(base, name)
            facts = os.lstat(path)
            is_file = stat.S_ISREG(facts.st_mode)
            place = os.path.relpath(path, folder)
            found[place] = (facts.st_size, facts.st_mtime_ns) if is_file else str(facts.st_mode)
    return found


def restore(template: Path, folder: Path) -> None:
    """Make `folder` equal to `template` again."""
    wanted, there = listing(template), listing(folder)
    for name in sorted({*wanted, *there}, reverse=True):  # what is inside goes first
        path = folder / name
        if wanted.get(name) == there.get(name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in sorted(wanted):
        if not (folder / name).exists():
            if (template / name).is_dir():
                (folder / name).mkdir()
            else:
                shutil.copy2(template / name, folder / name)


def problem(case: Case, template: Path, folder: Path) -> str | None:
    """Run a case in `folder`, a copy of `template`; what was wrong with the answer, or None."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        expected = list(case.words)
        if case.path is not None:
            (path,) = Path().glob(case.path)
            case.damage(path)
            expected = expected or [path.name]
        files = listing(folder)
        code, lines = run(case)
        now = listing(folder)
        changed = [name for name in {*files, *now} if files.get(name) != now.get(name)]
        return judge(code, lines, expected, changed)
    finally:
        os.chdir(before)
        restore(template, folder)


def run(case: Case) -> tuple[object, list[str]]:
    """Exit code and what a user would see on stderr, warnings included."""
    argv = [word.replace("␣", " ") for word in case.flags.split()]
    errors = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)  # as Python does
        try:
            code = module(case.script).main(argv)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            return f"{type(error).__name__}: {error}", []
    lines = [line for line in errors.getvalue().splitlines() if line.strip()]
    return code, [f"warning: {w.message}" for w in caught] + lines


def judge(code: object, lines: list[str], expected: list[str], changed: list[str]) -> str | None:
    """What is wrong with an answer, or None."""
    if MARKER in changed:
        return "the payload ran"
    if code != 2:
        return f"exit code {code}: {lines[-1:]}"
    if len(lines) != 1 or not lines[0].startswith("error:"):
        return f"expected one line that begins with error: {lines}"
    if not any(word in lines[0] for word in expected):
        return f"expected one of {expected} in: {lines[0]}"
    if "Traceback" in lines[0] or "weights_only" in lines[0]:
        return lines[0]
    return f"written: {changed}" if changed else None
