"""The CLoM loss against naive double loops, and the plug-in in someone else's loop."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clom import loss
from clom.loss import CLoM, GivenReal, ModelPool, clom_ce, clom_ce_mean, clom_cosine
from clom.pool import RealFeatures
from data.real_data import RealImages
from data.specs import Stats
from models import get_network

ROOT = Path(__file__).resolve().parents[1]
N, M, D, K = 7, 5, 6, 3


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


Y_REAL = torch.tensor([0, 1, 2, 0, 1, 1, 0])
Y_SYN = torch.tensor([0, 0, 1, 1, 2])


def naive(distance, y_real, y_syn):
    top = bottom = 0.0
    for i in range(len(y_real)):
        for j in range(len(y_syn)):
            d = distance(i, j)
            bottom += d
            if y_real[i] == y_syn[j]:
                top += d
    return top / bottom


def test_cosine_equals_a_double_loop():
    real, syn = draw(N, D), draw(M, D, seed=1)

    def distance(i, j):
        dot = sum(float(a * b) for a, b in zip(real[i], syn[j], strict=True))
        norms = [math.sqrt(sum(float(a) ** 2 for a in v)) for v in (real[i], syn[j])]
        return 1 - dot / (norms[0] * norms[1])

    expected = naive(distance, Y_REAL, Y_SYN)
    assert float(clom_cosine(real, Y_REAL, syn, Y_SYN)) == pytest.approx(expected, rel=1e-12)


def test_ce_equals_a_double_loop():
    logits = draw(M, K)

    def distance(i, j):
        total = sum(math.exp(float(v)) for v in logits[j])
        return -math.log(math.exp(float(logits[j, Y_REAL[i]])) / total)

    expected = naive(distance, Y_REAL, Y_SYN)
    assert float(clom_ce(logits, Y_SYN, Y_REAL)) == pytest.approx(expected, rel=1e-12)
    mean = (
        sum(
            -math.log(math.exp(float(logits[j, Y_SYN[j]])) / sum(math.exp(float(v)) for v in logits[j]))
            for j in range(M)
        )
        / M
    )
    assert float(clom_ce_mean(logits, Y_SYN)) == pytest.approx(mean, rel=1e-12)


def test_gradients_are_right():
    real, syn = draw(N, D).requires_grad_(), draw(M, D, seed=1).requires_grad_()
    logits = draw(M, K).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, s: clom_cosine(r, Y_REAL, s, Y_SYN), (real, syn))
    assert torch.autograd.gradcheck(lambda v: clom_ce(v, Y_SYN, Y_REAL), (logits,))
    assert torch.autograd.gradcheck(lambda v: clom_ce_mean(v, Y_SYN), (logits,))


@pytest.mark.parametrize("seed", range(5))
def test_order_range_and_scale(seed):
    real, syn, logits = draw(N, D, seed=seed), draw(M, D, seed=seed + 9), draw(M, K, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randperm(N, generator=generator), torch.randperm(M, generator=generator)
    cosine, ce = clom_cosine(real, Y_REAL, syn, Y_SYN), clom_ce(logits, Y_SYN, Y_REAL)
    assert 0 <= cosine <= 1 and 0 <= ce <= 1
    shuffled = clom_cosine(real[p], Y_REAL[p], syn[q], Y_SYN[q])
    torch.testing.assert_close(shuffled, cosine)
    torch.testing.assert_close(clom_ce(logits[q], Y_SYN[q], Y_REAL[p]), ce)
    torch.testing.assert_close(clom_cosine(3 * real, Y_REAL, 0.1 * syn, Y_SYN), cosine)


def test_zero_where_same_label_distances_vanish():
    axes = torch.eye(K, dtype=torch.float64)
    assert clom_cosine(axes[Y_REAL], Y_REAL, 2 * axes[Y_SYN], Y_SYN) == 0
    assert clom_ce(1000 * axes[Y_SYN], Y_SYN, Y_REAL) == 0
    opposite = clom_cosine(axes[Y_REAL], Y_REAL, axes[(Y_SYN + 1) % K], Y_SYN)
    assert opposite > 0.3


def test_degenerate_batches_stay_finite():
    same = torch.ones(M, D, dtype=torch.float64, requires_grad=True)
    loss = clom_cosine(torch.ones(N, D, dtype=torch.float64), Y_REAL, same, Y_SYN)
    (gradient,) = torch.autograd.grad(loss, same)
    assert loss == 0 and torch.isfinite(gradient).all()
    zeros = torch.zeros(M, D, dtype=torch.float64, requires_grad=True)
    loss = clom_cosine(draw(N, D), Y_REAL, zeros, Y_SYN)
    assert torch.isfinite(torch.autograd.grad(loss, zeros)[0]).all()
    assert clom_cosine(draw(N, D), Y_REAL, draw(M, D), Y_SYN + 10) == 0  # no label agrees


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="features"):
        clom_cosine(draw(N, D), Y_REAL, draw(M, D + 1), Y_SYN)
    with pytest.raises(ValueError, match="y_real"):
        clom_cosine(draw(N, D), Y_REAL[1:], draw(M, D), Y_SYN)
    with pytest.raises(ValueError, match="label 2, but there are 2"):
        clom_ce(draw(M, 2), Y_SYN, Y_REAL)


def tiny_net(name="ConvNetW32", seed=0):
    torch.manual_seed(seed)
    return get_network(name, 3, K, (8, 8))


@pytest.fixture
def real():
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(30) % K
    x = torch.randn(30, 3, 8, 8, generator=generator) + y[:, None, None, None]
    return x, y


@pytest.mark.parametrize("distance", ["cos", "ce"])
def test_plug_in_reaches_the_synthetic_images_only(real, distance):
    model = tiny_net("ConvNetBN").train()
    clom = CLoM(model, distance=distance, alpha=2.0, real=real, batch_size=16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = clom(x, torch.arange(6) % K)
    loss.backward()
    assert 0 < loss.item() <= 2 and x.grad.abs().sum() > 0
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not real[0].requires_grad


@pytest.mark.parametrize("distance", ["cos", "ce"])
def test_parts_of_the_synthetic_images_are_the_whole(real, distance, monkeypatch):
    """Images too many for one graph are embedded in parts: the same loss and gradients."""
    found = []
    for pixels in (10**9, 4 * 64):
        monkeypatch.setattr(loss, "PIXELS_AT_ONCE", pixels)
        clom = CLoM(tiny_net().double(), distance=distance, real=(real[0].double(), real[1]), batch_size=16)
        x = draw(10, 3, 8, 8, seed=1).double().requires_grad_()
        value = clom(x, torch.arange(10) % K)
        value.backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


def test_plug_in_changes_and_improves_the_images_of_a_foreign_loop(real):
    clom = CLoM(tiny_net(), distance="cos", alpha=50.0, real=real, batch_size=30)
    y = torch.arange(6) % K
    start = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for term in (None, clom):
        x = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([x], lr=1.0)
        for _ in range(10):
            loss = 1e-3 * x.square().sum()
            if term is not None:
                loss = loss + term(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(x.detach())
    assert not torch.allclose(results[0], results[1])
    features = tiny_net().eval().embed
    values = [clom_cosine(features(real[0]), real[1], features(x), y) for x in results]
    assert values[1] < values[0]


def test_embed_or_output_of_any_module(real):
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    x, y = torch.randn(3, 3, 8, 8), torch.arange(3)
    clom = CLoM(flat, real=real, batch_size=8)
    index = torch.randint(30, (8,), generator=_skip_draws())
    expected = clom_cosine(flat(real[0][index]), real[1][index], flat(x), y)
    torch.testing.assert_close(clom(x, y), expected)


def _skip_draws():
    """The generator of CLoM after it has drawn a family and a model of it."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        torch.randint(1, (1,), generator=generator)
    return generator


