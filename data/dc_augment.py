"""The older augmentation of dataset condensation (DC), batched on the device of the images.

Source: Zhao et al., "Dataset Condensation with Gradient Matching", arXiv 2006.05929; the published
code loops over images on the CPU. It only feeds the training of evaluation networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from data.dsa import affine_sample, translate
from utils.errors import pick

CROP_PIXELS = 4
SCALE_LIMIT = 0.2
ROTATE_DEGREES = 45
NOISE_STD = 0.001


def dc_strategy(dataset: str, model: str) -> str:
    """The published strategy for a data set and an evaluation network; "none" for most.

    A ConvNetBN keeps its own rule on MNIST too.
    """
    if model == "ConvNetBN":
        return "crop_noise"
    return "crop_scale_rotate" if dataset == "MNIST" else "none"


def dc_augment(x: Tensor, strategy: str, generator: torch.Generator) -> Tensor:
    """Change every image by one operation of `strategy`, drawn for it at random.

    - crop: pad by 4 pixels of the channel mean, crop back at a random place;
    - scale: height and width each times U(0.8, 1.2), resampled bilinearly about the centre at the
      same size (align_corners False), the channel mean outside;
    - rotate: by a whole number of degrees in [-45, 45) about the centre, bilinear, the channel mean
      outside;
    - noise: plus 0.001·N(0, 1).

    The channel mean is each image's own. Resampling about the centre is this module's reading of
    "scale each side"; the published code resizes and then crops or pads.

    Args:
        x: B×C×H×W float, normalised.
        strategy: operations joined by `_`; "none", "None" or "" returns x and draws nothing.
        generator: a CPU generator; it advances.

    Returns:
        B×C×H×W like x; x itself is left alone.

    Raises:
        UserError: an operation that does not exist; the message lists the valid ones.
        ValueError: x of another shape.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}, expected B x C x H x W float")
    if strategy in ("", "none", "None"):
        return x
    operations = [pick(OPERATIONS, name, "DC operation") for name in strategy.split("_")]
    drawn = torch.randint(len(operations), (len(x),), generator=generator)
    out = x.clone()
    for number, operation in enumerate(operations):
        members = (drawn == number).nonzero().flatten()
        if len(members):
            members = members.to(x.device)
            out[members] = operation(x[members], generator)
    return out


def _crop(x: Tensor, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    x = x - mean  # `translate` fills with zero, which is then the mean
    for axis in (2, 3):
        shift = torch.randint(-CROP_PIXELS, CROP_PIXELS + 1, (len(x),), generator=generator)
        x = translate(x, shift.to(x.device), axis)
    return x + mean


def _scale(x: Tensor, generator: torch.Generator) -> Tensor:
    factors = 1 + SCALE_LIMIT * (2 * torch.rand((2, len(x)), generator=generator) - 1)
    height, width = factors.to(x.device)
    zero = torch.zeros_like(height)
    # The picture grows by the factor, so that the place to read from shrinks by it.
    return _sample(x, 1 / width, zero, zero, 1 / height)


def _rotate(x: Tensor, generator: torch.Generator) -> Tensor:
    degrees = torch.randint(-ROTATE_DEGREES, ROTATE_DEGREES, (len(x),), generator=generator)
    turn = degrees.to(x.device) * (math.pi / 180)
    return _sample(x, turn.cos(), -turn.sin(), turn.sin(), turn.cos())


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
    return x + NOISE_STD * noise


def _sample(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Read each image at (a·u + b·v, c·u + d·v), u and v in pixels from the centre."""
    height, width = x.shape[2:]
    mean = x.mean((2, 3), keepdim=True)
    return affine_sample(x - mean, a, b * height / width, c * width / height, d, False) + mean


OPERATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "crop": _crop,
    "scale": _scale,
    "rotate": _rotate,
    "noise": _noise,
}
