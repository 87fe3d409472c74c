"""DC's older augmentation against the published loop over images, on SciPy and interpolate."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from data.augment.dc import dc_augment, dc_strategy, rotate
from utils.errors import UserError


def images(b=12, c=2, h=9, w=9):
    return torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def place_in_the_middle(picture, h, w):
    """On a square of zeros that holds both sizes, of which the middle h x w is cut out."""
    _, sh, sw = picture.shape
    side = max(sh, sw, h, w)
    canvas = np.zeros((len(picture), side, side), picture.dtype)
    r, c = int((side - sh) / 2), int((side - sw) / 2)
    canvas[:, r : r + sh, c : c + sw] = picture
    return cut_middle(canvas, h, w)


def cut_middle(canvas, h, w):
    r, c = int((canvas.shape[1] - h) / 2), int((canvas.shape[2] - w) / 2)
    return canvas[:, r : r + h, c : c + w]


def naive(x, strategy, generator):
    """The published loop over images, with the draws of `generator` in their order."""
    ops = strategy.split("_")
    drawn = torch.randint(len(ops), (len(x),), generator=generator).tolist()
    channels, h, w = x.shape[1:]
    mean = [float(x[:, c].mean()) for c in range(channels)]
    out = x.numpy().copy()
    for number, op in enumerate(ops):
        members = [i for i, d in enumerate(drawn) if d == number]
        n = len(members)
        if not n:
            continue
        if op == "crop":
            top = torch.randint(8, (n,), generator=generator).tolist()
            left = torch.randint(8, (n,), generator=generator).tolist()
        elif op == "scale":
            draws = torch.rand((2, n), generator=generator, dtype=torch.float64)
            scale = (0.8 + 0.4 * draws).tolist()
        elif op == "rotate":
            degrees = torch.randint(-45, 45, (n,), generator=generator).tolist()
        else:
            noise = torch.randn((n, *x.shape[1:]), generator=generator).double().numpy()
        for k, i in enumerate(members):
            image = x[i].numpy()
            if op == "crop":
                padded = np.empty((channels, h + 8, w + 8))
                padded[:] = np.array(mean)[:, None, None]
                padded[:, 4 : 4 + h, 4 : 4 + w] = image
                out[i] = padded[:, top[k] : top[k] + h, left[k] : left[k] + w]
            elif op == "scale":
                size = int(scale[0][k] * h), int(scale[1][k] * w)
                scaled = F.interpolate(x[i : i + 1], size)[0].numpy()
                out[i] = place_in_the_middle(scaled, h, w)
            elif op == "rotate":
                turned = ndimage.rotate(image, degrees[k], axes=(-2, -1), cval=np.mean(mean))
                out[i] = cut_middle(turned, h, w)
            else:
                out[i] = image + 0.001 * noise[k]
    return torch.from_numpy(out)


@pytest.mark.parametrize("strategy", ["crop", "scale", "rotate", "noise", "crop_scale_rotate", "crop_noise"])
@pytest.mark.parametrize("shape", [(300, 2, 9, 9), (9, 1, 13, 15), (200, 1, 28, 28)])
def test_equals_the_loop_over_images(strategy, shape):
    x = images(*shape)
    copy = x.clone()
    mine, theirs = (torch.Generator().manual_seed(4) for _ in range(2))
    got = dc_augment(x, strategy, mine)
    torch.testing.assert_close(got, naive(x, strategy, theirs), rtol=0, atol=1e-9)
    assert torch.equal(x, copy)
    assert torch.equal(mine.get_state(), theirs.get_state())


@pytest.mark.parametrize("size", [(28, 28), (9, 9), (13, 15), (2, 2), (1, 1)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_rotation_is_scipys_at_every_angle(size, dtype, atol):
    degrees = torch.arange(-45, 45)
    x = torch.randn(90, 2, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = rotate(x, degrees, torch.tensor(0.37, dtype=dtype))
    assert got.dtype == dtype
    for image, angle, mine in zip(x.numpy(), degrees.tolist(), got.numpy(), strict=True):
        turned = ndimage.rotate(image, angle, axes=(-2, -1), cval=0.37)
        np.testing.assert_allclose(mine, cut_middle(turned, *size), rtol=0, atol=atol)


def test_offsets_of_the_crop_are_0_to_7():
    """A single bright pixel moves by -3 to 4: offset 8, the last place there is, is never drawn."""
    x = torch.zeros(2000, 1, 11, 11)
    x[:, :, 5, 5] = 1
    got = dc_augment(x, "crop", torch.Generator().manual_seed(0))
    places = {tuple(p) for p in (got[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(5 + r, 5 + c) for r in range(-3, 5) for c in range(-3, 5)}


def test_what_fills_the_outside():
    """Channel means of the batch around a crop, zeros around a scaled picture."""
    x = torch.arange(1.0, 41).view(20, 2, 1, 1).expand(20, 2, 12, 12).contiguous()
    for strategy, fills in (("crop", x.mean((0, 2, 3)).tolist()), ("scale", [0, 0])):
        got = dc_augment(x, strategy, torch.Generator().manual_seed(0))
        for channel, fill in enumerate(fills):
            values = {
                v
                for v, i in zip(got[:, channel], x[:, channel, 0, 0], strict=True)
                for v in v.unique().tolist()
                if v != i
            }
            assert values == {fill}


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
