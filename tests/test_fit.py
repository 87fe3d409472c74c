"""The one training loop: steps, rates, failures; and the losses and metrics beside it."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.fit import accuracy, fit, half_squared_error, predict, supervised, train_step
from utils.errors import UserError
from utils.finite import FiniteGuard
from utils.optim import make_optimizer, make_schedule

MSE = supervised(nn.functional.mse_loss)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 2))
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator(p.numel()))
    return model


def separable(count=40):
    labels = torch.arange(count) % 2
    noise = 0.3 * torch.randn(count, 2, generator=generator())
    return 2.0 * (labels[:, None] * 2 - 1) + noise, labels


class Counted:
    """Endless batches that know how often they were asked."""

    def __init__(self, x, y):
        self.x, self.y, self.asked = x, y, 0

    def __iter__(self):
        while True:
            self.asked += 1
            yield self.x, self.y


def test_loss_falls_and_the_classes_are_told_apart():
    x, y = separable()
    losses, model = [], nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
    fit(
        model, itertools.repeat((x, y)), supervised(nn.functional.cross_entropy), optimizer,
        steps=40, on_step=lambda step, loss, rate: losses.append(float(loss)),
    )  # fmt: skip
    assert losses[0] == pytest.approx(math.log(2))  # before the first step
    assert losses[-1] < 0.05 and len(losses) == 40
    assert accuracy(predict(model, [(x[:30], None), (x[30:], None)]), y) == 100.0


FORMULAS = {
    "constant": lambda k, n, w: 1.0,
    "linear": lambda k, n, w: 1 - 0.999 * k / n,
    "cosine": lambda k, n, w: k / w if k < w else 0.5 * (1 + math.cos(math.pi * (k - w) / (n - w))),
    "tenth_at_half": lambda k, n, w: 1.0 if k < n / 2 else 0.1,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_rate_of_every_step(name):
    model, steps, warmup = network(), 12, 4
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.05)
    schedule = make_schedule(name, optimizer, steps, warmup)
    batches, trace = Counted(torch.ones(4, 2), torch.zeros(4, 2)), []
    fit(
        model, batches, MSE, optimizer, schedule, steps=steps,
        on_step=lambda step, loss, rate: trace.append((step, rate)),
    )  # fmt: skip
    assert [s for s, _ in trace] == list(range(1, 13))
    expected = [0.05 * FORMULAS[name](k, steps, warmup) for k in range(12)]
    assert [r for _, r in trace] == pytest.approx(expected)
    assert batches.asked == 12


def test_train_mode_while_training_and_eval_mode_after():
    model, modes = network().eval(), []

    def loss_fn(net, x, y):
        modes.append(net.training)
        return MSE(net, x, y)

    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
    out = fit(
        model, Counted(torch.ones(4, 2), torch.zeros(4, 2)), loss_fn, optimizer, steps=3
    )  # fmt: skip
    assert out is model and modes == [True] * 3
    assert not any(m.training for m in model.modules())


def test_start_goes_on_where_it_stopped():
    x, y = torch.randn(6, 2, generator=generator()), torch.randn(6, 2, generator=generator(1))
    results = []
    for parts in ([(0, 9)], [(0, 4), (4, 9)]):
        model, trace = nn.Linear(2, 2), []
        with torch.no_grad():
            model.weight.fill_(0.2)
            model.bias.zero_()
        optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
        schedule = make_schedule("linear", optimizer, 9)
        for start, steps in parts:
            fit(
                model, itertools.repeat((x, y)), MSE, optimizer, schedule, steps=steps, start=start,
                on_step=lambda step, loss, rate, log=trace: log.append((step, float(loss), rate)),
            )  # fmt: skip
        results.append((trace, model.weight.detach().clone()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_nothing_left_to_do():
    model = network()
    before = [p.clone() for p in model.parameters()]
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
    fit(model, Counted(torch.ones(4, 2), torch.zeros(4, 2)), MSE, optimizer, steps=5, start=5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model.training


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_the_step(value):
    model, count = nn.Linear(2, 2), itertools.count(1)

    def loss_fn(net, x, y):
        return MSE(net, x, y) * (value if next(count) == 4 else 1)

    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"pre-training: the loss is -?(nan|inf) at step 4;"):
        fit(
            model, Counted(torch.ones(4, 2), torch.zeros(4, 2)), loss_fn, optimizer,
            steps=9, what="pre-training",
        )  # fmt: skip


def test_finite_guard_on_the_cpu():
    guard = FiniteGuard("a run")
    for step in range(3):
        guard.check(torch.tensor(1e30 * step), step)
    guard.flush()
    with pytest.raises(UserError, match="a run: the loss is nan at step 7"):
        guard.check(torch.tensor(float("nan"), requires_grad=True), 7)


@pytest.mark.gpu
def test_finite_guard_on_the_gpu_is_at_most_one_step_late():
    guard = FiniteGuard("a run")
    guard.check(torch.ones((), device="cuda"), 1)
    guard.check(torch.full((), float("nan"), device="cuda"), 2)
    with pytest.raises(UserError, match="at step 2"):
        guard.check(torch.ones((), device="cuda"), 3)
    guard.flush()
    guard.check(torch.full((), float("inf"), device="cuda"), 4)
    with pytest.raises(UserError, match="at step 4"):
        guard.flush()


def test_train_step_is_one_gradient_step():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.grad = torch.full_like(model.weight, 100.0)  # an old gradient must not count
    loss = train_step(model, torch.tensor([[2.0]]), torch.tensor([[1.0]]), MSE, optimizer)
    assert float(loss) == pytest.approx((3 * 2 - 1) ** 2) and not loss.requires_grad
    assert model.weight.item() == pytest.approx(3 - 0.1 * 2 * (3 * 2 - 1) * 2)


def test_half_squared_error_is_numpys():
    outputs = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    targets = torch.randn(5, 3, generator=generator(1), dtype=torch.float64)
    expected = np.mean([0.5 * np.sum((outputs[i] - targets[i]).numpy() ** 2) for i in range(5)])
    assert float(half_squared_error(outputs, targets)) == pytest.approx(expected)
    assert torch.autograd.gradcheck(half_squared_error, (outputs.requires_grad_(), targets))


def test_accuracy_by_hand():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert accuracy(scores, torch.tensor([1, 0, 0, 0])) == 75.0
    assert accuracy(scores, torch.tensor([0, 1, 0, 1])) == 0.0


def test_predict_joins_batches_without_gradients():
    model = nn.Linear(2, 3)
    batches = [(torch.ones(4, 2), None), (torch.zeros(1, 2), None)]
    out = predict(model, batches)
    assert out.shape == (5, 3) and not out.requires_grad
    torch.testing.assert_close(out[4], model.bias.detach())
