"""Any folder of images as a data set: class sub-folders, a train/val pair, or loose pictures."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.prepare.raw import Source, file_source, stratified_split
from data.untrusted import open_picture
from utils.errors import UserError

_PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpx", ".png", ".apng", ".bmp", ".dib"),
    *(".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
_TRAIN, _HELD_OUT = ("train", "training"), ("val", "valid", "validation", "test", "testing")


def read_folder(path: Path, *, val_fraction: float = 0.0, unlabelled: bool = False) -> Source:
    """Read a folder of images.

    With `train/` beside `val/` (or training; valid, validation, test, testing; in any case) each is read as
    its own split; so is a lone `train/`. Otherwise sub-folders are classes, sorted by name, with the pictures
    of all levels below them; a folder without sub-folders has no labels. `unlabelled` takes the pictures of
    all levels, without labels. `val_fraction` of every class (at least one picture, but not its only
    one) becomes the test split, drawn with seed 0. A UserError for no pictures, an empty class folder, class
    names that differ only in spelling, pictures beside class folders or splits, and splits whose classes
    differ.
    """
    if not path.is_dir():
        raise UserError(f"--from_folder {path} is not a folder")
    origin = f"folder {path.name}"
    folders, loose, others = _entries(path)
    named = {folder.name.lower(): folder for folder in folders}
    train_folder = next((named[name] for name in _TRAIN if name in named), None)
    held_out = [named[name] for name in _HELD_OUT if name in named]
    if train_folder and (held_out or len(folders) == 1):
        if loose:
            raise UserError(
                f"{path} holds {len(loose)} loose pictures (such as {loose[0].name}) beside "
                f"{train_folder.name}/; sort them in, or remove them"
            )
        _name_others(path, others)
    if train_folder and held_out:
        test_folder = held_out[0]
        if val_fraction:
            raise UserError(
                f"{path} has {test_folder.name}/ already; --val_fraction is for a folder without one"
            )
        if spare := [folder.name for folder in folders if folder not in (train_folder, test_folder)]:
            print(f"{test_folder.name}/ becomes the test split; left out: {', '.join(spare)}")
        names, *train = _read_split(train_folder, unlabelled)
        test_names, *test = _read_split(test_folder, unlabelled)
        _check_same_classes(path, test_folder.name, names, test_names)
        return file_source(origin, names, train=train, test=test)
    path = train_folder if folders == [train_folder] else path
    names, files, labels = _read_split(path, unlabelled)
    if not val_fraction:
        return file_source(origin, names, train=(files, labels))
    strata = np.zeros(len(files), dtype=np.int64) if labels is None else np.asarray(labels)
    train, test = (
        ([files[i] for i in rows], None if labels is None else strata[rows])
        for rows in stratified_split(strata, lambda n: min(n - 1, max(1, round(val_fraction * n))))
    )
    if not test[0]:
        raise UserError(f"{path} has too few pictures for --val_fraction {val_fraction}")
    return file_source(origin, names, train=train, test=test)


def _check_same_classes(path: Path, held_out: str, train: list[str] | None, test: list[str] | None) -> None:
    """Refuse splits whose class folders differ."""
    if (train is None) != (test is None):
        flat, sorted_in = ("train", held_out) if train is None else (held_out, "train")
        raise UserError(
            f"{path}: {sorted_in}/ has class folders and {flat}/ has none; "
            "give both the same layout, or leave the labels out with --unlabelled"
        )
    if train != test:
        odd = sorted(set(train) ^ set(test))
        raise UserError(
            f"{path}: train/ and {held_out}/ differ in {len(odd)} class folders ({', '.join(odd[:5])})"
        )


def _read_split(path: Path, unlabelled: bool) -> tuple[list[str] | None, list[Path], list[int] | None]:
    """Class names, picture files and labels of one folder; no names or labels if it is flat."""
    classes, loose, others = _entries(path)
    if unlabelled or not classes:
        files, others = _pictures_below(path)
        if not files:
            raise UserError(f"{path} holds no pictures ({' '.join(_PICTURE_SUFFIXES)})")
        _name_others(path, others)
        return None, files, None
    if loose:
        raise UserError(
            f"{path} holds {len(loose)} loose pictures (such as {loose[0].name}) beside "
            f"{len(classes)} sub-folders; sort them in, or leave all labels out with --unlabelled"
        )
    names = [p.name for p in classes]
    _check_names(names, path)
    _name_others(path, others)
    return names, *pictures_by_class(classes)


def _check_names(names: list[str], path: Path) -> None:
    """Refuse class names that differ only in case, spaces or Unicode form."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFKC", name).strip().casefold()
        if key in seen:
            raise UserError(f"{path} has class folders {seen[key]!r} and {name!r}; merge them")
        seen[key] = name


def _entries(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The sub-folders, pictures and other files directly in a folder, sorted, without hidden ones.

    A picture is known by its suffix, or by its content if the name has none. Links are followed. A
    folder that does not exist is empty; one that cannot be read is a UserError.
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
        return path.suffix.lower() in _PICTURE_SUFFIXES
    try:
        with open_picture(path):
            return True
    except Exception:  # decoders raise a dozen types
        return False


def _pictures_below(folder: Path, above: tuple[str, ...] = ()) -> tuple[list[Path], list[Path]]:
    """The pictures on all levels below `folder` in sorted order, and the other files; `above` for loops."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} is a link to a folder that contains it; remove it")
    folders, pictures, others = _entries(folder)
    for inner in folders:
        more_pictures, more_others = _pictures_below(inner, (*above, real))
        pictures += more_pictures
        others += more_others
    return pictures, others


def _name_others(folder: Path, others: list[Path]) -> None:
    """Print in one line which files of a folder are left out."""
    if others:
        shown = ", ".join(str(path.relative_to(folder)) for path in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        line = f"{folder}: {len(others)} files that are not pictures are left out ({shown}{more})"
        print(line.encode(errors="backslashreplace").decode())  # names need not be UTF-8


def pictures_by_class(folders: Sequence[Path]) -> tuple[list[Path], list[int]]:
    """The pictures of class folders, each of which must have some, and their labels in folder order."""
    files, labels, others = [], [], []
    for label, folder in enumerate(folders):
        found, rest = _pictures_below(folder)
        if not found:
            raise UserError(f"class folder {folder} holds no pictures; remove or fill it")
        files += found
        others += rest
        labels += [label] * len(found)
    _name_others(folders[0].parent, others)
    return files, labels
