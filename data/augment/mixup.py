"""Mixup: every image of a batch is blended with another one, and the targets alike.

Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv 1710.09412, with λ ~ U(0, 1).
"""

import torch
from torch import Tensor

from utils.device import upload


def mixup(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """λ·x + (1 - λ)·x[partner] with a λ and a partner for each row; the same for y.

    x is (B, C, H, W) and y (B, D), float; differentiable in both. Partners are a random order of the batch.
    """
    share = torch.rand(len(x), generator=generator)
    partner = upload(torch.randperm(len(x), generator=generator), x.device)

    def blend(t: Tensor) -> Tensor:
        part = upload(share.to(t.dtype), t.device).view(-1, *[1] * (t.dim() - 1))
        return part * t + (1 - part) * t[partner]

    return blend(x), blend(y)
