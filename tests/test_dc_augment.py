"""DC's older augmentation against a per-image loop with explicit arithmetic."""

import math

import numpy as np
import pytest
import torch

from data.dc_augment import dc_augment, dc_strategy
from utils.errors import UserError


def images(b=12, c=2, h=9, w=9):
    return torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def sample(image, source):
    """Bilinear reading at source(v, u) in pixels from the centre; the channel mean outside."""
    channels, h, w = image.shape
    mean = image.reshape(channels, -1).mean(1)
    out = np.zeros_like(image)
    for i in range(h):
        for j in range(w):
            v, u = source(i - (h - 1) / 2, j - (w - 1) / 2)
            py, px = v + (h - 1) / 2, u + (w - 1) / 2
            y0, x0 = math.floor(py), math.floor(px)
            for yy in (y0, y0 + 1):
                for xx in (x0, x0 + 1):
                    inside = 0 <= yy < h and 0 <= xx < w
                    weight = (1 - abs(py - yy)) * (1 - abs(px - xx))
                    out[:, i, j] += weight * (image[:, yy, xx] if inside else mean)
    return out


def naive(x, strategy, generator):
    ops = strategy.split("_")
    drawn = torch.randint(len(ops), (len(x),), generator=generator).tolist()
    out = x.numpy().copy()
    for number, op in enumerate(ops):
        members = [i for i, d in enumerate(drawn) if d == number]
        n = len(members)
        if not n:
            continue
        if op == "crop":
            top = torch.randint(-4, 5, (n,), generator=generator).tolist()
            left = torch.randint(-4, 5, (n,), generator=generator).tolist()
        elif op == "scale":
            scale = (0.8 + 0.4 * torch.rand((2, n), generator=generator)).tolist()
        elif op == "rotate":
            degrees = torch.randint(-45, 45, (n,), generator=generator).tolist()
        else:
            noise = torch.randn((n, *x.shape[1:]), generator=generator).double().numpy()
        for k, i in enumerate(members):
            image = x[i].numpy()
            channels, h, w = image.shape
            if op == "crop":
                padded = np.empty((channels, h + 8, w + 8))
                padded[:] = image.reshape(channels, -1).mean(1)[:, None, None]
                padded[:, 4:-4, 4:-4] = image
                y, z = 4 + top[k], 4 + left[k]
                out[i] = padded[:, y : y + h, z : z + w]
            elif op == "scale":
                sy, sx = scale[0][k], scale[1][k]
                out[i] = sample(image, lambda v, u, sy=sy, sx=sx: (v / sy, u / sx))
            elif op == "rotate":
                t = math.radians(degrees[k])
                c, s = math.cos(t), math.sin(t)
                out[i] = sample(image, lambda v, u, c=c, s=s: (s * u + c * v, c * u - s * v))
            else:
                out[i] = image + 0.001 * noise[k]
    return torch.from_numpy(out)


@pytest.mark.parametrize(
    "strategy", ["crop", "scale", "rotate", "noise", "crop_scale_rotate", "crop_noise"]
)
@pytest.mark.parametrize("shape", [(12, 2, 9, 9), (5, 1, 6, 8)])
def test_equals_the_loop_over_images(strategy, shape):
    x = images(*shape)
    copy = x.clone()
    mine, theirs = (torch.Generator().manual_seed(4) for _ in range(2))
    got = dc_augment(x, strategy, mine)
    torch.testing.assert_close(got, naive(x, strategy, theirs), rtol=1e-5, atol=1e-6)
    assert torch.equal(x, copy)
    assert torch.equal(mine.get_state(), theirs.get_state())


def test_constant_images_stay_constant_under_geometry():
    x = torch.arange(1.0, 41).view(20, 2, 1, 1).expand(20, 2, 12, 12)
    got = dc_augment(x, "crop_scale_rotate", torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, x.contiguous())


def test_every_image_gets_one_operation_drawn_for_it():
    x = images(400, 1, 8, 8).float()
    got = dc_augment(x, "crop_noise", torch.Generator().manual_seed(1))
    change = (got - x).abs().amax((1, 2, 3))
    noisy = ((change > 0) & (change < 0.01)).float().mean()
    assert 0.4 < noisy < 0.6


def test_global_random_state_is_untouched_and_runs_repeat():
    x = images()
    before = torch.get_rng_state()
    a, b, c = (dc_augment(x, "crop_noise", torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("name", ["", "none", "None"])
def test_no_strategy_is_the_identity(name):
    x = images()
    assert dc_augment(x, name, torch.Generator()) is x


def test_strategies_of_the_published_evaluation():
    assert dc_strategy("MNIST", "ConvNet") == "crop_scale_rotate"
    assert dc_strategy("CIFAR10", "ConvNetBN") == "crop_noise"
    assert dc_strategy("MNIST", "ConvNetBN") == "crop_noise"
    assert dc_strategy("CIFAR10", "ConvNet") == "none"


def test_errors():
    with pytest.raises(UserError, match="'blur'; valid: crop, noise, rotate, scale"):
        dc_augment(images(), "crop_blur", torch.Generator())
    with pytest.raises(ValueError, match="expected B x C x H x W float"):
        dc_augment(images()[0], "crop", torch.Generator())
