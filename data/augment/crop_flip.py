"""Crop and flip of batches.

Drawing and applying are separate so that a view can be named by its parameters: crop offsets times
flip give (2·pad+1)²·2 distinct views of an image (162 at the published padding of 4).
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.device import upload


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


def count_views(pad: int, hflip: bool) -> int:
    """Number of distinct views of an image: (2·pad+1)² offsets, twice that with flips."""
    return (2 * pad + 1) ** 2 * (2 if hflip else 1)


def view_numbers(views: CropFlip, pad: int) -> Tensor:
    """The number in [0, count_views) of each view, (B,) int64; mirrored ones come last."""
    offsets = 2 * pad + 1
    return (views.flip.long() * offsets + views.top) * offsets + views.left


def views_from_numbers(numbers: Tensor, pad: int) -> CropFlip:
    """Inverse of `view_numbers`."""
    offsets = 2 * pad + 1
    left, rest = numbers % offsets, numbers // offsets
    return CropFlip(rest % offsets, left, rest >= offsets)


def apply_crop_flip(x: Tensor, views: CropFlip, pad: int, border: str = "constant") -> Tensor:
    """Pad by `pad` pixels, crop back at each image's own offset, mirror where flagged.

    x is (B, C, H, W) of any dtype, and so is the result, which is differentiable in a floating-point x.
    The `border` is zeros (black before normalisation), or with "reflect" the image mirrored at its
    edges, for floating-point images of more than `pad` rows and columns.
    """
    channels, height, width = x.shape[1:]
    view = upload(view_numbers(views, pad), x.device)
    index = _view_table(height, width, pad, x.device).index_select(0, view)  # (B, H·W)
    padded = F.pad(x, (pad, pad, pad, pad), border).flatten(2)
    return padded.gather(2, index[:, None].expand(-1, channels, -1)).view_as(x)


@functools.lru_cache(maxsize=8)
def _view_table(height: int, width: int, pad: int, device: torch.device) -> Tensor:
    """For each view, where its pixels lie in the flattened padded image: (2·(2·pad+1)², H·W)."""
    offset = torch.arange(2 * pad + 1)
    rows = offset[:, None] + torch.arange(height)  # (offsets, H)
    columns = offset[:, None] + torch.arange(width)  # (offsets, W)
    columns = torch.stack([columns, columns.flip(1)])  # (2, offsets, W)
    index = rows[None, :, None, :, None] * (width + 2 * pad) + columns[:, None, :, None, :]
    return index.reshape(-1, height * width).to(device)
