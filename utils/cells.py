"""Results one cell at a time: appended at once, found again after a restart."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from utils.errors import UserError


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
        self._cells: dict[str, dict[str, Any]] = {}
        try:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {self.path}: {error}") from None
        for line in lines:
            try:
                cell = json.loads(line)
                self._cells[cell["id"]] = cell
            except (ValueError, KeyError, TypeError):
                continue  # a line torn by a kill: its cell runs again

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
            with self.path.open("a") as file:
                file.write(("\n" if torn else "") + json.dumps(cell, default=str) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._cells[cell["id"]] = cell
        return cell
