"""Differentiable Siamese augmentation (DSA): one operation per batch, differentiable.

Source: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation",
arXiv 2102.08259, mode S of the authors' code. The same integer seed gives the same picture as
that code run on the CPU; the global random state is never touched.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment import read_pixels
from utils.device import upload
from utils.errors import pick

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP_RATIO = 0.125  # of the side, rounded half up
CUTOUT_RATIO = 0.5
SCALE_RATIO = 1.2
ROTATE_DEGREES = 15.0
FLIP_PROBABILITY = 0.5
MOST_VALUES = 3  # that an operation draws


def diff_augment(
    x: Tensor,
    strategy: str,
    *,
    seed: int | None = None,
    siamese: bool = False,
    align_corners: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Apply one operation of `strategy`, drawn at random, to the batch; differentiable in x.

    Args:
        x: B×C×H×W float, normalised or not (zeros are filled in as they are).
        strategy: operations joined by `_`; "none", "None" or "" returns x and draws nothing.
        seed: s >= 0: the operation index is drawn from a generator seeded s, every further tensor from
            one re-seeded s+1, s+2, ... in order of use (color 3; crop, cutout, scale 2; flip, rotate 1).
        siamese: use the parameters of the first image for all, so that batches of different size
            (real and synthetic) are augmented alike under one seed.
        align_corners: sampling convention of scale and rotate; True in the KRR-ST scripts, False in
            the DC family. It changes pictures.
        generator: on the CPU, in place of `seed`: the same draws without re-seeding.

    Raises:
        UserError: an operation that does not exist; the message lists the valid ones.
        ValueError: both or neither of seed and generator, a negative seed, or x of another shape.
    """
    if seed is not None and generator is not None:
        raise ValueError("give diff_augment either seed or generator, not both")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}, expected B x C x H x W float")
    if no_augmentation(strategy):
        return x
    check_strategy(strategy)
    if seed is None and generator is None:
        raise ValueError("diff_augment needs explicit randomness: pass seed or generator")
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}, expected an integer >= 0")
    name, drawn = _draw(strategy, x.shape, seed, generator)
    drawn = [upload(values[:1] if siamese else values, x.device) for values in drawn]
    return OPERATIONS[name].apply(x, drawn, align_corners)


def no_augmentation(strategy: str | None) -> bool:
    """Whether a strategy means none; the published default is the word None."""
    return strategy in (None, "", "none", "None")


def check_strategy(strategy: str | None) -> None:
    """Raise a UserError for an operation that does not exist; the message lists the valid ones."""
    for name in () if no_augmentation(strategy) else strategy.split("_"):
        pick(OPERATIONS, name, "DSA operation")


def without_flip(strategy: str) -> str:
    """The strategy for sets whose mirrored pictures mean something else (digits, SVHN)."""
    return "_".join(name for name in strategy.split("_") if name != "flip")


def _draw(
    strategy: str, shape: torch.Size, seed: int | None, generator: torch.Generator | None = None
) -> tuple[str, list[Tensor]]:
    """An operation for images (B, C, H, W), and what it draws for each of them: (B,) each, on the CPU.

    Numbers U(0, 1) are float32 whatever the images are, so that the parameters are the same.
    """
    fresh, names = torch.Generator(), strategy.split("_")
    streams = itertools.repeat(generator) if seed is None else map(fresh.manual_seed, itertools.count(seed))
    name = names[int(torch.randint(len(names), (1,), generator=next(streams)))]
    operation, count = pick(OPERATIONS, name, "DSA operation"), shape[:1]
    drawn = [
        torch.rand(count, generator=next(streams), dtype=torch.float32) for _ in range(operation.uniform)
    ]
    for side in shape[2:] if operation.bounds else ():
        drawn.append(torch.randint(*operation.bounds(side), count, generator=next(streams)))
    return name, drawn


def draw_siamese(strategy: str, seed: int, shape: torch.Size) -> tuple[str, Tensor]:
    """What `diff_augment` draws from a seed in Siamese mode: an operation, and its values on the CPU.

    For images (C, H, W), and for `apply_drawn`. Of "none", no operation, all values are 0. One image draws
    what the first of any batch does: torch.rand and torch.randint fill in order (measured with torch 2.14,
    sizes 1 to 65537; only randn changes at 16 elements).
    """
    values = torch.zeros(MOST_VALUES)
    if no_augmentation(strategy):
        return "none", values
    name, drawn = _draw(strategy, torch.Size((1, *shape)), seed)
    values[: len(drawn)] = torch.cat(drawn)
    return name, values


