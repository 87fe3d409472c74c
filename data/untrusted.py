"""Reading files that somebody else made: regular files, JSON objects, pictures of known raster formats."""

import contextlib
import json
import stat
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from utils.errors import UserError

# Pictures and labels compress to no less than a hundredth, short files aside.
_GROWTH, SMALL = 100, 1 << 26
# Decoded by Pillow itself. Others are no rasters, or are handed to another program (EPS: Ghostscript).
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000", "TGA")


def check_regular(path: Path | str) -> None:
    """Raise a UserError for pipes, sockets and devices, whose reading may never end, and for folders."""
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UserError(f"{path} is not a regular file")


def check_growth(path: Path, packed: int, unpacked: int) -> None:
    """Refuse a file that unpacks to far more than pictures and labels would (a "zip bomb")."""
    if unpacked > _GROWTH * packed + SMALL:
        raise UserError(f"{path} is refused: {packed} bytes would unpack to {unpacked} and more")


def check_zip(path: Path) -> None:
    """The same of each member of a zip file, such as npz; reading gives no more than is declared."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            check_growth(path, info.compress_size, info.file_size)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if it does not exist; a UserError if it holds anything else."""
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else "{}"
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read as text") from None
    return parse_json(text, path)


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in a text of `path`; a UserError if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} does not hold readable JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


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
    Image.init()  # names the formats that this Pillow was built with
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # in our words below
        with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as picture:
            if Image.MAX_IMAGE_PIXELS and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
                print(f"{path} is very large: {picture.width} x {picture.height} pixels", flush=True)
            try:
                yield picture
            except MemoryError:
                raise MemoryError(f"{path}, a picture of {picture.width} x {picture.height} pixels") from None
