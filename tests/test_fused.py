"""The fused kernels, run by Triton's interpreter on a CPU, against torch's layers in float64."""

import copy
import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from models import fused, fused_images, get_model

pytest.importorskip("triton")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
# Triton decides when it is imported: these tests have a process of their own.
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="see the last test")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(fused, "_PROGRAMS", 5)
    monkeypatch.setattr(fused_images, "_PROGRAMS", 2)
    if os.environ.get("TRITON_INTERPRET") == "1":  # it has no product of bfloat16
        monkeypatch.setattr(fused_images, "OPERANDS", torch.float32)


def block(channels, bias=True, **options):
    """Convolution of 3 channels, BatchNorm with statistics of its own, ReLU, pooling."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, channels, 3, bias=bias, **{"padding": 1} | options)
    layers = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AvgPool2d(2))
    with torch.no_grad():
        layers[1].weight.uniform_(-1.5, 1.5)
        layers[1].bias.normal_()
        layers[1].running_mean.normal_()
        layers[1].running_var.uniform_(0.5, 2)
    return layers.to(memory_format=torch.channels_last)


def off(found, wanted):
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def compare(layers, training, dtype, x, images=False):
    """Relative differences of our block from float64: output, gradients, running statistics.

    With `images` the convolution is among the kernels, and the dtype is autocast's.
    """
    layers.train(training).requires_grad_(training)
    exact = copy.deepcopy(layers).double()
    ours = x if images else x.to(dtype).contiguous(memory_format=torch.channels_last)
    if not images:
        layers[0].to(dtype)
    ours = ours.clone().requires_grad_(not (images and training))
    theirs = x.double().requires_grad_()
    assert fused.fusable(list(layers), ours)
    with torch.autocast(x.device.type, dtype, enabled=images):
        assert fused_images.takes_images(layers[0], ours, training) == images
        found = fused.fused(list(layers), ours)
    wanted = exact(theirs)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(found)
    found.backward(grad)
    wanted.backward(grad.double())
    apart = {"output": off(found, wanted)}
    if ours.requires_grad:
        apart["input"] = off(ours.grad, theirs.grad)
        assert ours.grad.stride() == ours.stride()
    for (name, a), b in zip(layers.named_parameters(), exact.parameters(), strict=True):
        if name == "0.bias" and training:  # what BatchNorm takes away: rounding in torch, zero here
            assert b.grad.abs().max() < 1e-10 and not a.grad.any()
        elif training:
            apart[name] = off(a.grad, b.grad)
    assert layers[1].num_batches_tracked == exact[1].num_batches_tracked
    statistics = ("running_mean", "running_var")
    return apart | {name: off(getattr(layers[1], name), getattr(exact[1], name)) for name in statistics}


@interpreted
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("dtype", "channels", "bias", "padding"),
    [(torch.float32, 136, True, 1), (torch.bfloat16, 136, True, 1), (torch.float32, 8, False, 0)],
)
def test_values_and_gradients(training, dtype, channels, bias, padding):
    x = 1 + torch.randn(3, 3, 8, 12)  # not centred
    apart = compare(block(channels, bias, padding=padding), training, dtype, x)
    assert max(apart.values()) < BOUNDS[dtype], apart


@interpreted
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("channels", "bias", "layout"), [(136, True, torch.contiguous_format), (8, False, torch.channels_last)]
)
def test_the_first_block(training, channels, bias, layout):
    x = 1 + torch.randn(3, 3, 8, 12).contiguous(memory_format=layout)
    apart = compare(block(channels, bias), training, torch.bfloat16, x, images=True)
    assert max(apart.values()) < BOUNDS[torch.bfloat16], apart


@interpreted
def test_the_first_block_of_one_channel():
    torch.manual_seed(0)
    layers = block(8)
    layers[0] = nn.Conv2d(1, 8, 3, padding=1)
    apart = compare(layers, True, torch.bfloat16, torch.randn(2, 1, 6, 6), images=True)
    assert max(apart.values()) < BOUNDS[torch.bfloat16], apart


@interpreted
def test_statistics_of_maps_far_from_zero():
    """Mean 1000 and deviation 0.1: sums of squares in float32 would lose all digits."""
    layers = block(8, bias=False).train()
    with torch.no_grad():  # the corner's is another one: it sees the padding
        layers[0].weight.fill_(1 / 27)
    x = 1000 + 0.1 * torch.randn(4, 3, 8, 8)
    found = fused.fused(list(layers), x)
    wanted = copy.deepcopy(layers).double()(x.double())
    assert off(found, wanted) < 1e-3


@interpreted
def test_a_network_of_first_order():
    torch.manual_seed(0)
    networks = [get_model("convnet_4_8_bn", (3, 8, 8), 5)]
    networks.append(copy.deepcopy(networks[0]))
    networks[1].first_order = True
    x = torch.randn(4, 3, 8, 8)
    for network in networks:
        rate = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        for _ in range(2):
            network(x).square().mean().backward()
            rate.step()
            rate.zero_grad()
    for (name, a), b in zip(networks[0].state_dict().items(), networks[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(networks[0].eval()(x), networks[1].eval()(x), rtol=1e-3, atol=1e-4)


@interpreted
def test_no_second_derivative():
    layers = block(8).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(fused.fused(list(layers), x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x)


@interpreted
def test_what_is_left_to_torch(monkeypatch):
    x = torch.randn(2, 3, 8, 8)
    layers = list(block(8))
    assert fused.fusable(layers, x)
    assert not fused.fusable(layers[:3], x)
    assert not fused.fusable(layers, x[:, :, :7])
    assert not fused.fusable([*layers[:3], nn.MaxPool2d(2)], x)
    assert not fused.fusable([*layers[:2], nn.LeakyReLU(), layers[3]], x)
    assert not fused.fusable([*layers[:3], nn.AvgPool2d(2, stride=1)], x)
    assert not fused.fusable([*layers[:3], nn.AvgPool2d(2, divisor_override=1)], x)
    assert not fused.fusable(layers, x.double())
    assert not fused.fusable(list(block(8, padding="same")), x)
    assert not fused.fusable(list(block(8, stride=2)), x)
    for register in (layers[1].register_forward_hook, layers[0].register_forward_pre_hook):
        hook = register(lambda *_: None)
        assert not fused.fusable(layers, x)
        hook.remove()
    for layer in layers:
        layer.eval()
    assert not fused.fusable(layers, x)  # its parameters need a gradient
    layers[1].requires_grad_(False)
    assert not fused.fusable(layers, x)  # so do the convolution's
    with torch.no_grad():
        assert fused.fusable(layers, x)
        monkeypatch.setattr(fused, "_compiles", lambda device: False)
        assert not fused.fusable(layers, x)
    monkeypatch.undo()
    monkeypatch.setattr(fused, "_INTERPRETED", False)
    with torch.no_grad():
        assert not fused.fusable(layers, x)


@interpreted
def test_a_compiler_that_fails_is_said_once(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "_pooled", fails)
    fused._compiles.cache_clear()
    try:
        layers, x = list(block(8)), torch.randn(2, 3, 8, 8)
        assert not fused.fusable(layers, x) and not fused.fusable(layers, x)
        assert capsys.readouterr().out.count("no fused kernels on cpu (Failed to find C compiler)") == 1
    finally:
        fused._compiles.cache_clear()


def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    here = {"TRITON_INTERPRET": "1"}
    command += ["-k", "not test_in_the_interpreter and not h100"]
    done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


P = {"PIXELS": 16, "CHANNELS": 128}
Q = {"C_IN": 3, "TAPS": 32, "PIXELS": 32, "CHANNELS": 128}
BFLOAT16 = {"y", "out", "grad", "d_y", "weights", "columns"}
INTEGERS = {"pixels", "rows", "height", "width", "sb", "sc", "sh", "sw", "channels"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "constants"),
    [
        (fused, "_forward_kernel", P),
        (fused, "_backward_kernel", P),
        (fused, "_statistics_kernel", {"ROWS": 32, "CHANNELS": 128}),
        (fused, "_gradient_sums_kernel", {"PIXELS": 8, "CHANNELS": 128}),
        *(
            (fused_images, f"_{name}", Q)
            for name in ["forward", "statistics", "gradient_sums", "weight_gradient"]
        ),
        (fused_images, "_columns", Q | {"PIXELS": 16}),
        (fused_images, "_fold", Q | {"PIXELS": 256}),
    ],
)
def test_kernels_compile_for_an_h100(module, name, constants):
    """To machine code, which needs no GPU: the interpreter takes types that the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("an older Triton takes a kernel's source in another form")
    kernel = getattr(module, name)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    kinds = dict.fromkeys(constants, "constexpr") | dict.fromkeys(INTEGERS, "i32")
    kinds |= dict.fromkeys(BFLOAT16, "*bf16")
    signature = {key: kinds.get(key, "*fp32") for key in kernel.arg_names}
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert made.asm["cubin"]
