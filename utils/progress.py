"""For long loops: progress, means of losses, a check that they are finite, when to save."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError


class Progress:
    """The progress of a loop that resumes after `start` of `total` units ("step"), as a bar.

    Without a terminal or with `bar=False` it prints lines instead.
    """

    def __init__(self, label: str, unit: str, start: int, total: int, *, bar: bool = True) -> None:
        self._unit, self._total, self._reported = unit, total, start
        disable = None if bar else True  # None: no bar without a terminal
        self._bar = tqdm(desc=label, initial=start, total=total, disable=disable, dynamic_ncols=True)
        self._mark = time.perf_counter()
        self.advance, self.close = self._bar.update, self._bar.close

    def report(self, done: int, shown: str) -> float:
        """Show values after `done` in all; returns how many per second since the last report."""
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
        """The time spent in the block does not count for the speed."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - began


class LossWindow:
    """Mean of the last `size` losses, kept on the device: only `mean` synchronises."""

    def __init__(self, size: int) -> None:
        self._losses: deque[Tensor] = deque(maxlen=size)

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._stacked().tolist() if self._losses else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(torch.tensor(loss) for loss in state["losses"])

    def mean(self) -> float:
        """Mean over the window as a Python float; NaN while it is empty."""
        if not self._losses:
            return math.nan
        return float(self._stacked().mean())

    def _stacked(self) -> Tensor:
        device = self._losses[-1].device  # losses of an earlier start came back to the CPU
        return torch.stack([loss.to(device) for loss in self._losses])


class FiniteGuard:
    """Watches the losses of a loop; `what` names it in the message.

    On CUDA each loss is copied to pinned memory in the background and read one step later, so that
    the device always has the next step queued; elsewhere it is read at once.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._pending: tuple[int, Tensor, torch.cuda.Event] | None = None  # on its way

    def check(self, loss: Tensor, step: int) -> None:
        """Raise a UserError if this loss (on CUDA: the one before) is not finite."""
        if loss.device.type != "cuda":
            self._judge(float(loss.detach()), step)
            return
        self.flush()
        value = torch.empty((), dtype=loss.dtype, pin_memory=True)
        value.copy_(loss.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (step, value, event)

    def flush(self) -> None:
        """Check the loss still on its way; call before every save."""
        if self._pending is not None:
            step, value, event = self._pending
            self._pending = None
            event.synchronize()
            self._judge(float(value), step)

    def _judge(self, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"{self.what}: the loss is {value} at step {step}; stopped; the last save, if any, is kept; "
                "a smaller learning rate usually helps"
            )


class Every(str):
    """The type of a flag: `500` steps, or `300s`, seconds."""

    def __new__(cls, text: str | int) -> Every:
        plain = str(text)
        with contextlib.suppress(ValueError):
            if (steps := float(plain)).is_integer():  # published command lines write counts as 1e3, too
                plain = str(int(steps))
        if not re.fullmatch(r"0*[1-9]\d*s?", plain):
            raise argparse.ArgumentTypeError(
                f"expected steps such as 500 or seconds such as 300s, got {text!r}"
            )
        return super().__new__(cls, plain)


class SaveTimer:
    """Says after which steps to save; this changes nothing that a run computes."""

    def __init__(self, every: str | int) -> None:
        self._every = Every(every)
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after `step`; if so, a clock of seconds starts again."""
        if not self._every.endswith("s"):
            return step % int(self._every) == 0
        if time.monotonic() - self._last < int(self._every[:-1]):
            return False
        self._last = time.monotonic()
        return True


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `5.2 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def byte_size(count: float) -> str:
    """`35 MB`, `1.2 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f} {unit}"
    return f"{count:.0f} B"
