"""What a raw data set looks like to data.prepare, and the checks that all raw readers share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError

PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
_DATA_SUFFIXES = (".tgz", ".tar", ".gz", ".zip", ".mat", ".npz", "-ubyte")
_PACKED_SUFFIXES = (".tgz", ".tar", ".gz", ".zip")


@dataclass(frozen=True)
class Part:
    """A stretch of one split that fits in memory.

    Attributes:
        images: picture files, or a uint8 array N×H×W or N×H×W×3.
        labels: N class indices from 0, or None for unlabelled pictures.
    """

    images: Sequence[Path] | np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True)
class Source:
    """A raw set: every split is a function that yields its parts, so that one lies in memory.

    Attributes:
        origin: where the pictures came from, for meta.json.
        class_names: one name a class; None for unlabelled pictures.
        splits: "train" and perhaps "test" -> function that yields parts.
        counts: number of pictures by split where known beforehand, for the progress bar.
    """

    origin: str
    class_names: tuple[str, ...] | None
    splits: dict[str, Callable[[], Iterable[Part]]]
    counts: dict[str, int]


def one_part(images: Sequence[Path] | np.ndarray, labels: Sequence[int] | np.ndarray | None):
    """A split function that yields the whole split as one part."""
    own = None if labels is None else np.asarray(labels, dtype=np.int64)
    return lambda: iter((Part(images, own),))


def file_source(
    origin: str,
    class_names: Sequence[str] | None,
    **splits: tuple[list[Path], list[int] | np.ndarray | None],
) -> Source:
    """A source whose splits are lists of picture files with labels."""
    return Source(
        origin,
        None if class_names is None else tuple(class_names),
        {name: one_part(*split) for name, split in splits.items()},
        {name: len(split[0]) for name, split in splits.items()},
    )


def stratified_split(
    labels: np.ndarray, held_out: Callable[[int], int], seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split positions class by class with a generator of its own.

    Args:
        labels: N class indices.
        held_out: number of pictures of a class -> how many of them go to the second part.
        seed: of the NumPy generator.

    Returns:
        Sorted positions of the first and of the second part.
    """
    generator = np.random.default_rng(seed)
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


def locate(raw: Path, *marks: str, what: str, help: str) -> Path:
    """The folder that holds all `marks`: `raw` itself or one of its sub-folders.

    Args:
        raw: where the user said (or the default place).
        marks: relative paths of files or folders that the layout always has.
        what: the set's name, for the message.
        help: how to get it, for the message.

    Raises:
        UserError: nothing there; an archive not unpacked or a saved web page is named.
    """
    if raw.is_file():
        check_not_html(raw)
        raise UserError(f"{raw} is a file; unpack it and give the folder with --raw")
    folders = [raw, *sorted(p for p in raw.glob("*") if p.is_dir())] if raw.is_dir() else []
    for folder in folders:
        if all((folder / mark).exists() for mark in marks):
            return folder
    hint = ""
    for path in _data_files(raw):
        check_not_html(path)
        if path.name.endswith(_PACKED_SUFFIXES):
            hint = f" (unpack {path.name} there first)"
    best = max(folders, key=lambda f: sum((f / mark).exists() for mark in marks), default=raw)
    missing = [mark for mark in marks if not (best / mark).exists()]
    raise UserError(
        f"no raw {what} in {raw}: {', '.join(missing)} not found{hint}; {help}, "
        "and give the folder with --raw PATH"
    )


def _data_files(raw: Path) -> Iterator[Path]:
    """Archives and array files in `raw` and two levels below."""
    if raw.is_dir():
        for path in sorted([*raw.glob("*"), *raw.glob("*/*"), *raw.glob("*/*/*")]):
            if path.name.lower().endswith(_DATA_SUFFIXES) and path.is_file():
                yield path


def check_not_html(path: Path) -> None:
    """Refuse a web page that was saved under the name of a data file.

    Raises:
        UserError: the file starts like HTML.
    """
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError(
            f"{path} holds a web page, not data (a login or error page saved in its place); "
            "delete it and fetch it again"
        )


def check_no_html_archive(raw: Path) -> None:
    """Refuse web pages among the archives in `raw`; raises like `check_not_html`."""
    for path in _data_files(raw):
        check_not_html(path)


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file.

    Raises:
        UserError: missing, not text, or empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a readable text file ({error})") from None
    check_not_html(path)
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


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
