"""Batches from whole tensors that live on the device: gather, augment and normalise in one go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from data.augment import apply_crop_flip, draw_crop_flip, normalize, to_float
from data.specs import Stats


class ImagePipeline:
    """uint8 or float images in pixel space -> (augmented) normalised float32 batch.

    Args:
        stats: normalisation.
        pad: zero padding of the random crop in pixels; None switches augmentation off.
        hflip: mirror with probability 1/2 (only when augmenting).
    """

    def __init__(self, stats: Stats, *, pad: int | None = None, hflip: bool = False) -> None:
        self.stats, self.pad, self.hflip = stats, pad, hflip

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) on its device -> the same shape, float32, normalised."""
        if self.pad is not None:
            views = draw_crop_flip(len(x), self.pad, self.hflip, generator)
            x = apply_crop_flip(x, views, self.pad)
        return normalize(to_float(x), self.stats)


class TensorLoader:
    """Shuffled batches of (images, targets), drawn by one explicit generator.

    The split is kept as it is stored (uint8 where it can be) on the device if it fits into
    `max_device_bytes`, else in pinned host memory, from where the next batch is copied while the
    current one is used.

    `epoch()` yields every sample once; `forever()` goes on without end. The state of the endless
    stream can be saved between any two batches and restored: the following batches are the same.

    Args:
        images: (N, C, H, W).
        targets: (N, ...) or None; then batches carry None.
        batch_size: images a batch.
        device: where batches are wanted.
        generator: CPU generator; order and augmentation come from it alone.
        transform: maps (batch on the device, generator) to the network's input.
        shuffle: a new order each pass.
        drop_last: in the endless stream, leave out the incomplete last batch of each pass (a split
            smaller than a batch is one batch).
        max_device_bytes: how much of the device the images may take; None: half of what is free.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor | None,
        *,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator,
        transform: Any = None,
        shuffle: bool = True,
        drop_last: bool = False,
        max_device_bytes: int | None = None,
    ) -> None:
        if targets is not None and len(targets) != len(images):
            raise ValueError(f"{len(images)} images but {len(targets)} targets")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device, self.generator = torch.device(device), generator
        self.transform, self.shuffle, self.drop_last = transform, shuffle, drop_last
        self.batch_size = min(batch_size, len(images))
        self.targets = None if targets is None else targets.to(self.device)
        self.resident = self._fits(images, max_device_bytes)
        self.images = images.to(self.device) if self.resident else images
        if not self.resident and self.device.type == "cuda" and not images.is_pinned():
            self.images = images.pin_memory()
        self._order = torch.arange(len(images))
        self._position = len(images)  # of the endless stream; past the end: a new pass starts
        self._order_state = generator.get_state()

    def __len__(self) -> int:
        """Batches of one epoch, the incomplete last one included."""
        return -(-len(self.images) // self.batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One pass over all samples; the last batch may be smaller."""
        order = self._new_order()
        yield from self._fetch(order.split(self.batch_size))

    def forever(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches without end; continues where `load_state_dict` or the last call left off."""
        return self._fetch(self._endless())

    def state_dict(self) -> dict[str, Any]:
        """Position of the endless stream: enough to go on with exactly the next batch."""
        return {
            "order_state": self._order_state,
            "position": self._position,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.generator.set_state(state["order_state"])
        self._order = self._new_order()
        self._order_state = state["order_state"]
        self._position = state["position"]
        self.generator.set_state(state["generator"])

    def _fits(self, images: Tensor, limit: int | None) -> bool:
        if self.device.type == "cpu":
            return True
        if limit is None:
            if self.device.type != "cuda":
                return True
            limit = torch.cuda.mem_get_info(self.device)[0] // 2
        return images.numel() * images.element_size() <= limit

    def _new_order(self) -> Tensor:
        count = len(self.images)
        if self.shuffle:
            order = torch.randperm(count, generator=self.generator)
        else:
            order = torch.arange(count)
        return order.to(self.device) if self.resident else order  # once a pass, not once a batch

    def _endless(self) -> Iterator[Tensor]:
        while True:
            needed = self.batch_size if self.drop_last else 1
            if self._position + needed > len(self._order):
                self._order_state = self.generator.get_state()
                self._order = self._new_order()
                self._position = 0
            start = self._position
            self._position = min(start + self.batch_size, len(self._order))
            yield self._order[start : self._position]

    def _fetch(self, indices: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
        for index in indices:
            x = self.images[index].to(self.device, non_blocking=True)
            if self.transform is not None:
                x = self.transform(x, self.generator)
            y = None if self.targets is None else self.targets[index.to(self.device)]
            yield x, y
