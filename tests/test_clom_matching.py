"""Matching distances against naive loops."""

import math

import pytest
import torch

from clom.matching import EPSILON, METRICS, distribution_distance, gradient_distance
from utils.errors import UserError

SHAPES = [(4, 3, 2, 2), (4,), (3, 2, 2), (5, 6), (5,)]


def grads(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(s, dtype=torch.float64, generator=generator) for s in SHAPES]


def cosine(a, b):
    a, b = a.flatten().tolist(), b.flatten().tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b)) + EPSILON)


def test_ours_equals_a_row_by_row_loop():
    a, b = grads(0), grads(1)
    expected = 0.0
    for g, h in zip(a, b, strict=True):
        if g.dim() > 1:
            expected += sum(1 - cosine(g[row], h[row]) for row in range(len(g)))
    assert float(gradient_distance(a, b, "ours")) == pytest.approx(expected, rel=1e-12)


def test_mse_and_cos_use_everything_joined():
    a, b = grads(0), grads(1)
    join = [torch.cat([g.flatten() for g in side]) for side in (a, b)]
    squared = sum((x - y) ** 2 for x, y in zip(*[j.tolist() for j in join], strict=True))
    assert float(gradient_distance(a, b, "mse")) == pytest.approx(squared, rel=1e-12)
    assert float(gradient_distance(a, b, "cos")) == pytest.approx(1 - cosine(*join), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_zero_for_equal_gradients_and_differentiable(metric):
    a, b = grads(0), grads(1)
    assert float(gradient_distance(a, [g.clone() for g in a], metric)) == pytest.approx(0, abs=1e-4)
    assert float(gradient_distance(a, b, metric)) > 0.1
    variables = tuple(g.requires_grad_() for g in a)
    assert torch.autograd.gradcheck(lambda *g: gradient_distance(g, b, metric), variables)


@pytest.mark.parametrize("metric", METRICS)
def test_vanishing_gradients_stay_finite(metric):
    zeros = [torch.zeros(s, requires_grad=True) for s in SHAPES]
    real = [g.float() for g in grads(1)]
    distance = gradient_distance(zeros, real, metric)
    found = torch.autograd.grad(distance, zeros, allow_unused=True)
    assert torch.isfinite(distance)
    assert all(torch.isfinite(g).all() for g in found if g is not None)


def test_bad_arguments():
    with pytest.raises(UserError, match="unknown dis_metric 'l1'; valid: cos, mse, ours"):
        gradient_distance(grads(0), grads(1), "l1")
    with pytest.raises(ValueError, match="compared"):
        gradient_distance(grads(0)[:-1], grads(1))


@pytest.mark.parametrize("counts", [[4, 4, 4], [3, 5, 4]])
def test_distribution_distance_equals_a_loop_over_classes(counts):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(12, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    syn = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    expected, start = 0.0, 0
    for c, count in enumerate(counts):
        for d in range(5):
            mean_real = sum(real[start + i, d].item() for i in range(count)) / count
            mean_syn = sum(syn[2 * c + i, d].item() for i in range(2)) / 2
            expected += (mean_real - mean_syn) ** 2
        start += count
    distance = distribution_distance(real, syn, counts, [2, 2, 2])
    assert distance.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.grad(distance, real, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.gradcheck(lambda s: distribution_distance(real, s, counts, [2, 2, 2]), (syn,))
    with pytest.raises(ValueError, match="counts"):
        distribution_distance(real, syn, [4, 4, 3], [2, 2, 2])
