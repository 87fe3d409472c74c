"""Norms whose gradient is differentiated by a formula, against PyTorch's own."""

import copy

import pytest
import torch
from torch import nn

from models import get_model
from models.twice import twice_differentiable

NORMS = {"batch": lambda: nn.BatchNorm2d(3), "instance": lambda: nn.InstanceNorm2d(3, affine=True)}


def pair(name, dtype=torch.float64):
    norm = NORMS[name]().to(dtype)
    with torch.no_grad():
        for p in norm.parameters():
            p.uniform_(0.5, 2)
    return norm, twice_differentiable(copy.deepcopy(norm))


def derivatives(norm, x, seed=0):
    """Output, gradient, and the gradient of a function of the gradient."""
    random = torch.Generator().manual_seed(seed)

    def draw(t):
        return torch.randn(t.shape, generator=random, dtype=torch.float64).to(t)

    parameters = [x, *norm.parameters()]
    out = norm(x)
    g = draw(out).requires_grad_()
    first = torch.autograd.grad(out, parameters, g, create_graph=True)
    value = sum((f * draw(f)).sum() + f.pow(3).sum() for f in first)
    # No second derivative depends on the shift.
    return [out, *first], torch.autograd.grad(value, [*parameters[:2], g])


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_both_orders_are_those_of_finite_differences(name):
    _, ours = pair(name)
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    given = (x, *ours.parameters())
    assert torch.autograd.gradgradcheck(lambda x, *p: ours(x), given)
    assert torch.autograd.gradcheck(lambda x, *p: ours(x), given)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_first_order_is_bit_for_bit_and_second_order_close(name, layout):
    own, ours = pair(name, torch.float32)
    x = (3 + 2 * torch.randn(6, 3, 8, 8)).contiguous(memory_format=layout).requires_grad_()
    (first, second), (wanted, exact) = derivatives(ours, x), derivatives(own, x)
    for a, b in zip(first, wanted, strict=True):
        assert torch.equal(a, b)
    exact = derivatives(own.double(), x.detach().double().requires_grad_())[1]
    for a, b in zip(second, exact, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("name", NORMS)
def test_one_value_per_channel_is_refused_as_by_pytorch(name):
    for norm in pair(name):
        with pytest.raises(ValueError, match="more than 1"):
            norm(torch.randn(1, 3, 1, 1, dtype=torch.float64))


def test_bfloat16():
    """A map in bfloat16 with parameters in float32, as under autocast."""
    own, ours = pair("batch", torch.float32)
    x = torch.randn(8, 3, 8, 8).bfloat16().requires_grad_()
    second, wanted = derivatives(ours, x)[1], derivatives(own, x.detach().float().requires_grad_())[1]
    for a, b in zip(second, wanted, strict=True):
        assert (a.float() - b).norm() <= 0.05 * b.norm()


def test_which_layers_are_replaced_and_what_stays():
    network = get_model("convnet_4_4_bn", (3, 8, 8), 5)
    x, before = torch.randn(6, 3, 8, 8), copy.deepcopy(network.state_dict())
    own = copy.deepcopy(network)
    assert twice_differentiable(network) is network
    assert torch.equal(network(x), own(x))
    for (name, a), (wanted, b) in zip(before.items(), network.state_dict().items(), strict=True):
        assert name == wanted and torch.equal(a, b)  # running statistics, too
    own.load_state_dict(before)
    assert torch.equal(network.eval()(x), own.eval()(x))
    others = nn.Sequential(nn.GroupNorm(4, 4), nn.LayerNorm(3), nn.InstanceNorm2d(3))
    assert [type(m) for m in twice_differentiable(others)] == [nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d]
