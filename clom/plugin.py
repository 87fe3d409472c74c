"""CLoM in the distillation loop: the pool of pre-trained models and the features of real images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clom.config import PREFIX, DistillFlags, pair_alphas
from clom.loss import CLoM, embed
from clom.pool import TeacherPool, load_family, load_foundation
from data.load import ImageSet
from data.meta import read_meta
from data.real_data import RealImages
from data.space import Space
from data.specs import DC_SPECS
from models.layout import images_at_once
from utils.errors import UserError

GPU_PART = 256
CPU_CACHE_BYTES = 2 << 30


class RealFeatures:
    """Real images as CLoM sees them: labels, and features computed once per model if memory allows.

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

    def __len__(self) -> int:
        return len(self.real)

    @property
    def num_classes(self) -> int:
        """Of the data set."""
        return self.real.num_classes

    def labels_at(self, index: Tensor) -> Tensor:
        """Labels (n,) of the rows at `index`, on the device."""
        return self.real.labels_at(index)

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
        return embed(model, self.real.at(index)).float()

    def _part(self, model: nn.Module) -> int:
        # Always the same groups of rows, so that a resumed run sees the same bits.
        return images_at_once(model, self.real.images.shape, self.real.device, GPU_PART)

    def _all(self, model: nn.Module) -> Tensor:
        parts = torch.arange(len(self.real)).split(self._part(model))
        bar = tqdm(parts, desc="real features", leave=False, disable=None, delay=2)
        return torch.cat([self._embed(model, part) for part in bar])


def load_pool(flags: DistillFlags, image_set: ImageSet, device: torch.device) -> TeacherPool:
    """The pre-trained models of `flags`, ready for this set's images.

    Raises:
        UserError: too few, damaged, or of other labels than the set's with ce.
    """
    channels, *size = image_set.img_shape
    given = Space(image_set.stats, channels, tuple(size))
    families = []
    for name, alpha in zip(flags.models_pool, pair_alphas(flags.models_pool, flags.alphas), strict=True):
        if name.startswith(PREFIX):
            families.append(load_foundation(name, alpha=alpha, given=given, device=device))
            continue
        family, num_classes = load_family(flags, name, alpha, given, device)
        families.append(family)
        if flags.CLoM_distance == "ce" and not same_labels(flags, image_set, num_classes):
            raise UserError(
                f"--CLoM_distance ce needs models of the same labels: {flags.source_dataset} "
                f"({num_classes} classes) is not {flags.dataset} ({image_set.num_classes} "
                "classes); use --CLoM_distance cos"
            )
    return TeacherPool(families)


def same_labels(flags: DistillFlags, image_set: ImageSet, num_classes: int) -> bool:
    """Whether the source's classes are the target's: one prepared set, or equal class names."""
    if num_classes != image_set.num_classes:
        return False
    folders = [
        DC_SPECS[name].folder if name in DC_SPECS else name for name in (flags.source_dataset, flags.dataset)
    ]
    if folders[0] == folders[1]:
        return True
    data_dir = image_set.train.path.parents[1]
    names = [read_meta(data_dir / folder).get("class_names") for folder in folders]
    return names[0] is not None and names[0] == names[1]


class Plugin:
    """The pool and the features of the real images, shared by all experiments of a run.

    Args:
        flags: of the run.
        image_set: the source.
        real: its training images on the device.

    Raises:
        UserError: as `load_pool`.
    """

    def __init__(self, flags: DistillFlags, image_set: ImageSet, real: RealImages) -> None:
        self.flags = flags
        self.pool, self.real = load_pool(flags, image_set, real.device), RealFeatures(real)

    def term(self, generator: torch.Generator) -> CLoM:
        """The loss of one experiment, which draws from `generator`."""
        flags = self.flags
        return CLoM(
            self.pool,
            distance=flags.CLoM_distance,
            ce_form=flags.CLoM_ce_form,
            real=self.real,
            batch_size=flags.CLoM_batch_size,
            generator=generator,
        )
