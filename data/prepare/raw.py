"""What a raw data set looks like to data.prepare, and what all its readers share.

A reader of a listed set is a function (raw folder, whether to download) -> Source.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.prepare.files import check_not_html
from utils.errors import UserError

_PACKED_SUFFIXES = (".tgz", ".tar", ".gz", ".zip")
_DATA_SUFFIXES = (*_PACKED_SUFFIXES, ".mat", ".npz", "-ubyte")


@dataclass(frozen=True)
class Part:
    """A stretch of one split that fits in memory."""

    images: Sequence[Path] | np.ndarray  # picture files, or uint8 N×H×W or N×H×W×3
    labels: np.ndarray | None  # N int64 class indices; None for unlabelled pictures


@dataclass(frozen=True)
class Source:
    """A raw set.

    The parts of a split ("train" and perhaps "test") are read once, one after another, so that only
    one part of a lazy iterable is in memory.
    """

    origin: str  # for meta.json
    class_names: tuple[str, ...] | None  # None for unlabelled pictures
    splits: dict[str, Iterable[Part]]


def one_part(images: Sequence[Path] | np.ndarray, labels: Sequence[int] | None) -> tuple[Part]:
    """A whole split as one part."""
    return (Part(images, None if labels is None else np.asarray(labels, dtype=np.int64)),)


def file_source(
    origin: str, class_names: Sequence[str] | None, **splits: tuple[list[Path], Sequence[int] | None]
) -> Source:
    """A source whose splits are lists of picture files with labels."""
    names = None if class_names is None else tuple(class_names)
    return Source(origin, names, {name: one_part(*split) for name, split in splits.items()})


def stratified_split(labels: np.ndarray, held_out: Callable[[int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of two parts; `held_out(n)` of a class's n pictures go to the second (seed 0)."""
    generator = np.random.default_rng(0)
    taken = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        taken[generator.permutation(members)[: held_out(len(members))]] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def require_pictures(paths: Sequence[Path], listed_in: Path | str) -> None:
    """Raise a UserError if a listed picture is missing, or none is listed."""
    if missing := [path for path in paths if not path.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{listed_in} names {missing[0]}, which does not exist{more}")
    if not paths:
        raise UserError(f"{listed_in} names no pictures")


def with_subfolders(raw: Path) -> list[Path]:
    """`raw` and the folders in it, sorted; none if it does not exist."""
    return [raw, *sorted(p for p in raw.glob("*") if p.is_dir())] if raw.is_dir() else []


def find_folder(raw: Path, mark: str) -> Path | None:
    """The first of `raw` and its sub-folders that holds `mark` (a path or glob pattern)."""
    return next((folder for folder in with_subfolders(raw) if any(folder.glob(mark))), None)


def locate(raw: Path, download: bool, name: str, help: str, *marks: str) -> Path:
    """The first of `raw` and its sub-folders with all `marks`, for a set that torchvision cannot fetch."""
    by_hand = f"{help}, and give the folder with --raw PATH"
    if download:
        raise UserError(f"--download cannot fetch {name}; {by_hand}")
    if raw.is_file():
        check_not_html(raw)
        raise UserError(f"{raw} is a file; unpack it and give the folder with --raw")
    missing = marks
    for folder in with_subfolders(raw):
        lacking = [mark for mark in marks if not any(folder.glob(mark))]
        if not lacking:
            return folder
        missing = min(missing, lacking, key=len)
    packed = check_data_files(raw)
    hint = f" (unpack {packed[-1]} there first)" if packed else ""
    raise UserError(f"no raw {name} in {raw}: {', '.join(missing)} not found{hint}; {by_hand}")


def check_data_files(raw: Path) -> list[str]:
    """Names of the archives in `raw` and two levels below; refuses web pages among data files."""
    packed = []
    for path in sorted(p for depth in ("*", "*/*", "*/*/*") for p in raw.glob(depth)):
        if path.name.lower().endswith(_DATA_SUFFIXES) and path.is_file():
            check_not_html(path)
            packed += [path.name] if path.name.endswith(_PACKED_SUFFIXES) else []
    return packed
