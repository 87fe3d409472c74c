"""Reading the files of raw sets, text lists and arrays, without running code from them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError


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


def load_arrays(path: Path, *keys: str) -> list[Any]:
    """The values under `keys` in an .npz file, a MATLAB file or a pickled dict (any other suffix).

    Raises:
        UserError: missing, a web page, damaged, without one of the keys, or a pickle that names
            anything but plain containers and arrays.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    check_not_html(path)
    read, kind = _READERS.get(path.suffix, (_read_pickle, "a pickle of plain arrays"))
    try:
        content = read(path, keys)
    except Exception as error:  # the readers raise a dozen types on a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or not {kind} ({reason})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a dict with {' and '.join(keys)}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{path} has no variable {', '.join(missing)}")
    return [content[key] for key in keys]


def _read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in keys if key in archive}


def _read_mat(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    from scipy.io import loadmat

    return loadmat(path, variable_names=keys)


def _read_pickle(path: Path, keys: tuple[str, ...]) -> Any:
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()  # of Python 2, too


_READERS = {".npz": (_read_npz, "an .npz file"), ".mat": (_read_mat, "a MATLAB file")}


def _latin1(text: str, codec: str) -> bytes:
    """What `_codecs.encode` does in pickles that Python 3 writes for Python 2; nothing else."""
    if codec != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode to {codec}")
    return text.encode("latin1")


# The globals that NumPy itself writes for plain arrays, old and new module names.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[_core + ".multiarray", "_reconstruct"] = np._core.multiarray._reconstruct
    _ALLOWED[_core + ".numeric", "_frombuffer"] = np._core.numeric._frombuffer


class _ArrayUnpickler(pickle.Unpickler):
    """Knows arrays and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"loading it would run {module}.{name}")
        return _ALLOWED[module, name]
