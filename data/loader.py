"""Batches from whole tensors that live on the device: gather, augment and normalise in one go."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.augment import normalize
from data.augment.crop_flip import apply_crop_flip, draw_crop_flip
from data.augment.mixup import mixup
from data.specs import Stats
from utils.device import free_memory, upload
from utils.seed import draw_seed

Transform = Callable[[Tensor, torch.Generator], Any]


def fits(images: Tensor, device: torch.device) -> bool:
    """Whether images may live on the device: on CUDA within half of what is free."""
    return device.type != "cuda" or images.nbytes <= free_memory(device) // 2


@dataclass(frozen=True)
class ImagePipeline:
    """uint8 or float images in pixel space -> (augmented) normalised float32 batch."""

    stats: Stats
    pad: int | None = None  # zero padding of the random crop in pixels; None: no augmentation
    hflip: bool = False  # mirror with probability 1/2 (only when augmenting)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) on its device -> the same shape, float32, normalised."""
        if self.pad is not None:
            x = apply_crop_flip(x, draw_crop_flip(len(x), self.pad, self.hflip, generator), self.pad)
        return normalize(x, self.stats)


@dataclass(frozen=True)
class ViewPipeline:
    """Like an augmenting ImagePipeline, and says which view of its image each row shows.

    Every rank of `shard` (see TensorLoader) draws the views of the whole batch, so that the ranks
    together see what a single process would.
    """

    stats: Stats
    pad: int
    hflip: bool
    shard: tuple[int, int] = (0, 1)

    def __call__(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the same shape, float32, normalised; and (B,) view numbers on the CPU."""
        rank, ranks = self.shard
        views = draw_crop_flip(len(x) * ranks, self.pad, self.hflip, generator)[rank::ranks].contiguous()
        return normalize(apply_crop_flip(x, views, self.pad), self.stats), views


class _Slice(NamedTuple):
    """Rows of one batch, and the stream's state once it has been handed out."""

    index: Tensor
    host_index: Tensor
    order_state: Tensor
    end: int


class TensorLoader:
    """Shuffled batches of (images, targets), drawn by one explicit generator.

    The images are kept as stored (uint8 where possible), on the device if they fit; otherwise in host
    memory, and the next batch is gathered into pinned memory and copied while the current one is in use.

    `epoch()` yields every sample once, `forever()` an endless stream, whose state can be saved between
    any two batches and restored: the following batches are the same. A ValueError for arguments that do
    not fit each other.

    Args:
        images: (N, C, H, W), or any tensor of N rows.
        targets: (N, ...), or None: batches carry the row numbers instead, int64 on the CPU.
        batch_size: at least 1 and a multiple of the number of ranks.
        device: of the batches.
        generator: on the CPU; order and augmentation come from it alone.
        transform: maps (batch on the device, generator) to the network's input.
        mix: mixup of inputs and targets, which are float vectors; after the transform.
        shuffle: a new order for each pass.
        drop_last: the endless stream leaves out the incomplete last batch of each pass (a split
            smaller than a batch is one batch).
        shard: (rank, ranks): the rows of each batch of the endless stream are dealt to the ranks in
            equal numbers; the rows of an incomplete last batch that are left over are dropped.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor | None,
        *,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator,
        transform: Transform | None = None,
        mix: bool = False,
        shuffle: bool = True,
        drop_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if targets is not None and len(targets) != len(images):
            raise ValueError(f"{len(images)} images but {len(targets)} targets")
        if mix and (targets is None or not targets.is_floating_point()):
            raise ValueError("mixup needs target vectors")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device, self.generator = torch.device(device), generator
        self.transform, self.shuffle, self.drop_last = transform, shuffle, drop_last
        self.mix = mix
        self.batch_size = min(batch_size, len(images))
        self.shard = shard
        if self.batch_size % shard[1]:
            raise ValueError(f"a batch of {self.batch_size} cannot be dealt to {shard[1]} ranks")
        self.targets = None if targets is None else targets.to(self.device)
        self.resident = images.device.type != "cpu" or fits(images, self.device)
        self.images = images.to(self.device) if self.resident else images
        # Orders have a stream of their own: looking a batch ahead does not disturb augmentation.
        self._order_generator = torch.Generator().manual_seed(draw_seed(generator))
        self._order_state = self._order_generator.get_state()  # before the order in use was drawn
        self._position = -1  # in the endless stream's pass; -1: no pass has begun

    def __len__(self) -> int:
        """Batches of one epoch, including the incomplete last one."""
        return -(-len(self.images) // self.batch_size)

    @property
    def steps_per_pass(self) -> int:
        """Batches of one pass of the endless stream."""
        return len(self.images) // self.batch_size if self.drop_last else len(self)

    def epoch(self) -> Iterator[tuple[Any, Tensor]]:
        """One pass over all samples; the last batch may be smaller."""
        return self._batches(self._one_pass())

    def forever(self) -> Iterator[tuple[Any, Tensor]]:
        """Batches without end; continues where `load_state_dict` or the last call left off."""
        return self._batches(self._endless())

    def state_dict(self) -> dict[str, Any]:
        """Position of the endless stream."""
        return {
            "order_state": self._order_state,
            "position": self._position,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position; takes effect at the next call of `forever`."""
        self._order_state, self._position = state["order_state"], state["position"]
        self.generator.set_state(state["generator"])

    def _new_order(self) -> tuple[Tensor, Tensor]:
        """A pass's order where the images live, and on the CPU."""
        order = torch.arange(len(self.images))
        if self.shuffle:
            order = torch.randperm(len(order), generator=self._order_generator)
        # Moved once per pass, not once per batch.
        return (upload(order, self.device) if self.resident else order), order

    def _endless(self) -> Iterator[_Slice]:
        position, order_state = self._position, self._order_state
        self._order_generator.set_state(order_state)
        orders = self._new_order() if position >= 0 else None
        rank, ranks = self.shard
        needed = self.batch_size if self.drop_last else ranks
        while True:
            if orders is None or position + needed > len(orders[0]):
                order_state = self._order_generator.get_state()
                orders, position = self._new_order(), 0
            count = min(self.batch_size, len(orders[0]) - position)
            end = position + count - count % ranks  # as many rows for every rank
            own = (order[position + rank : end : ranks] for order in orders)
            yield _Slice(*own, order_state, end)
            position = end

    def _one_pass(self) -> Iterator[_Slice]:
        for own in zip(*(o.split(self.batch_size) for o in self._new_order()), strict=True):
            yield _Slice(*own, self._order_state, self._position)

    def _batches(self, slices: Iterator[_Slice]) -> Iterator[tuple[Any, Tensor]]:
        for part, x in self._gather(slices):
            self._order_state, self._position = part.order_state, part.end
            if self.transform is not None:
                x = self.transform(x, self.generator)
            y = part.host_index if self.targets is None else self.targets[upload(part.index, self.device)]
            yield mixup(x, y, self.generator) if self.mix else (x, y)

    def _gather(self, slices: Iterator[_Slice]) -> Iterator[tuple[_Slice, Tensor]]:
        if self.resident:
            yield from ((part, self.images.index_select(0, part.index)) for part in slices)
            return
        cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if cuda else None

        def start(part: _Slice) -> tuple[_Slice, Tensor]:
            shape = len(part.index), *self.images.shape[1:]
            rows = torch.empty(shape, dtype=self.images.dtype, pin_memory=cuda)
            torch.index_select(self.images, 0, part.index, out=rows)
            with torch.cuda.stream(stream):  # torch reuses the pinned memory only after the copy
                return part, rows.to(self.device, non_blocking=cuda)

        ahead = map(start, slices)
        following = next(ahead, None)
        while following is not None:
            part, x = following
            if cuda:
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(stream)
                x.record_stream(current)
            following = next(ahead, None)  # copied while this one is in use
            yield part, x
