"""A device that runs out of memory: smaller parts where that changes nothing, clear words else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host could not give memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class SplitBatches:
    """Calls a function of independent rows on the whole batch, or on parts that fit the memory.

    The result is the same: every row is computed from itself alone. A size that did not fit is
    remembered.

    Args:
        function: (B, ...) and perhaps more arguments -> (B, ...), without gradient, in eval mode.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.limit: int | None = None

    def __call__(self, x: Tensor, *more: Any) -> Tensor:
        """The function's value on all rows of x; `more` goes along with every part.

        Raises:
            torch.OutOfMemoryError: not even one row fits.
        """
        while True:
            size = min(len(x), self.limit or len(x))
            try:
                parts = [self.function(part, *more) for part in x.split(size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or size < 2:
                    raise
            # Outside of the handler: the error holds on to the memory of the failed call.
            self.limit = size // 2
            print(f"out of memory with {size} images at once; going on with {self.limit}")
            if x.device.type == "cuda":
                torch.cuda.empty_cache()


@contextlib.contextmanager
def out_of_memory_says(device: torch.device, knobs: str) -> Iterator[None]:
    """Turn an out-of-memory error in the block into one line that names what to change.

    Args:
        device: where it happens.
        knobs: flags that need less, in words.

    Raises:
        UserError: in place of the error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        raise UserError(
            f"{device} is out of memory: {knobs}; the last save is kept ({reason})"
        ) from None
