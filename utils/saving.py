"""When a loop saves: every so many steps, or every so many seconds."""

from __future__ import annotations

import argparse
import re
import time


class Every(str):
    """`500`: steps; `300s`: seconds. A flag's type.

    Raises:
        argparse.ArgumentTypeError: something else.
    """

    def __new__(cls, text: str | int) -> Every:
        """Check the form."""
        plain = re.sub(r"\.0+$", "", str(text))
        if not re.fullmatch(r"0*[1-9]\d*s?", plain):
            raise argparse.ArgumentTypeError(
                f"expected steps such as 500 or seconds such as 300s, got {text!r}"
            )
        return super().__new__(cls, plain)


class SaveTimer:
    """Says after which steps to save. When that is decides nothing that a run computes.

    Args:
        every: steps, or seconds since the last save.
    """

    def __init__(self, every: str | int) -> None:
        text = Every(every)
        self._seconds = int(text[:-1]) if text.endswith("s") else None
        self._steps = None if self._seconds else int(text)
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after `step`; the clock then starts again."""
        if self._steps is not None:
            return step % self._steps == 0
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
