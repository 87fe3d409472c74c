"""ZCA whitening: an affine map of images after which their pixels are nearly uncorrelated."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.augment import to_float
from data.specs import Stats, pixel_stats
from utils.device import free_memory
from utils.errors import UserError

RIDGE = 0.1  # of the published methods
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Whitening:
    """z = (x - mean) · matrix for flattened images x, normalised with known statistics.

    With D = C·H·W values per image, `mean` is (D,) and `matrix` (D, D), float32 on one device.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", app. A (ZCA).
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, images: Tensor, stats: Stats, device: torch.device, normalized: bool = False) -> Whitening:
        """ZCA of the images (N, C, H, W), uint8 or float in [0, 1], in float64.

        With covariance U S Uᵀ of the pixels (of the normalised images, if `normalized`) it is
        U (S + 0.1)^-½ Uᵀ. The result takes images that are normalised with `stats`. A UserError for
        images that are too large for the memory.
        """
        size = images[0].numel()
        if device.type == "mps":  # has no float64
            device = torch.device("cpu")
        if (needed := 4 * 8 * size**2) > free_memory(device):
            raise UserError(
                f"--zca: whitening {size} values per image takes {needed / 1e9:.0f} GB on {device}; "
                "use --no-zca or a smaller --img_size"
            )
        used, shape = stats if normalized else pixel_stats(images.shape[1]), images.shape[1:]
        scale, shift = _rows(used, shape, device)

        def part(start: int) -> Tensor:
            x = to_float(images[start : start + _ROWS].to(device)).flatten(1).double()
            return (x - shift) / scale

        starts = range(0, len(images), _ROWS)
        mean = sum(part(start).sum(0) for start in starts) / len(images)
        covariance = torch.zeros(size, size, dtype=torch.float64, device=device)
        for start in starts:
            x = part(start) - mean
            covariance.addmm_(x.mT, x)
        values, vectors = torch.linalg.eigh(covariance / max(1, len(images) - 1))
        matrix = (vectors * (values.clamp_min(0) + RIDGE).rsqrt()) @ vectors.mT
        return cls(mean.float(), matrix.float()).moved(used, stats, shape)

    def moved(self, source: Stats, target: Stats, shape: tuple[int, ...]) -> Whitening:
        """The same map for images (C, H, W) normalised with `target` where it took `source`."""
        if source == target:
            return self
        own, other = (_rows(stats, shape, self.mean.device) for stats in (source, target))
        scale, shift = other[0] / own[0], (other[1] - own[1]) / own[0]  # x = scale · y + shift
        mean = (self.mean.double() - shift) / scale
        return Whitening(mean.float(), (scale[:, None] * self.matrix.double()).float())

    def to(self, device: torch.device) -> Whitening:
        """On a device."""
        return replace(self, mean=self.mean.to(device), matrix=self.matrix.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> whitened ones, the same shape, float32."""
        with torch.autocast(x.device.type, enabled=False):
            return ((x.flatten(1).float() - self.mean) @ self.matrix).view(x.shape)

    def undo(self, z: Tensor) -> Tensor:
        """Whitened images (B, C, H, W) -> normalised ones, float32."""
        inverse, mean = self._inverse, self.mean.to(self._inverse)
        x = z.flatten(1).to(inverse) @ inverse + mean
        return x.view(z.shape).to(z.device, torch.float32)

    @functools.cached_property
    def _inverse(self) -> Tensor:
        matrix = self.matrix.cpu() if self.matrix.device.type == "mps" else self.matrix
        return torch.linalg.inv(matrix.double())


def _rows(stats: Stats, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(D,) float64 standard deviations and means of the values of a flattened (C, H, W) image."""
    values = torch.tensor((stats.std, stats.mean), dtype=torch.float64, device=device)
    return values.repeat_interleave(shape[-2] * shape[-1], dim=1).unbind()
