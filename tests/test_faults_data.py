"""Raw data and pictures that somebody else made: hostile, odd, or left half replaced."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import pickle
import shlex
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from raw_drawing import draw
from scipy.io import savemat

from data import prepared
from data.load import load_set
from data.meta import read_meta
from data.prepare import __main__ as prepare
from data.prepare import images
from data.prepare.files import load_arrays
from data.prepare.folder import read_folder
from data.synthetic import SyntheticSet
from utils.cli import parse
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\nshowpage\n"


def run(*flags: str | Path | int) -> int:
    return prepare.main([str(flag) for flag in flags])


@pytest.fixture
def pictures(tmp_path) -> Path:
    for i in range(4):
        draw(tmp_path / "pictures" / ("ant", "bee")[i % 2] / f"{i}.png", 40 * i)
    return tmp_path / "pictures"


@pytest.fixture
def own(pictures, tmp_path) -> tuple[str | Path | int, ...]:
    """Flags that prepare `pictures`."""
    return "--from_folder", pictures, "--data_name", "own", "--size", 6, "--data_dir", tmp_path / "out"


def refused(capsys, *flags: str | Path | int) -> str:
    """The one line of a refused command."""
    assert run(*flags) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.fixture
def png_set(tmp_path) -> Path:
    folder = tmp_path / "png"
    draw(folder / "0.png")
    (folder / "labels.csv").write_text("file,label\n0.png,0\n")
    (folder / "meta.json").write_text('{"mean": [0, 0, 0], "std": [1, 1, 1]}')
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_postscript_under_another_name_starts_no_program(
    own, pictures, png_set, workers, monkeypatch, capsys
):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    for path in (pictures / "bee" / "1.png", png_set / "0.png"):
        path.write_text(POSTSCRIPT)
    assert "1.png: not a picture" in refused(capsys, *own, "--workers", workers)
    with pytest.raises(UserError, match=r"0\.png cannot be read"):
        SyntheticSet.load(png_set)
    assert not started


def test_pictures_are_opened_in_one_place():
    for folder in ("benchmarks", "clom", "data", "distillation", "evaluation", "krr_st", "models", "utils"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "Image.open(" not in path.read_text() or path.name == "untrusted.py", path


def test_pipes_are_refused_and_do_not_hang(own, pictures, png_set, tmp_path, capsys):
    for path in (pictures / "ant" / "pipe.png", png_set / "0.png", tmp_path / "raw" / "wnids.txt"):
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    assert "pipe.png: is not a regular file" in refused(capsys, *own)
    with pytest.raises(UserError, match=r"0\.png is not a regular file"):
        SyntheticSet.load(png_set)
    for name in ("train", "val"):
        (tmp_path / "raw" / name).mkdir()
    tiny = refused(capsys, "--data_name", "tinyimagenet", "--raw", tmp_path / "raw")
    assert "wnids.txt is not a regular file" in tiny


class _Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_arrays_are_read_as_numpy_reads_them(tmp_path, protocol):
    generator = np.random.default_rng(0)
    held = [
        generator.integers(0, 256, (3, 5), dtype=np.uint8),
        np.asfortranarray(generator.normal(size=(3, 4))),
        generator.integers(-9, 9, 7).astype(">i4"),
        np.array([True, False]),
        np.float32(generator.normal(size=(2, 1, 3))),
    ]
    path = tmp_path / "arrays"
    path.write_bytes(pickle.dumps({str(i): a for i, a in enumerate(held)}, protocol=protocol))
    for found, wanted in zip(load_arrays(path, *map(str, range(5))), held, strict=True):
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted)


_OBJECTS = np.empty(1, object)
_RECONSTRUCT = np._core.multiarray._reconstruct


class _State(_Call):
    """As `_Call`, and a state that is set on the result."""

    def __init__(self, state, function, *arguments):
        self.call = function, arguments, state


@pytest.mark.parametrize(
    "value",
    [
        _Call(np.ndarray, (1,), "O", b"8 bytes."),  # bytes of the file as a pointer
        _Call(np.ndarray, (9,), "u1", b"8 bytes."),
        _State((1, (1,), np.dtype("O"), False, b"8 bytes."), _RECONSTRUCT, np.ndarray, (0,), b"b"),
        _State((1, (3,), np.dtype("u1"), False, b"8 bytes."), _RECONSTRUCT, np.ndarray, (0,), b"b"),
        _State((1, (-8,), np.dtype("u1"), False, b"8 bytes."), _RECONSTRUCT, np.ndarray, (0,), b"b"),
        _State((1, (2**62, 4), np.dtype("u1"), False, b""), _RECONSTRUCT, np.ndarray, (0,), b"b"),
        _OBJECTS,
        np.zeros(1, [("a", "u1")]),
    ],
)
def test_arrays_that_are_no_plain_numbers_are_never_made(tmp_path, value):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": value}, protocol=2))
    with pytest.raises(UserError, match="batch is damaged or not a pickle of plain arrays"):
        load_arrays(path, "data")


@pytest.mark.parametrize("name", ["zeros.npz", "zeros.mat"])
def test_files_that_unpack_to_a_thousand_times_their_size(tmp_path, name):
    path, zeros = tmp_path / name, np.zeros(100 << 20, np.uint8)
    if path.suffix == ".npz":
        np.savez_compressed(path, x=zeros)
    else:
        savemat(path, {"x": zeros}, do_compression=True)
    with pytest.raises(UserError, match=r"bytes would unpack to \d+"):
        load_arrays(path, "x")
    assert path.stat().st_size < 1 << 20
    if path.suffix == ".npz":
        assert zipfile.ZipFile(path).infolist()[0].file_size > 100 << 20


def test_pictures_of_every_suffix_and_none(tmp_path, capsys):
    suffixes = {"jfif": "JPEG", "jpe": "JPEG", "JP2": "JPEG2000", "tga": "TGA", "pnm": "PPM", "avif": "AVIF"}
    for suffix, form in suffixes.items():
        Image.new("RGB", (9, 7), "red").save(draw(tmp_path / "a" / "0.png").with_name(f"1.{suffix}"), form)
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "nameless")
    for name, text in (("IMG.heic", "ftypheic"), ("README", "words"), ("notes.txt", "words")):
        (tmp_path / "a" / name).write_text(text)
    (part,) = read_folder(tmp_path).splits["train"]
    assert {path.name for path in part.images} == {f"1.{suffix}" for suffix in suffixes} | {"nameless"}
    rows, broken = images.rows_from_files(part.images, 4, 3)
    assert len(rows) == 7 and not broken
    (line,) = capsys.readouterr().out.splitlines()
    assert "3 files that are not pictures are left out" in line
    assert all(f"a/{name}" in line for name in ("IMG.heic", "README", "notes.txt"))


def test_linked_and_unreadable_folders(tmp_path, monkeypatch):
    draw(tmp_path / "elsewhere" / "1.png")
    draw(tmp_path / "set" / "a" / "0.png")
    (tmp_path / "set" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (part,) = read_folder(tmp_path / "set").splits["train"]
    assert [path.name for path in part.images] == ["0.png", "1.png"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set" / "a")
    with pytest.raises(UserError, match="back is a link to a folder that contains it"):
        read_folder(tmp_path / "set")
    (tmp_path / "elsewhere" / "back").unlink()
    real = os.scandir

    def locked(path):
        if Path(path).name == "linked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(UserError, match=r"linked cannot be read \(Permission denied\)"):
        read_folder(tmp_path / "set")


def test_a_set_replaced_in_part_is_not_used(tmp_path, monkeypatch):
    """Killed before each renaming in turn, with as many pictures as before, but others."""
    out, real, refusals = tmp_path / "out", Path.replace, 0

    class Killed(BaseException):
        pass

    def make(value: int, **counts: int) -> None:
        folder = tmp_path / f"pictures{value}"
        for name, count in counts.items():
            for i in range(count):
                draw(folder / name / f"{i}.png", value)
        flags = "--data_name", "own", "--size", 6, "--data_dir", out, "--val_fraction", 0.5
        assert run("--from_folder", folder, *flags, "--overwrite") == 0

    def values() -> tuple[list, ...]:
        own = load_set("own", 6, out)
        tensors = (own.train.labels, own.train.images, own.test.labels, own.test.images)
        return tuple(tensor.tolist() for tensor in tensors)

    for kill_at in range(6):
        make(1, ant=4, bee=2)
        old, renamed = values(), []

        def replace(path, target, renamed=renamed, kill_at=kill_at):
            if len(renamed) == kill_at:
                raise Killed
            renamed.append(target)
            return real(path, target)

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(Path, "replace", replace)
            make(2, ant=2, bee=4)
        assert len(renamed) == kill_at  # of four tensors and meta.json
        try:
            found = values()
        except UserError as error:
            assert "is not what meta.json beside it describes" in str(error)
            refusals += 1
        else:
            assert (found == old) == (kill_at == 0) and kill_at in (0, 5)
        make(2, ant=2, bee=4)
        assert values()[0] == [0, 1, 1] and values() != old
    assert refusals == 4


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_changed_set_is_refused(own, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(prepared, "_MAP_FROM_BYTES", limit)  # 0: a sample of the rows, here all four
    assert run(*own) == 0
    path = tmp_path / "out" / "own" / "X_tr_6.pth"
    assert bool(read_meta(path.parent)["sizes"]["6"]["sample"]) == (limit == 0)
    changed = torch.load(path, weights_only=True)
    assert torch.equal(load_set("own", 6, tmp_path / "out").train.images, changed)
    changed[1, 0, 0, 0] ^= 1
    torch.save(changed, path)
    with pytest.raises(UserError, match=r"X_tr_6\.pth is not what meta\.json"):
        load_set("own", 6, tmp_path / "out")


def _png(depth: int, colour: int, row: bytes, clear: bytes) -> bytes:
    """A PNG of one row of two pixels with a transparent value."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "clear", "other"),
    [
        (2, 0, b"\x60", b"\0\2", 85),  # pixels 1 and 2
        (4, 0, b"\x37", b"\0\7", 51),  # 3 and 7
        (8, 0, b"\x09\x0a", b"\0\x0a", 9),
        (16, 0, struct.pack(">2H", 257, 1000), struct.pack(">H", 1000), 1),
        (16, 2, struct.pack(">6H", *[257] * 3, 1000, 2000, 3000), struct.pack(">3H", 1000, 2000, 3000), 1),
    ],
)
def test_a_transparent_value_is_laid_on_white_at_every_depth(depth, colour, row, clear, other):
    picture = Image.open(io.BytesIO(_png(depth, colour, row, clear)))
    found = np.asarray(images.to_eight_bit(picture, 3))
    assert found.tolist() == [[[other] * 3, [255] * 3]]


