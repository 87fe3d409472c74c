"""What every network of both zoos offers, and the evaluation pools."""

import pytest
import torch
import torch.nn.functional as F

from models import NETWORKS, eval_pool, get_model, get_network
from utils.errors import UserError
from utils.seed import local_seed

ZOO_A = ["convnet_8_16_bn", "convnet_8_16_in", "convnet_8_16_none"]
ZOO_A += ["alexnet", "vgg", "resnet10", "resnet18", "mobilenet"]
ALL = [("A", name) for name in ZOO_A] + [("B", name) for name in NETWORKS]


def side(name):
    return 64 if name == "ConvNetD6" else 32  # D6 pools six times


def build(zoo, name):
    with local_seed(0):
        return get_model(name) if zoo == "A" else get_network(name, 3, 10, (side(name),) * 2)


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("zoo", "name"), ALL)
def test_contract(zoo, name):
    """embed, pooled, forward_features, head and forward agree; the declared widths are true."""
    model, x = build(zoo, name).eval(), images(side(name))
    assert isinstance(model.head, torch.nn.Linear) and model.head.out_features == 10
    assert dict(model.named_modules())[model.head_name] is model.head
    assert list(model.state_dict())[-1] == f"{model.head_name}.bias"
    with torch.no_grad():
        features, embedded, pooled = model.forward_features(x), model.embed(x), model.pooled(x)
        assert embedded.shape == (2, model.num_features) == (2, model.head.in_features)
        assert pooled.shape == (2, model.num_pooled)
        assert torch.equal(model(x), model.head(embedded))
        if features.dim() == 4:
            assert torch.equal(pooled, features.mean((2, 3)))
        if pooled.shape == embedded.shape:
            torch.testing.assert_close(pooled, embedded)
        else:
            assert torch.equal(embedded, features.flatten(1))
        assert torch.isfinite(embedded).all() and not torch.equal(embedded[0], embedded[1])


@pytest.mark.parametrize(("zoo", "name"), ALL)
def test_gradient_reaches_every_parameter(zoo, name):
    model = build(zoo, name)
    for module in model.modules():  # zero-initialised norms block what lies behind them
        if getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            torch.nn.init.ones_(module.weight)
    F.cross_entropy(model(images(side(name))), torch.arange(2)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        if parameter.dim() > 1:  # the bias of a convolution before a norm has none by rights
            assert parameter.grad.abs().max() > 0, key


def test_weights_come_from_the_global_random_state():
    """Same seed, same network; construction neither re-seeds nor reads the clock."""
    for zoo, name in (("A", "convnet_8_16_bn"), ("A", "resnet10"), ("B", "ConvNet")):
        first, second = build(zoo, name).state_dict(), build(zoo, name).state_dict()
        assert all(torch.equal(first[k], second[k]) for k in first)
    torch_state = torch.get_rng_state()
    build("B", "LeNet")
    assert torch.equal(torch_state, torch.get_rng_state())
    third, fourth = get_network("LeNet", 3, 10), get_network("LeNet", 3, 10)
    assert not torch.equal(third.fc_3.weight, fourth.fc_3.weight)


def test_double_backward_through_both_zoos():
    """KRR-ST and gradient matching differentiate through a gradient."""
    for zoo, name in (("A", "convnet_8_16_bn"), ("B", "ConvNetW32"), ("B", "LeNet")):
        model, x = build(zoo, name), images().requires_grad_()
        loss = model(x).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        assert x.grad.abs().sum() > 0, name


def test_eval_pools():
    expected = dict(
        M="MLP ConvNet LeNet AlexNet VGG11 ResNet18",
        B="ConvNetBN ConvNetASwishBN AlexNetBN VGG11BN ResNet18BN",
        W="ConvNetW32 ConvNetW64 ConvNetW128 ConvNetW256",
        D="ConvNetD1 ConvNetD2 ConvNetD3 ConvNetD4",
        A="ConvNetAS ConvNetAR ConvNetAL ConvNetASwish",
        P="ConvNetNP ConvNetMP ConvNetAP",
        N="ConvNetNN ConvNetBN ConvNetLN ConvNetIN ConvNetGN",
        S="ConvNet",
        SS="ConvNetBN",
    )
    for mode, names in expected.items():
        assert eval_pool(mode, "ConvNetBN") == names.split()
        assert set(names.split()) <= set(NETWORKS)
    assert eval_pool("S", "ConvNetD4") == ["ConvNetD4"]
    assert eval_pool("S", "ConvNetASwishBN") == ["ConvNetASwish"]
    assert all(eval_pool("S", name)[0] in NETWORKS for name in NETWORKS)
    with pytest.raises(UserError, match="unknown eval_mode 'X'; valid: A, B"):
        eval_pool("X", "ConvNet")
    with pytest.raises(UserError, match="unknown network 'convnet'"):
        eval_pool("S", "convnet")


def test_zoo_b_parameter_counts():
    def count(*args):
        with torch.device("meta"):
            return sum(p.numel() for p in get_network(*args).parameters())

    assert count("ConvNet", 3, 10) == 320_010  # as reported for DC's ConvNet
    assert count("LeNet", 1, 10, (28, 28)) == 61_706  # the classical LeNet-5
    assert count("MLP", 1, 10, (28, 28)) == 784 * 128 + 128 + 128 * 128 + 128 + 1290
    assert count("ResNet18BN", 3, 10) == 11_173_962  # the well-known count of the CIFAR ResNet-18
    assert count("VGG11BN", 3, 10) == 9_231_114
