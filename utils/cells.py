"""Results one cell at a time: appended at once, found again after a restart.

Several processes, on one node or several, may write the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.locks import file_lock


def read_cells(path: Path | str) -> list[dict[str, Any]]:
    """All finished cells of a file, oldest first; torn and foreign lines are left out.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    cells = []
    for line in lines:
        try:
            cell = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line torn by a kill: its cell runs again
        if isinstance(cell, dict) and "id" in cell:
            cells.append(cell)
    return cells


class CellStore:
    """An append-only results.jsonl of finished cells.

    A cell is one measurement, identified by everything its value depends on.

    Args:
        path: the file; its folder is made.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.reload()

    def reload(self) -> None:
        """Read the file again: other processes may have added cells."""
        self._cells = {cell["id"]: cell for cell in read_cells(self.path)}

    @staticmethod
    def identity(key: dict[str, Any]) -> str:
        """A short digest of the key."""
        text = json.dumps(key, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The finished cell of `key`, or None."""
        return self._cells.get(self.identity(key))

    def add(self, key: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Append a finished cell and return it; on the disk before this returns.

        Raises:
            UserError: the file cannot be written.
        """
        cell = {"id": self.identity(key), **key, **values}
        line = json.dumps(cell, default=str) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                with file_lock(handle):  # O_APPEND alone is not atomic on network file systems
                    _append(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._cells[cell["id"]] = cell
        return cell


def _append(handle: int, line: bytes) -> None:
    """Write a whole line at once; a last line torn by a kill is closed first."""
    end = os.lseek(handle, 0, os.SEEK_END)
    if end:
        os.lseek(handle, end - 1, os.SEEK_SET)
        if os.read(handle, 1) != b"\n":
            line = b"\n" + line
    written = os.write(handle, line)
    if written != len(line):
        raise OSError(f"{written} of {len(line)} bytes written")
    os.fsync(handle)