def test_cached_features_are_the_recomputed_ones(real):
    images = (real[0] * 20 + 100).clamp(0, 255).to(torch.uint8)
    store = RealImages(images, real[1], stats=Stats((0.5,) * 3, (0.2,) * 3))
    x, y = torch.randn(3, 3, 8, 8), torch.arange(3)
    values = []
    for limit in (None, 0):
        clom = CLoM(tiny_net(), real=RealFeatures(store, limit), batch_size=8)
        values.append(torch.stack([clom(x, y) for _ in range(3)]))
    torch.testing.assert_close(values[0], values[1])
    # Real images go through once; RealFeatures asks one more for the width of its features.
    for given, more in ((RealFeatures(store), 1), ((store.at(torch.arange(30)), real[1]), 0)):
        model, calls = tiny_net(), []
        counted = CLoM(model, real=given, batch_size=8)
        model.features.register_forward_hook(lambda m, given, out, calls=calls: calls.append(len(given[0])))
        found = torch.stack([counted(x, y) for _ in range(3)])
        torch.testing.assert_close(found, values[0])
        assert calls.count(3) == 3 and sum(calls) == 3 * 3 + 30 + more


def test_draws_go_on_from_a_saved_state(real):
    x, y = torch.randn(3, 3, 8, 8), torch.arange(3)
    nets = [tiny_net(seed=s) for s in range(3)]
    first, second = (CLoM(nets, real=real, batch_size=8) for _ in range(2))
    first(x, y)
    second.load_state_dict(first.state_dict())
    values = [[float(clom(x, y)) for _ in range(4)] for clom in (first, second)]
    assert values[0] == values[1] and len(set(values[0])) == 4


