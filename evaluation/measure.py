"""Measurements: a key names all that a value depends on; what is finished is not measured again.

Several processes, on one node or several, may write the same file.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from evaluation.parallel import in_parallel
from utils import cli
from utils.errors import UserError
from utils.run_folder import environment, read_log, write_json
from utils.table import mean_std

Cell = dict[str, Any]


def read_cells(path: Path | str) -> list[Cell]:
    """All finished cells of a file, oldest first, without foreign lines and those torn by a kill.

    A UserError where the file cannot be read.
    """
    try:
        return [cell for cell in read_log(Path(path), errors="strict") if "id" in cell]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


class CellStore:
    """An append-only results.jsonl of finished cells, each one measurement; its folder is made."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._cells = {cell["id"]: cell for cell in read_cells(self.path)}

    @staticmethod
    def identity(key: dict[str, Any]) -> str:
        """A short digest of the key."""
        return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def get(self, key: dict[str, Any]) -> Cell | None:
        return self._cells.get(self.identity(key))

    def add(self, key: dict[str, Any], **values: Any) -> Cell:
        """Append a finished cell, on the disk before this returns; a UserError where it cannot be written."""
        cell = {"id": self.identity(key), **key, **values}
        line = json.dumps(cell, default=str) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Appending alone is not atomic on network file systems.
            lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
            with lock, self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = "\n" * (file.read() != b"\n") + line  # after one torn by a kill
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._cells[cell["id"]] = cell
        return cell

    def measure(
        self, key: dict[str, Any], compute: Callable[[], dict[str, Any]], shown: Callable[[Cell], str]
    ) -> Cell:
        """The cell of `key`, finished or what `compute` gives, with its seconds; prints it as `shown`."""
        cell, kept = self.get(key), " (kept)"
        if cell is None:
            self._check_writable()
            began, kept = time.perf_counter(), ""
            found = compute()
            cell = self._keep(key, found | {"seconds": time.perf_counter() - began}, shown)
        print(f"{shown(cell)}{kept}", flush=True)
        return cell

    def _check_writable(self) -> None:
        """Raise a UserError now rather than after hours of work, where the file could not be written."""
        place = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not os.access(place, os.W_OK):
            raise UserError(f"cannot write {self.path}: no permission in {place}")

    def _keep(self, key: dict[str, Any], found: dict[str, Any], shown: Callable[[Cell], str]) -> Cell:
        """`add`; what cannot be written is printed."""
        try:
            return self.add(key, **found)
        except UserError:
            print(f"{shown({**key, **found})} (not kept)", flush=True)
            raise

    def measure_all(
        self,
        tasks: Sequence[tuple[dict[str, Any], Callable[[Callable[[], None]], dict[str, Any]]]],
        device: torch.device,
        shown: Callable[[Cell], str],
        again: Sequence[dict[str, Any]] = (),
    ) -> list[Cell]:
        """`measure` for several keys with tasks of `in_parallel`; those in `again`, finished or not."""
        missing = [(key, task) for key, task in tasks if key in again or self.get(key) is None]
        if missing:
            self._check_writable()
        results = in_parallel([task for _, task in missing], device)
        failed: list[UserError] = []
        for (key, _), found in zip(missing, results, strict=True):
            try:
                print(shown(self._keep(key, found, shown)), flush=True)
            except UserError as error:
                failed.append(error)
        if failed:
            raise failed[0]
        return [self.get(key) for key, _ in tasks]


def grouped(cells: Iterable[Cell], by: Callable[[Cell], Hashable]) -> dict[Hashable, list[Cell]]:
    """Cells by what `by` gives, in the order of their first."""
    groups: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(by(cell), []).append(cell)
    return groups


def spread(cells: Sequence[Cell], field: str = "accuracy") -> dict[str, float]:
    """Number, mean and population standard deviation of a field over cells."""
    mean, std = mean_std([cell[field] for cell in cells])
    return {"n": len(cells), "mean": mean, "std": std}


def finish(
    folder: Path,
    flags: Any,
    device: torch.device,
    cells: list[Cell],
    summary: list[dict[str, Any]],
    text: str,
    **more: Any,
) -> None:
    """Write {folder}/results.json with means over seeds, further facts and the table `text`; print that."""
    record = {"flags": cli.as_json(flags), **more, "environment": environment(device)}
    write_json(folder / "results.json", {**record, "table": text, "summary": summary, "cells": cells})
    print(text)
    print(f"results: {folder / 'results.json'}")
