"""Temporary files and folders: which of them a process still uses."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def _flock(path: Path, kind: int) -> Iterator[None]:
    """Lock a file or folder itself, or raise an OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Mark a temporary file or folder as in use for the block, or until this process dies."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                stack.enter_context(_flock(path, fcntl.LOCK_SH))
        yield


def is_left_over(path: Path) -> bool:
    """Whether the process that made a temporary file or folder was killed.

    Never where the file system has no advisory locks.
    """
    if fcntl is not None:
        with contextlib.suppress(OSError), _flock(path, fcntl.LOCK_EX):
            return True
    return False
