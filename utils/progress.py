"""What a long loop needs: progress, means of losses, a check that they are finite, when to save."""

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
    """The progress of a loop that may resume where another start left off.

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


class LossWindow:
    """Mean of the last `size` losses, kept on the device: reading it is the only synchronisation.

    Args:
        size: number of steps averaged.
    """

    def __init__(self, size: int) -> None:
        self._losses: deque[torch.Tensor] = deque(maxlen=size)

    def add(self, loss: torch.Tensor) -> None:
        """Take a step's loss (detached scalar); no host synchronisation."""
        self._losses.append(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """The losses in the window, for a resumed run."""
        return {"losses": torch.stack(list(self._losses)).tolist() if self._losses else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._losses.clear()
        self._losses.extend(torch.tensor(loss) for loss in state["losses"])

    def mean(self) -> float:
        """Mean over the window as a Python float; NaN while it is empty."""
        if not self._losses:
            return math.nan
        device = self._losses[-1].device  # losses of an earlier start came back to the CPU
        return float(torch.stack([loss.to(device) for loss in self._losses]).mean())


class FiniteGuard:
    """Watches the losses of a loop.

    On the CPU each loss is read at once. On CUDA it is copied to pinned memory in the background
    and read one step later, so that the device always has the next step queued.

    Args:
        what: what is running, for the message.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._pending: tuple[int, Tensor, torch.cuda.Event] | None = None

    def check(self, loss: Tensor, step: int) -> None:
        """Take the loss of `step`.

        Raises:
            UserError: this loss (CPU) or the one before (CUDA) is not finite; names its step.
        """
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
        """Judge the loss still on its way; call before every save."""
        if self._pending is not None:
            step, value, event = self._pending
            self._pending = None
            event.synchronize()
            self._judge(float(value), step)

    def _judge(self, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"{self.what}: the loss is {value} at step {step}; stopped, the last save is kept; "
                "a smaller learning rate usually helps"
            )


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
