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

# Decoded by Pillow itself. Others hand the file to a program (EPS: Ghostscript) or are no rasters.
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000", "TGA")


def check_regular(path: Path | str) -> None:
    """Refuse pipes, sockets and devices, whose reading may never end.

    Raises:
        UserError: one of these, or a folder; what does not exist passes.
    """
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UserError(f"{path} is not a regular file")


@functools.cache
def _formats() -> list[str]:
    """Those of the formats that this Pillow was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def open_picture(path: Path | str) -> Iterator[Image.Image]:
    """Open a picture of one of the known raster formats; a very large one is announced by a line.

    Raises:
        UserError: not a regular file.
        MemoryError: names the picture.
        Exception: what Pillow's decoders raise, among them UnidentifiedImageError for anything
            else, and DecompressionBombError beyond twice Pillow's limit.
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
