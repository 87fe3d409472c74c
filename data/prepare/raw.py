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
from data.untrusted import open_picture
from utils.errors import UserError

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpx", ".png", ".apng", ".bmp", ".dib"),
    *(".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
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


def entries(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The sub-folders, pictures and other files directly in a folder, sorted, without hidden ones.

    A picture is known by its suffix, or by its content if the name has none. Links are followed. A
    folder that does not exist is empty.

    Raises:
        UserError: the folder cannot be read.
    """
    folders, pictures, others = [], [], []
    try:
        with os.scandir(folder) as listed:
            for entry in sorted(listed, key=lambda entry: entry.name):
                if not entry.name.startswith((".", "__MACOSX")):
                    path = Path(entry.path)
                    kind = folders if entry.is_dir() else pictures if _is_picture(path) else others
                    kind.append(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror})") from None
    return folders, pictures, others


def _is_picture(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in PICTURE_SUFFIXES
    try:
        with open_picture(path):
            return True
    except Exception:  # decoders raise a dozen types
        return False


def pictures_below(folder: Path, above: tuple[str, ...] = ()) -> tuple[list[Path], list[Path]]:
    """The pictures on all levels below `folder` in sorted order, and the other files.

    Raises:
        UserError: a folder that cannot be read, or a link to a folder that contains it (`above`).
    """
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} is a link to a folder that contains it; remove it")
    folders, pictures, others = entries(folder)
    for inner in folders:
        more_pictures, more_others = pictures_below(inner, (*above, real))
        pictures += more_pictures
        others += more_others
    return pictures, others


def name_others(folder: Path, others: list[Path]) -> None:
    """Print in one line which files of a folder are left out."""
    if others:
        shown = ", ".join(str(path.relative_to(folder)) for path in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        print(f"{folder}: {len(others)} files that are not pictures are left out ({shown}{more})")


def pictures_by_class(folders: Sequence[Path]) -> tuple[list[Path], list[int]]:
    """The pictures of class folders, and their labels in the order of the folders.

    Raises:
        UserError: a folder that cannot be read or has no pictures.
    """
    files, labels, others = [], [], []
    for label, folder in enumerate(folders):
        found, rest = pictures_below(folder)
        if not found:
            raise UserError(f"class folder {folder} holds no pictures; remove or fill it")
        files += found
        others += rest
        labels += [label] * len(found)
    name_others(folders[0].parent, others)
    return files, labels


def require_pictures(paths: Sequence[Path], listed_in: Path | str) -> None:
    """Raise a UserError if a listed picture is missing, or none is listed."""
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
    """Like `find_folder`, for the set `name`, which torchvision cannot fetch; `help` says how to get it.

    Raises:
        UserError: not found; names an archive that is still packed, or a web page saved in its place.
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
