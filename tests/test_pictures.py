"""Pictures of every kind through file, worker and tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.load import load_set
from data.prepare.raw import Source, one_part
from data.prepare.write import write_prepared
from utils.errors import UserError


def one_row(tmp_path: Path, picture: Image.Image, name: str, **save) -> np.ndarray:
    """A picture through file, worker and tensor; size 4, returned as 4×4×3."""
    picture.save(tmp_path / name, **save)
    source = Source("one", None, {"train": one_part([tmp_path / name], None)})
    write_prepared(tmp_path / "one", 4, 3, source, workers=1)
    images = load_set("one", 4, tmp_path).train.images
    return images[0].numpy().transpose(1, 2, 0)


def test_grey_palette_and_one_bit(tmp_path):
    ramp = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    grey = Image.fromarray(ramp)
    assert np.array_equal(one_row(tmp_path, grey, "grey.png"), ramp[..., None].repeat(3, 2))
    palette = grey.convert("P")
    assert np.array_equal(one_row(tmp_path, palette, "p.png"), ramp[..., None].repeat(3, 2))
    bits = Image.fromarray(ramp > 100)
    assert np.array_equal(one_row(tmp_path, bits, "bits.png")[..., 1], (ramp > 100) * np.uint8(255))


def test_sixteen_bit_and_float(tmp_path):
    ramp = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    for name in ("deep.png", "deep.tiff"):
        assert np.array_equal(one_row(tmp_path, deep, name)[..., 0], ramp)
    found = one_row(tmp_path, deep, "white.tiff", tiffinfo={262: 0})  # white is zero
    assert Image.open(tmp_path / "white.tiff").tag_v2[262] == 0
    assert np.array_equal(found[..., 0], 255 - ramp)
    unit = Image.fromarray(ramp.astype(np.float32) / 255)
    assert np.array_equal(one_row(tmp_path, unit, "unit.tiff")[..., 2], ramp)
    bytes_ = Image.fromarray(ramp.astype(np.float32))
    assert np.array_equal(one_row(tmp_path, bytes_, "bytes.tiff")[..., 2], ramp)
    with pytest.raises(UserError, match=r"float pixels from"):
        one_row(tmp_path, Image.fromarray(ramp.astype(np.float32) - 9), "odd.tiff")


def test_transparency_is_laid_on_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    row = one_row(tmp_path, clear, "clear.png")
    assert row[0, 0].tolist() == [10, 20, 30] and row[1, 1].tolist() == [255, 255, 255]
    indexed = Image.new("P", (4, 4), 1)
    indexed.putpalette([0, 0, 0, 200, 0, 0])
    assert one_row(tmp_path, indexed, "t.png", transparency=1)[0, 0].tolist() == [255] * 3
    assert one_row(tmp_path, indexed, "t.gif")[0, 0].tolist() == [200, 0, 0]
    assert one_row(tmp_path, Image.new("LA", (4, 4), (0, 0)), "la.png")[2, 2].tolist() == [255] * 3


def test_cmyk_and_exif_orientation(tmp_path):
    row = one_row(tmp_path, Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "cmyk.jpg", quality=100)
    assert np.abs(row.astype(int) - [0, 255, 255]).max() <= 3
    lying = np.zeros((32, 32, 3), np.uint8)
    lying[:, :16] = 255  # white on the left; orientation 6 turns it clockwise to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    row = one_row(tmp_path, Image.fromarray(lying), "lying.jpg", exif=exif, quality=100)
    assert row[0].min() > 245 and row[3].max() < 10
