"""One run over several processes of torchrun: who is who, and how gradients are averaged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The other ranks wait while the first one evaluates, which takes far longer than the default.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Group:
    """The processes of a run; with one process every method does nothing.

    Attributes:
        rank: number of this process.
        ranks: number of processes.
    """

    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, ranks), as loaders take it."""
        return self.rank, self.ranks

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors of one dtype and device by their mean over the processes."""
        if self.ranks == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])  # one message instead of several
        dist.all_reduce(flat)
        flat /= self.ranks
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def from_first(self, value: Any) -> Any:
        """A plain value of the first process, on all of them; waits for it."""
        if self.ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any process; all of them have to ask."""
        if self.ranks == 1:
            return value
        answers: list[Any] = [None] * self.ranks
        dist.all_gather_object(answers, value)
        return any(answers)


ALONE = Group()


def launched() -> bool:
    """Whether torchrun (or its like) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def local_gpu(default: int) -> int:
    """Which GPU of its machine this process uses: its local rank under torchrun, else `default`."""
    return int(os.environ.get("LOCAL_RANK", default)) if launched() else default


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """Join the processes torchrun started; alone otherwise. NCCL on CUDA, gloo elsewhere."""
    if not launched():
        yield ALONE
        return
    cuda = device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
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
