"""CLoM in the distillation loop: the pool of pre-trained models and the features of real images."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clom.config import PREFIX, DistillFlags, pair_pool
from clom.loss import ModelPool, embed
from clom.pool import load_foundation, load_networks
from clom.source import set_folder
from data.load import ImageSet
from data.meta import read_meta
from data.real_data import RealImages
from data.space import Space
from models.layout import images_at_once
from utils.checkpoint import state_fingerprint
from utils.errors import UserError

GPU_PART = 256
CPU_CACHE_BYTES = 2 << 30


class RealFeatures:
    """Real images as CLoM sees them: labels, and features computed once per model if memory allows.

    The images are never augmented. All features together take at most `limit` bytes; None: a quarter
    of the free device memory, 2 GiB on the CPU. Without room they are computed at every call.
    """

    def __init__(self, real: RealImages, limit: int | None = None) -> None:
        self.real, self.num_classes, self.labels_at = real, real.num_classes, real.labels_at
        if limit is None:
            cuda = real.device.type == "cuda"
            limit = torch.cuda.mem_get_info(real.device)[0] // 4 if cuda else CPU_CACHE_BYTES
        self._left = limit
        self._features: dict[nn.Module, Tensor] = {}

    def __len__(self) -> int:
        return len(self.real)

    @torch.no_grad()
    def features(self, model: nn.Module, index: Tensor) -> Tensor:
        """Features (n, D) of the rows at `index` (CPU int64), on the device."""
        if model not in self._features:
            size = len(self.real) * self._embed(model, index[:1]).shape[1] * 4
            if size > self._left:
                return self._embed(model, index)
            self._left -= size
            self._features[model] = self._embed(model, torch.arange(len(self.real)))
        return self._features[model][index.to(self.real.device)]

    def _embed(self, model: nn.Module, index: Tensor) -> Tensor:
        # Always the same groups of rows, so that a resumed run sees the same bits.
        part = images_at_once(model, self.real.images.shape, self.real.device, GPU_PART)
        parts = tqdm(index.split(part), desc="real features", leave=False, disable=None, delay=2)
        return torch.cat([embed(model, self.real.at(rows)).float() for rows in parts])


def load_pool(flags: DistillFlags, image_set: ImageSet, device: torch.device) -> ModelPool:
    """The pre-trained models of `flags`, ready for this set's images.

    A UserError if they are too few, damaged, or, with ce, of other labels than the set's.
    """
    given, families = Space.of(image_set.stats, image_set.img_shape[1:]), []
    for name, alpha in pair_pool(flags):
        if name.startswith(PREFIX):
            models = [load_foundation(name, given, device)]
        else:
            models, num_classes = load_networks(flags, name, given, device)
            if flags.CLoM_distance == "ce" and not same_labels(flags, image_set, num_classes):
                theirs = f"{flags.source_dataset} ({num_classes} classes)"
                raise UserError(
                    f"--CLoM_distance ce needs models of the same labels: {theirs} is not {flags.dataset} "
                    f"({image_set.num_classes} classes); use --CLoM_distance cos"
                )
        families.append((models, alpha))
    return ModelPool(families)


def same_labels(flags: DistillFlags, image_set: ImageSet, num_classes: int) -> bool:
    """Whether the source's classes are the target's: one prepared set, or equal class names."""
    if num_classes != image_set.num_classes:
        return False
    source, target = map(set_folder, (flags.source_dataset, flags.dataset))
    data_dir = image_set.train.path.parents[1]
    names = [read_meta(data_dir / folder).get("class_names") for folder in (source, target)]
    return source == target or (names[0] is not None and names[0] == names[1])


def pool_fingerprint(pool: ModelPool) -> str:
    """Which weights the models of a pool have, and what images they were made for."""
    found = [(state_fingerprint(m.model.state_dict()), m.own) for models, _ in pool.families for m in models]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]
