"""Low frequencies of images."""

import functools
import math

import torch
from torch import Tensor

ORDER = 8  # how steeply the filter falls around its cutoff


def low_pass(x: Tensor, cutoff: Tensor) -> Tensor:
    """The low frequencies of x (n, C, H, W) float, which goes on as its mirror image; differentiable in x.

    Coefficients of the cosine transform (DCT-II) at frequency f count by 1 / (1 + (f / cutoff)^8), with the
    `cutoff` (n,) above 0 of each image. Frequencies are in units of the highest along an axis (half a
    cycle per pixel), so the highest of all, in the corner, is √2.

    Source: Butterworth's filter; cosine transform of Ahmed, Natarajan and Rao, IEEE Trans. Comput. 1974.
    """
    height, width = x.shape[2:]
    rows, columns = (_cosines(n, x.dtype, x.device) for n in (height, width))
    down, across = (torch.arange(n, dtype=x.dtype, device=x.device) / n for n in (height, width))
    power = (down[:, None].square() + across.square()) ** (ORDER // 2)  # f^8
    gain = 1 / (1 + power / cutoff.view(-1, 1, 1, 1) ** ORDER)
    with torch.autocast(x.device.type, enabled=False):
        return rows.T @ (gain * (rows @ x @ columns.T)) @ columns


@functools.lru_cache(maxsize=16)
def _cosines(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal matrix (size, size) of the cosine transform; kept: a copy from the host stalls."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)
