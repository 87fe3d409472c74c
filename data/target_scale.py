"""Target vectors with mean 0 and variance 1 in each dimension, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

TARGET_SCALES = ("none", "std")  # values of --target_scale


@dataclass(frozen=True, eq=False)
class TargetScale:
    """y = (t - mean) / std for target vectors t (B, D); `mean` and `std` are (D,) float32."""

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> TargetScale:
        """Mean and population standard deviation of features (N, D), in float64; constant ones get std 1."""
        features = features.cpu() if features.device.type == "mps" else features  # has no float64
        mean, std = features.double().mean(0), features.double().std(0, correction=0)
        std = torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0)
        return cls(mean.float(), std.float())

    def to(self, device: torch.device) -> TargetScale:
        """On a device."""
        return replace(self, mean=self.mean.to(device), std=self.std.to(device))

    def __call__(self, t: Tensor) -> Tensor:
        """Target vectors (B, D) -> standardised ones, float32."""
        return (t.float() - self.mean.to(t.device)) / self.std.to(t.device)

    def undo(self, y: Tensor) -> Tensor:
        """Standardised vectors (B, D) -> those of the target model, float32."""
        return y.float() * self.std.to(y.device) + self.mean.to(y.device)

    @torch.no_grad()
    def undo_in(self, linear: nn.Linear) -> None:
        """Change a last layer whose outputs are standardised vectors: they become the target model's."""
        std, mean = self.std.to(linear.weight.device), self.mean.to(linear.weight.device)
        linear.weight.mul_(std[:, None])
        linear.bias.mul_(std).add_(mean)
