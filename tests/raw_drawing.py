"""Drawing miniature raw layouts for the tests of data.prepare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data.prepare.raw import Source


def draw(path: Path, value: int = 0, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * 3).save(path)
    return path


def content(source: Source, split: str) -> list[tuple[str, int]]:
    """(file name, label) of every picture of a split of files."""
    (part,) = source.splits[split]
    return [(p.name, int(y)) for p, y in zip(part.images, part.labels, strict=True)]


def cells(*values: str) -> np.ndarray:
    """An N×1 MATLAB cell array of strings."""
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


def structs(*rows: dict) -> np.ndarray:
    """A 1×N MATLAB struct array."""
    array = np.empty((1, len(rows)), dtype=[(key, object) for key in rows[0]])
    for i, row in enumerate(rows):
        array[0, i] = tuple(row.values())
    return array
