"""Opening files that somebody else made: regular files only, pictures of known raster formats only."""

from __future__ import annotations

import contextlib
import functools
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from utils.errors import UserError

# Decoded by Pillow itself. Others are no rasters, or are handed to another program (EPS: Ghostscript).
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000", "TGA")


def check_regular(path: Path | str) -> None:
    """Raise a UserError for pipes, sockets and devices, whose reading may never end, and for folders."""
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UserError(f"{path} is not a regular file")


@functools.cache
def _formats() -> list[str]:
    """The formats that this Pillow was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def open_picture(path: Path | str) -> Iterator[Image.Image]:
    """Open a picture of one of the known raster formats; prints a line for a very large one.

    Raises:
        UserError: not a regular file.
        MemoryError: names the picture.
        Exception: what Pillow's decoders raise, such as UnidentifiedImageError for anything else, and
            DecompressionBombError beyond twice Pillow's limit.
    """
    check_regular(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # in our words below
        with Image.open(path, formats=_formats()) as picture:
            if Image.MAX_IMAGE_PIXELS and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                print(f"{path} is very large: {picture.width} x {picture.height} pixels", flush=True)
            try:
                yield picture
            except MemoryError:
                raise MemoryError(f"{path}, a picture of {picture.width} x {picture.height} pixels") from None
