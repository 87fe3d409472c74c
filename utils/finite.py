"""Catching a non-finite loss within a step, without making the host wait for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.errors import UserError


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
