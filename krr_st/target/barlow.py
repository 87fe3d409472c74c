"""Barlow Twins: the self-supervised objective that makes a target model without labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.augment import normalize, to_float
from data.specs import Stats
from utils.seed import draw_seed, local_seed


def barlow_twins_loss(z1: Tensor, z2: Tensor, off_diagonal: float = 5e-3) -> Tensor:
    """Distance of the views' cross-correlation matrix from the identity.

        Σ_i (1 - C_ii)² + off_diagonal · Σ_{i≠j} C_ij²,  C = Z₁ᵀZ₂ / n

    with each column of Z₁ and Z₂ standardised over the batch.

    Args:
        z1: (n, p) projections of the first views; n at least 2.
        z2: (n, p) projections of the second views of the same images.
        off_diagonal: weight λ of the redundancy-reduction term.

    Returns:
        Scalar, float32 or the wider dtype of the inputs.

    Raises:
        ValueError: shapes differ or n < 2.

    Source: Zbontar et al., "Barlow Twins", arXiv 2103.03230, eq. 1-2.
    """
    if z1.dim() != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(
            f"expected two (n, p) matrices with n >= 2, got {tuple(z1.shape)}, {tuple(z2.shape)}"
        )
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    c = z1.mT @ z2 / len(z1)  # (p, p)
    diagonal = c.diagonal()
    on = (1 - diagonal).square().sum()
    off = c.square().sum() - diagonal.square().sum()
    return on + off_diagonal * off


def projector(features: int, hidden: int, layers: int = 3) -> nn.Sequential:
    """The projection head: `layers` linear layers of width `hidden`, BatchNorm + ReLU between.

    Maps (n, features) to (n, hidden). Source: arXiv 2103.03230, sec. 2.2.
    """
    blocks: list[nn.Module] = []
    for i in range(layers - 1):
        width = features if i == 0 else hidden
        blocks += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    blocks.append(nn.Linear(features if layers == 1 else hidden, hidden, bias=False))
    return nn.Sequential(*blocks)


class TwoViews:
    """Two random views of each image, by kornia, batched on the images' device.

    Random resized crop, mirror, colour jitter, grey: what Barlow Twins uses at small sizes. The
    colour operations need three channels and are left out for one.

    Args:
        size: side of the output in pixels.
        channels: image channels.
        stats: normalisation, applied last.
        hflip: whether mirroring keeps the meaning.
        min_crop: smallest area of the crop as a share of the image.
        jitter: strength of the colour jitter; 0 leaves colours alone.
        degrees: largest rotation; 0 leaves the images upright.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        stats: Stats,
        *,
        hflip: bool,
        min_crop: float,
        jitter: float,
        degrees: float = 0.0,
    ) -> None:
        import kornia.augmentation as K  # slow to import, and only training a target needs it

        self.stats = stats
        crop = K.RandomResizedCrop((size, size), scale=(min_crop, 1.0), cropping_mode="resample")
        steps: list[nn.Module] = [crop]
        if degrees > 0:
            steps.append(K.RandomRotation(degrees, p=1.0))
        if hflip:
            steps.append(K.RandomHorizontalFlip())
        if jitter > 0 and channels == 3:
            steps.append(K.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.4 * jitter, 0.2 * jitter, p=0.8))
            steps.append(K.RandomGrayscale(p=0.2))
        self._augment = nn.Sequential(*steps)

    @torch.no_grad()
    def __call__(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(n, C, H, W) in pixel space -> two normalised float32 batches of (n, C, size, size)."""
        x = to_float(x)
        with local_seed(draw_seed(generator)):  # kornia draws from the global random state
            first, second = self._augment(x), self._augment(x)
        return normalize(first, self.stats), normalize(second, self.stats)
