"""Any folder of images as a data set: class sub-folders, a train/val pair, or loose pictures."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np

from data.raw import PICTURE_SUFFIXES, Source, file_source, pictures_below, stratified_split
from utils.errors import UserError

_HELD_OUT = ("val", "valid", "validation", "test")


def read_folder(path: Path, *, val_fraction: float = 0.0, unlabelled: bool = False) -> Source:
    """Read a folder of images.

    With `train/` beside `val/` (or valid, validation, test) each is read as its own split; so is a
    lone `train/`. Otherwise sub-folders are classes, sorted by name, with the pictures of all
    levels below them; pictures lying directly in the folder have no labels.

    Args:
        path: the folder.
        val_fraction: share of every class (at least one picture where there are two) that becomes
            the test split; drawn once with seed 0.
        unlabelled: take all pictures on all levels, without labels.

    Raises:
        UserError: no pictures, an empty class folder, class names that differ only in spelling,
            pictures beside class folders, or splits whose classes differ.
    """
    if not path.is_dir():
        raise UserError(f"--from_folder {path} is not a folder")
    origin = f"folder {path.name}"
    below = {p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")}
    held_out = [name for name in _HELD_OUT if name in below]
    if "train" in below and (held_out or below == {"train"}):
        if held_out:
            return _read_pair(path, held_out, val_fraction, unlabelled, origin)
        path = path / "train"
    names, files, labels = _read_split(path, unlabelled)
    if not val_fraction:
        return file_source(origin, names, train=(files, labels))
    strata = np.zeros(len(files), dtype=np.int64) if labels is None else np.asarray(labels)
    train, test = stratified_split(
        strata, lambda n: min(n - 1, max(1, round(val_fraction * n))) if n > 1 else 0
    )
    if not len(test):
        raise UserError(f"{path} has too few pictures for --val_fraction {val_fraction}")
    picked = [
        ([files[i] for i in rows], None if labels is None else strata[rows])
        for rows in (train, test)
    ]
    return file_source(origin, names, train=picked[0], test=picked[1])


def _read_pair(
    path: Path, held_out: list[str], val_fraction: float, unlabelled: bool, origin: str
) -> Source:
    """Read `train/` and the first of the held-out folders."""
    if val_fraction:
        raise UserError(
            f"{path} has {held_out[0]}/ already; --val_fraction is for a folder without one"
        )
    if len(held_out) > 1:
        print(f"{held_out[0]}/ becomes the test split; {', '.join(held_out[1:])} is left out")
    names, files, labels = _read_split(path / "train", unlabelled)
    other_names, other_files, other_labels = _read_split(path / held_out[0], unlabelled)
    if (names is None) != (other_names is None):
        flat, sorted_in = ("train", held_out[0]) if names is None else (held_out[0], "train")
        raise UserError(
            f"{path}: {sorted_in}/ has class folders and {flat}/ has none; "
            "give both the same layout, or leave the labels out with --unlabelled"
        )
    if names != other_names:
        odd = sorted(set(names) ^ set(other_names))
        raise UserError(
            f"{path}: train/ and {held_out[0]}/ differ in {len(odd)} class folders "
            f"({', '.join(odd[:5])})"
        )
    return file_source(origin, names, train=(files, labels), test=(other_files, other_labels))


def _read_split(
    path: Path, unlabelled: bool
) -> tuple[list[str] | None, list[Path], list[int] | None]:
    """Class names, picture files and labels of one folder; no names or labels if it is flat."""
    entries = [p for p in sorted(path.iterdir()) if not p.name.startswith((".", "__MACOSX"))]
    loose = [p for p in entries if p.is_file() and p.name.lower().endswith(PICTURE_SUFFIXES)]
    classes = [p for p in entries if p.is_dir()]
    if unlabelled or (loose and not classes):
        files = pictures_below(path)
        if not files:
            raise UserError(f"{path} holds no pictures ({' '.join(PICTURE_SUFFIXES)})")
        return None, files, None
    if not classes:
        raise UserError(f"{path} holds no pictures ({' '.join(PICTURE_SUFFIXES)})")
    if loose:
        raise UserError(
            f"{path} holds {len(loose)} loose pictures (such as {loose[0].name}) beside "
            f"{len(classes)} sub-folders; sort them in, or leave all labels out with --unlabelled"
        )
    _check_names([p.name for p in classes], path)
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = pictures_below(folder)
        if not found:
            raise UserError(f"class folder {folder} holds no pictures; remove or fill it")
        files += found
        labels += [label] * len(found)
    return [p.name for p in classes], files, labels


def _check_names(names: list[str], path: Path) -> None:
    """Refuse class names that differ only in case, spaces or Unicode form."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFKC", name).strip().casefold()
        if key in seen:
            raise UserError(f"{path} has class folders {seen[key]!r} and {name!r}; merge them")
        seen[key] = name
