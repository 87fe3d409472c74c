"""DSA against the published protocol, re-derived here with the global seed and per-pixel loops."""

import math

import numpy as np
import pytest
import torch

from data.augment.dsa import diff_augment
from utils.errors import UserError

FULL = "color_crop_cutout_flip_scale_rotate"
OPS = FULL.split("_")


def images(b=3, c=2, h=6, w=9, dtype=torch.float64):
    return torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(5)).to(dtype)


class Published:
    """The protocol as the authors run it: re-seed the global state before every random tensor."""

    def __init__(self, seed):
        self.latest = seed

    def reseed(self):
        torch.manual_seed(self.latest)
        self.latest += 1

    def rand(self, *size):
        self.reseed()
        return torch.rand(*size).flatten().tolist()

    def randint(self, low, high, b):
        self.reseed()
        return torch.randint(low, high, size=[b, 1, 1]).flatten().tolist()


def bilinear(image, a, b, c, d, align):
    """Per-pixel sampling of one C×H×W array; zeros outside."""
    _, h, w = image.shape
    out = np.zeros_like(image)
    for i in range(h):
        for j in range(w):
            if align:
                gx, gy = 2 * j / (w - 1) - 1, 2 * i / (h - 1) - 1
            else:
                gx, gy = (2 * j + 1) / w - 1, (2 * i + 1) / h - 1
            u, v = a * gx + b * gy, c * gx + d * gy
            px = (u + 1) / 2 * (w - 1) if align else ((u + 1) * w - 1) / 2
            py = (v + 1) / 2 * (h - 1) if align else ((v + 1) * h - 1) / 2
            x0, y0 = math.floor(px), math.floor(py)
            for yy in (y0, y0 + 1):
                for xx in (x0, x0 + 1):
                    if 0 <= yy < h and 0 <= xx < w:
                        weight = (1 - abs(px - xx)) * (1 - abs(py - yy))
                        out[:, i, j] += weight * image[:, yy, xx]
    return out


def naive_image(op, image, p, align):
    """One image, parameters p of that image, explicit arithmetic."""
    channels, h, w = image.shape
    out = image.copy()
    if op == "color":
        out = out + (p[0] - 0.5)
        for i in range(h):
            for j in range(w):
                mean = out[:, i, j].sum() / channels
                out[:, i, j] = (out[:, i, j] - mean) * (2 * p[1]) + mean
        mean = out.sum() / out.size
        return (out - mean) * (p[2] + 0.5) + mean
    if op == "crop":
        for i in range(h):
            for j in range(w):
                y, x = i + p[0], j + p[1]
                out[:, i, j] = image[:, y, x] if 0 <= y < h and 0 <= x < w else 0
        return out
    if op == "cutout":
        ch, cw = int(h * 0.5 + 0.5), int(w * 0.5 + 0.5)
        for i in range(ch):  # the published way: every index of the square, clamped to the image
            for j in range(cw):
                y = min(max(i + p[0] - ch // 2, 0), h - 1)
                x = min(max(j + p[1] - cw // 2, 0), w - 1)
                out[:, y, x] = 0
        return out
    if op == "flip":
        return image[:, :, ::-1].copy() if p[0] < 0.5 else out
    if op == "scale":
        low, high = 1 / 1.2, 1.2
        sx, sy = (u * (high - low) + low for u in p)
        return bilinear(image, sx, 0, 0, sy, align)
    angle = (p[0] - 0.5) * 2 * 15 * math.pi / 180
    return bilinear(image, math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle), align)


def naive(x, strategy, seed, siamese, align):
    b, _, h, w = x.shape
    with torch.random.fork_rng(devices=[]):
        rng = Published(seed)
        names = strategy.split("_")
        rng.reseed()
        op = names[int(torch.randint(0, len(names), size=(1,)))]
        if op == "color":
            draws = [rng.rand(b, 1, 1, 1) for _ in range(3)]
        elif op == "crop":
            sides = int(h * 0.125 + 0.5), int(w * 0.125 + 0.5)
            draws = [rng.randint(-s, s + 1, b) for s in sides]
        elif op == "cutout":
            draws = [rng.randint(0, s + (1 - int(s * 0.5 + 0.5) % 2), b) for s in (h, w)]
        elif op == "scale":
            draws = [rng.rand(b), rng.rand(b)]
        else:
            draws = [rng.rand(b, 1, 1, 1)]
    rows = []
    for i in range(b):
        parameters = [d[0 if siamese else i] for d in draws]
        rows.append(naive_image(op, x[i].numpy(), parameters, align))
    return torch.from_numpy(np.stack(rows)), op


@pytest.mark.parametrize("siamese", [False, True])
@pytest.mark.parametrize("align", [False, True])
def test_same_picture_as_the_published_protocol(siamese, align):
    x = images()
    seen = set()
    for seed in range(24):
        expected, op = naive(x, FULL, seed, siamese, align)
        seen.add(op)
        got = diff_augment(x, FULL, seed=seed, siamese=siamese, align_corners=align)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=f"{op} seed {seed}")
    assert seen == set(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 1, 5, 7), (17, 3, 16, 12)])
def test_each_operation_on_float32(op, shape):
    x = images(*shape)
    for seed in (0, 3, 11):
        expected, _ = naive(x, op, seed, False, False)
        got = diff_augment(x.float(), op, seed=seed)
        assert got.dtype == torch.float32 and got.shape == x.shape
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5)


