"""How to train on a synthetic set, where the set itself decides it: kept beside its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.untrusted import check_regular, parse_json
from data.whitening import Whitening
from utils import checkpoint
from utils.errors import UserError, first_line

TRAINING_FILE = "training.safetensors"


@dataclass(frozen=True, eq=False)
class TrainingSettings:
    """What a set brings along for networks that are trained on it; None: the method's recipe decides."""

    lr: float | None = None  # learned step size of SGD
    dsa: str | None = None  # strategy of the differentiable augmentation, or "none"
    whitening: Whitening | None = None  # of synthetic, training and test images alike
    momentum: float | None = None  # of SGD

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UserError(f"learned step size {self.lr}: expected a positive number")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise UserError(f"momentum {self.momentum}: expected a number from 0 to below 1")

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def record(self) -> dict[str, Any]:
        """What identifies the settings, as plain JSON values; {} where there are none."""
        values = {"lr": self.lr, "momentum": self.momentum, "dsa": self.dsa}
        if self.whitening is not None:
            values["whitening"] = checkpoint.fingerprint(self.whitening.mean, self.whitening.matrix)
        return {name: value for name, value in values.items() if value is not None}

    def check_images(self, images: Tensor) -> None:
        """Raise a UserError for a whitening of images of another size than (m, C, H, W)."""
        if self.whitening is None:
            return
        size, found = images[0].numel(), tuple(self.whitening.matrix.shape)
        if found != (size, size) or tuple(self.whitening.mean.shape) != (size,):
            raise UserError(f"the whitening's matrix is {found}, the images need {(size, size)}")

    def pack(self) -> tuple[dict[str, Tensor], str]:
        """Tensors and a JSON text, what a safetensors file holds."""
        if self.whitening is None:
            return {}, json.dumps(self.record())
        tensors = {
            "whitening.mean": self.whitening.mean.cpu().contiguous(),
            "whitening.matrix": self.whitening.matrix.cpu().contiguous(),
        }
        return tensors, json.dumps(self.record())

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], text: str, path: Path) -> TrainingSettings:
        """The inverse of `pack`; a UserError that names the file for what is none."""
        raw = parse_json(text, path)
        lr, dsa, momentum = raw.get("lr"), raw.get("dsa"), raw.get("momentum")
        usable = all(isinstance(v, float | int | None) for v in (lr, momentum)) and isinstance(
            dsa, str | None
        )
        found = [tensors.get(f"whitening.{name}") for name in ("mean", "matrix")]
        present = [t for t in found if t is not None]
        usable = usable and len(present) in (0, 2)
        if not usable or not all(t.is_floating_point() and bool(t.isfinite().all()) for t in present):
            raise UserError(f"{path} does not hold settings for training on a synthetic set")
        try:
            whitening = Whitening(*(t.float() for t in present)) if present else None
            return cls(lr, dsa, whitening, momentum)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


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
    """Write tensors and texts into one file, whole or not at all."""
    payload = safetensors.torch.save(tensors, {"format": "pt", **metadata})
    checkpoint.write_atomic(path, lambda file: file.write(payload))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file on the CPU, and its metadata; a UserError for a damaged one."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({first_line(error)})") from None
