"""Differentiable Siamese augmentation (DSA): one operation a batch, gradients reach the images.

Source: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation",
arXiv 2102.08259, mode S of the authors' code. The same integer seed gives the same picture as
that code run on the CPU; the global random state is never touched.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import pick

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP_RATIO = 0.125  # of the side, rounded half up
CUTOUT_RATIO = 0.5
SCALE_RATIO = 1.2
ROTATE_DEGREES = 15.0
FLIP_PROBABILITY = 0.5

# Always float32: the published code draws in the dtype of its float32 images, and batches of half
# precision must get the same parameters.
uniform = functools.partial(torch.rand, dtype=torch.float32)

# Draws one random tensor, draw(uniform, size=...) or draw(torch.randint, low, high, size=...), on
# the CPU and moves it to the images.
Draw = Callable[..., Tensor]


def diff_augment(
    x: Tensor,
    strategy: str,
    *,
    seed: int | None = None,
    siamese: bool = False,
    align_corners: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Apply one operation of `strategy`, drawn at random, to the batch.

    Randomness comes from exactly one of `seed` and `generator`:

    - seed s: the operation index is drawn from a generator seeded s, every further tensor from
      one re-seeded s+1, s+2, ... in order of use (color 3; crop, cutout, scale 2; flip, rotate 1).
    - generator: the same draws, taken one after the other without re-seeding.

    Args:
        x: B×C×H×W float, normalised or not (zeros are filled in as they are).
        strategy: operations joined by `_`, of color, crop, cutout, flip, scale, rotate; "none",
            "None" or "" returns x and draws nothing.
        seed: integer >= 0. Batches of different size share their parameters under one seed if
            `siamese` is set, which is how real and synthetic images are augmented alike.
        siamese: use the parameters of the first image for all.
        align_corners: sampling convention of scale and rotate; True in the KRR-ST scripts, False in
            the DC family. It changes pictures.
        generator: a CPU generator; it advances.

    Returns:
        B×C×H×W like x, differentiable in x.

    Raises:
        UserError: an operation that does not exist; the message lists the valid ones.
        ValueError: both or neither of seed and generator, a negative seed, or x of another shape.
    """
    if seed is not None and generator is not None:
        raise ValueError("give diff_augment either seed or generator, not both")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}, expected B x C x H x W float")
    if strategy in ("", "none", "None"):
        return x
    operations = [pick(OPERATIONS, name, "DSA operation") for name in strategy.split("_")]
    if seed is None and generator is None:
        raise ValueError("diff_augment needs explicit randomness: pass seed or generator")
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}, expected an integer >= 0")
    draw_cpu = _make_draw(seed, generator)
    chosen = operations[int(draw_cpu(torch.randint, 0, len(operations), size=(1,)))]

    def draw(function: Callable[..., Tensor], *args: int, size: tuple[int, ...]) -> Tensor:
        # The whole batch is drawn, as published, though Siamese mode keeps the first value only.
        # torch.rand and torch.randint fill in order at every size (measured with torch 2.14, sizes
        # 1 to 65537: element 0 is the same; only randn changes at 16 elements), so that the first
        # value does not depend on the batch size.
        values = draw_cpu(function, *args, size=size)
        values = values[:1] if siamese else values
        return values.to(x.device)

    return chosen(x, draw, align_corners)


def without_flip(strategy: str) -> str:
    """The strategy for sets whose mirrored pictures mean something else (digits, SVHN)."""
    return "_".join(name for name in strategy.split("_") if name != "flip")


def _make_draw(seed: int | None, generator: torch.Generator | None) -> Draw:
    """Draw from `generator` in sequence, or re-seed before every draw with seed, seed + 1, ..."""
    source = torch.Generator() if generator is None else generator
    seeds = None if seed is None else itertools.count(seed)

    def draw(function: Callable[..., Tensor], *args: int, size: tuple[int, ...]) -> Tensor:
        if seeds is not None:
            source.manual_seed(next(seeds))
        return function(*args, size, generator=source)

    return draw


# Each operation: (x, draw, align_corners) -> x. Its random values have batch size B, or 1 in
# Siamese mode, and broadcast.


def _color(x: Tensor, draw: Draw, align_corners: bool) -> Tensor:
    """Brightness, then saturation about each pixel's channel mean, then contrast."""
    size = (len(x), 1, 1, 1)
    x = x + (draw(uniform, size=size).to(x.dtype) - 0.5) * BRIGHTNESS
    gray = x.mean(1, keepdim=True)
    x = (x - gray) * (draw(uniform, size=size).to(x.dtype) * SATURATION) + gray
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (draw(uniform, size=size).to(x.dtype) + CONTRAST) + mean


