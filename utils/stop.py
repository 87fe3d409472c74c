"""SIGTERM, SIGHUP, SIGUSR2 and Ctrl-C as a request: the loop saves first, then the command ends.

SIGUSR2 is what schedulers are commonly told to send before a time limit, SIGHUP comes of a closed terminal.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

TIME_LIMIT = getattr(signal, "SIGUSR2", signal.SIGTERM)  # Windows has none
HANG_UP = getattr(signal, "SIGHUP", signal.SIGTERM)


def drop_if_closed(output: int) -> bool:
    """Whether nobody is left at the other end of a file descriptor; what is written there is dropped then."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


class Stopped(BaseException):
    """A run that was asked to stop by signal `number` has saved; the message says how to resume.

    No Exception, like KeyboardInterrupt: a handler of all errors would take it for another one.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Within the block `handler` takes the signals; Python allows it in the main thread alone."""

    def hung_up(number: int, frame: FrameType | None) -> None:
        for output in (1, 2):  # of a closed terminal: printing would fail before the save
            drop_if_closed(output)
        handler(number, frame)

    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = dict.fromkeys(numbers, handler)
        if signal.getsignal(HANG_UP) is not signal.SIG_IGN:  # as under nohup
            handlers[HANG_UP] = hung_up
        before = {number: signal.signal(number, act) for number, act in handlers.items()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def end_with_parent(worker: int = 0) -> None:
    """In a child process: leave Ctrl-C to the parent, and exit when it does, even if it is killed.

    It fits `worker_init_fn` of a DataLoader, which gives the number of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _when_parent_ends(lambda: os._exit(1))


def stop_with_parent() -> None:
    """In a child process: be asked to stop when the parent ends, even if it is killed; a loop saves first."""
    _when_parent_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))


def _when_parent_ends(act: Callable[[], None]) -> None:
    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        act()

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM, SIGHUP and SIGUSR2 raise `Stopped`.

    Loops that can save take over with a StopRequest.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise Stopped("terminated; what was finished is kept", number)

    with _handled(leave, signal.SIGTERM, TIME_LIMIT):
        yield


class StopRequest:
    """Within `with StopRequest() as stop:` a signal, or the first Ctrl-C, only sets `stop.number`.

    A loop asks `if stop:` where it can save, and then calls `leave`. A second Ctrl-C ends the
    process at once. Outside the main thread nothing changes.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._where: str | None = None
        self._handled = _handled(self._note, signal.SIGTERM, TIME_LIMIT, signal.SIGINT)

    def __enter__(self) -> StopRequest:
        self._handled.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handled.__exit__(*error)

    def __bool__(self) -> bool:
        return self.number is not None

    @contextlib.contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """Within the block, where everything is saved, a signal leaves at once."""
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
        """Raise `Stopped`, once everything is saved; `where`: "after step 120 of 1000"."""
        number = self.number or signal.SIGTERM
        raise Stopped(
            f"stopped {where} by {signal.Signals(number).name}; everything is saved, "
            "the same command resumes from there",
            number,
        )
