"""The frozen target model g: what the synthetic set has to reproduce."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from models import get_model
from utils import checkpoint
from utils.errors import UserError


class Representation(nn.Module):
    """A zoo-A network without its head, as a map from images to pooled features.

    The state dict of `backbone` has the published key layout of a target checkpoint (a
    torchvision-style network without `fc`).

    Args:
        arch: name in zoo A.
        img_shape: (C, H, W).
    """

    def __init__(self, arch: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.backbone = get_model(arch, img_shape=img_shape, num_classes=1)
        self.backbone.fc = nn.Identity()
        self.dim = self.backbone.num_pooled

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised images -> (B, dim): the last feature map averaged over space."""
        return self.backbone.pooled(x)


def default_checkpoint(arch: str, data_name: str, folder: Path | str = "teacher_ckpt") -> Path:
    """The published place of a target checkpoint."""
    return Path(folder) / f"barlow_twins_{arch}_{data_name}.pt"


def load_target(
    arch: str, path: Path, img_shape: tuple[int, int, int], device: torch.device, make_command: str
) -> Representation:
    """Load a target model, in eval mode and frozen.

    Args:
        arch: name in zoo A.
        path: plain state dict without the head (a head that is there is left out).
        img_shape: (C, H, W).
        device: where it shall live.
        make_command: printed when the file does not exist.

    Raises:
        UserError: missing file (with the command that makes it), or one that does not fit.
    """
    model = Representation(arch, img_shape)
    if not path.exists():
        raise UserError(f"target checkpoint {path} does not exist; make it with: {make_command}")
    state = checkpoint.load_state(path, what="target checkpoint")
    checkpoint.apply_state(model.backbone, state, origin=path, skip=("fc.",))
    return model.to(device).eval().requires_grad_(False)
