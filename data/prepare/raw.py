"""What a raw data set looks like to data.prepare, and what all its readers share.

A reader of a listed set is a function (raw folder, whether to download) -> Source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.prepare.files import check_not_html
from utils.errors import UserError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_PACKED_SUFFIXES = (".tgz", ".tar", ".gz", ".zip")
_DATA_SUFFIXES = (*_PACKED_SUFFIXES, ".mat", ".npz", "-ubyte")


@dataclass(frozen=True)
class Part:
    """A stretch of one split that fits in memory.

    Attributes:
        images: picture files, or a uint8 array N×H×W or N×H×W×3.
        labels: N int64 class indices from 0, or None for unlabelled pictures.
    """

    images: Sequence[Path] | np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True)
class Source:
    """A raw set.

    Attributes:
        origin: where the pictures came from, for meta.json.
        class_names: one name per class; None for unlabelled pictures.
        splits: "train" and perhaps "test" -> its parts, read once and one after another, so that
            only one of a lazy iterable lies in memory.
    """

    origin: str
    class_names: tuple[str, ...] | None
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
    """Split positions class by class, the same way every time.

    Args:
        labels: N class indices.
        held_out: number of pictures of a class -> how many of them go to the second part.

    Returns:
        Sorted positions of the first and of the second part.
    """
    generator = np.random.default_rng(0)
    taken = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        taken[generator.permutation(members)[: held_out(len(members))]] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def pictures_below(folder: Path) -> list[Path]:
    """All picture files below `folder`, sorted; hidden files and folders are left out."""
    found = []
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        found += [
            Path(base, name)
            for name in sorted(files)
            if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")
        ]
    return found


def pictures_by_class(folders: Iterable[Path]) -> tuple[list[Path], list[int]]:
    """The pictures of class folders, and their labels in the order of the folders.

    Raises:
        UserError: a folder without pictures.
    """
    files, labels = [], []
    for label, folder in enumerate(folders):
        found = pictures_below(folder)
        if not found:
            raise UserError(f"class folder {folder} holds no pictures; remove or fill it")
        files += found
        labels += [label] * len(found)
    return files, labels


def require_pictures(paths: Sequence[Path], listed_in: Path | str) -> None:
    """Check that every listed picture exists.

    Raises:
        UserError: names the list, the first missing picture and how many are missing.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{listed_in} names {missing[0]}, which does not exist{more}")
    if not paths:
        raise UserError(f"{listed_in} names no pictures")


def with_subfolders(raw: Path) -> list[Path]:
    """`raw` and the folders in it, sorted; none if it does not exist."""
    return [raw, *sorted(p for p in raw.glob("*") if p.is_dir())] if raw.is_dir() else []


def find_folder(raw: Path, *marks: str) -> Path | None:
    """The first of `raw` and its sub-folders that holds all `marks` (paths or glob patterns)."""
    return next((f for f in with_subfolders(raw) if not _missing(f, marks)), None)


def _missing(folder: Path, marks: tuple[str, ...]) -> list[str]:
    return [mark for mark in marks if not any(folder.glob(mark))]


def locate(raw: Path, download: bool, name: str, help: str, *marks: str) -> Path:
    """Find the raw folder of a set that torchvision cannot fetch.

    Args:
        raw: where the user said (or the default place).
        download: whether the user asked for that.
        name: the set's name, for messages.
        help: how to get it, for messages.
        marks: what the layout always has, see `find_folder`.

    Raises:
        UserError: nothing there; an archive not unpacked or a saved web page is named.
    """
    by_hand = f"{help}, and give the folder with --raw PATH"
    if download:
        raise UserError(f"--download cannot fetch {name}; {by_hand}")
    if raw.is_file():
        check_not_html(raw)
        raise UserError(f"{raw} is a file; unpack it and give the folder with --raw")
    found = find_folder(raw, *marks)
    if found is not None:
        return found
    packed = check_data_files(raw)
    hint = f" (unpack {packed[-1]} there first)" if packed else ""
    missing = min((_missing(f, marks) for f in with_subfolders(raw)), key=len, default=marks)
    raise UserError(f"no raw {name} in {raw}: {', '.join(missing)} not found{hint}; {by_hand}")


def check_data_files(raw: Path) -> list[str]:
    """Names of the archives in `raw` and two levels below; refuses web pages among data files."""
    packed = []
    for path in sorted(p for depth in ("*", "*/*", "*/*/*") for p in raw.glob(depth)):
        if path.name.lower().endswith(_DATA_SUFFIXES) and path.is_file():
            check_not_html(path)
            packed += [path.name] if path.name.endswith(_PACKED_SUFFIXES) else []
    return packed
