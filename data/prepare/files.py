"""Reading the files of raw sets, text lists and arrays, without running code from them."""

from __future__ import annotations

import math
import pickle
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.untrusted import SMALL, check_growth, check_regular, check_zip
from utils.errors import UserError, first_line

_MAT_COMPRESSED = 15  # the type of an element, MATLAB's "MAT-File Level 5"


def check_not_html(path: Path) -> None:
    """Raise a UserError if a file starts like a web page, or is a pipe or a device."""
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError(
            f"{path} holds a web page, not data (a login or error page saved in its place); "
            "delete it and fetch it again"
        )


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file, which must have one (UserError)."""
    try:
        check_not_html(path)
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a readable text file ({error})") from None
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def load_arrays(path: Path, *keys: str) -> list[Any]:
    """The values under `keys` in an .npz file, a MATLAB file or a pickled dict (any other suffix).

    A UserError for a file that is missing, a web page, damaged, without one of the keys, far larger unpacked
    than packed, or a pickle that names anything but plain containers and arrays of numbers.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    check_not_html(path)
    read, kind = _READERS.get(path.suffix, (_read_pickle, "a pickle of plain arrays"))
    try:
        content = read(path, keys)
    except UserError:
        raise
    except Exception as error:  # the readers raise a dozen types on a damaged file
        raise UserError(f"{path} is damaged or not {kind} ({first_line(error)})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a dict with {' and '.join(keys)}")
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path} has no variable {', '.join(missing)}")
    return [content[key] for key in keys]


def _read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    check_zip(path)
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in keys if key in archive}


def _read_mat(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    from scipy.io import loadmat

    _check_mat(path)
    return loadmat(path, variable_names=keys)


def _check_mat(path: Path) -> None:
    """Check the unpacked length of each compressed variable of a MATLAB 5 file, piece by piece."""
    with path.open("rb") as file:
        header = file.read(128)
        if 0 in header[:4]:  # MATLAB 4, which compresses nothing
            return
        order = "<" if header[126:] == b"IM" else ">"
        while len(tag := file.read(8)) == 8:
            kind, size = struct.unpack(f"{order}II", tag)
            if kind != _MAT_COMPRESSED:
                file.seek(size, 1)
                continue
            packed, unpacked = file.read(min(size, path.stat().st_size)), 0
            inflate = zlib.decompressobj()
            rest = packed
            while rest and not inflate.eof:
                unpacked += len(inflate.decompress(rest, SMALL))
                check_growth(path, len(packed), unpacked)
                rest = inflate.unconsumed_tail


def _read_pickle(path: Path, keys: tuple[str, ...]) -> Any:
    with path.open("rb") as file:
        content = _Parser(file, encoding="latin1").load()  # of Python 2, too
    if not isinstance(content, dict):
        return content
    return {key: _array(value) if isinstance(value, _Named) else value for key, value in content.items()}


_READERS = {".npz": (_read_npz, "an .npz file"), ".mat": (_read_mat, "a MATLAB file")}

# What NumPy writes for plain arrays, by its old and new module names.
_ARRAY_NAMES = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (f"{core}.{module}", name)
    for core in ("numpy.core", "numpy._core")
    for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
}


class _Named:
    """What a pickle names, with the arguments and the state it would get: recorded, never run."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name, self.arguments, self.state = name, arguments, ()

    def __call__(self, *arguments: Any) -> _Named:
        return _Named(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Parser(pickle._Unpickler):
    """Plain containers, and a `_Named` for each array; imports nothing.

    Based on the unpickler in Python: that in C reserves memory for any index or length a file claims.
    """

    def find_class(self, module: str, name: str) -> _Named:
        if (module, name) not in _ARRAY_NAMES:
            raise pickle.UnpicklingError(f"loading it would run {module}.{name}")
        return _Named(name)


def _array(named: _Named) -> np.ndarray:
    """The numbers that a `_Named` describes; the content must have exactly their length."""
    if named.name == "_reconstruct":
        _, shape, dtype, column_major, content = named.state
    elif named.name == "_frombuffer":
        content, dtype, shape, order = named.arguments
        column_major = order == "F"
    else:
        raise pickle.UnpicklingError(f"{named.name} in place of an array")
    if isinstance(content, _Named) and content.name == "encode":  # bytes in protocol 2
        content, _ = content.arguments
    if isinstance(content, str):
        content = content.encode("latin1")
    dtype = _dtype(dtype)
    if not isinstance(content, bytes | bytearray) or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array without shape and bytes")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"{len(content)} bytes for an array of shape {shape}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if column_major else "C")


def _dtype(named: _Named) -> np.dtype:
    """A type of plain numbers."""
    code, byte_order = named.arguments[0], named.state[1]
    if named.name != "dtype" or not re.fullmatch("b1|[iu][1248]|f[248]", code):
        raise pickle.UnpicklingError(f"an array of {code}, expected plain numbers")
    return np.dtype(code).newbyteorder(byte_order)
