"""Compact storage: a synthetic set in fewer bytes, decoded to ordinary images and targets when it is read.

A safetensors file whose metadata `compact` is the JSON object {"version": 1, "size": [H, W], "pad": p}, with
views also "border": "reflect", or "constant" for black, which is what files without this key mean; version
2 where there are x.cutoffs, 3 where there are x.drawn or y.bits:

x        (n, C, h, w) float32, bfloat16 or uint8: images, enlarged bilinearly to (H, W), corners not aligned
x.map    (2, C) float32, with uint8 alone: slope and offset of each channel's values, slope * x + offset
x.views  (n, k) uint8, where each image stands for k: numbers of crop-and-flip views at padding p; image
         i * k + j of the set is view j of image i (data/synthetic/views.py)
x.partners, x.partner_views, x.shares   (n, k) integers, uint8 and uint8, where it is blended: with which
         image, in which view, and its own share in 255ths
x.cutoffs   (n, k) uint8, where shares are those of low frequencies: which frequencies are low
x.drawn  (5,) int64, in place of these five: k, and the seed, views, hflip and hybrid of the BlendDraw whose
         first k views of each image these are
y        (n * k,) class indices or (n * k, D) target vectors, or in place of these
y.mean, y.left, y.right   (D,), (n * k, r) and (r, D): the target vectors are mean + left @ right
y.map    (2, D) or (2, r) float32, where y or y.left are target vectors in uint8: of each column, as x.map
y.bits   (D,) or (r,) uint8, where y or y.left are (n * k, bytes) uint8: each row is a string of bits, the
         lowest of a byte first, of which each value takes so many, 0 to 8, with its lowest bit first
y.unit   (D,), where y.right is in int8: the target vectors are mean + left @ right * unit
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment.crop_flip import count_views
from data.specs import Stats
from data.synthetic.levels import MOST_BITS, between, pack_bits, share_bits, unpack_bits
from data.synthetic.views import (
    BLEND,
    BORDERS,
    INTEGERS,
    LARGEST_PAD,
    BlendDraw,
    SetViews,
    ViewFlags,
    index_type,
)
from utils.cli import flag
from utils.errors import UserError
from utils.precision import DTYPES

VERSIONS = (1, 2, 3)
_DRAWN = 5 * torch.int64.itemsize  # bytes of x.drawn
_MOST_DRAWN = 2**25  # views that are drawn again: these take a file no bytes at all
LARGEST = 2**31  # values of the decoded images, and of the targets: a small file could ask for any number
_LOW_RANK = ("y.mean", "y.left", "y.right")
_FLOATS = tuple(DTYPES.values())
# Axes and number types of what is not y; m = n * k.
_TENSORS = {
    "x": ("nChw", (*_FLOATS, torch.uint8), "float32, bfloat16 or uint8"),
    "x.map": ("2C", (torch.float32,), "float32"),
    "x.views": ("nk", (torch.uint8,), "uint8"),
    "x.partners": ("nk", INTEGERS, "integers"),
    "x.partner_views": ("nk", (torch.uint8,), "uint8"),
    "x.shares": ("nk", (torch.uint8,), "uint8"),
    "x.cutoffs": ("nk", (torch.uint8,), "uint8"),
    "x.drawn": ("5", (torch.int64,), "int64"),
    "y.mean": ("D", _FLOATS, "float32 or bfloat16"),
    "y.left": ("mr", (*_FLOATS, torch.uint8), "float32, bfloat16 or uint8"),
    "y.map": ("2q", (torch.float32,), "float32"),
    "y.unit": ("D", _FLOATS, "float32 or bfloat16"),
    "y.right": ("rD", (*_FLOATS, torch.int8), "float32, bfloat16 or int8"),
}


@dataclass(frozen=True)
class CompactFlags:
    """How compactly a set is stored."""

    x_size: int | None = flag(
        None,
        "height in pixels at which images are stored, the width in proportion; default: theirs",
        minimum=1,
    )
    x_dtype: str = flag(
        "fp32",
        "of stored images; uint8: 256 levels between the extremes of each channel",
        choices=(*DTYPES, "uint8"),
    )
    y_rank: int | None = flag(
        None,
        "store target vectors as their mean and this many principal directions, of the standardised ones "
        "where the set is learned so",
        minimum=1,
    )
    y_variance: float | None = flag(
        None,
        "as many directions as keep this share of the target vectors' variance",
        above=0,
        maximum=1,
        instead_of="y_rank",
    )
    y_dtype: str = flag(
        "fp32",
        "of stored target vectors; uint8: 256 levels between the extremes of each entry or direction",
        choices=(*DTYPES, "uint8"),
    )
    y_bits: int | None = flag(
        None,
        "bits of each stored target vector, shared out among its entries or directions so that little is "
        "lost; a multiple of 8 wastes none",
        minimum=1,
        instead_of="y_dtype",
    )

    def small_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Height and width at which images of `size` are stored; a UserError for an --x_size above it."""
        height, width = size
        if self.x_size is None:
            return height, width
        if self.x_size > height:
            raise UserError(f"--x_size {self.x_size}: the images have {height} rows; expected at most that")
        return self.x_size, max(1, round(width * self.x_size / height))


