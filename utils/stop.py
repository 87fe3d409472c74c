"""SIGTERM and Ctrl-C as a request: the loop saves first, then the command leaves."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """A run that was asked to stop has saved; the message says how to go on.

    Like KeyboardInterrupt no Exception: it may arise anywhere, and what a handler of all errors
    would make of it (a damaged file, a failed download) is not what happened.

    Args:
        message: for the user.
        number: the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises `Stopped`: files are closed and claims are given back.

    Loops that can save take over with a StopRequest.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise Stopped("terminated; what was finished is kept", number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Within `with StopRequest() as stop:` a first SIGTERM or Ctrl-C only sets `stop.number`.

    A loop asks `if stop:` where it can save, and then calls `leave`. A second Ctrl-C ends the
    process at once, as ever. Nested ones share the signal; outside the main thread, where Python
    allows no handlers, nothing changes.

    Attributes:
        number: the signal received, or None.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number: int | None = None
        self._where: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.number is not None

    @contextlib.contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """Within the block there is nothing to save: a signal leaves without waiting for its end.

        Args:
            where: as in `leave`.
        """
        self._where = where
        try:
            if self:
                self.leave(where)
            yield
        finally:
            self._where = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self._where is not None:
            self.leave(self._where)

    def leave(self, where: str) -> None:
        """Raise `Stopped`; call once everything is saved.

        Args:
            where: how far the run is, such as "after step 120 of 1000".
        """
        number = self.number or signal.SIGTERM
        raise Stopped(
            f"stopped {where} by {signal.Signals(number).name}; everything is saved, "
            "the same command resumes from there",
            number,
        )
