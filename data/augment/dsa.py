"""Differentiable Siamese augmentation (DSA): one operation per batch, differentiable.

Source: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation",
arXiv 2102.08259, mode S of the authors' code. The same integer seed gives the same picture as
that code run on the CPU; the global random state is never touched.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

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
    operations = [pick(OPERATIONS, name, "DSA operation") for name in strategy.split("_")]
    if seed is None and generator is None:
        raise ValueError("diff_augment needs explicit randomness: pass seed or generator")
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}, expected an integer >= 0")
    draw = Draws(seed, generator, siamese, x.device)
    return operations[draw.number(len(operations))](x, draw, align_corners)


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


class Draws:
    """The random tensors of one call of `diff_augment`, drawn on the CPU and moved to the images.

    In Siamese mode the whole batch is drawn, as published, and the first value kept. It does not
    depend on the batch size: torch.rand and torch.randint fill in order (measured with torch 2.14,
    sizes 1 to 65537; only randn changes at 16 elements).
    """

    def __init__(
        self, seed: int | None, generator: torch.Generator | None, siamese: bool, device: torch.device
    ) -> None:
        self._seeds = None if seed is None else itertools.count(seed)
        self._generator = torch.Generator() if generator is None else generator
        self._siamese, self._device = siamese, device

    def _draw(self, sampler: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self._seeds is not None:
            self._generator.manual_seed(next(self._seeds))
        return sampler(*args, generator=self._generator, **kwargs)

    def _move(self, values: Tensor) -> Tensor:
        return upload(values[:1] if self._siamese else values, self._device)

    def number(self, end: int) -> int:
        """One whole number from 0 to end - 1; it never leaves the CPU."""
        return int(self._draw(torch.randint, 0, end, (1,)))

    def uniform(self, *size: int) -> Tensor:
        """U(0, 1) in float32 whatever the images have, so that the parameters are the same."""
        return self._move(self._draw(torch.rand, size, dtype=torch.float32))

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """Whole numbers from low to high - 1."""
        return self._move(self._draw(torch.randint, low, high, size))


def draw_siamese(strategy: str, seed: int, shape: torch.Size) -> tuple[str, Tensor]:
    """What `diff_augment` draws from a seed in Siamese mode: an operation, and its values on the CPU.

    For images (C, H, W), and for `apply_drawn`. Of "none", no operation, all values are 0.
    """
    values = torch.zeros(MOST_VALUES)
    if no_augmentation(strategy):
        return "none", values
    names, draw = strategy.split("_"), Draws(seed, None, True, values.device)
    name = names[draw.number(len(names))]
    for i, (kind, args) in enumerate(_asked(name, tuple(shape))):
        values[i] = getattr(draw, kind)(*args).view(())
    return name, values


def apply_drawn(x: Tensor, name: str, values: Tensor, align_corners: bool) -> Tensor:
    """`diff_augment` with what `draw_siamese` drew, the values on the images' device: can be replayed."""
    return x if name == "none" else OPERATIONS[name](x, _Told(values), align_corners)


@functools.cache
def _asked(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The draws of an operation on an image, in order: names of methods of Draws and their arguments."""
    noted = _Noted()
    pick(OPERATIONS, name, "DSA operation")(torch.empty(1, *shape, device="meta"), noted, False)
    return noted.calls


class _Noted:
    """In place of Draws: notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def uniform(self, *size: int) -> Tensor:
        self.calls.append(("uniform", size))
        return torch.empty(size, device="meta")

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        self.calls.append(("integers", (low, high, *size)))
        return torch.empty(size, dtype=torch.int64, device="meta")


class _Told:
    """In place of Draws: values that were drawn before, as float32."""

    def __init__(self, values: Tensor) -> None:
        self._left = iter(values.unbind())

    def uniform(self, *size: int) -> Tensor:
        return next(self._left).view([1] * len(size))

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        return next(self._left).view([1] * len(size)).long()


# Each operation: (x, draw, align_corners) -> x. Its random values have batch size B, or 1 in
# Siamese mode, and broadcast.


def _color(x: Tensor, draw: Draws, align_corners: bool) -> Tensor:
    """Brightness, then saturation about each pixel's channel mean, then contrast."""
    size = (len(x), 1, 1, 1)
    x = x + (draw.uniform(*size).to(x.dtype) - 0.5) * BRIGHTNESS
    gray = x.mean(1, keepdim=True)
    x = (x - gray) * (draw.uniform(*size).to(x.dtype) * SATURATION) + gray
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (draw.uniform(*size).to(x.dtype) + CONTRAST) + mean


def _crop(x: Tensor, draw: Draws, align_corners: bool) -> Tensor:
    """Translate by whole pixels, height first; zeros come in from outside."""
    places = []
    for side in x.shape[2:]:
        limit = int(side * CROP_RATIO + 0.5)
        shift = draw.integers(-limit, limit + 1, len(x), 1)
        places.append(torch.arange(side, device=x.device) + shift)
    return read_pixels(x, *places)


def _cutout(x: Tensor, draw: Draws, align_corners: bool) -> Tensor:
    """Zero a rectangle of half the size; its centre is uniform, so that it may hang over."""
    covered = []
    for side in x.shape[2:]:
        length = int(side * CUTOUT_RATIO + 0.5)
        first = draw.integers(0, side + (1 - length % 2), len(x), 1) - length // 2
        position = torch.arange(side, device=x.device)
        covered.append((position >= first) & (position < first + length))
    rows, columns = covered
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _flip(x: Tensor, draw: Draws, align_corners: bool) -> Tensor:
    return torch.where(draw.uniform(len(x), 1, 1, 1) < FLIP_PROBABILITY, x.flip(3), x)


def _scale(x: Tensor, draw: Draws, align_corners: bool) -> Tensor:
    """Resample at (sx·X, sy·Y): a value above 1 shrinks the picture."""
    low, high = 1 / SCALE_RATIO, SCALE_RATIO
    sx, sy = (draw.uniform(len(x)) * (high - low) + low for _ in range(2))
    return affine_sample(x, sx, torch.zeros_like(sx), torch.zeros_like(sx), sy, align_corners)


def _rotate(x: Tensor, draw: Draws, align_corners: bool) -> Tensor:
    """Resample on a grid turned by U(-15, 15) degrees about the centre."""
    turn = (draw.uniform(len(x)) - 0.5) * 2 * ROTATE_DEGREES / 180 * math.pi
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


OPERATIONS: dict[str, Callable[[Tensor, Draws, bool], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
