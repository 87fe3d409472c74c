"""The unrolled student: gradients against finite differences and the naive formula, in float64."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.augment.dsa import diff_augment
from models import get_network
from trajectory.match import (
    DISTANCES,
    UNROLLS,
    full_gradients,
    functional_loss,
    matching_distance,
    stepwise_gradients,
    tensor_weights,
    tesla_gradients,
    unroll,
)
from utils.seed import local_seed

STEPS, CLASSES, M = 3, 3, 6


class Problem:
    """A small smooth network, an expert's two snapshots, a set with DSA in its batches."""

    def __init__(self, steps=STEPS, soft=True, batch_norm=False):
        with local_seed(0):
            norm = nn.BatchNorm2d(4) if batch_norm else nn.GroupNorm(4, 4)
            self.network = nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1), norm, nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES)
            ).double()
            draw = lambda *size: torch.randn(*size, dtype=torch.float64)  # noqa: E731
            self.x = draw(M, 2, 4, 4).requires_grad_()
            self.y = draw(M, CLASSES).requires_grad_()
            self.lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
            self.start = [p.detach().clone() for p in self.network.parameters()]
            self.goal = [p + 0.1 * draw(*p.shape) for p in self.start]
            self.rows = [torch.randperm(M)[:4] for _ in range(steps)]
        self.loss = functional_loss(self.network, F.mse_loss)
        self.inputs = [self.x, self.y] if soft else [self.x]
        self.batches = [self.batch(rows, seed) for seed, rows in enumerate(self.rows)]

    def batch(self, rows, seed):
        given = dict(strategy="color_scale_cutout", seed=seed)
        return lambda: (diff_augment(self.x[rows], **given), self.y[rows])

    def distance(self, end):
        return matching_distance(end, self.start, self.goal)

    def gradients(self, mode, momentum=0.0, wd=0.0):
        given = (self.loss, self.start, self.batches, self.distance, self.inputs, self.lr)
        return UNROLLS[mode](*given, momentum, wd)

    def value(self, momentum, wd):
        """The loss by plain SGD of torch on a copy of the network."""
        network = self.network
        with torch.no_grad():
            for p, s in zip(network.parameters(), self.start, strict=True):
                p.copy_(s)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=self.lr.item(), momentum=momentum, weight_decay=wd
        )
        for make in self.batches:
            x, y = (t.detach() for t in make())
            optimizer.zero_grad()
            F.mse_loss(network(x), y).backward()
            optimizer.step()
        end = [p.detach() for p in network.parameters()]
        top = sum((e - g).square().sum() for e, g in zip(end, self.goal, strict=True))
        return float(top / sum((s - g).square().sum() for s, g in zip(self.start, self.goal, strict=True)))


