"""Optimisers and schedules against hand computation and the libraries they must agree with."""

import itertools
import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from utils.errors import UserError
from utils.optim import LARS, make_optimizer, make_schedule, set_gradients


def parameter(values):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def test_lars_by_hand_for_two_steps():
    matrix, bias = parameter([[3.0, 4.0]]), parameter([2.0])
    optimizer = LARS([matrix, bias], lr=0.1, momentum=0.9, weight_decay=0.5, trust=0.01)
    w, b, w_speed, b_speed = [3.0, 4.0], 2.0, [0.0, 0.0], 0.0
    for gradient, bias_gradient in (([1.0, -2.0], 3.0), ([0.5, 0.25], -1.0)):
        matrix.grad = torch.tensor([gradient], dtype=torch.float64)
        bias.grad = torch.tensor([bias_gradient], dtype=torch.float64)
        optimizer.step()
        update = [g + 0.5 * v for g, v in zip(gradient, w, strict=True)]
        ratio = 0.01 * norm(w) / norm(update)
        w_speed = [0.9 * s + ratio * u for s, u in zip(w_speed, update, strict=True)]
        w = [v - 0.1 * s for v, s in zip(w, w_speed, strict=True)]
        b_speed = 0.9 * b_speed + bias_gradient  # neither decay nor scaling
        b -= 0.1 * b_speed
        torch.testing.assert_close(matrix.data, torch.tensor([w], dtype=torch.float64))
        assert bias.item() == pytest.approx(b)


def test_lars_at_zero_weights_or_gradients_is_finite():
    zero, weights, unused = parameter([[0.0, 0.0]]), parameter([[1.0, 2.0]]), parameter([[5.0]])
    optimizer = LARS([zero, weights, unused], lr=0.1, momentum=0.0, weight_decay=0.0)
    zero.grad, weights.grad = torch.ones_like(zero), torch.zeros_like(weights)
    optimizer.step()
    assert zero.tolist() == [[-0.1, -0.1]]  # ratio 1
    assert weights.tolist() == [[1.0, 2.0]] and unused.tolist() == [[5.0]]


def test_lars_state_survives():
    runs = []
    for restart in (False, True):
        p = parameter([[1.0, 2.0], [3.0, 4.0]])
        optimizer = LARS([p], lr=0.1)
        for step in range(4):
            if restart and step == 2:
                state, optimizer = optimizer.state_dict(), LARS([p], lr=7.0)
                optimizer.load_state_dict(state)
            p.grad = p.detach() * (step + 1)
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.AdamW), ("adamw", torch.optim.AdamW), ("lars", LARS)],
)
def test_names(name, kind):
    optimizer = make_optimizer(name, [parameter([1.0])], lr=0.3, momentum=0.4, wd=0.05)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.3 and group["weight_decay"] == 0.05
    if name in ("sgd", "lars"):
        assert group["momentum"] == 0.4
    else:
        assert group["betas"] == (0.9, 0.999)


def test_momentum_defaults_to_the_published_one():
    assert make_optimizer("sgd", [parameter([1.0])], lr=1).param_groups[0]["momentum"] == 0.9


def test_decay_of_adam_is_decoupled():
    p = parameter([2.0])
    p.grad = torch.zeros_like(p)
    make_optimizer("adam", iter([p]), lr=0.1, wd=0.5).step()
    assert p.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))  # Adam with L2 would move by lr


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UserError, match="adam, adamw, lamb, lars, sgd"):
        make_optimizer("rmsprop", [parameter([1.0])], lr=1)
    with pytest.raises(UserError, match="constant, cosine, cosine_to_tenth, linear, tenth_at_half"):
        make_schedule("step", make_optimizer("sgd", [parameter([1.0])], lr=1), 10)


def rates(name, steps, warmup=0, lr=2.0, more=0):
    """The rate of every step, and the ones a further step would have."""
    optimizer = make_optimizer("sgd", [parameter([1.0])], lr=lr)
    schedule = make_schedule(name, optimizer, steps, warmup)
    found = []
    for _ in range(steps + more):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_constant():
    assert set(rates("constant", 5)) == {2.0}


def test_linear_ends_at_a_thousandth():
    found = rates("linear", 100, more=3)
    assert found[0] == 2.0
    assert found[100] == pytest.approx(2e-3)
    assert found[50] == pytest.approx(2.0 * (1 + 1e-3) / 2)
    falls = {round(a - b, 12) for a, b in itertools.pairwise(found[:101])}
    assert len(falls) == 1
    assert found[101:] == pytest.approx([2e-3] * 3)


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 500), (40, 0), (10, 3), (300, 500)])
def test_cosine_is_transformers(steps, warmup):
    optimizer = make_optimizer("sgd", [parameter([1.0])], lr=2.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    expected = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        theirs.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates("cosine", steps, warmup) == pytest.approx(expected, abs=1e-12)


def test_cosine_ends_at_zero():
    found = rates("cosine", 8, more=2)
    assert found[0] == 2.0 and found[4] == pytest.approx(1.0)
    assert found[8:] == pytest.approx([0.0] * 3, abs=1e-12)


@pytest.mark.parametrize(("steps", "full"), [(10, 5), (7, 3), (2, 1), (1, 0)])
def test_a_tenth_from_half_on(steps, full):
    assert rates("tenth_at_half", steps)[:steps] == pytest.approx([2.0] * full + [0.2] * (steps - full))


def test_schedule_state_survives():
    found = []
    for restart in (False, True):
        optimizer = make_optimizer("sgd", [parameter([1.0])], lr=2.0)
        schedule = make_schedule("linear", optimizer, 10)
        for step in range(10):
            if restart and step == 4:
                states = optimizer.state_dict(), schedule.state_dict()
                optimizer = make_optimizer("sgd", [parameter([1.0])], lr=2.0)
                schedule = make_schedule("linear", optimizer, 10)
                optimizer.load_state_dict(states[0])
                schedule.load_state_dict(states[1])
            optimizer.step()
            schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
    assert found[0] == found[1] == pytest.approx(2e-3)


def test_gradients_are_laid_out_as_their_tensors():
    tensors = [torch.zeros(2, 3, 4, 5, requires_grad=True), torch.zeros(3, requires_grad=True)]
    given = [torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), torch.randn(3)]
    set_gradients(tensors, given)
    for tensor, gradient in zip(tensors, given, strict=True):
        assert tensor.grad.stride() == tensor.stride() and torch.equal(tensor.grad, gradient)
