"""Which reader belongs to which prepared folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data import raw_arrays
from data.raw import Source

# (raw folder, whether to download) -> source, by the name of the prepared folder.
SOURCES: dict[str, Callable[[Path, bool], Source]] = {
    "digits": raw_arrays.read_digits,
}
