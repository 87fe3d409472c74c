"""Reading pickled NumPy arrays without running code from the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from data.raw import check_not_html
from utils.errors import UserError


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


def load_pickled_arrays(path: Path) -> Any:
    """Read a pickle of plain containers and arrays, of Python 2 or 3.

    Raises:
        UserError: missing, a web page, damaged, or it names any other global.
    """
    check_not_html(path)
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # the unpickler raises a dozen types on a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is refused or damaged: {reason}") from None
