"""From a picture of any kind to one uint8 row, by NumPy and PIL alone.

A picture is scaled as a whole, without cropping, by PIL's bilinear filter, which antialiases.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from data.untrusted import open_picture

RESIZE_RULE = "whole picture to size x size, PIL bilinear with antialias, no crop"


def to_eight_bit(picture: Image.Image, channels: int) -> Image.Image:
    """Turn a picture of any mode upright and into 8-bit RGB (`channels` 3) or grey (1).

    16-bit grey is divided by 257, so that white stays white; float is taken as [0, 1] or else
    [0, 255]; transparent pixels become white; palette, CMYK and the rest are converted by PIL. A ValueError
    for integer or float pixels outside those ranges.
    """
    _scale_transparent_value(picture)
    white_is_zero = getattr(picture, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):
        pixels, clear = np.asarray(picture), picture.info.get("transparency")
        pixels = 65535 - pixels if white_is_zero else pixels  # Pillow inverts 8 bits alone
        picture = _from_integers(pixels if clear is None else np.where(pixels == clear, 65535, pixels))
    elif picture.mode == "F":
        picture = _from_floats(np.asarray(picture))
    elif picture.has_transparency_data:
        overlay = picture.convert("RGBA")
        picture = Image.new("RGBA", overlay.size, "white")
        picture.alpha_composite(overlay)
    mode = "RGB" if channels == 3 else "L"
    return picture if picture.mode == mode else picture.convert(mode)


def _scale_transparent_value(picture: Image.Image) -> None:
    """Bring a PNG's transparent value to the 8 bits of the pixels, which Pillow leaves out."""
    raw = next((tile[3] for tile in getattr(picture, "tile", ())), None)
    clear = picture.info.get("transparency")
    if raw in ("L;2", "L;4") and isinstance(clear, int):
        picture.info["transparency"] = clear * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B" and isinstance(clear, tuple):
        picture.info["transparency"] = tuple(value >> 8 for value in clear)


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
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """The rows n×C×size×size of the readable pictures, and (position, reason) of the others."""
    rows, broken = [], []
    for position, path in enumerate(paths):
        try:
            with open_picture(path) as picture:
                rows.append(picture_row(picture, size, channels))
        except MemoryError:
            raise
        except Exception as error:  # decoders raise a dozen types on a damaged file
            reason = str(error).removeprefix(f"{path} ")
            reason = "not a picture" if "cannot identify" in reason else " ".join(reason.split())
            broken.append((position, reason or type(error).__name__))
    return np.array(rows, np.uint8).reshape(-1, channels, size, size), broken


def rows_from_array(images: np.ndarray, size: int, channels: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Convert n×H×W or n×H×W×3 uint8; returns the same as `rows_from_files`."""
    own_channels = 3 if images.ndim == 4 else 1
    if images.shape[1:3] == (size, size) and own_channels <= channels:
        rows = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
        return np.broadcast_to(rows, (len(rows), channels, size, size)), []
    pictures = (Image.fromarray(np.ascontiguousarray(image)) for image in images)
    return np.stack([picture_row(picture, size, channels) for picture in pictures]), []
