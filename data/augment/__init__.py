"""Augmentation of image batches on their device; here, normalisation and reading pixels at other places."""

import functools

import torch
from torch import Tensor

from data.specs import Stats
from utils.device import upload


def to_float(x: Tensor) -> Tensor:
    """Uint8 in [0, 255] becomes float32 in [0, 1]; float tensors pass through."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def normalize(x: Tensor, stats: Stats) -> Tensor:
    """(x - mean) / std per channel of (B, C, H, W) float in [0, 1], or uint8 in [0, 255]; a new tensor."""
    mean, std = _channel_rows(stats, x.dtype, x.device)
    if x.dtype == torch.uint8:  # two passes in place instead of four with copies
        return x.float().mul_(1 / (255 * std)).sub_(mean / std)
    return (x - mean) / std


def denormalize(x: Tensor, stats: Stats) -> Tensor:
    """Inverse of `normalize`, to [0, 1]; not clamped."""
    mean, std = _channel_rows(stats, x.dtype, x.device)
    return x * std + mean


@functools.lru_cache(maxsize=16)
def _channel_rows(stats: Stats, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std as (1, C, 1, 1), float32 for integers; kept: a copy from the host stalls every batch."""
    dtype = dtype if dtype.is_floating_point else torch.float32
    rows = (torch.tensor(values, dtype=dtype, device=device) for values in (stats.mean, stats.std))
    return tuple(row.view(1, -1, 1, 1) for row in rows)


def gather_pixels(x: Tensor, index: Tensor) -> Tensor:
    """Pixels of x (n, C, H, W) at flat positions `index` (n or 1, H', W'), for all channels."""
    flat = upload(index, x.device).flatten(1)[:, None].expand(*x.shape[:2], -1)
    return x.flatten(2).gather(2, flat).view(*x.shape[:2], *index.shape[1:])


def read_pixels(x: Tensor, rows: Tensor, columns: Tensor, fill: Tensor | float = 0.0) -> Tensor:
    """The pixels of x (n, C, H, W) at each image's own rows and columns; differentiable in x.

    `rows` are (n, H') whole numbers, `columns` (n, W'), or n = 1 for all images; `fill` is the value
    outside of the image, a number or C×1×1. Returns (n, C, H', W').
    """
    height, width = x.shape[2:]
    inside = ((rows >= 0) & (rows < height))[:, :, None]
    inside = inside & ((columns >= 0) & (columns < width))[:, None, :]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    return torch.where(upload(inside, x.device)[:, None], gather_pixels(x, index), fill)
