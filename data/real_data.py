"""The real images of a distillation: kept on the device as stored, drawn class by class."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from data.augment import normalize, to_float
from data.load import ImageSet
from data.loader import fits
from data.specs import Stats
from utils.device import upload
from utils.errors import UserError

READ_AT_ONCE = 2**24  # numbers, 64 MB of float32


class RealImages:
    """Labelled images with an index list per class.

    The images are (N, C, H, W) uint8 or float in [0, 1], kept as they are, on the device if they fit;
    without `stats`, which normalise every batch, float images in the space of the synthetic ones. Labels
    are (N,) int64; their classes are by default up to the largest. The device is by default the images'.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        stats: Stats | None = None,
        num_classes: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if len(images) != len(labels) or not len(images):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        self.device = images.device if device is None else torch.device(device)
        self.labels, self.stats = labels.cpu(), stats
        self.num_classes = num_classes or int(self.labels.max()) + 1
        self.images = images.to(self.device) if fits(images, self.device) else images
        self._on_device = self.labels.to(self.device)
        order = self.labels.argsort(stable=True)
        counts = self.labels.bincount(minlength=self.num_classes)
        self.index_of_class = order.split(counts.tolist())

    @classmethod
    def from_set(cls, image_set: ImageSet, device: torch.device) -> RealImages:
        """The training split of a prepared set; a UserError if it has no labels or an empty class."""
        train, classes = image_set.train, image_set.num_classes
        if train.labels is None:
            raise UserError(f"{train.path.parent} has no labels; DC, DSA and DM work class by class")
        real = cls(train.images, train.labels, stats=image_set.stats, num_classes=classes, device=device)
        empty = [c for c, index in enumerate(real.index_of_class) if not len(index)]
        if empty:
            raise UserError(f"{train.path} has no image of class {empty[0]} ({len(empty)} such)")
        return real

    def __len__(self) -> int:
        return len(self.images)

    def at(self, index: Tensor) -> Tensor:
        """Rows at `index` (int64 on the CPU, or where the images are) as a float32 batch, normalised."""
        x = upload(self.images[upload(index, self.images.device)], self.device)
        return to_float(x) if self.stats is None else normalize(x, self.stats)

    def labels_at(self, index: Tensor) -> Tensor:
        """Labels at `index`, on the device."""
        return self._on_device[upload(index, self.device)]

    def draw_class(self, c: int, count: int, generator: torch.Generator) -> Tensor:
        """Indices of `count` images of class c without replacement, or all if it has fewer."""
        index = self.index_of_class[c]
        return index[torch.randperm(len(index), generator=generator)[:count]]

    def draw_classes(self, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """A batch of each class in turn, as `draw_class` draws them; all rows move to the device at once."""
        drawn = [self.draw_class(c, count, generator) for c in range(self.num_classes)]
        rows = upload(torch.cat(drawn), self.images.device)
        counts = [len(index) for index in drawn]
        # Several classes are read at once where launching kernels takes the time.
        most = READ_AT_ONCE // (count * self.images[0].numel()) if self.device.type == "cuda" else 1
        while counts:
            part, counts = counts[: max(1, most)], counts[max(1, most) :]
            here, rows = rows[: sum(part)], rows[sum(part) :]
            yield from self.at(here).split(part)
