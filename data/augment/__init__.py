"""Augmentation and, here, normalisation of image batches, on the device of the images."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from data.specs import Stats


def to_float(x: Tensor) -> Tensor:
    """Uint8 in [0, 255] becomes float32 in [0, 1]; float tensors pass through."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def normalize(x: Tensor, stats: Stats) -> Tensor:
    """(x - mean) / std per channel of (B, C, H, W) float in [0, 1], or uint8 in [0, 255]; a new tensor."""
    mean, std = _channel_rows(stats, _float_dtype(x), x.device)
    if x.dtype == torch.uint8:  # two passes in place instead of four with copies
        return x.float().mul_(1 / (255 * std)).sub_(mean / std)
    return (x - mean) / std


def denormalize(x: Tensor, stats: Stats) -> Tensor:
    """Inverse of `normalize`, to [0, 1]; not clamped."""
    mean, std = _channel_rows(stats, _float_dtype(x), x.device)
    return x * std + mean


def _float_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float32


@functools.lru_cache(maxsize=16)
def _channel_rows(stats: Stats, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std as (1, C, 1, 1); kept, since a copy from the host would stall every batch."""
    rows = (torch.tensor(values, dtype=dtype, device=device) for values in (stats.mean, stats.std))
    return tuple(row.view(1, -1, 1, 1) for row in rows)
