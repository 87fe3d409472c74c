"""What a raw data set looks like to data.prepare, and what all its readers share.

A reader of a listed set is a function (raw folder, whether to download) -> Source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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


class Entries(NamedTuple):
    """What lies in a folder: sub-folders, pictures and other files, each sorted."""

    folders: list[Path]
    pictures: list[Path]
    others: list[Path]


def entries(folder: Path) -> Entries:
    """What lies directly in a folder; links are followed, hidden files and folders left out.

    A picture is known by its suffix, or by its content where the name has none. A folder that does
    not exist is empty.

    Raises:
        UserError: the folder cannot be read.
    """
    found = Entries([], [], [])
    try:
        with os.scandir(folder) as listed:
            for entry in sorted(listed, key=lambda entry: entry.name):
                if not entry.name.startswith((".", "__MACOSX")):
                    path = Path(entry.path)
                    found[0 if entry.is_dir() else 1 if _is_picture(path) else 2].append(path)
    except FileNotFoundError:
        return found
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror})") from None
    return found


def _is_picture(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in PICTURE_SUFFIXES
    try:
        with open_picture(path):
            return True
    except Exception:  # decoders raise a dozen types
        return False


def pictures_below(folder: Path, above: tuple[str, ...] = ()) -> tuple[list[Path], list[Path]]:
    """The pictures on all levels below `folder`, level by level in sorted order; and other files.

    Raises:
        UserError: a folder that cannot be read, or a link to a folder around it (`above`).
    """
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} is a link to a folder that holds it; remove it")
    folders, pictures, others = entries(folder)
    for inner in folders:
        for mine, theirs in zip((pictures, others), pictures_below(inner, (*above, real)), strict=True):
            mine += theirs
    return pictures, others


def name_others(folder: Path, others: list[Path]) -> None:
    """Say in one line which files of a folder are left out."""
    if others:
        shown = ", ".join(str(path.relative_to(folder)) for path in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        print(f"{folder}: {len(others)} files that are no pictures are left out ({shown}{more})")


def pictures_by_class(folders: Sequence[Path]) -> tuple[list[Path], list[int]]:
    """The pictures of class folders side by side, and their labels in the order of the folders.

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