def finite_difference(problem, tensor, index, momentum, wd, step=1e-5):
    flat, values = tensor.detach().view(-1), []
    before = flat[index].item()
    for sign in (1, -1):
        flat[index] = before + sign * step
        values.append(problem.value(momentum, wd))
    flat[index] = before
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("mode", ["full", "checkpoint"])
@pytest.mark.parametrize("momentum,wd", [(0.0, 0.0), (0.9, 0.0), (0.0, 0.05), (0.9, 0.05)])
def test_gradients_are_finite_differences_of_torch_sgd(mode, momentum, wd):
    problem = Problem()
    loss, (of_x, of_y), of_lr = problem.gradients(mode, momentum, wd)
    assert float(loss) == pytest.approx(problem.value(momentum, wd), rel=1e-12)
    for tensor, found in ((problem.x, of_x), (problem.y, of_y), (problem.lr, of_lr)):
        places = range(0, tensor.numel(), max(1, tensor.numel() // 12))
        for i in places:
            wanted = finite_difference(problem, tensor, i, momentum, wd)
            assert float(found.reshape(-1)[i]) == pytest.approx(wanted, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("momentum,wd", [(0.0, 0.0), (0.9, 0.05)])
def test_batch_norm_by_batch_statistics_and_buffers_left_alone(momentum, wd):
    problem = Problem(batch_norm=True)
    buffers = [b.clone() for b in problem.network.buffers()]
    found = problem.gradients("checkpoint", momentum, wd)
    assert all(torch.equal(a, b) for a, b in zip(buffers, problem.network.buffers(), strict=True))
    wanted = problem.gradients("full", momentum, wd)
    for a, b in zip([*found[1], found[2]], [*wanted[1], wanted[2]], strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert float(found[0]) == pytest.approx(problem.value(momentum, wd), rel=1e-12)


def test_tesla_is_full_unrolling_for_one_step():
    problem = Problem(steps=1)
    tesla, full = problem.gradients("tesla"), problem.gradients("full")
    assert float(tesla[0]) == pytest.approx(float(full[0]), rel=1e-12)
    for a, b in zip([*tesla[1], tesla[2]], [*full[1], full[2]], strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_tesla_is_its_formula_written_naively():
    problem = Problem()
    lr, network = problem.lr.item(), problem.network
    theta, gradients = [p.clone() for p in problem.start], []

    def gradient_at(parameters, x, y, create_graph=False):
        with torch.no_grad():
            for p, value in zip(network.parameters(), parameters, strict=True):
                p.copy_(value)
        loss = ((network(x) - y) ** 2).mean()
        return torch.autograd.grad(loss, list(network.parameters()), create_graph=create_graph)

    thetas = []
    for make in problem.batches:
        x, y = (t.detach() for t in make())
        thetas.append(theta)
        gradients.append(gradient_at(theta, x, y))
        theta = [p - lr * g for p, g in zip(theta, gradients[-1], strict=True)]
    total = [sum(parts) for parts in zip(*gradients, strict=True)]
    d = sum((s - g).square().sum() for s, g in zip(problem.start, problem.goal, strict=True))
    bracket = [
        lr * (goal - start) + lr**2 * sum_
        for goal, start, sum_ in zip(problem.goal, problem.start, total, strict=True)
    ]
    of_x, of_y = torch.zeros_like(problem.x), torch.zeros_like(problem.y)
    for make, theta in zip(problem.batches, thetas, strict=True):
        g = gradient_at(theta, *make(), create_graph=True)
        product = sum((b * part).sum() for b, part in zip(bracket, g, strict=True))
        found = torch.autograd.grad(product, [problem.x, problem.y])
        of_x += 2 / d * found[0]
        of_y += 2 / d * found[1]
    alpha = torch.tensor(lr, dtype=torch.float64, requires_grad=True)
    loss = sum(
        (s - alpha * sum_ - g).square().sum()
        for s, sum_, g in zip(problem.start, total, problem.goal, strict=True)
    )
    of_lr = torch.autograd.grad(loss / d, alpha)[0]
    value, inputs, rate = problem.gradients("tesla")
    assert torch.allclose(value, (loss / d).detach())
    assert torch.allclose(inputs[0], of_x) and torch.allclose(inputs[1], of_y)
    assert torch.allclose(rate, of_lr)
    exact = problem.gradients("full")[1][0]
    assert not torch.allclose(exact, of_x, rtol=1e-2)  # it is another gradient


def test_integer_labels_and_the_zoo_network():
    with local_seed(1):
        network = get_network("ConvNetD1", 3, 4, (8, 8))
        x = torch.randn(8, 3, 8, 8, requires_grad=True)
        goal = [p.detach() + 0.05 * torch.randn_like(p) for p in network.parameters()]
    start = [p.detach().clone() for p in network.parameters()]
    y, lr = torch.arange(8) % 4, torch.tensor(0.1, requires_grad=True)
    batches = [lambda rows=rows: (x[rows], y[rows]) for rows in torch.arange(8).split(4)]
    loss = functional_loss(network, F.cross_entropy)
    given = (loss, start, batches, lambda end: matching_distance(end, start, goal), [x], lr)
    for a, b in itertools.pairwise([full_gradients(*given), stepwise_gradients(*given)]):
        assert torch.allclose(a[1][0], b[1][0], rtol=1e-3, atol=1e-7)
        assert torch.allclose(a[2], b[2], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(p, s) for p, s in zip(network.parameters(), start, strict=True))
    assert tesla_gradients(*given)[1][0].shape == x.shape
    assert len(unroll(loss, start, batches, lr)) == len(start)


def test_distances():
    start = [torch.zeros(2, 2), torch.zeros(2), torch.ones(3)]
    goal = [torch.ones(2, 2), torch.full((2,), 2.0), torch.ones(3)]
    end = [torch.full((2, 2), 0.5), torch.full((2,), 2.0), torch.full((3,), 5.0)]
    assert float(matching_distance(start, start, goal)) == 1
    assert float(matching_distance(goal, start, goal)) == 0
    # whole: (4 · 0.25 + 0 + 3 · 16) / (4 + 8); by layer the last one, which did not move, is out
    assert float(matching_distance(end, start, goal)) == pytest.approx(49 / 12)
    assert float(DISTANCES["layer"](end, start, goal, [1, 1, 1])) == pytest.approx(0.25 / 2)
    assert float(DISTANCES["layer"](end, start, goal, [1, 0.1, 1])) == pytest.approx(0.25 / 1.1)
    assert float(matching_distance(end, start, goal, [1, 1, 0])) == pytest.approx(1 / 12)
    for distance in DISTANCES.values():
        with pytest.raises(ValueError, match="moved no tensor"):
            distance(end, start, start, [1, 1, 1])


def test_weights_of_body_head_and_vectors():
    network = get_network("ConvNetD1", 3, 4, (8, 8))
    names = [name for name, _ in network.named_parameters()]
    weights = dict(zip(names, tensor_weights(network, vector=0.1, head=0.5), strict=True))
    assert weights["features.0.weight"] == 1 and weights["features.0.bias"] == 0.1
    assert weights["classifier.weight"] == 0.5 and weights["classifier.bias"] == pytest.approx(0.05)
    body = dict(zip(names, tensor_weights(network, head=0.0), strict=True))
    assert [n for n, w in body.items() if not w] == ["classifier.weight", "classifier.bias"]


class Held:
    """A tensor that autograd keeps; counts the bytes of all that are alive."""

    alive = peak = 0

    def __init__(self, tensor):
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        Held.alive += self.size
        Held.peak = max(Held.peak, Held.alive)

    def __del__(self):
        Held.alive -= self.size


def kept_by_autograd(mode, steps):
    problem = Problem(steps=steps)
    gc.collect()
    Held.alive = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        problem.gradients(mode)
    return Held.peak


def test_memory_grows_with_the_steps_only_where_one_graph_is_kept():
    few, many = ({mode: kept_by_autograd(mode, n) for mode in UNROLLS} for n in (2, 12))
    assert many["full"] > 4 * few["full"]
    for mode in ("checkpoint", "tesla"):
        assert many[mode] < 1.2 * few[mode]
        assert many[mode] < 0.2 * many["full"]
