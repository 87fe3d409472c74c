"""What the distillers match: gradients (DC, DSA) and mean features (DM). Pure functions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.errors import pick

# Keeps the cosine of a vanishing gradient finite.
EPSILON = 1e-6


def gradient_distance(
    grads_syn: Sequence[Tensor], grads_real: Sequence[Tensor], metric: str = "ours"
) -> Tensor:
    """Distance between two gradients of one network, each with one tensor per parameter.

    "ours": Σ over layers and output rows of 1 - cosine; of everything concatenated, "mse" is the sum of
    squared differences, "cos" is 1 - cosine. A scalar >= 0 (up to rounding), differentiable in both.
    A ValueError for lists that do not fit each other, a UserError for an unknown metric.

    Source: Zhao et al., arXiv 2006.05929, eq. 10 ("ours").
    """
    shapes_syn, shapes_real = ([tuple(g.shape) for g in grads] for grads in (grads_syn, grads_real))
    if shapes_syn != shapes_real or not shapes_syn:
        raise ValueError(f"gradients of shapes {shapes_syn} and {shapes_real} cannot be compared")
    return pick(METRICS, metric, "dis_metric")(grads_syn, grads_real)


def _layerwise(grads_syn: Sequence[Tensor], grads_real: Sequence[Tensor]) -> Tensor:
    total = grads_syn[0].new_zeros(())
    for g_syn, g_real in zip(grads_syn, grads_real, strict=True):
        if g_syn.dim() > 1:  # biases and affine norms do not count
            # One row per output: conv (out, in·h·w), linear (out, in), layer norm (C, h·w).
            total = total + (1 - _cosine(g_syn.flatten(1), g_real.flatten(1))).sum()
    return total


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last axis, with the published guard in the denominator."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / (norms + EPSILON)


def _joined(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


METRICS: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "ours": _layerwise,
    "mse": lambda syn, real: (_joined(syn) - _joined(real)).square().sum(),
    "cos": lambda syn, real: 1 - _cosine(_joined(syn), _joined(real)),
}


def distribution_distance(
    f_real: Tensor, f_syn: Tensor, counts_real: Sequence[int], counts_syn: Sequence[int]
) -> Tensor:
    """Σ over classes of ‖mean real feature - mean synthetic feature‖².

    Features (N, D) and (m, D) in class order, and how many rows each class has in them, at least
    one -> a scalar >= 0, differentiable in `f_syn` alone. A ValueError for counts that do not fit.

    Source: Zhao and Bilen, arXiv 2110.04181, eq. 6.
    """
    if len(counts_real) != len(counts_syn):
        raise ValueError(f"{len(counts_real)} real classes, {len(counts_syn)} synthetic ones")
    difference = class_means(f_real.detach(), counts_real) - class_means(f_syn, counts_syn)
    return difference.square().sum()


def class_means(features: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean of consecutive groups of rows: (N, D) and K counts -> (K, D)."""
    if min(counts, default=0) < 1 or sum(counts) != len(features):
        raise ValueError(f"class counts {counts} do not fit {len(features)} rows")
    if len(set(counts)) == 1:
        return features.view(len(counts), counts[0], -1).mean(1)
    return torch.stack([group.mean(0) for group in features.split(list(counts))])