def encode(
    images: Tensor,
    targets: Tensor,
    how: CompactFlags,
    views: SetViews | None = None,
    unit: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a compact file.

    Of images (m, C, H, W) float32 with targets (m,) int64 or (m, D) float32. `views` are what n stored
    images stand for, m in all; the first view shows each as it is. `unit` (D,) above 0 is that in which
    errors of the target vectors count; None: equally. A UserError for a size or rank that they do
    not have, or more bits than there is room for.
    """
    size, images = tuple(images.shape[2:]), images.cpu()
    x = images if views is None else images[:: views.each]
    tensors = _pack("x", _shrink(x, how.small_size(size)), how.x_dtype)
    if views is not None:
        tensors |= views.tensors()
    tensors |= _encode_targets(targets.cpu(), how, 1 if unit is None else unit.cpu().double())
    stored = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    facts = {"pad": 0} if views is None else {"pad": views.pad, "border": views.border}
    version = 3 if stored.keys() & {"x.drawn", "y.bits"} else 2 if "x.cutoffs" in stored else 1
    return stored, {"version": version, "size": size, **facts}


def _shrink(x: Tensor, small: tuple[int, int]) -> Tensor:
    """The images (n, C, h, w) whose enlargements are nearest to x: least squares, not an average.

    So what was enlarged once is stored without further loss.
    """
    if small == tuple(x.shape[2:]):
        return x
    rows, columns = (
        torch.linalg.pinv(_enlarging(s, large)).to(x) for s, large in zip(small, x.shape[2:], strict=True)
    )
    return rows @ x @ columns.T


def _enlarging(small: int, large: int) -> Tensor:
    """The matrix (large, small) of linear interpolation, float64."""
    unit = torch.eye(small, dtype=torch.float64)
    return F.interpolate(unit[None], large, mode="linear", align_corners=False)[0].T


def _pack(name: str, t: Tensor, dtype: str) -> dict[str, Tensor]:
    """`t` (n, C, ...) in `dtype`; in levels with the map that leads back to the values of each of the C."""
    if dtype in DTYPES:
        return {name: t.to(DTYPES[dtype])}
    axes = [0, *range(2, t.dim())]
    levels, slope, low = between(t, t.amin(axes, keepdim=True), t.amax(axes, keepdim=True), MOST_BITS)
    return {name: levels, f"{name[0]}.map": torch.stack([slope, low]).view(2, -1).float()}


def _unpack(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `_pack`, float32."""
    t = tensors[name]
    if t.dtype != torch.uint8:
        return t.float()
    slope, offset = tensors[f"{name[0]}.map"].view(2, -1, *[1] * (t.dim() - 2))
    return t.float() * slope + offset


def _pack_bits(name: str, t: Tensor, unit: Tensor | float, total: int) -> dict[str, Tensor]:
    """`t` (m, q), in `unit` (q,), with `total` bits a row, and the map that leads back to t * unit."""
    each = t.shape[1]
    if total > each * MOST_BITS:
        raise UserError(f"--y_bits {total}: expected at most {MOST_BITS} for each of {each} columns")
    (levels, slope, low), bits = share_bits(t, total)
    back = torch.stack([slope, low]) * unit
    return {name: pack_bits(levels, bits), "y.map": back.float(), "y.bits": bits.byte()}


def _encode_targets(y: Tensor, how: CompactFlags, unit: Tensor | float) -> dict[str, Tensor]:
    """By the singular value decomposition of the centred vectors: no other rank r is nearer in `unit`."""
    low_rank = how.y_rank is not None or how.y_variance is not None
    if not y.is_floating_point():
        if low_rank or how.y_bits is not None:
            needed = "--y_rank, --y_variance and --y_bits need target vectors"
            raise UserError(f"{needed}; this set has class indices")
        return {"y": y.to(index_type(int(y.max())))}
    if not low_rank:
        if how.y_bits is None:
            return _pack("y", y, how.y_dtype)
        return _pack_bits("y", y.double() / unit, unit, how.y_bits)
    y = y.double()
    mean = y.mean(0)
    left, spectrum, right = torch.linalg.svd((y - mean) / unit, full_matrices=False)
    rank = how.y_rank
    if rank is None:
        kept = spectrum.square().cumsum(0)
        rank = min(int((kept < how.y_variance * kept[-1]).sum()) + 1, len(spectrum))
    if rank > len(spectrum):
        wanted = f"expected at most {len(spectrum)}"
        raise UserError(f"--y_rank {rank}: {wanted} for {len(y)} target vectors of length {y.shape[1]}")
    left, right = left[:, :rank] * spectrum[:rank], right[:rank]
    stored = {"y.mean": mean.to(_basis(how))}
    if how.y_bits is None:
        return stored | {"y.right": (right * unit).to(_basis(how))} | _pack("y.left", left, how.y_dtype)
    scale = right.abs().amax(1, keepdim=True) / 127  # y.map undoes it
    stored |= _pack_bits("y.left", left, scale.T, how.y_bits)
    used = stored["y.bits"] > 0  # the others are always 0, their mean
    stored |= {"y.map": stored["y.map"][:, used], "y.bits": stored["y.bits"][used]}
    right = (right / scale).round().to(torch.int8)[used]
    return stored | {"y.right": right, "y.unit": (unit * torch.ones_like(mean)).float()}


def _basis(how: CompactFlags) -> torch.dtype:
    """Number type of the mean and the directions of target vectors; with --y_bits of the mean alone."""
    return DTYPES.get(how.y_dtype, torch.bfloat16)


def decode(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], stats: Stats | None, path: Path
) -> dict[str, Any]:
    """The inverse of `encode`: `images`, `targets` (float32 or class indices), and `views` or None.

    Sizes, types and values are checked before anything is decoded; a UserError names the file.
    """
    size, shifts = _checked_facts(facts, path)
    tensors = _one_per_byte(tensors, path)
    views = _check_tensors(tensors, size, shifts, path)
    images = _unpack("x", tensors)
    if size != tuple(images.shape[2:]):
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    if views is not None:
        if stats is None:
            raise UserError(f"{path} holds views but no mean and std")
        stats.check_channels(images.shape[1], path)
        images = views.images(images, stats)
    if "y" in tensors:
        targets = _unpack("y", tensors) if "y.map" in tensors else tensors["y"]
    else:
        mean, left, right = (_unpack(name, tensors) for name in _LOW_RANK)
        targets = mean + left @ right * tensors.get("y.unit", torch.ones(()))
    return {"images": images, "targets": targets, "views": views}


