"""Crop, flip and normalisation as batched functions; parameters are drawn apart from their use.

Drawing and applying are separate so that a view can be named by its parameters: crop offsets times
flip give (2·pad+1)²·2 distinct views of an image (162 at the published padding of 4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.specs import Stats


class CropFlip(NamedTuple):
    """Parameters of a batch of views: offsets in [0, 2·pad] and a flip flag, each of shape (B,)."""

    top: Tensor
    left: Tensor
    flip: Tensor


def default_padding(size: int) -> int:
    """The published 4 pixels from 32 pixels up; an eighth of the side below (2 at 16 pixels)."""
    return 4 if size >= 32 else size // 8


def draw_crop_flip(count: int, pad: int, hflip: bool, generator: torch.Generator) -> CropFlip:
    """Draw `count` views on the CPU: uniform offsets, flip with probability 1/2 if `hflip`."""
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5 if hflip else torch.zeros(count).bool()
    return CropFlip(top, left, flip)


def apply_crop_flip(x: Tensor, views: CropFlip, pad: int) -> Tensor:
    """Zero-pad, crop back at each image's own offset, mirror where flagged.

    Args:
        x: (B, C, H, W) of any dtype, before normalisation (the padding is black).
        views: one entry an image; moved to x's device.
        pad: zero padding in pixels on each side.

    Returns:
        A new tensor of x's shape and dtype; differentiable in x where x is floating point.
    """
    batch, channels, height, width = x.shape
    top, left, flip = (v.to(x.device, non_blocking=True) for v in views)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(batch, width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    padded = F.pad(x, (pad, pad, pad, pad))
    padded_width = width + 2 * pad
    index = rows[:, :, None] * padded_width + columns[:, None, :]  # (B, H, W)
    index = index.view(batch, 1, height * width).expand(batch, channels, height * width)
    return padded.flatten(2).gather(2, index).view_as(x)


def to_float(x: Tensor) -> Tensor:
    """Uint8 in [0, 255] becomes float32 in [0, 1]; float tensors pass through."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def normalize(x: Tensor, stats: Stats) -> Tensor:
    """(x - mean) / std per channel, x float in [0, 1] of shape (B, C, H, W)."""
    mean, std = _channel_rows(x, stats)
    return (x - mean) / std


def denormalize(x: Tensor, stats: Stats) -> Tensor:
    """Inverse of `normalize`; not clamped."""
    mean, std = _channel_rows(x, stats)
    return x * std + mean


def _channel_rows(x: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(v, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
        for v in (stats.mean, stats.std)
    )
    return mean, std
