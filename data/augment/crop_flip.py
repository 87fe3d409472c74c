"""Crop and flip of batches.

Offsets from 0 to 2·pad and a flip give V = (2·pad+1)²·2 distinct views of an image (162 at the published
padding of 4). A view is its number, (flip · (2·pad+1) + top) · (2·pad+1) + left: mirrored ones come last.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.device import upload


def default_padding(size: int) -> int:
    """The published 4 pixels from 32 pixels up; an eighth of the side below (2 at 16 pixels)."""
    return 4 if size >= 32 else size // 8


def draw_crop_flip(count: int, pad: int, hflip: bool, generator: torch.Generator) -> Tensor:
    """Draw `count` views: int64 on the CPU, uniform offsets, flip with probability 1/2 if `hflip`."""
    offsets = 2 * pad + 1
    top, left = torch.randint(offsets, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5 if hflip else 0
    return (flip * offsets + top) * offsets + left


def count_views(pad: int, hflip: bool) -> int:
    """Number of distinct views of an image: (2·pad+1)² offsets, twice that with flips."""
    return (2 * pad + 1) ** 2 * (2 if hflip else 1)


def apply_crop_flip(x: Tensor, views: Tensor, pad: int, border: str = "constant") -> Tensor:
    """Pad by `pad` pixels, crop back at the offsets of each image's view (B,), mirror where it says so.

    x is (B, C, H, W) of any dtype, and so is the result, which is differentiable in a floating-point x.
    The `border` is zeros (black before normalisation), or with "reflect" the image mirrored at its
    edges, for floating-point images of more than `pad` rows and columns.
    """
    channels, height, width = x.shape[1:]
    index = _view_table(height, width, pad, x.device).index_select(0, upload(views, x.device))  # (B, H·W)
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
