"""From a picture of any kind to one uint8 row: what the worker processes of data.prepare run.

NumPy and PIL only. A picture is scaled as a whole to size×size by PIL's bilinear filter, which
averages over the source area when it shrinks (antialias) and does not crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

RESIZE_RULE = "whole picture to size x size, PIL bilinear with antialias, no crop"


def to_eight_bit(picture: Image.Image, channels: int) -> Image.Image:
    """Turn a picture of any mode upright and into 8-bit RGB (`channels` 3) or grey (1).

    16-bit grey is divided by 257, so that white stays white; float is taken as [0, 1] or else
    [0, 255]; transparency is laid on white; palette, CMYK and the rest go through PIL's own
    conversion.

    Raises:
        ValueError: integer or float pixels outside those ranges.
    """
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):
        picture = _from_integers(np.asarray(picture))
    elif picture.mode == "F":
        picture = _from_floats(np.asarray(picture))
    elif picture.has_transparency_data:
        overlay = picture.convert("RGBA")
        picture = Image.new("RGBA", overlay.size, "white")
        picture.alpha_composite(overlay)
    mode = "RGB" if channels == 3 else "L"
    return picture if picture.mode == mode else picture.convert(mode)


def _from_integers(pixels: np.ndarray) -> Image.Image:
    """H×W integers in the 16-bit range to 8-bit grey."""
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ValueError(f"integer pixels from {low} to {high}, expected 16 bit")
    return Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _from_floats(pixels: np.ndarray) -> Image.Image:
    """H×W floats in [0, 1] or [0, 255] to 8-bit grey."""
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 255):  # also refuses NaN
        raise ValueError(f"float pixels from {low:.3g} to {high:.3g}, expected [0, 1] or [0, 255]")
    return Image.fromarray(np.rint(pixels * (255 if high <= 1 else 1)).astype(np.uint8))


def picture_row(picture: Image.Image, size: int, channels: int) -> np.ndarray:
    """One picture as C×size×size uint8."""
    picture = to_eight_bit(picture, channels)
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def rows_from_files(
    paths: Sequence[Path | str], size: int, channels: int
) -> tuple[np.ndarray, list[int], list[tuple[int, str]]]:
    """Read and convert pictures.

    Returns:
        The rows n×C×size×size of the readable ones, their positions in `paths`, and
        (position, reason) of the unreadable ones.
    """
    rows = np.empty((len(paths), channels, size, size), np.uint8)
    good, broken = [], []
    for position, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                rows[len(good)] = picture_row(picture, size, channels)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise a dozen types on a damaged file
            reason = "not a picture" if "cannot identify" in str(error) else str(error)
            broken.append((position, " ".join(reason.split()) or type(error).__name__))
        else:
            good.append(position)
    return rows[: len(good)], good, broken


def rows_from_array(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Convert n×H×W or n×H×W×3 uint8 to n×C×size×size; a plain copy where nothing changes."""
    own_channels = 3 if images.ndim == 4 else 1
    if images.shape[1:3] == (size, size) and own_channels <= channels:
        rows = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
        return np.ascontiguousarray(np.broadcast_to(rows, (len(rows), channels, size, size)))
    rows = np.empty((len(images), channels, size, size), np.uint8)
    for row, image in zip(rows, images, strict=True):
        row[:] = picture_row(Image.fromarray(np.ascontiguousarray(image)), size, channels)
    return rows


def moments(rows: np.ndarray) -> np.ndarray:
    """Sum and sum of squares of every channel, C×2; exact: whole numbers below 2^53 in float64.

    Without a dot product: BLAS would start threads of its own in every worker.
    """
    totals = np.zeros((rows.shape[1], 2))
    step = max(1, (1 << 16) // max(1, rows[0, 0].size if len(rows) else 1))  # stays in the cache
    for start in range(0, len(rows), step):
        for channel in range(rows.shape[1]):
            values = rows[start : start + step, channel].astype(np.float64).reshape(-1)
            totals[channel, 0] += values.sum()
            totals[channel, 1] += np.square(values, out=values).sum()
    return totals


def statistics(totals: np.ndarray, pixels: int) -> tuple[list[float], list[float]]:
    """Mean and std in [0, 1] per channel from `moments`; std at least 1e-3.

    Args:
        totals: C×2, sums and sums of squares of values in [0, 255].
        pixels: number of pixels they run over.
    """
    mean, square = totals.T / pixels
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return (mean / 255).tolist(), np.maximum(std / 255, 1e-3).tolist()
