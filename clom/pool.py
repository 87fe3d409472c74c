"""CLoM's pre-trained models, read from disk, and their features of real images."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clom.config import PREFIX, DistillFlags, pair_pool
from clom.loss import ModelPool, embed
from clom.source import set_folder
from data.load import ImageSet
from data.meta import read_meta
from data.real_data import RealImages
from data.space import Space, convert
from data.specs import DC_SPECS, Stats, pixel_stats
from models import get_network
from models.foundation import load_hf
from models.layout import arranged, images_at_once
from utils import checkpoint
from utils.cli import typed
from utils.device import upload
from utils.errors import UserError

GPU_PART = 256
CPU_CACHE_BYTES = 2 << 30


class Teacher(nn.Module):
    """A frozen model of images in the space `own` that takes images (B, C, H, W) of `given`.

    `mode` is the interpolation where the sizes differ.
    """

    def __init__(self, model: nn.Module, own: Space, given: Space, mode: str = "bilinear") -> None:
        super().__init__()
        self.model, self.own, self.given, self.mode = model, own, given, mode
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(convert(x, self.given, self.own, self.mode))

    def embed(self, x: Tensor) -> Tensor:
        return self.model.embed(convert(x, self.given, self.own, self.mode))


def model_folder(root: Path, dataset: str, model: str, kind: str = "original") -> Path:
    """Where models of one architecture lie; those of real images ("original") in folders index_{i}."""
    return Path(root) / dataset / kind / model


def checkpoint_name(dataset: str, model: str, epoch: int | str, kind: str = "original") -> str:
    """File name of a state dict after `epoch` epochs."""
    return f"{dataset}_{model}_{kind}_epoch{epoch}.pth"


def index_folders(folder: Path) -> list[Path]:
    """The index_{i} folders, by number."""
    found = (p for p in folder.glob("index_*") if re.fullmatch(r"index_\d+", p.name))
    return sorted(found, key=lambda p: int(p.name[6:]))


def find_checkpoints(flags: DistillFlags, model: str) -> list[Path]:
    """The state dicts of an architecture that the flags ask for; a UserError if there are fewer."""
    root, dataset, count = flags.pretrained_path, flags.source_dataset, flags.model_num
    folder, wanted = model_folder(root, dataset, model), checkpoint_name(dataset, model, flags.epoch)
    found = [p / wanted for p in index_folders(folder) if (p / wanted).exists()]
    if len(found) >= count:
        return found[:count]
    named: dict[str, Any] = dict(dataset=dataset, model=model, num=count - len(found), epochs=flags.epoch)
    if dataset == flags.dataset:  # another set has its own size
        named["img_size"] = flags.img_size
    if Path(root) != Path(DistillFlags.pretrained_path):
        named["pretrained_path"] = root
    command = typed(
        "python train_original_models.py", normalize_data=True, **named, data_path=flags.data_path
    )
    raise UserError(
        f"looked for {count} x {folder / 'index_*' / wanted} and found {len(found)}; there are: "
        f"{_describe(root, folder, dataset, model)}; train them with: {command}"
    )


def _describe(root: Path, folder: Path, dataset: str, model: str) -> str:
    """What lies where checkpoints were expected, in a few words."""
    pattern = re.compile(re.escape(checkpoint_name(dataset, model, "@")).replace("@", r"(\d+)"))
    shown = []
    for index in index_folders(folder):
        epochs = sorted(int(m[1]) for p in index.iterdir() if (m := pattern.fullmatch(p.name)))
        shown.append(f"{index.name} epochs {epochs[:2]} to {epochs[-1]}" if epochs else index.name)
    if shown:
        return "; ".join(shown[:5]) + (f"; and {len(shown) - 5} more" if len(shown) > 5 else "")
    others = sorted(str(p.relative_to(root)) for p in Path(root).glob("*/original/*"))
    return ", ".join(others[:8]) if others else f"nothing in {root}"


def load_networks(
    flags: DistillFlags, model: str, given: Space, device: torch.device
) -> tuple[list[Teacher], int]:
    """The zoo networks of one architecture, for images of the space `given`, and their class count.

    A UserError for too few checkpoints, damaged ones, or a source whose images are unknown.
    """
    teachers, num_classes, dataset = [], 0, flags.source_dataset
    for path in find_checkpoints(flags, model):
        own, num_classes = source_space(path, dataset)
        network = get_network(model, own.channels, num_classes, own.size)
        state = checkpoint.load_state(path, what="pre-trained model")
        checkpoint.apply_state(network, state, origin=path)
        source = given
        if flags.CLoM_teacher_stats == "target":
            own, source = (replace(s, stats=pixel_stats(s.channels)) for s in (own, given))
        teachers.append(Teacher(arranged(network, device), own, source))
    return teachers, num_classes


def load_foundation(name: str, given: Space, device: torch.device) -> Teacher:
    """Load `hf:NAME_OR_FOLDER` for images of the space `given`; raises as `models.foundation.load_hf`."""
    found = load_hf(name.removeprefix(PREFIX))
    own = Space(Stats(found.mean, found.std), found.size)
    return Teacher(found.network, own, given, found.mode).to(device)


def source_space(path: Path, dataset: str) -> tuple[Space, int]:
    """Image space and class count of a checkpoint: from its config.json, else the table of data sets.

    A UserError where neither knows them.
    """
    config = path.parent / "config.json"
    try:
        facts = json.loads(config.read_text()) if config.exists() else {}
        if not isinstance(facts, dict):
            raise TypeError("not an object")
        if "img_shape" in facts:
            _, *size = facts["img_shape"]
            stats = Stats(tuple(facts["mean"]), tuple(facts["std"]))
            return Space(stats, tuple(size)), int(facts["num_classes"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        raise UserError(f"{config} is damaged; expected what train_original_models.py writes") from None
    if dataset not in DC_SPECS:
        known = ", ".join(sorted(DC_SPECS))
        missing = f"{config} does not give it, and {dataset} is none of {known}"
        raise UserError(f"the image size of {dataset} is unknown: {missing}")
    spec = DC_SPECS[dataset]
    size = spec.sizes[0]
    return Space(spec.stats[size], (size, size)), spec.num_classes


def load_pool(flags: DistillFlags, image_set: ImageSet, device: torch.device) -> ModelPool:
    """The pre-trained models of `flags`, ready for this set's images.

    A UserError if they are too few, damaged, or, with ce, of other labels than the set's.
    """
    given, families = Space(image_set.stats, image_set.img_shape[1:]), []
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
    found = [
        (checkpoint.state_fingerprint(m.model.state_dict()), m.own)
        for models, _ in pool.families
        for m in models
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


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
        return self._features[model][upload(index, self.real.device)]

    def _embed(self, model: nn.Module, index: Tensor) -> Tensor:
        # Always the same groups of rows, so that a resumed run sees the same bits.
        part = images_at_once(model, self.real.images.shape, self.real.device, GPU_PART)
        parts = tqdm(index.split(part), desc="real features", leave=False, disable=None, delay=2)
        return torch.cat([embed(model, self.real.at(rows)).float() for rows in parts])
