"""Crop, flip and normalisation against one image, one padding, one slice at a time."""

import numpy as np
import pytest
import torch

from data.augment import denormalize, normalize, to_float
from data.augment.crop_flip import apply_crop_flip, count_views, default_padding, draw_crop_flip
from data.augment.low_pass import low_pass
from data.specs import Stats

STATS = Stats((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive(image, top, left, flip, pad):
    """One C×H×W picture by NumPy: pad, cut out, mirror."""
    _, height, width = image.shape
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    view = padded[:, top : top + height, left : left + width]
    return torch.from_numpy((view[:, :, ::-1] if flip else view).copy())


def number(top, left, flip, pad):
    return ((2 * pad + 1) * flip + top) * (2 * pad + 1) + left


def parts(views, pad):
    """Top, left and flip of views."""
    flip, offsets = np.divmod(views.numpy(), (2 * pad + 1) ** 2)
    return *np.divmod(offsets, 2 * pad + 1), flip


def pictures(count, shape, dtype):
    if dtype == torch.uint8:
        return torch.randint(256, (count, *shape), generator=generator(), dtype=dtype)
    return torch.rand(count, *shape, generator=generator(), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("shape", "pad"), [((3, 8, 8), 4), ((1, 5, 7), 2), ((3, 4, 4), 0)])
def test_batched_is_one_by_one(shape, pad, dtype):
    x = pictures(20, shape, dtype)
    kept = x.clone()
    views = draw_crop_flip(20, pad, True, generator(1))
    out = apply_crop_flip(x, views, pad)
    assert out.dtype == dtype and out.shape == x.shape and torch.equal(x, kept)
    for i in range(20):
        top, left, flip = (int(v[i]) for v in parts(views, pad))
        assert torch.equal(out[i], naive(x[i], top, left, flip, pad))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_162_views_of_an_image(dtype):
    image = pictures(1, (3, 8, 8), dtype)[0]
    grid = [(t, left, f) for t in range(9) for left in range(9) for f in (0, 1)]
    numbers = torch.tensor([number(*parameters, 4) for parameters in grid])
    assert sorted(numbers.tolist()) == list(range(count_views(4, True)))
    out = apply_crop_flip(image.expand(162, 3, 8, 8), numbers, 4)
    assert len({view.numpy().tobytes() for view in out}) == 162
    for view, parameters in zip(out, grid, strict=True):
        assert torch.equal(view, naive(image, *parameters, 4))


def test_the_middle_view_is_the_image_and_the_rest_is_zero():
    x = 1 + torch.rand(3, 3, 6, 6, generator=generator())

    def seen(top, left, flip):
        return apply_crop_flip(x, torch.full((3,), number(top, left, flip, 2)), 2)

    assert torch.equal(seen(2, 2, 0), x)
    assert torch.equal(seen(2, 2, 1), x.flip(3))
    corner = seen(0, 0, 0)
    assert (corner[:, :, :2] == 0).all() and (corner[:, :, :, :2] == 0).all()
    assert torch.equal(corner[:, :, 2:, 2:], x[:, :, :4, :4])


@pytest.mark.parametrize("border", ["constant", "reflect"])
def test_differentiable(border):
    x = torch.rand(2, 1, 3, 3, generator=generator(), dtype=torch.float64, requires_grad=True)
    views = torch.tensor([number(0, 1, 1, 1), number(2, 2, 0, 1)])
    assert torch.autograd.gradcheck(lambda t: apply_crop_flip(t, views, 1, border), x)


@pytest.mark.parametrize("hflip", [True, False])
def test_draws_cover_everything_evenly(hflip):
    views = draw_crop_flip(20000, 4, hflip, generator())
    assert views.shape == (20000,) and views.dtype == torch.int64
    top, left, flip = parts(views, 4)
    for offsets in (top, left):
        counts = np.bincount(offsets)
        assert len(counts) == 9 and counts.min() > 2000 and counts.max() < 2450  # 2222 expected
    joint = np.bincount(top * 9 + left)
    assert len(joint) == 81 and joint.min() > 170  # 247 expected: the offsets are independent
    share = flip.mean()
    assert 0.48 < share < 0.52 if hflip else share == 0


def test_draws_come_from_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (draw_crop_flip(50, 4, True, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_normalize_is_the_formula_and_denormalize_its_inverse():
    x = torch.rand(2, 3, 4, 5, generator=generator(), dtype=torch.float64)
    out = normalize(x, STATS)
    for n in range(2):
        for c in range(3):
            expected = (x[n, c].numpy() - STATS.mean[c]) / STATS.std[c]
            np.testing.assert_allclose(out[n, c].numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(denormalize(out, STATS), x)
    assert (denormalize(10 * out, STATS) > 1).any()  # not clamped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normalize_keeps_the_dtype(dtype):
    assert normalize(torch.rand(1, 3, 2, 2).to(dtype), STATS).dtype == dtype


def test_to_float():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(levels), torch.arange(256) / 255)
    x = torch.rand(3)
    assert to_float(x) is x


@pytest.mark.parametrize(
    ("size", "pad"), [(8, 1), (16, 2), (28, 3), (32, 4), (64, 4), (224, 4)]
)  # 4 is published
def test_default_padding(size, pad):
    assert default_padding(size) == pad


def test_low_frequencies_of_waves():
    """A wave of the cosine transform counts by the gain at its frequency; no frequency stays whole."""
    n = torch.arange(12, dtype=torch.float64)
    for row, column in ((0, 0), (3, 0), (2, 5), (11, 11)):
        wave = torch.cos(torch.pi * row * (n[:, None] + 0.5) / 12) * torch.cos(
            torch.pi * column * (n + 0.5) / 12
        )
        x = wave.expand(3, 2, 12, 12)
        cutoff = torch.tensor([0.04, 0.4, 1.5], dtype=torch.float64)
        frequency = (row**2 + column**2) ** 0.5 / 12
        gain = 1 / (1 + (frequency / cutoff) ** 8)
        torch.testing.assert_close(low_pass(x, cutoff), gain.view(3, 1, 1, 1) * x, atol=1e-12, rtol=1e-9)
    x = torch.randn(2, 1, 5, 8, dtype=torch.float64, requires_grad=True)  # sides that differ
    assert torch.autograd.gradcheck(lambda t: low_pass(t, torch.tensor([0.2, 0.7], dtype=torch.float64)), x)