def _crop(x: Tensor, draw: Draw, align_corners: bool) -> Tensor:
    """Translate by whole pixels, height first; zeros come in from outside."""
    for axis in (2, 3):
        limit = int(x.shape[axis] * CROP_RATIO + 0.5)
        x = translate(x, draw(torch.randint, -limit, limit + 1, size=(len(x), 1, 1)), axis)
    return x


def _cutout(x: Tensor, draw: Draw, align_corners: bool) -> Tensor:
    """Zero a rectangle of half the size; its centre is uniform, so that it may hang over."""
    covered = torch.ones((), dtype=torch.bool, device=x.device)
    for axis in (2, 3):
        side = x.shape[axis]
        length = int(side * CUTOUT_RATIO + 0.5)
        centre = draw(torch.randint, 0, side + (1 - length % 2), size=(len(x), 1, 1))[..., None]
        first = centre - length // 2
        position = _indices(x, axis)
        covered = covered & (position >= first) & (position < first + length)
    return x * ~covered


def _flip(x: Tensor, draw: Draw, align_corners: bool) -> Tensor:
    return torch.where(draw(uniform, size=(len(x), 1, 1, 1)) < FLIP_PROBABILITY, x.flip(3), x)


def _scale(x: Tensor, draw: Draw, align_corners: bool) -> Tensor:
    """Resample at (sx·X, sy·Y): a value above 1 shrinks the picture."""
    low, high = 1 / SCALE_RATIO, SCALE_RATIO
    sx = draw(uniform, size=(len(x),)) * (high - low) + low
    sy = draw(uniform, size=(len(x),)) * (high - low) + low
    return affine_sample(x, sx, torch.zeros_like(sx), torch.zeros_like(sx), sy, align_corners)


def _rotate(x: Tensor, draw: Draw, align_corners: bool) -> Tensor:
    """Resample on a grid turned by U(-15, 15) degrees about the centre."""
    turn = (draw(uniform, size=(len(x),)) - 0.5) * 2 * ROTATE_DEGREES / 180 * math.pi
    return affine_sample(x, turn.cos(), -turn.sin(), turn.sin(), turn.cos(), align_corners)


def translate(x: Tensor, shift: Tensor, axis: int) -> Tensor:
    """Read B×C×H×W images `shift` pixels further along axis 2 or 3; zeros outside.

    Args:
        x: the images.
        shift: int64, B values (or one for all) in any shape.
        axis: 2 for height, 3 for width.
    """
    source = _indices(x, axis) + shift.view(-1, 1, 1, 1)
    inside = (source >= 0) & (source < x.shape[axis])
    index = source.clamp(0, x.shape[axis] - 1).expand_as(x)
    return torch.where(inside, x.gather(axis, index), x.new_zeros(()))


def _indices(x: Tensor, axis: int) -> Tensor:
    """0, 1, ... along one axis, to broadcast against x."""
    shape = [1, 1, 1, 1]
    shape[axis] = x.shape[axis]
    return torch.arange(x.shape[axis], device=x.device).view(shape)


def affine_sample(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, align_corners: bool
) -> Tensor:
    """Read x bilinearly at (a·X + b·Y, c·X + d·Y), zeros outside; X, Y in [-1, 1].

    a to d hold B values, or one for all. The result has x's shape.

    Written out instead of F.affine_grid, whose matrix product would lose digits to TF32 or
    autocast on a GPU.
    """
    a, b, c, d = (v.to(x.dtype)[:, None, None] for v in (a, b, c, d))
    rows = _positions(x.shape[2], align_corners, x)[:, None]
    columns = _positions(x.shape[3], align_corners, x)[None, :]
    grid = torch.stack((a * columns + b * rows, c * columns + d * rows), dim=-1)
    grid = grid.expand(len(x), -1, -1, -1)
    return F.grid_sample(x, grid, "bilinear", "zeros", align_corners=align_corners)


def _positions(side: int, align_corners: bool, like: Tensor) -> Tensor:
    """Pixel centres in [-1, 1]; the outer pixels lie on ±1 only with align_corners."""
    steps = 2 * torch.arange(side, device=like.device, dtype=like.dtype) - (side - 1)
    return steps / max(side - 1 if align_corners else side, 1)


OPERATIONS: dict[str, Callable[[Tensor, Draw, bool], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