@pytest.mark.parametrize("workers", [1, 2])
def test_too_little_memory_is_one_line(own, pictures, workers, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*own, "--size", 100000)
    assert "--size: must be at most" in capsys.readouterr().err

    def row(picture, size, channels):
        raise MemoryError

    for i in range(200):
        draw(pictures / "ant" / f"{i:03d}.png")
    monkeypatch.setattr(images, "picture_row", row)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    message = refused(capsys, *own, "--workers", workers)
    assert "out of memory at " in message and "a picture of 9 x 7 pixels" in message
    gc.collect()  # the loader waits for its workers here, not for seconds in the test that comes next


@pytest.mark.parametrize("mean", ["abc", "123", [10**400] * 3, {"a": 1}, 5, [[1]] * 3])
def test_check_of_statistics_that_are_no_numbers(own, tmp_path, mean, capsys):
    assert run(*own) == 0
    path = tmp_path / "out" / "own" / "meta.json"
    meta = json.loads(path.read_text())
    meta["sizes"]["6"]["mean"] = mean
    path.write_text(json.dumps(meta))
    assert "mean and std must be" in refused(capsys, "--check", "own", "--data_dir", tmp_path / "out")


def test_the_command_for_a_missing_set_can_be_pasted(tmp_path):
    data_dir = tmp_path / "my data"
    for name, size, download in (("cifar10", 64, True), ("cub2011", 32, False), ("digits", 16, False)):
        with pytest.raises(UserError) as caught:
            load_set(name, size, data_dir)
        words = shlex.split(str(caught.value).split("make it with: ")[1])
        assert words[:3] == ["python", "-m", "data.prepare"]
        flags = parse(prepare.PrepareFlags, words[3:], prog="", description="")
        assert (flags.data_name, flags.size, flags.data_dir) == (name, size, data_dir)
        assert flags.download == download
    with pytest.raises(UserError, match=r"--data_dir '.*my data'"):
        load_set("unheard", 32, data_dir)


def test_all_broken_pictures_are_named(own, pictures, tmp_path, capsys):
    for i in range(8):
        (pictures / "ant" / f"broken{i}.png").write_text("words")
    path = tmp_path / "out" / "own.unreadable.txt"
    assert f"all of them in {path}" in refused(capsys, *own)
    lines = path.read_text().splitlines()
    assert [Path(line.split(": ")[0]).name for line in lines] == [f"broken{i}.png" for i in range(8)]
    assert run(*own, "--skip_broken") == 0
    assert not path.exists()


def test_very_large_pictures_are_announced_in_one_line(own, monkeypatch, capfd, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9 * 7 - 1)
    assert run(*own, "--workers", 1) == 0
    out, err = capfd.readouterr()
    assert out.count("is very large: 9 x 7 pixels") == 4 and "DecompressionBomb" not in err
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]
