"""How far a loop is: a bar where someone watches, else a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from tqdm import tqdm


class Progress:
    """The progress of a loop that may go on where another start left off.

    Args:
        label: what runs, before the bar.
        unit: of what is counted, such as "step".
        start: how many are done.
        total: how many there are to do.
        bar: False: no bar in any case.
    """

    def __init__(self, label: str, unit: str, start: int, total: int, *, bar: bool = True) -> None:
        self._unit, self._total, self._reported = unit, total, start
        self._bar = tqdm(
            desc=label, initial=start, total=total,
            # None: no bar where nobody watches, lines instead.
            disable=None if bar else True, dynamic_ncols=True,
        )  # fmt: skip
        self._mark = time.perf_counter()

    def advance(self) -> None:
        """One more is done."""
        self._bar.update()

    def report(self, done: int, shown: str) -> float:
        """Show values after `done` in all; returns how many a second since the last report."""
        now = time.perf_counter()
        speed = (done - self._reported) / max(now - self._mark, 1e-9)
        self._mark, self._reported = now, done
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            print(
                f"{self._unit} {done}/{self._total}: {shown}, {speed:.3g} {self._unit}s/s, "
                f"{(self._total - done) / max(speed, 1e-9):.0f} s left",
                flush=True,
            )
        return speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block does not count for the speed."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - began

    def write(self, line: str) -> None:
        """Print a line beside the bar."""
        self._bar.write(line)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
