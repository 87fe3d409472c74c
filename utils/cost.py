"""What a run takes: time, memory and disk, told by its first steps."""

import bisect
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.checkpoint import tensors_in
from utils.cli import how
from utils.memory import peak_memory
from utils.progress import byte_size, duration

LONG = 2 * 3600  # seconds; who waits longer is told what shortens it
# Enough is measured after so many steps and seconds, or after more seconds whatever the steps.
_STEPS, _RUN, _TRIAL = 3, (2.0, 10.0), (0.3, 1.0)


@dataclass(frozen=True)
class DryRunFlags:
    """Flags of commands that say what they would do."""

    dry_run: bool = how(False, "print the resolved configuration and stop")
    cost: bool = how(
        False, "take a few steps, print the expected time, memory and disk, and stop; no run is written"
    )


@dataclass(frozen=True)
class Cost:
    """What `work` (in any unit) takes; `memory` and `disk` are bytes, at their peak."""

    seconds: float
    work: float
    memory: int
    disk: int
    advice: str = ""  # how to shorten it

    def __str__(self) -> str:
        disk = max(self.disk, 1000)  # at least a log and results
        memory = f"{byte_size(self.memory)} of memory, " if self.memory else ""
        found = f"expected: about {duration(self.seconds)}, {memory}{byte_size(disk)} on disk"
        return found + (f"; {self.advice}" if self.advice else "")


class _Known(Exception):
    """Ends a trial."""


class Forecast:
    """Measures the first steps of a run, and says once what the whole takes.

    `work` is what lies ahead in any unit, such as images through networks, each counted three times in
    training; without any it stays silent. `disk` gives bytes, asked for when it speaks. Beyond two hours
    it says which flags shorten the run: `length`, a flag and its value, and `shorter`, others in words;
    so much as `fixed` of the work does not depend on `length`.
    """

    def __init__(
        self,
        work: float,
        device: torch.device,
        *,
        disk: Callable[[], int] = lambda: 0,
        length: tuple[str, int] | None = None,
        fixed: float = 0.0,
        shorter: str = "",
    ) -> None:
        self.work, self.device, self.disk = work, device, disk
        self._length, self._fixed, self._shorter = length, fixed, shorter
        self._done = self._measured = 0.0
        self._steps, self._seconds, self._mark = 0, 0.0, time.perf_counter()
        self._trial, self.told = False, work <= 0

    def skip(self, work: float) -> None:
        """So much was done before, or at another speed."""
        self._done += work

    def tick(self, work: float) -> None:
        """Call after each step, with its work; prints one line when enough is measured."""
        self._done += work
        if self.told or not self._enough(work):
            return
        if self._trial:
            raise _Known
        self.told = True
        if self._done < self.work:
            print(self._cost(self.work - self._done), flush=True)

    def trial(self, run: Callable[[], object]) -> Cost:
        """What the whole takes; `run`, which ticks, is left as soon as this is known."""
        self._trial = True
        began = self._mark = time.perf_counter()
        with contextlib.suppress(_Known):
            run()
            self._measured, self._seconds = self._done, time.perf_counter() - began  # over before it is known
        return self._cost(self.work)

    @contextlib.contextmanager
    def paused(self, work: float) -> Iterator[None]:
        """The block does so much of the work, at a speed of its own: its time does not count."""
        self.skip(work)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - began

    def _enough(self, work: float) -> bool:
        """Count a step that has just ended; whether the speed is known. A first step warms up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, self._steps = time.perf_counter(), self._steps + 1
        if self._steps == 1 and now - self._mark < _RUN[1]:
            self._mark = now
            return False
        self._measured += work
        self._seconds = now - self._mark
        enough, patience = _TRIAL if self._trial else _RUN
        return self._seconds >= patience or (self._steps > _STEPS and self._seconds >= enough)

    def _cost(self, work: float) -> Cost:
        seconds = self._seconds * work / max(self._measured, 1e-9)
        return Cost(seconds, work, peak_memory(self.device), self.disk(), self._advice(seconds))

    def _advice(self, seconds: float) -> str:
        if seconds <= LONG:
            return ""
        ways = [self._shorter] if self._shorter else []
        allowed = LONG * self._measured / self._seconds - self._fixed
        if self._length is not None and allowed > 0:
            name, value = self._length
            ways.insert(0, f"{name} {round_down(value * allowed / (self.work - self._fixed))} (two hours)")
        return f"to shorten it: {', '.join(ways)}"


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    return sum(t.numel() * t.element_size() for t in tensors_in(value))


def forward_flops(make_model: Callable[[], nn.Module], img_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one (C, H, W) image's forward pass; no tensor has data."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make_model().eval()(torch.empty(1, *img_shape))
    return counter.get_total_flops()


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where all smaller ones do, too; at least 1."""
    return max(1, bisect.bisect_left(range(1, most + 1), True, key=lambda number: not fits(number)))


def round_down(value: float) -> int:
    """Two leading digits of a number, the rest zeros; at least 1."""
    digits = 10 ** max(0, len(str(int(value))) - 2)
    return max(1, int(value) // digits * digits)