def apply_drawn(x: Tensor, name: str, values: Tensor, align_corners: bool) -> Tensor:
    """`diff_augment` with what `draw_siamese` drew, the values on the images' device: can be replayed."""
    return x if name == "none" else OPERATIONS[name].apply(x, values.split(1), align_corners)


# Each operation: (x, its random values, align_corners) -> x. The values have batch size B, or 1 in
# Siamese mode, and broadcast.


def _color(x: Tensor, drawn: Sequence[Tensor], align_corners: bool) -> Tensor:
    """Brightness, then saturation about each pixel's channel mean, then contrast."""
    brightness, saturation, contrast = (values.to(x.dtype).view(-1, 1, 1, 1) for values in drawn[:3])
    x = x + (brightness - 0.5) * BRIGHTNESS
    gray = x.mean(1, keepdim=True)
    x = (x - gray) * (saturation * SATURATION) + gray
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + CONTRAST) + mean


def _crop_bounds(side: int) -> tuple[int, int]:
    """Of the shift in pixels."""
    limit = int(side * CROP_RATIO + 0.5)
    return -limit, limit + 1


def _crop(x: Tensor, drawn: Sequence[Tensor], align_corners: bool) -> Tensor:
    """Translate by whole pixels, height first; zeros come in from outside."""
    sides = zip(x.shape[2:], drawn[:2], strict=True)
    return read_pixels(x, *(torch.arange(side, device=x.device) + by.long()[:, None] for side, by in sides))


def _cutout_bounds(side: int) -> tuple[int, int]:
    """Of the first position, for a rectangle whose centre is uniform, so that it may hang over."""
    length = int(side * CUTOUT_RATIO + 0.5)
    return -(length // 2), side + 1 - length % 2 - length // 2


def _cutout(x: Tensor, drawn: Sequence[Tensor], align_corners: bool) -> Tensor:
    """Zero a rectangle of half the size."""
    covered = []
    for side, first in zip(x.shape[2:], drawn[:2], strict=True):
        position = torch.arange(side, device=x.device) - first.long()[:, None]
        covered.append((position >= 0) & (position < int(side * CUTOUT_RATIO + 0.5)))
    rows, columns = covered
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _flip(x: Tensor, drawn: Sequence[Tensor], align_corners: bool) -> Tensor:
    return torch.where(drawn[0].view(-1, 1, 1, 1) < FLIP_PROBABILITY, x.flip(3), x)


def _scale(x: Tensor, drawn: Sequence[Tensor], align_corners: bool) -> Tensor:
    """Resample at (sx·X, sy·Y): a value above 1 shrinks the picture."""
    low, high = 1 / SCALE_RATIO, SCALE_RATIO
    sx, sy = (values * (high - low) + low for values in drawn[:2])
    return affine_sample(x, sx, torch.zeros_like(sx), torch.zeros_like(sx), sy, align_corners)


def _rotate(x: Tensor, drawn: Sequence[Tensor], align_corners: bool) -> Tensor:
    """Resample on a grid turned by U(-15, 15) degrees about the centre."""
    turn = (drawn[0] - 0.5) * 2 * ROTATE_DEGREES / 180 * math.pi
    return affine_sample(x, turn.cos(), -turn.sin(), turn.sin(), turn.cos(), align_corners)


def affine_sample(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, align_corners: bool) -> Tensor:
    """Read x bilinearly at (a·X + b·Y, c·X + d·Y), zeros outside; X, Y in [-1, 1]; a to d of length B or 1.

    Written out, because the matrix product in F.affine_grid would lose digits to TF32 or autocast.
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


class Operation(NamedTuple):
    """One operation, and what it draws for each image: numbers U(0, 1), or a whole number for each side."""

    apply: Callable[[Tensor, Sequence[Tensor], bool], Tensor]
    uniform: int = 0
    bounds: Callable[[int], tuple[int, int]] | None = None  # side -> lowest whole number, and the end


OPERATIONS = {
    "color": Operation(_color, uniform=3),
    "crop": Operation(_crop, bounds=_crop_bounds),
    "cutout": Operation(_cutout, bounds=_cutout_bounds),
    "flip": Operation(_flip, uniform=1),
    "scale": Operation(_scale, uniform=2),
    "rotate": Operation(_rotate, uniform=1),
}
