"""How to train on a synthetic set, where the set itself decides it: kept beside its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.augment.dsa import check_strategy
from data.target_scale import TargetScale
from data.untrusted import check_regular, parse_json
from data.whitening import Whitening
from utils import checkpoint
from utils.errors import UserError, first_line

TRAINING_FILE = "training.safetensors"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TENSORS = {"whitening": ("mean", "matrix"), "targets": ("mean", "std")}  # part -> its tensors


@dataclass(frozen=True, eq=False)
class TrainingSettings:
    """What a set brings along for networks that are trained on it; None: the method's recipe decides."""

    lr: float | None = None  # learned step size of SGD
    dsa: str | None = None  # strategy of the differentiable augmentation, or "none"
    whitening: Whitening | None = None  # of synthetic, training and test images alike
    momentum: float | None = None  # of SGD
    targets: TargetScale | None = None  # networks learn the targets standardised; their outputs are undone
    mixup: bool | None = None  # of images and target vectors

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UserError(f"learned step size {self.lr}: expected a positive number")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise UserError(f"momentum {self.momentum}: expected a number from 0 to below 1")

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def record(self) -> dict[str, Any]:
        """What identifies the settings, as plain JSON values; {} where there are none."""
        values = {"lr": self.lr, "momentum": self.momentum, "dsa": self.dsa, "mixup": self.mixup}
        if self.whitening is not None:
            values["whitening"] = checkpoint.fingerprint(self.whitening.mean, self.whitening.matrix)
        if self.targets is not None:
            values["targets"] = checkpoint.fingerprint(self.targets.mean, self.targets.std)
        return {name: value for name, value in values.items() if value is not None}

    def check_images(self, images: Tensor) -> None:
        """Raise a UserError for a whitening of images of another size than (m, C, H, W)."""
        if self.whitening is None:
            return
        size, found = images[0].numel(), tuple(self.whitening.matrix.shape)
        if found != (size, size) or tuple(self.whitening.mean.shape) != (size,):
            raise UserError(f"the whitening's matrix is {found}, the images need {(size, size)}")

    def check_targets(self, targets: Tensor) -> None:
        """Raise a UserError for statistics or mixup of vectors (m, D) that the targets are not."""
        vectors = targets.is_floating_point()
        if self.mixup and not vectors:
            raise UserError("mixup of class indices; expected target vectors")
        if self.targets is None:
            return
        sizes = {tuple(t.shape) for t in (self.targets.mean, self.targets.std)}
        if not vectors or sizes != {tuple(targets.shape[1:])}:
            found = f"vectors of {targets.shape[1]}" if vectors else "class indices"
            raise UserError(f"statistics of targets are {sorted(sizes)}, the targets are {found}")
        if not bool((self.targets.std > 0).all()):
            raise UserError("statistics of targets: expected positive standard deviations")

    def pack(self) -> tuple[dict[str, Tensor], str]:
        """Tensors and a JSON text, what a safetensors file holds."""
        parts = {"whitening": self.whitening, "targets": self.targets}
        tensors = {
            f"{name}.{field}": getattr(part, field).cpu().contiguous()
            for name, part in parts.items()
            for field in (_TENSORS[name] if part is not None else ())
        }
        return tensors, json.dumps(self.record())

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], text: str, path: Path) -> TrainingSettings:
        """The inverse of `pack`; a UserError that names the file for what is none."""
        raw = parse_json(text, path)
        lr, dsa, momentum, mixup = (raw.get(name) for name in ("lr", "dsa", "momentum", "mixup"))
        usable = isinstance(dsa, str | None) and isinstance(mixup, bool | None)
        found = {}
        for name, fields in _TENSORS.items():
            present = [t for field in fields if (t := tensors.get(f"{name}.{field}")) is not None]
            usable = usable and len(present) in (0, len(fields))
            usable = usable and all(t.dtype in _FLOATS for t in present)
            found[name] = [t.float() for t in present] if usable else []
            usable = usable and all(bool(t.isfinite().all()) for t in found[name])  # as float32
        if not usable:
            raise UserError(f"{path} does not hold settings for training on a synthetic set")
        try:
            whitening = Whitening(*found["whitening"]) if found["whitening"] else None
            targets = TargetScale(*found["targets"]) if found["targets"] else None
            check_strategy(dsa)
            return cls(_number(lr), dsa, whitening, _number(momentum), targets, mixup)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def _number(value: Any) -> float | None:
    """A JSON number or null as it is; infinity for a number too large, NaN for anything else."""
    if value is None:
        return None
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return math.inf


def read_training(path: Path) -> TrainingSettings:
    """The settings in a file of their own; none where there is no such file."""
    if not path.exists():
        return TrainingSettings()
    tensors, metadata = read_safetensors(path)
    return TrainingSettings.unpack(tensors, metadata.get("training", ""), path)


def write_training(training: TrainingSettings, path: Path) -> None:
    """Write the settings into a file of their own; without any, a file that is there is removed."""
    if not training:
        path.unlink(missing_ok=True)
        return
    tensors, text = training.pack()
    write_safetensors(tensors, path, training=text)


def write_safetensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write tensors and texts into one file, whole or not at all; the same ones make the same bytes."""
    payload = safetensors.torch.save(tensors, {"format": "pt", **metadata})
    start = 8 + int.from_bytes(payload[:8], "little")  # the library writes the texts in any order
    header = json.loads(payload[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values stay aligned
    parts = len(text).to_bytes(8, "little"), text, memoryview(payload)[start:]
    checkpoint.write_atomic(path, lambda file: file.writelines(parts))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file on the CPU, and its metadata; a UserError for a damaged one."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({first_line(error)})") from None
