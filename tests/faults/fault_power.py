"""A model of a disk whose power is cut: what may be there afterwards, given what was synced.

The content of a file is certain once it was synced, and its name once its folder was; until then a
rename or a removal may have happened or not, each by itself, whatever the order they were made in.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Change:
    """`source` was renamed to `target`, or removed where there is none."""

    source: str
    target: str | None
    content: bytes
    synced: bool  # the content is certain
    certain: bool = False  # the change is


@dataclass
class Recorder:
    """The changes of names in one folder, in order."""

    folder: Path
    changes: list[Change] = field(default_factory=list)
    _synced: dict[int, bytes] = field(default_factory=dict)  # inode -> content at its last sync

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens inside; everything does happen. What is there already is certain."""
        self._synced |= {p.stat().st_ino: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

        def synced(handle: int) -> None:
            fsync(handle)
            facts = os.fstat(handle)
            if stat.S_ISDIR(facts.st_mode):
                for change in self.changes:
                    change.certain = True
            else:
                self._synced[facts.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()

        def replaced(path: Path, target: Path) -> Path:
            self._add(path, Path(target).name)
            return replace(path, target)

        def unlinked(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                self._add(path, None)
            unlink(path, missing_ok)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", synced)
            patch.setattr(Path, "replace", replaced)
            patch.setattr(Path, "unlink", unlinked)
            yield

    def _add(self, path: Path, target: str | None) -> None:
        if path.parent.resolve() == self.folder.resolve():
            content = path.read_bytes()
            synced = self._synced.get(path.stat().st_ino) == content
            self.changes.append(Change(path.name, target, content, synced))

    def aftermaths(self, before: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
        """Every folder (name -> content) that a cut at any moment, or after the end, may leave."""
        seen = set()
        for end in range(len(self.changes) + 1):  # cut after so many changes; later ones never were
            over = end == len(self.changes)
            options = [self._options(change, over) for change in self.changes[:end]]
            for chosen in itertools.product(*options):
                names = dict(before)
                for change, happened in zip(self.changes, chosen, strict=False):
                    if happened is None:
                        names.setdefault(change.source, change.content[: len(change.content) // 2])
                        continue
                    names.pop(change.source, None)
                    if change.target is not None:
                        names[change.target] = happened
                key = tuple(sorted(names.items()))
                if key not in seen:
                    seen.add(key)
                    yield names

    @staticmethod
    def _options(change: Change, over: bool) -> list[bytes | None]:
        """The content under the new name, for each way it may have gone; None: it did not happen."""
        half = change.content[: len(change.content) // 2]
        contents = [change.content] if change.synced or change.target is None else [change.content, half, b""]
        return contents if over and change.certain else [*contents, None]


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def replay(folder: Path, write: Callable[[], None], read: Callable[[], object]) -> list[object]:
    """Record `write`, then `read` after every cut that it may meet; what was read each time."""
    before, recorder, found = contents(folder), Recorder(folder), []
    with recorder.recording():
        write()
    assert recorder.changes, "nothing was recorded"
    for names in recorder.aftermaths(before):
        for path in folder.iterdir():
            path.unlink()
        for name, content in names.items():
            (folder / name).write_bytes(content)
        found.append(read())
    return found
