"""Memory: keeping what was freed, and what happens when a device has no more."""

import contextlib
import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError, first_line

try:
    import resource
except ImportError:  # not on Windows
    resource = None

# mallopt(3): number of a parameter -> value that keeps freed memory.
MALLOC = {
    -4: 0,  # M_MMAP_MAX: no separate mapping for a large block
    -3: 32 << 20,  # M_MMAP_THRESHOLD
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD
    -8: 1,  # M_ARENA_MAX: the threads share one heap
}


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory instead of giving it back to the system.

    Otherwise each large tensor of each step is mapped, zeroed page by page and unmapped again: half
    the time of DC's published evaluation on two CPU cores. The process stays as large as it once was,
    or 2 GB smaller.

    Returns whether anything was changed: not without glibc, and not where the environment tunes it
    (MALLOC_..., GLIBC_TUNABLES).
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    tuned |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    done = [libc.mallopt(number, value) for number, value in MALLOC.items()]
    return all(done)


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has taken so far, on CUDA those of the device; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host could not give memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and re.search(r"out of memory|can('t|not) allocate memory|ALLOC_FAILED", str(error), re.I) is not None
    )


class SplitBatches:
    """Calls a function of independent rows on the whole batch, or on parts that fit the memory.

    `function` maps (B, ...), and arguments that go along with every part, to (B, ...), without
    gradient, in eval mode: the result is the same either way. A size that did not fit is remembered.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.limit: int | None = None

    def __call__(self, x: Tensor, *more: Any) -> Tensor:
        while True:
            size = min(len(x), self.limit or len(x))
            try:
                parts = [self.function(part, *more) for part in x.split(size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or size < 2:
                    raise
            # Outside the handler: the error holds on to the memory of the failed call.
            self.limit = size // 2
            print(f"out of memory with {size} images at once; continuing with {self.limit}")
            if x.device.type == "cuda":
                torch.cuda.empty_cache()


@contextlib.contextmanager
def out_of_memory_says(device: torch.device, knobs: str) -> Iterator[None]:
    """Turn an out-of-memory error in the block into a UserError; `knobs` says which flags need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{device} is out of memory: {knobs}; the last save, if any, is kept ({first_line(error)})"
        ) from None
