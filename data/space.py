"""Image spaces: which form a network's images have, and the way from one form into another."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from data.augment import denormalize, normalize
from data.specs import Stats


@dataclass(frozen=True)
class Space:
    """The form of image batches: normalisation, channels (1 or 3), height and width."""

    stats: Stats
    channels: int
    size: tuple[int, int]

    @classmethod
    def of(cls, stats: Stats, size: tuple[int, ...]) -> Space:
        """As many channels as the statistics have."""
        height, width = size
        return cls(stats, len(stats.mean), (height, width))


def convert(x: Tensor, source: Space, target: Space, mode: str = "bilinear") -> Tensor:
    """Bring normalised images from one space into another, differentiably.

    De-normalise, one channel to three equal ones (or three to their mean), resize (antialiased),
    normalise. Equal spaces return x itself.

    Args:
        x: (B, C, H, W) float in `source`.
        source: where x lives.
        target: where it should.
        mode: interpolation, bilinear or bicubic.

    Returns:
        (B, C', H', W') in `target`.
    """
    if source == target:
        return x
    x = denormalize(x, source.stats)
    if source.channels != target.channels:
        x = x.expand(-1, 3, -1, -1) if target.channels == 3 else x.mean(1, keepdim=True)
    if source.size != target.size:
        x = F.interpolate(x, target.size, mode=mode, align_corners=False, antialias=True)
    return normalize(x, target.stats)
