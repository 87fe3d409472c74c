"""The real images of a distillation: kept on the device as stored, drawn class by class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clom.layout import images_at_once
from data.augment import normalize, to_float
from data.load import ImageSet
from data.specs import Stats
from utils.errors import UserError

GPU_PART = 256
CPU_CACHE_BYTES = 2 << 30


class RealImages:
    """Labelled images with an index list per class.

    Args:
        images: (N, C, H, W) uint8 or float in [0, 1], kept as they are; with `stats` None, float
            images already in the space of the synthetic ones.
        labels: (N,) int64.
        stats: normalisation applied to every batch; None: none.
        num_classes: None means the largest label + 1.
        device: where batches are wanted; the images live there if half the free memory is enough.
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
        self.images = images.to(self.device) if self._fits(images) else images
        self._on_device = self.labels.to(self.device)
        order = self.labels.argsort(stable=True)
        counts = self.labels.bincount(minlength=self.num_classes)
        self.index_of_class = order.split(counts.tolist())

    @classmethod
    def from_set(cls, image_set: ImageSet, device: torch.device) -> RealImages:
        """The training split of a prepared set.

        Raises:
            UserError: no labels, or a class without images.
        """
        train = image_set.train
        if train.labels is None:
            raise UserError(
                f"{train.path.parent} has no labels; DC, DSA and DM work class by class"
            )
        real = cls(
            train.images, train.labels, stats=image_set.stats,
            num_classes=image_set.num_classes, device=device,
        )  # fmt: skip
        empty = [c for c, index in enumerate(real.index_of_class) if not len(index)]
        if empty:
            raise UserError(f"{train.path} has no image of class {empty[0]} ({len(empty)} such)")
        return real

    def _fits(self, images: Tensor) -> bool:
        if self.device.type != "cuda":
            return True
        free = torch.cuda.mem_get_info(self.device)[0]
        return images.numel() * images.element_size() <= free // 2

    def __len__(self) -> int:
        return len(self.images)

    def at(self, index: Tensor) -> Tensor:
        """Rows at `index` (CPU int64) as a float32 batch on the device, normalised."""
        x = self.images[index.to(self.images.device)].to(self.device)
        return to_float(x) if self.stats is None else normalize(x, self.stats)

    def labels_at(self, index: Tensor) -> Tensor:
        """Labels at `index`, on the device."""
        return self._on_device[index.to(self.device)]

    def draw_class(self, c: int, count: int, generator: torch.Generator) -> Tensor:
        """Indices of `count` images of class c without replacement, or all if it has fewer."""
        index = self.index_of_class[c]
        return index[torch.randperm(len(index), generator=generator)[:count]]

    def draw_all_classes(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        """A batch of every class in class order: images, and how many each class gave."""
        drawn = [self.draw_class(c, count, generator) for c in range(self.num_classes)]
        return self.at(torch.cat(drawn)), [len(index) for index in drawn]


class FeatureCache:
    """Features of real images under frozen models, computed once per model if memory allows.

    Args:
        real: the images; no augmentation ever touches them here.
        enabled: False recomputes at every call.
        limit: bytes for all models together; None: a quarter of the free device memory, 2 GiB on
            the CPU.
    """

    def __init__(self, real: RealImages, *, enabled: bool = True, limit: int | None = None) -> None:
        self.real, self.enabled = real, enabled
        self._features: dict[int, Tensor] = {}
        self._left = self._default_limit() if limit is None else limit

    def _default_limit(self) -> int:
        if self.real.device.type == "cuda":
            return torch.cuda.mem_get_info(self.real.device)[0] // 4
        return CPU_CACHE_BYTES

    @torch.no_grad()
    def features(self, model: nn.Module, index: Tensor) -> Tensor:
        """Features (n, D) of the rows at `index` (CPU int64), on the device."""
        key = id(model)  # the pool holds its models as long as this cache lives
        if key not in self._features and self.enabled:
            size = len(self.real) * self._embed(model, index[:1]).shape[1] * 4
            if size <= self._left:
                self._left -= size
                self._features[key] = self._all(model)
        if key in self._features:
            return self._features[key][index.to(self.real.device)]
        return torch.cat([self._embed(model, part) for part in index.split(self._part(model))])

    def _embed(self, model: nn.Module, index: Tensor) -> Tensor:
        return getattr(model, "embed", model)(self.real.at(index)).flatten(1).float()

    def _part(self, model: nn.Module) -> int:
        # Always the same groups of rows, so that a resumed run sees the same bits.
        return images_at_once(model, self.real.images.shape, self.real.device, GPU_PART)

    def _all(self, model: nn.Module) -> Tensor:
        parts = torch.arange(len(self.real)).split(self._part(model))
        bar = tqdm(parts, desc="real features", leave=False, disable=None, delay=2)
        return torch.cat([self._embed(model, part) for part in bar])
