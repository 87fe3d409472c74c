"""One run over several processes of torchrun: their numbers, and how gradients are averaged."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import LostProcess
from utils.memory import is_out_of_memory

# The other ranks wait while the first one evaluates, which takes far longer than the default.
_PATIENCE = timedelta(hours=12)


class Group(NamedTuple):
    """The processes of a run: this one's number, and how many."""

    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors of one dtype and device by their mean over the processes."""
        if self.ranks == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])  # one message instead of several
        with _all_there():
            dist.all_reduce(flat)
        flat /= self.ranks
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gathered(self, value: Any) -> list[Any]:
        """A plain value of every process, by rank; waits until all have called it."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        with _all_there():
            dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    """Within the block a broken connection means that another process was killed, or gave up."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise it, or classes of their own below it
        if is_out_of_memory(error):
            raise
        raise LostProcess(
            "another process of this run has ended; the last save is kept, the same command resumes from it"
        ) from None


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def local_gpu(default: int) -> int:
    """The GPU that this process uses: its local rank under torchrun, else `default`.

    Where there are more processes than GPUs they take turns.
    """
    if not launched():
        return default
    return int(os.environ.get("LOCAL_RANK", default)) % max(1, torch.cuda.device_count())


def _backend(device: torch.device) -> str:
    """NCCL with a GPU for each process of this machine; gloo where they share one, and on CPUs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return "nccl" if device.type == "cuda" and processes <= torch.cuda.device_count() else "gloo"


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """Join the processes torchrun started; alone otherwise."""
    if not launched():
        yield Group()
        return
    dist.init_process_group(_backend(device), timeout=_PATIENCE)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Drop what processes other than the first print to stdout."""
    if not launched() or os.environ["RANK"] == "0":
        yield
        return
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield
