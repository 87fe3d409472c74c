"""Work shared by several processes on one folder: who has claimed what.

A claim is a file that only one process can create. Its owner touches it every `BEAT` seconds; a
claim is abandoned, and taken over, when its process is dead (seen on the same host) or when it has
not been touched for `ABANDONED` seconds (the only sign from another host). A process that was
suspended for longer loses its claim: its job may then run twice, and the later result counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BEAT = 20.0
ABANDONED = 600.0


@contextlib.contextmanager
def file_lock(handle: int) -> Iterator[None]:
    """Hold the advisory lock of an open file; does nothing where the file system has none."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Mark a temporary file or folder as in use for the block, or until this process dies.

    Without advisory locks nothing is marked, and nothing is ever taken for left over.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def is_left_over(path: Path) -> bool:
    """Whether nobody uses a temporary file or folder: the process that made it was killed."""
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def this_host() -> str:
    """Host name and process-number space: in two containers equal numbers are not one process."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


class Claims:
    """The claims of one folder.

    Args:
        folder: shared by all processes; made at the first claim.
        beat: seconds between touches of a claim that is held.
        abandoned: age in seconds from which an untouched claim may be taken over.
    """

    def __init__(
        self, folder: Path | str, *, beat: float = BEAT, abandoned: float = ABANDONED
    ) -> None:
        self.folder, self.beat, self.abandoned = Path(folder), beat, abandoned
        self._token = secrets.token_hex(8)

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Try to claim `name` (a file name); yields whether it is ours inside the block.

        Raises:
            UserError: the folder cannot be written.
        """
        path = self.folder / f"{name}.lock"
        if not self._take(path):
            yield False
            return
        done = threading.Event()
        beating = threading.Thread(target=self._keep_touching, args=(path, done), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            done.set()
            beating.join()
            with contextlib.suppress(OSError, UserError), self._guard():
                if _owner(path).get("token") == self._token:  # not ours after a takeover
                    path.unlink()

    def held_elsewhere(self, name: str) -> bool:
        """Whether another process works on `name` at present."""
        with self._guard() as now:
            return self._alive(self.folder / f"{name}.lock", now)

    def owner(self, name: str) -> str:
        """Who holds `name`, in words."""
        owner = _owner(self.folder / f"{name}.lock")
        return f"process {owner.get('pid', '?')} on {str(owner.get('host', '?')).split(' ')[0]}"

    @contextlib.contextmanager
    def _guard(self) -> Iterator[float]:
        """One process at a time looks and takes; yields the time by the folder's own clock."""
        path = self.folder / "guard"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            with file_lock(handle):
                os.utime(path)
                yield os.fstat(handle).st_mtime
        finally:
            os.close(handle)

    def _take(self, path: Path) -> bool:
        content = json.dumps({"host": this_host(), "pid": os.getpid(), "token": self._token})
        with self._guard() as now:
            if self._alive(path, now):
                return False
            path.unlink(missing_ok=True)
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:  # only where there are no advisory locks
                return False
            with os.fdopen(handle, "w") as file:
                file.write(content)
        return True

    def _alive(self, path: Path, now: float) -> bool:
        try:
            age = now - path.stat().st_mtime
        except FileNotFoundError:
            return False
        if age > self.abandoned:
            return False
        owner = _owner(path)
        return owner.get("host") != this_host() or _runs(owner.get("pid"))

    def _keep_touching(self, path: Path, done: threading.Event) -> None:
        while not done.wait(self.beat):
            with contextlib.suppress(OSError):
                os.utime(path)


def _owner(path: Path) -> dict:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _runs(pid: object) -> bool:
    """Whether a process of this host is there (a finished one nobody waited for is not)."""
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True
