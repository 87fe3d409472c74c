"""Folders that one process at a time may use: who has claimed what.

The locks are the operating system's, by filelock: they end with their process, and a process that
is only suspended keeps its own.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Claims:
    """The claims of one folder, shared by all processes; a link to it means the same claims."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).resolve()

    @contextlib.contextmanager
    def claim(self, name: str, patience: float = 0.3) -> Iterator[bool]:
        """Try to claim `name` (a file name); yields whether it is ours inside the block.

        A process that only asks whether it is held has it for an instant: hence `patience` seconds.
        """
        path = self.folder / f"{name}.lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = FileLock(path).acquire(timeout=patience, poll_interval=0.05)
            with contextlib.suppress(OSError):  # for messages alone
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except Timeout:
            yield False
            return
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        with held:
            yield True

    def held_elsewhere(self, name: str) -> bool:
        """Whether another process works on `name` at present."""
        if not (self.folder / f"{name}.lock").exists():
            return False
        with self.claim(name, patience=0) as free:
            return not free

    def owner(self, name: str) -> str:
        """Who holds `name`, in words."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.folder / f"{name}.lock").read_text() or "another process"
        return "another process"


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
