"""Values in few bits: levels at equal distances, as many for each column as pay there.

Source of bits shared out among principal directions: Huang and Schultheiss, "Block quantization of
correlated Gaussian random variables", IEEE Transactions on Communications Systems, 1963.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST_BITS = 8  # of a value
# Shares of a column's values below and above its range that are tried, and become its ends.
_OUTSIDE = (0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)


class Levels(NamedTuple):
    """Values t (m, q), or any shape that `slope` and `low` broadcast with, as low + slope * levels."""

    levels: Tensor  # uint8
    slope: Tensor
    low: Tensor

    def errors(self, t: Tensor) -> Tensor:
        """Squared errors of each column of t (m, q): (q,)."""
        return (self.levels * self.slope + self.low - t).square().sum(0)


def between(t: Tensor, low: Tensor, high: Tensor, bits: int) -> Levels:
    """`t` in 2**bits levels from `low` to `high`, its nearest ones."""
    top = 2**bits - 1
    slope = torch.where(high > low, (high - low) / max(top, 1), 1)
    return Levels(((t - low) / slope).round().clamp(0, top).byte(), slope, low)


def share_bits(t: Tensor, total: int) -> tuple[Levels, Tensor]:
    """`t` (m, q) in `total` bits a row, at most MOST_BITS * q, and the bits of each column: little is lost.

    One bit after the other goes to the column whose squared errors it lowers most, which is best where each
    further bit of a column lowers them less.
    """
    ordered, outside = t.sort(0).values, (torch.tensor(_OUTSIDE) * (len(t) - 1)).round().long()
    ends = ordered[outside], ordered[len(t) - 1 - outside]
    choices = [between(t, t.mean(0), t.mean(0), 0)]
    choices += [_best_range(t, bits, *ends) for bits in range(1, MOST_BITS + 1)]
    errors = torch.stack([choice.errors(t) for choice in choices])
    gains = (errors[:-1] - errors[1:]).cummin(0).values  # a bit does not come before those that it follows
    columns = torch.arange(t.shape[1])
    bits = torch.bincount(gains.flatten().topk(total).indices % len(columns), minlength=len(columns))
    levels, slope, low = (torch.stack(parts) for parts in zip(*choices, strict=True))
    return Levels(levels[bits, :, columns].T, slope[bits, columns], low[bits, columns]), bits


def _best_range(t: Tensor, bits: int, lows: Tensor, highs: Tensor) -> Levels:
    """`t` (m, q) in 2**bits levels: of each column between those of the ends (k, q) that lose least."""
    errors = [between(t, *ends, bits).errors(t) for ends in zip(lows, highs, strict=True)]
    best = torch.stack(errors).argmin(0, keepdim=True)
    return between(t, lows.gather(0, best)[0], highs.gather(0, best)[0], bits)


def _places(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each bit of a row its column, and its place in the level there, the lowest first."""
    return (torch.arange(MOST_BITS) < bits[:, None]).nonzero(as_tuple=True)


def pack_bits(levels: Tensor, bits: Tensor) -> Tensor:
    """Levels (m, q) uint8 as (m, bytes): those of a row one after the other, the lowest bits first."""
    columns, places = _places(bits)
    single = levels[:, columns] >> places.byte() & 1
    return torch.from_numpy(np.packbits(single.numpy(), axis=1, bitorder="little"))


def unpack_bits(packed: Tensor, bits: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    columns, places = _places(bits)
    single = np.unpackbits(packed.numpy(), axis=1, count=len(columns), bitorder="little")
    levels = torch.zeros(len(packed), len(bits), dtype=torch.uint8)
    return levels.index_add_(1, columns, torch.from_numpy(single) << places.byte())
