"""Reading batches of images at other places."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_pixels(x: Tensor, index: Tensor) -> Tensor:
    """Pixels of x (n, C, H, W) at flat positions `index` (n or 1, H', W'), for all channels."""
    flat = index.to(x.device).flatten(1)[:, None].expand(*x.shape[:2], -1)
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
    return torch.where(inside[:, None].to(x.device), gather_pixels(x, index), fill)
