"""Errors that a user can fix, and the one place that turns them into an exit code."""

import contextlib
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

from utils.stop import Stopped, drop_if_closed, terminable

T = TypeVar("T")


class UserError(ValueError):
    """Bad input: the message is one line that names the file or flag and what was expected."""


class LostProcess(UserError):
    """Another process of the same run has ended: each that is left says so."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (message(error).splitlines() or [type(error).__name__])[0]


def message(error: BaseException) -> str:
    """An error's message, without PyTorch's advice to read untrusted files by running code of theirs."""
    text = str(error).strip()
    return "a file holds more than tensors and plain containers" if "weights_only" in text else text


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """Look `name` up in a dispatch table; a UserError lists the valid ones."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}; valid: {', '.join(sorted(table))}")
    return table[name]


def entry_point(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's `main(argv)`: a UserError becomes one line on stderr and exit code 2.

    A run that was asked to stop exits with 128 + the signal's number. Of several processes under
    torchrun only the first prints, unless another one was lost.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        speaks = os.environ.get("RANK", "0") == "0"
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack what tables print (± and †)
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with terminable():
                code = main(argv) or 0
                sys.stdout.flush()  # a pipe that was closed shows here, not when Python ends
                return code
        except UserError as error:
            code, line = 2, f"error: {' '.join(str(error).split())}"
            speaks = speaks or isinstance(error, LostProcess)
        except OSError as error:  # a name too long, a full disk, a folder that may not be read
            if isinstance(error, BrokenPipeError) and drop_if_closed(1):
                return 128 + signal.SIGPIPE
            if error.strerror is None:
                raise
            code, line = 2, f"error: {error.filename or 'a file'}: {error.strerror}"
        except Stopped as stopped:
            code, line = stopped.exit_code, str(stopped)
        except KeyboardInterrupt:
            code, line = 130, "interrupted"
        if speaks:
            with contextlib.suppress(OSError):  # a closed terminal
                print(line, file=sys.stderr)
        return code

    return wrapped
