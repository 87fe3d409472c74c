"""BatchNorm folded into convolutions computes what it did before."""

import copy

import pytest
import torch
from torch import nn

from models import get_model
from models.fold import can_fold, fold_frozen, folded_conv

SHAPE = (3, 32, 32)
X = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))


def with_statistics(model):
    """Eval mode, with BatchNorm far from the identity."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
def test_folded_conv_in_float64(bias):
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=2, bias=bias)
    norm = nn.BatchNorm2d(5)
    pair = with_statistics(nn.Sequential(conv, norm)).double()
    x = X.double().requires_grad_()
    folded, plain = folded_conv(conv, norm, x), pair(x)
    torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad(out, x, gradient)[0] for out in (folded, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_where_it_is_a_fixed_map():
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    norm.eval()
    assert not can_fold(conv, norm)  # its parameters want a gradient
    with torch.no_grad():
        assert can_fold(conv, norm)
    norm.requires_grad_(False)
    assert can_fold(conv, norm)
    assert not can_fold(conv, nn.GroupNorm(1, 5)) and not can_fold(nn.Linear(3, 3), norm)
    handle = norm.register_forward_hook(lambda *args: None)
    assert not can_fold(conv, norm)
    handle.remove()
    assert not can_fold(conv, norm.train())


def unfolded(model, x):
    """The features with a listener on each BatchNorm, which keeps them apart."""
    handles = [
        m.register_forward_hook(lambda *args: None) for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    out = model.embed(x)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("name", ["convnet_8_16_bn", "vgg", "alexnet", "ConvNetBN", "VGG11BN"])
def test_networks_fold_in_eval_mode_only(name):
    from models import get_network

    make = (
        (lambda: get_model(name, SHAPE, 4))
        if name[0].islower()
        else (lambda: get_network(name, 3, 4, (32, 32)))
    )
    model = with_statistics(make()).double()
    x = X.double()
    torch.testing.assert_close(model.embed(x), unfolded(model, x), rtol=1e-9, atol=1e-9)
    before = copy.deepcopy(model.state_dict())
    model.train()
    trained = model.embed(x)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert any("running_mean" in k for k in changed) == any(
        isinstance(m, nn.BatchNorm2d) for m in model.modules()
    )
    if changed:
        assert not torch.allclose(trained, unfolded(model.eval(), x))


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "mobilenet", "convnet_8_16_bn"])
def test_frozen_networks(name):
    model = with_statistics(get_model(name, SHAPE, 4))
    folded = fold_frozen(model, X)
    assert folded is not model
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(X), model(X), rtol=1e-3, atol=1e-4)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())  # the original is as it was


def test_a_shared_convolution_is_left_alone():
    class Shared(nn.Module):
        """One convolution in front of two norms."""

        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)

        def forward(self, x):
            y = self.conv(x)
            return self.a(y) + self.b(y)

    model = with_statistics(Shared())
    assert fold_frozen(model, X) is model


def test_an_output_used_twice_is_left_alone():
    class Twice(nn.Module):
        """The convolution's output goes on beside the norm's."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    model = with_statistics(Twice())
    assert fold_frozen(model, X) is model