def _one_per_byte(tensors: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """`tensors` with target vectors of few bits widened to one value a byte; they stay if there are none."""
    if "y.bits" not in tensors:
        return tensors
    name = "y" if "y" in tensors else "y.left"
    bits, packed = tensors["y.bits"], tensors.get(name, torch.empty(0))
    fits = bits.dtype == packed.dtype == torch.uint8 and (bits.dim(), packed.dim()) == (1, 2)
    fits = fits and bool((bits <= MOST_BITS).all()) and packed.shape[1] == (int(bits.sum()) + 7) // 8
    if not fits or len(packed) * len(bits) > LARGEST:
        raise UserError(
            f"{path}: a compact set of {describe(tensors)}; expected y.bits in uint8, each at most "
            f"{MOST_BITS}, and in rows of as many bits y or y.left in uint8, at most {LARGEST} values"
        )
    return {**tensors, name: unpack_bits(packed, bits)}


def _checked_facts(facts: Mapping[str, Any], path: Path) -> tuple[tuple[int, int], dict[str, Any]]:
    """Height and width of the images, and how their views are shifted."""
    version, size, pad = (facts.get(name) for name in ("version", "size", "pad"))
    border = facts.get("border", "constant")  # of files that do not say it: the first ones
    if version not in VERSIONS:
        raise UserError(f"{path} is a compact set of version {version}, expected 1 to 3")
    sides = size if isinstance(size, list) and len(size) == 2 else [None, None]
    if not all(type(v) is int and 1 <= v <= LARGEST for v in sides):
        raise UserError(f"{path}: a compact set's size is {size}, expected height and width in pixels")
    if type(pad) is not int or not 0 <= pad <= LARGEST_PAD:
        raise UserError(f"{path}: the padding of a compact set's views is {pad}, expected 0 to {LARGEST_PAD}")
    if border not in BORDERS or (border == "reflect" and pad >= min(size)):
        raise UserError(
            f"{path}: views of {size} pixels cannot be shifted by {pad}, border {border!r}; expected "
            "constant, or reflect with a shift below both sides"
        )
    return (size[0], size[1]), {"pad": pad, "border": border}


def _check_tensors(
    tensors: Mapping[str, Tensor], size: tuple[int, int], shifts: dict[str, Any], path: Path
) -> SetViews | None:
    """The views; a UserError for tensors that do not fit together or would be too many values."""

    def check(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{path}: a compact set of {describe(tensors) or 'nothing'}; expected {what}")

    check("x" in tensors, "x of shape (n, C, h, w)")
    lengths = {"2": 2, "5": 5}
    for name, (axes, dtypes, words) in _TENSORS.items():
        if (t := tensors.get(name)) is not None:
            fits = (
                t.dtype in dtypes and t.dim() == len(axes) and 0 not in t.shape and bool(t.isfinite().all())
            )
            fits = fits and all(lengths.setdefault(a, n) == n for a, n in zip(axes, t.shape, strict=True))
            shape = ", ".join("n * k" if axis == "m" else axis for axis in axes)
            check(fits, f"finite {name} of shape ({shape}) in {words}")
    x, y = tensors["x"], tensors.get("y")
    check(x.shape[2] <= size[0] and x.shape[3] <= size[1], f"x of at most {size} pixels")
    check(("x.map" in tensors) == (x.dtype == torch.uint8), "x.map with x in uint8, and only then")
    each = int(tensors["x.drawn"][0]) if "x.drawn" in tensors else lengths.get("k", 1)
    check(len(x) * each * x.shape[1] * size[0] * size[1] <= LARGEST, f"at most {LARGEST} decoded values")
    views = _check_views(tensors, shifts, check)
    count = len(x) if views is None else len(views)
    check({name in tensors for name in _LOW_RANK} == {y is None}, "y, or y.mean, y.left and y.right")
    check(y is None or "y.unit" not in tensors, "y.unit with y.right")
    if y is None:
        check(lengths["m"] == count, f"y.left for {count} images")
        check(lengths["r"] <= min(count, lengths["D"]), "a rank of at most n * k and D")
        check(count * lengths["D"] <= LARGEST, f"at most {LARGEST} target values")
    else:
        check(y.dtype in {*_FLOATS, *INTEGERS}, "y in float32, bfloat16 or integers")
        check(bool(y.isfinite().all()), "finite values")
    vectors = tensors["y.left"] if y is None else y
    columns = vectors.shape[1] if vectors.dtype == torch.uint8 and vectors.dim() == 2 else None
    check(lengths.get("q") == columns, "y.map of shape (2, columns) with y or y.left in uint8, and only then")
    return views


def _check_views(
    tensors: Mapping[str, Tensor], shifts: dict[str, Any], check: Callable[[bool, str], None]
) -> SetViews | None:
    """The views, drawn again or as they are stored; `check` raises a UserError where they do not fit."""
    pad, count = shifts["pad"], len(tensors["x"])
    blend = {name: tensors[f"x.{name}"] for name in BLEND if f"x.{name}" in tensors}
    if "x.drawn" in tensors:
        kept, seed, drawn, *switches = tensors["x.drawn"].tolist()
        known = 2 <= kept <= drawn and 0 <= seed < 2**32 and {*switches} <= {0, 1}
        check(known, "x.drawn of k from 2 to the drawn views, a seed below 2**32 and two switches")
        check(count * drawn <= _MOST_DRAWN, f"at most {_MOST_DRAWN} drawn views")
        check(not blend and not tensors.keys() & {"x.views", "x.cutoffs"}, "x.drawn or x.views")
        check(count > 1 and shifts["border"] == "reflect", "x.drawn for several images with border reflect")
        return BlendDraw(seed, drawn, *map(bool, switches)).of(count, pad).first(kept)
    check(len(blend) in (0, len(BLEND)), "x.partners, x.partner_views and x.shares, or none of them")
    check("x.views" in tensors or not blend, "blends of the views in x.views")
    check(bool(blend) or "x.cutoffs" not in tensors, "x.shares with x.cutoffs")
    for name in ("x.views", "x.partner_views"):
        known = name not in tensors or int(tensors[name].max()) < count_views(pad, True)
        check(known, f"view numbers for padding {pad}")
    if blend:
        low, high = blend["partners"].aminmax()
        check(low >= 0 and high < count, f"partners below {count}")
    if "x.views" not in tensors:
        return None
    return SetViews(tensors["x.views"], **shifts, **blend, cutoffs=tensors.get("x.cutoffs"))


def describe(tensors: Mapping[str, Tensor]) -> str:
    """A compact file's images (x) and targets (y) in one line, not what says how to train."""
    return ", ".join(
        f"{name} {' x '.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}"
        for name, t in sorted(tensors.items())
        if name.split(".")[0] in ("x", "y")
    )


def count_bytes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Bytes of a compact file's images (with views and map) and of its targets."""
    return tuple(sum(t.nbytes for name, t in tensors.items() if name.split(".")[0] == k) for k in "xy")


def _itemsize(dtype: str) -> int:
    return DTYPES.get(dtype, torch.uint8).itemsize


def images_within(
    budget: int, img_shape: tuple[int, int, int], label: int | torch.dtype, how: CompactFlags, seen: ViewFlags
) -> int:
    """How many images fit into `budget` bytes with their targets, each in the views that `seen` says.

    `label` is the length of target vectors, or the number type of class indices. Directions that get no bit
    are counted, though they are not stored. A UserError says what one image takes where none fits, and that
    a rank has to be known.
    """
    if how.y_variance is not None:
        raise UserError("--bytes needs a known rank; use --y_rank in place of --y_variance")
    channels, *size = img_shape
    height, width = how.small_size(tuple(size))
    each = channels * height * width * _itemsize(how.x_dtype)
    mapped = 2 * torch.float32.itemsize  # for each channel or column that is stored in levels
    once = channels * mapped if how.x_dtype == "uint8" else 0
    if isinstance(label, torch.dtype):
        each += seen.views * label.itemsize
    else:
        rank = how.y_rank and min(how.y_rank, how.y_bits or how.y_rank)
        columns, basis = rank or label, label * _basis(how).itemsize  # of a direction or the mean
        once += columns * mapped if how.y_bits or how.y_dtype == "uint8" else 0
        if how.y_bits:
            each += seen.views * ((how.y_bits + 7) // 8)
            once += columns + (2 * basis + rank * label if rank else 0)
        else:
            each += seen.views * columns * _itemsize(how.y_dtype)
            once += (1 + rank) * basis if rank else 0
    if seen.blend:
        once += _DRAWN
    elif seen.views > 1:
        each += seen.views
    if budget < once + each:
        raise UserError(f"--bytes {budget}: the first image takes {once + each} bytes, each other {each}")
    return (budget - once) // each