def test_released_form_of_ce_needs_no_real_data(real):
    x, y = torch.randn(3, 3, 8, 8), torch.arange(3)
    clom = CLoM(tiny_net(), distance="ce", ce_form="classification")
    torch.testing.assert_close(clom(x, y), F.cross_entropy(tiny_net().eval()(x), y))


def test_misuse_is_named(real):
    with pytest.raises(ValueError, match="needs real data"):
        CLoM(tiny_net(), distance="cos")
    with pytest.raises(ValueError, match="unknown distance 'l2'; valid: ce, cos"):
        CLoM(tiny_net(), distance="l2")
    with pytest.raises(ValueError, match="ce_form"):
        CLoM(tiny_net(), distance="ce", ce_form="mean", real=real)
    wide = CLoM(get_network("ConvNetD1", 3, 5, (8, 8)), distance="ce", real=real)
    with pytest.raises(ValueError, match="5 classes, the data have 3"):
        wide(torch.randn(3, 3, 8, 8), torch.arange(3))
    lacking = GivenReal(*real, num_classes=5)  # a batch without its highest classes
    assert CLoM(wide.pool, distance="ce", real=lacking)(torch.randn(3, 3, 8, 8), torch.arange(3)) > 0
    with pytest.raises(ValueError, match="needs a pre-trained model"):
        CLoM([], real=real)
    with pytest.raises(ValueError, match="30 images but 29 labels"):
        CLoM(tiny_net(), real=(real[0], real[1][1:]))
    with pytest.raises(ValueError, match="needs a pre-trained model"):
        ModelPool([])


SCRIPT = """
import sys, torch
from clom.loss import CLoM
ours = ("clom", "data", "distillation", "evaluation", "krr_st", "methods", "models", "utils")
print(*sorted(name for name in sys.modules if name.split(".")[0] in ours))
images, labels = torch.randn(4, 3, 2, 2), torch.arange(4) % 2
clom = CLoM(torch.nn.Flatten(), real=(images, labels), batch_size=4)
print(float(clom(images, labels)) > 0)
"""


def test_the_plug_in_stands_alone():
    """It can be taken into another project: nothing of this one is loaded beside it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["clom", "clom.loss", "True"]


def test_draws_are_uniform_over_architectures_and_repeat():
    nets = [tiny_net(seed=s) for s in range(3)]
    pool = ModelPool([(nets[:1], 1.0), (nets[1:], 5.0)])

    def sequence(seed, count):
        generator = torch.Generator().manual_seed(seed)
        return [pool.draw(generator) for _ in range(count)]

    drawn = sequence(0, 400)
    assert [(id(m), a) for m, a in drawn] == [(id(m), a) for m, a in sequence(0, 400)]
    shares = [sum(m is net for m, _ in drawn) / 400 for net in nets]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.08)
    assert all(alpha == (1.0 if m is nets[0] else 5.0) for m, alpha in drawn)
