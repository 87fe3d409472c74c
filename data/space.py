"""Image spaces: which form a network's images have, and the way from one form into another."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from data.augment import denormalize, normalize
from data.specs import Stats


@dataclass(frozen=True)
class Space:
    """The form of image batches: normalisation, and with it the number of channels; height and width."""

    stats: Stats
    size: tuple[int, int]

    @property
    def channels(self) -> int:
        """1 or 3."""
        return len(self.stats.mean)


def convert(x: Tensor, source: Space, target: Space, mode: str = "bilinear") -> Tensor:
    """Bring normalised images from one space into another, differentiably.

    De-normalise, one channel to three equal ones (or three to their mean), resize (antialiased),
    normalise. Equal spaces return x itself.

    x is (B, C, H, W) float in `source`, the result (B, C', H', W') in `target`; `mode`: bilinear or bicubic.
    """
    if source == target:
        return x
    x = denormalize(x, source.stats)
    if source.channels != target.channels:
        x = x.expand(-1, 3, -1, -1) if target.channels == 3 else x.mean(1, keepdim=True)
    if source.size != target.size:
        x = F.interpolate(x, target.size, mode=mode, align_corners=False, antialias=True)
    return normalize(x, target.stats)