def test_golden_parameters_of_seed_7():
    # brightness, saturation and contrast come from seeds 8, 9 and 10; numbers of torch 2.14
    x = torch.tensor([[0.0, 1.0], [2.0, 5.0]]).expand(1, 3, 2, 2).contiguous()
    u = [float(torch.rand(1, generator=torch.Generator().manual_seed(s))) for s in (8, 9, 10)]
    got = diff_augment(x, "color", seed=7)
    bright = x + u[0] - 0.5  # equal channels: saturation changes nothing
    torch.testing.assert_close(got, (bright - bright.mean()) * (u[2] + 0.5) + bright.mean())
    torch.testing.assert_close(u, [0.5979, 0.6558, 0.4581], rtol=0, atol=5e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("align", [False, True])
def test_gradcheck(op, align):
    x = images(2, 2, 4, 5).requires_grad_()
    for seed in (1, 2):
        assert torch.autograd.gradcheck(
            lambda t, s=seed: diff_augment(t, op, seed=s, align_corners=align), (x,)
        )


@pytest.mark.parametrize("op", OPS)
def test_siamese_parameters_do_not_depend_on_the_batch_size(op):
    x = images(300, 3, 8, 8, torch.float32)
    for seed in (0, 5):
        whole = diff_augment(x, op, seed=seed, siamese=True)
        for size in (1, 2, 15, 16, 17, 64):
            part = diff_augment(x[:size], op, seed=seed, siamese=True)
            torch.testing.assert_close(part, whole[:size])


@pytest.mark.parametrize("op", OPS)
def test_siamese_treats_all_images_alike_and_otherwise_not(op):
    x = images(1, 3, 16, 16).expand(32, -1, -1, -1)
    alike = diff_augment(x, op, seed=3, siamese=True)
    torch.testing.assert_close(alike, alike[:1].expand_as(alike))
    apart = diff_augment(x, op, seed=3)
    assert (apart - apart[:1]).abs().max() > 0.01


@pytest.mark.parametrize("op", OPS)
def test_global_random_state_and_input_are_untouched(op):
    x = images()
    before, copy = torch.get_rng_state(), x.clone()
    diff_augment(x, op, seed=4)
    diff_augment(x, op, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, copy)


def test_align_corners_matters_for_scale_and_rotate_only():
    x = images(2, 3, 16, 16)
    for op in OPS:
        a, b = (diff_augment(x, op, seed=2, align_corners=v) for v in (True, False))
        assert torch.equal(a, b) == (op not in ("scale", "rotate"))


def test_scale_above_one_shrinks_the_picture():
    x = torch.ones(64, 1, 20, 20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sx = torch.rand(64) * (1.2 - 1 / 1.2) + 1 / 1.2
    visible = diff_augment(x, "scale", seed=0)[:, 0, 10].sum(1)
    assert (visible[sx > 1.1] < 19).all() and (visible[sx < 1] == 20).all()


def test_generator_draws_in_sequence_and_advances():
    x = images(5, 3, 8, 8)
    mine, theirs = (torch.Generator().manual_seed(9) for _ in range(2))
    got = [diff_augment(x, "color_flip", generator=mine) for _ in range(4)]
    for out in got:
        op = int(torch.randint(0, 2, (1,), generator=theirs))
        if op == 1:
            flip = torch.rand(5, 1, 1, 1, generator=theirs) < 0.5
            expected = torch.where(flip, x.flip(3), x)
        else:
            p = [torch.rand(5, 1, 1, 1, generator=theirs) for _ in range(3)]
            rows = [naive_image("color", x[i].numpy(), [float(q[i]) for q in p], False) for i in range(5)]
            expected = torch.from_numpy(np.stack(rows))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(mine.get_state(), theirs.get_state())


def test_default_dtype_does_not_change_the_draws():
    x = images(2, 3, 8, 8)
    plain = diff_augment(x, "color", seed=1)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(diff_augment(x, "color", seed=1), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_half_precision_keeps_the_parameters():
    x = images(4, 3, 8, 8, torch.float32)
    for op in OPS:
        low = diff_augment(x.bfloat16(), op, seed=6)
        assert low.dtype == torch.bfloat16
        assert (low.float() - diff_augment(x, op, seed=6)).abs().max() < 0.25


@pytest.mark.parametrize("name", ["", "none", "None"])
def test_no_strategy_is_the_identity(name):
    x = images()
    assert diff_augment(x, name) is x
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert diff_augment(x, name, generator=generator) is x
    assert torch.equal(generator.get_state(), before)


def test_errors():
    x = images()
    with pytest.raises(UserError, match=r"'blur'.*color, crop, cutout, flip, rotate, scale"):
        diff_augment(x, "color_blur", seed=0)
    with pytest.raises(UserError, match="unknown DSA operation ''"):
        diff_augment(x, "color__flip", seed=0)
    with pytest.raises(ValueError, match="not both"):
        diff_augment(x, "color", seed=0, generator=torch.Generator())
    with pytest.raises(ValueError, match="explicit randomness"):
        diff_augment(x, "color")
    with pytest.raises(ValueError, match="seed is -1"):
        diff_augment(x, "color", seed=-1)
    with pytest.raises(ValueError, match="expected B x C x H x W float"):
        diff_augment(x[0], "color", seed=0)
    with pytest.raises(ValueError, match="int64"):
        diff_augment(x.long(), "color", seed=0)
