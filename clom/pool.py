"""CLoM's pre-trained models: where they lie, and the way from other images into them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from clom.config import PREFIX, DistillFlags
from data.space import Space, convert
from data.specs import DC_SPECS, Stats
from models import get_network
from models.foundation import load_hf
from models.layout import arranged
from utils import checkpoint
from utils.errors import UserError


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


def find_checkpoints(root: Path, dataset: str, model: str, epoch: int, count: int) -> list[Path]:
    """The first `count` state dicts of an architecture at an epoch; a UserError if there are fewer."""
    folder, wanted = model_folder(root, dataset, model), checkpoint_name(dataset, model, epoch)
    found = [p / wanted for p in index_folders(folder) if (p / wanted).exists()]
    if len(found) >= count:
        return found[:count]
    raise UserError(
        f"looked for {count} x {folder / 'index_*' / wanted} and found {len(found)}; there is: "
        f"{_describe(root, folder, dataset, model)}; train them with: python "
        f"train_original_models.py --normalize_data --dataset {dataset} --model {model} "
        f"--num {count - len(found)} --epochs {epoch}"
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
    for path in find_checkpoints(flags.pretrained_path, dataset, model, flags.epoch, flags.model_num):
        own, num_classes = source_space(path, dataset)
        network = get_network(model, own.channels, num_classes, own.size)
        state = checkpoint.load_state(path, what="pre-trained model")
        checkpoint.apply_state(network, state, origin=path)
        source = given
        if flags.CLoM_teacher_stats == "target":
            own, source = (replace(s, stats=pixel_stats(s.channels)) for s in (own, given))
        teachers.append(Teacher(arranged(network, device), own, source))
    return teachers, num_classes


def pixel_stats(channels: int) -> Stats:
    """Statistics that change nothing."""
    return Stats((0.0,) * channels, (1.0,) * channels)


def load_foundation(name: str, given: Space, device: torch.device) -> Teacher:
    """Load `hf:NAME_OR_FOLDER` for images of the space `given`; raises as `models.foundation.load_hf`."""
    found = load_hf(name.removeprefix(PREFIX))
    own = Space.of(Stats(found.mean, found.std), found.size)
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
            channels, *size = facts["img_shape"]
            stats = Stats(tuple(facts["mean"]), tuple(facts["std"]))
            return Space(stats, channels, tuple(size)), int(facts["num_classes"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        raise UserError(f"{config} is damaged; expected what train_original_models.py writes") from None
    if dataset not in DC_SPECS:
        known = ", ".join(sorted(DC_SPECS))
        raise UserError(f"the image size of {dataset} is unknown: it is not in {config}, nor one of {known}")
    spec = DC_SPECS[dataset]
    size = spec.sizes[0]
    return Space.of(spec.stats[size], (size, size)), spec.num_classes
