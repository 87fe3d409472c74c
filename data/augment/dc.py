"""The older augmentation of dataset condensation (DC), batched on the device of the images.

Source: Zhao et al., "Dataset Condensation with Gradient Matching", arXiv 2006.05929; the published
code loops over images on the CPU, with the same arithmetic (its draws come from NumPy's global
state, here from a generator). It only feeds the training of evaluation networks.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from data.augment import gather_pixels, read_pixels
from utils.device import upload
from utils.errors import pick

CROP_PIXELS = 4
SCALE_LIMIT = 0.2
ROTATE_DEGREES = 45
NOISE_STD = 0.001


def dc_strategy(dataset: str, model: str) -> str:
    """The published strategy for a data set and an evaluation network; "none" for most."""
    if model == "ConvNetBN":
        return "crop_noise"
    return "crop_scale_rotate" if dataset == "MNIST" else "none"


def dc_augment(x: Tensor, strategy: str, generator: torch.Generator) -> Tensor:
    """Change every image by one operation of `strategy`, drawn for it at random.

    - crop: pad by 4 pixels of the channel means, crop back at an offset of 0 to 7 in each axis (the
      last possible one, 8, is never drawn);
    - scale: height and width each times U(0.8, 1.2), cut to whole pixels, nearest neighbour; centred
      on zeros, of which the middle H×W is kept;
    - rotate: by a whole number of degrees in [-45, 45) about the centre, cubic spline, the mean of
      the channel means outside;
    - noise: plus 0.001·N(0, 1).

    The channel means are those of the whole batch. x is B×C×H×W float, normalised, and stays as it is; the
    generator is on the CPU. `strategy` is operations joined by `_`; "none", "None" or "" returns x and draws
    nothing.

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
    mean = x.mean((0, 2, 3))
    out = x.clone()
    for number, operation in enumerate(operations):
        members = (drawn == number).nonzero().flatten()
        if len(members):
            members = upload(members, x.device)
            out[members] = operation(x[members], mean, generator)
    return out


def _crop(x: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    offsets = torch.randint(2 * CROP_PIXELS, (2, len(x)), generator=generator)
    rows, columns = (
        torch.arange(side) + offset[:, None] - CROP_PIXELS
        for side, offset in zip(x.shape[2:], offsets, strict=True)
    )
    return read_pixels(x, rows, columns, mean.view(-1, 1, 1))


def _scale(x: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    sides = torch.tensor(x.shape[2:])
    factors = torch.rand((2, len(x)), generator=generator, dtype=torch.float64)
    scaled = ((1 + SCALE_LIMIT * (2 * factors - 1)) * sides[:, None]).long()
    canvas = torch.cat([scaled, sides[:, None].expand_as(scaled)]).amax(0)
    places = []
    for side, new in zip(sides.tolist(), scaled, strict=True):
        # Pixel of the kept middle -> pixel of the canvas -> pixel of the scaled picture.
        at = torch.arange(side) + ((canvas - side) // 2 - (canvas - new) // 2)[:, None]
        # torch.nn.functional.interpolate computes the nearest pixel in float32, too.
        source = (at * (torch.tensor(float(side)) / new.float())[:, None]).floor().long()
        outside = (at < 0) | (at >= new[:, None])
        places.append(source.clamp(max=side - 1).masked_fill(outside, -1))
    return read_pixels(x, *places)


def _rotate(x: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    degrees = torch.randint(-ROTATE_DEGREES, ROTATE_DEGREES, (len(x),), generator=generator)
    return rotate(x, degrees, mean.mean())


def rotate(x: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """`scipy.ndimage.rotate` (order 3) of every image, cut back to its size about the centre.

    x is n×C×H×W float; `degrees` are n whole numbers on the CPU, positive ones turn the first axis
    towards the second; `fill` is the value outside the picture, a scalar tensor.
    """
    height, width = x.shape[2:]
    to_coefficients = [upload(_spline_filter(side).to(x.dtype), x.device) for side in (height, width)]
    coefficients = to_coefficients[0] @ x @ to_coefficients[1].mT
    rows, columns = _read_places(degrees, height, width)
    inside = (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)
    out = torch.zeros_like(x)
    for row, row_weight in _taps(rows, height):
        for column, column_weight in _taps(columns, width):
            weight = upload((row_weight * column_weight)[:, None].to(x.dtype), x.device)
            out += weight * gather_pixels(coefficients, row * width + column)
    return torch.where(upload(inside, x.device)[:, None], out, fill)


def _read_places(degrees: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column (n, H, W) float64 of the picture that each pixel of the result shows.

    As in SciPy the picture is turned on a canvas that holds all of it; the middle H×W is kept.
    """
    angle = degrees.double() * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    tall = (height * cos.abs() + width * sin.abs() + 0.5).long()
    wide = (height * sin.abs() + width * cos.abs() + 0.5).long()

    def from_centre(canvas: Tensor, side: int) -> Tensor:
        cut = torch.div(canvas - side, 2, rounding_mode="trunc")
        return torch.arange(side) + (cut - (canvas - 1) / 2)[:, None]

    v, u = from_centre(tall, height)[:, :, None], from_centre(wide, width)[:, None, :]
    cos, sin = cos[:, None, None], sin[:, None, None]
    rows = cos * v + sin * u + (height - 1) / 2
    columns = cos * u - sin * v + (width - 1) / 2
    # What lies on the edge of the picture belongs to it, whichever way the last bit was rounded.
    return tuple(torch.where((p - p.round()).abs() < 1e-9, p.round(), p) for p in (rows, columns))


def _spline_filter(side: int) -> Tensor:
    """Pixels of one line -> the coefficients of the cubic B-spline through them, mirrored ends."""
    if side == 1:
        return torch.ones((1, 1), dtype=torch.float64)
    at = torch.arange(side, dtype=torch.float64)
    line = (4 - 3 * (at[:, None] - at).abs()).clamp(min=0)  # 4 on the diagonal, 1 beside it
    line[0, 1] = line[-1, -2] = 2  # the neighbour beyond the end is the one before it
    return torch.linalg.inv(line / 6)


def _taps(at: Tensor, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The four coefficients around each place and their weights in the cubic B-spline."""
    left = at.floor()
    t = at - left
    near, far = ((4 - 6 * d**2 + 3 * d**3) / 6 for d in (t, 1 - t))
    weights = ((1 - t) ** 3 / 6, near, far, t**3 / 6)
    last = side - 1
    for step, weight in zip(range(-1, 3), weights, strict=True):
        mirrored = (left.long() + step).abs()
        yield (last - (last - mirrored).abs()).clamp(0, last), weight


def _noise(x: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    noise = upload(torch.randn(x.shape, generator=generator).to(x.dtype), x.device)
    return x + NOISE_STD * noise


OPERATIONS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "crop": _crop,
    "scale": _scale,
    "rotate": _rotate,
    "noise": _noise,
}
