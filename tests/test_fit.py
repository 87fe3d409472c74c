"""The one training loop: steps, rates, failures; and the losses and metrics beside it."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from data.loader import TensorLoader
from data.specs import Stats
from evaluation.fit import Trainer, accuracy, outputs, train_step
from evaluation.recipes import Recipe, half_squared_error, sgd_by_epochs
from utils.errors import UserError
from utils.progress import FiniteGuard

CPU = torch.device("cpu")


def mse(model, x, y):
    return nn.functional.mse_loss(model(x), y)


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


def batches(x, y, size=None):
    """A loader of all images in one batch, or of batches in random order."""
    return TensorLoader(
        x, y, batch_size=size or len(x), device=CPU, generator=generator(3), shuffle=size is not None
    )


def ones():
    return batches(torch.ones(4, 2), torch.zeros(4, 2))


def recipe(loss="mse", schedule="constant", steps=9, lr=0.1, **more):
    return Recipe(loss, "sgd", lr, 0.0, schedule, 4, steps=steps, **more)


def test_loss_falls_and_the_classes_are_told_apart():
    x, y = separable()
    losses, model = [], nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    Trainer(model, batches(x, y), recipe("cross_entropy", steps=40)).run(
        on_step=lambda step, loss, rate: losses.append(float(loss))
    )
    assert losses[0] == pytest.approx(math.log(2))  # before the first step
    assert losses[-1] < 0.05 and len(losses) == 40
    assert accuracy(model(x), y) == 100.0


FORMULAS = {
    "constant": lambda k, n, w: 1.0,
    "linear": lambda k, n, w: 1 - 0.999 * k / n,
    "cosine": lambda k, n, w: k / w if k < w else 0.5 * (1 + math.cos(math.pi * (k - w) / (n - w))),
    "tenth_at_half": lambda k, n, w: 1.0 if k < n / 2 else 0.1,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_rate_of_every_step(name):
    steps, warmup, trace, asked = 12, 4, [], []

    def loss_fn(model, x, y):
        asked.append(1)
        return mse(model, x, y)

    given = recipe(schedule=name, steps=steps, lr=0.05, warmup=warmup)
    Trainer(network(), ones(), given, loss_fn=loss_fn).run(
        on_step=lambda step, loss, rate: trace.append((step, rate))
    )
    assert [s for s, _ in trace] == list(range(1, 13))
    expected = [0.05 * FORMULAS[name](k, steps, warmup) for k in range(12)]
    assert [r for _, r in trace] == pytest.approx(expected)
    assert len(asked) == 12


def test_train_mode_while_training_and_eval_mode_after():
    model, modes = network().eval(), []

    def loss_fn(net, x, y):
        modes.append(net.training)
        return mse(net, x, y)

    out = Trainer(model, ones(), recipe(steps=3), loss_fn=loss_fn).run()
    assert out is model and modes == [True] * 3
    assert not any(m.training for m in model.modules())


def test_a_training_in_parts_is_one_training():
    x, y = torch.randn(6, 2, generator=generator()), torch.randn(6, 2, generator=generator(1))
    results = []
    for stops in ([9], [4, 9], [4, 4, None]):
        model, trace = nn.Linear(2, 2), []
        with torch.no_grad():
            model.weight.fill_(0.2)
            model.bias.zero_()
        trainer = Trainer(model, batches(x, y, 4), recipe(schedule="linear"))
        for stop in stops:
            trainer.run(
                stop, on_step=lambda step, loss, rate, log=trace: log.append((step, float(loss), rate))
            )
        results.append((trace, model.weight.detach().clone()))
    for trace, weight in results[1:]:
        assert trace == results[0][0] and torch.equal(weight, results[0][1])


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 10])
def test_resumed_in_the_middle_of_an_epoch(stop):
    """By step decay with fresh momentum, after epochs 2 and 3 of 4 with 3 steps each."""
    given = sgd_by_epochs(4, 0.1, 0.9, 1e-3, 4, (2, 3)).override(fresh_momentum=True)
    x, y = separable(10)
    start = network()

    def trainer(seed, model=start):
        loader = TensorLoader(
            x,
            y,
            batch_size=4,
            device=CPU,
            generator=generator(seed),
            transform=lambda x, draw: x + 0.1 * torch.randn(x.shape, generator=draw),
        )
        return Trainer(copy.deepcopy(model), loader, given)

    def rest(trained, until=None):
        trace = []
        trained.run(until, on_step=lambda *found: trace.append((found[0], float(found[1]), found[2])))
        return trace

    torch.manual_seed(0)  # of dropout, which draws from the global stream
    whole = trainer(0)
    first = rest(whole, stop)
    state, dropout = copy.deepcopy(whole.state_dict()), torch.random.get_rng_state()
    second = rest(whole)
    assert [step for step, *_ in first + second] == list(range(1, 13))
    rates = [rate for *_, rate in first + second]
    assert rates == pytest.approx([0.1] * 6 + [0.01] * 3 + [0.001] * 3)
    resumed = trainer(1, network())  # its own order and weights, until the state is put back
    resumed.load_state_dict(state)
    torch.random.set_rng_state(dropout)
    assert resumed.step == stop and rest(resumed) == second
    weights = [t.model.state_dict() for t in (whole, resumed)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert whole.window.mean() == resumed.window.mean()


def test_momentum_is_forgotten_at_a_decay():
    """A step after it is that of plain SGD at the new rate."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    weights = []
    for fresh in (True, False):
        given = sgd_by_epochs(3, 0.1, 0.9, 0.0, 1, (2,)).override(fresh_momentum=fresh)
        trained = copy.deepcopy(model)
        trainer = Trainer(trained, batches(torch.ones(1, 1), torch.zeros(1, 1)), given, loss_fn=mse)
        for step in (1, 2, 3):
            trainer.run(step)
            weights.append(trained.weight.item())

    def by_hand(fresh):
        w, v, seen = 1.0, 0.0, []
        for rate in (0.1, 0.1, 0.01):
            v = (0.0 if fresh and rate == 0.01 else 0.9 * v) + 2 * w
            w -= rate * v
            seen.append(w)
        return seen

    assert weights == pytest.approx(by_hand(True) + by_hand(False), rel=1e-6)


def test_nothing_left_to_do():
    model = network()
    trainer = Trainer(model, ones(), recipe(steps=5))
    trainer.run()
    before = [p.clone() for p in model.parameters()]
    trainer.run()
    assert trainer.step == 5
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model.training


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_the_step(value):
    model, count = nn.Linear(2, 2), itertools.count(1)

    def loss_fn(net, x, y):
        return mse(net, x, y) * (value if next(count) == 4 else 1)

    trainer = Trainer(model, ones(), recipe(), loss_fn=loss_fn)
    with pytest.raises(UserError, match=r"pre-training: the loss is -?(nan|inf) at step 4;"):
        trainer.run(what="pre-training")


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
    loss = train_step(model, torch.tensor([[2.0]]), torch.tensor([[1.0]]), mse, optimizer)
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


def test_outputs_join_batches_without_gradients():
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(5, 1, 2, 2)
    image_set = SimpleNamespace(stats=Stats((0.5,), (2.0,)), size=2)
    out = outputs(model, images, image_set, CPU, batch_size=4)
    assert out.shape == (5, 3) and not out.requires_grad
    torch.testing.assert_close(out, model((images - 0.5) / 2).detach())
