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
    """`t` (m, q) in `total` bits a row, at most MOST_BITS * q, and the bits of each column: least is lost.

    One bit after the other goes to the column whose squared errors it lowers most.
    """
    choices = [_best_range(t, bits) for bits in range(MOST_BITS + 1)]
    errors = torch.stack([choice.errors(t) for choice in choices])
    gains = (errors[:-1] - errors[1:]).cummin(0).values  # a bit does not come before those that it follows
    columns = torch.arange(t.shape[1])
    bits = torch.bincount(gains.flatten().topk(total).indices % len(columns), minlength=len(columns))
    levels, slope, low = (torch.stack(parts) for parts in zip(*choices, strict=True))
    return Levels(levels[bits, :, columns].T, slope[bits, columns], low[bits, columns]), bits


def _best_range(t: Tensor, bits: int) -> Levels:
    """`t` (m, q) in 2**bits levels: of each column over the range that loses least."""
    if bits == 0:
        return between(t, t.mean(0), t.mean(0), 0)
    ordered, outside = t.sort(0).values, (torch.tensor(_OUTSIDE) * (len(t) - 1)).round().long()
    lows, highs = ordered[outside], ordered[len(t) - 1 - outside]
    errors = [between(t, *ends, bits).errors(t) for ends in zip(lows, highs, strict=True)]
    best = torch.stack(errors).argmin(0, keepdim=True)
    return between(t, lows.gather(0, best)[0], highs.gather(0, best)[0], bits)


def pack_bits(levels: Tensor, bits: Tensor) -> Tensor:
    """Levels (m, q) uint8 as (m, bytes): those of a row one after the other, the lowest bits first."""
    columns = zip(levels.numpy().T, bits.tolist(), strict=True)
    single = [np.unpackbits(c[:, None], axis=1, count=b, bitorder="little") for c, b in columns]
    return torch.from_numpy(np.packbits(np.concatenate(single, 1), axis=1, bitorder="little"))


def unpack_bits(packed: Tensor, bits: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    single = np.unpackbits(packed.numpy(), axis=1, count=int(bits.sum()), bitorder="little")
    levels = np.zeros((len(packed), len(bits)), np.uint8)
    for i, column in enumerate(np.split(single, bits.cumsum(0)[:-1].tolist(), axis=1)):
        if column.size:
            levels[:, i] = np.packbits(column, axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(levels)
