"""Ways to damage a file: cut, flipped, emptied, replaced, or made to run code when it is loaded."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

MARKER = "PAYLOAD_RAN"
Damage = Callable[[Path], object]


class Payload:
    """Unpickled, it calls a function: what an attacker puts into a file."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


_TOUCH = f"open({MARKER!r}, 'w')"
PAYLOADS = {
    "system": lambda: Payload(os.system, f"touch {MARKER}"),
    "eval": lambda: Payload(builtins.eval, _TOUCH),
    "exec": lambda: Payload(builtins.exec, _TOUCH),
    "mkdir": lambda: Payload(os.mkdir, MARKER),
    "getattr": lambda: Payload(getattr, Payload(__import__, "os"), "system"),
}


def data_offset(path: Path) -> int:
    """Where the largest record of a zip file begins."""
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name + extra


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Turn one bit over."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def _replace(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _folder(path: Path) -> None:
    _replace(path)
    path.mkdir()


def _link(path: Path, to: str) -> None:
    _replace(path)
    path.symlink_to(to)


def write(content: bytes | str) -> Damage:
    """Other content in place of the file's."""
    content = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(content)


def cut(share: float) -> Damage:
    """The first part of the file alone."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def store(value: object) -> Damage:
    """Another object in a well-formed torch file."""
    return lambda path: torch.save(value() if callable(value) else value, path)


def payload(kind: str, form: str = "zip") -> Damage:
    """A file that runs code where it is unpickled.

    Args:
        kind: a name in PAYLOADS.
        form: zip or legacy (as torch.save writes), bare (a pickle alone), nested (deep inside).
    """

    def damage(path: Path) -> None:
        evil = PAYLOADS[kind]()
        if form == "bare":
            path.write_bytes(pickle.dumps(evil, protocol=2))
            return
        content = {"weight": torch.zeros(2), "x": evil}
        if form == "nested":
            content = {"data": [[torch.zeros(1), ({"deep": [evil]},)]]}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")

    return damage


def pipe(path: Path) -> None:
    """Something that is opened and never ends."""
    _replace(path)
    os.mkfifo(path)


# Under any picture's name, it would start Ghostscript.
POSTSCRIPT = write("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


# For any file that torch.save wrote.
TORCH_FILE: dict[str, Damage] = {
    "empty": write(b""),
    "zeros": write(bytes(100)),
    "text": write("hello\n"),
    "web page": write("<!DOCTYPE html><html><body>Sign in</body></html>"),
    "half": cut(0.5),
    "without its end": cut(0.98),
    "flipped": lambda path: flip(path, data_offset(path), 3),
    "folder": _folder,
    "link to nothing": lambda path: _link(path, "nowhere"),
    "link to itself": lambda path: _link(path, path.name),
    "class": store(lambda: torch.nn.Linear(1, 1)),
    "number": store(3),
    "list": store([1, 2]),
    "code, system": payload("system"),
    "code, eval": payload("eval", "legacy"),
    "code, bare": payload("exec", "bare"),
    "code, nested": payload("mkdir", "nested"),
    "code, getattr": payload("getattr"),
}
# For any file of text that has to be JSON.
JSON_FILE: dict[str, Damage] = {
    "empty": write(b""),
    "torn": write('{"mean": [0.1, '),
    "binary": write(bytes(range(128, 256))),
    "folder": _folder,
    "list": write("[]"),
    "number": write("3"),
    "deep": write("[" * 100000),
}


def random_damage(path: Path, rng: random.Random) -> str:
    """Cut, flip or empty a file somewhere; says what was done."""
    size = path.stat().st_size
    kind = rng.choice(("cut", "flip", "empty", "zeros"))
    if kind == "cut":
        at = rng.randrange(size)
        path.write_bytes(path.read_bytes()[:at])
        return f"cut to {at} of {size} bytes"
    if kind == "flip":
        with zipfile.ZipFile(path) as archive:
            stored = [i for i in archive.infolist() if i.file_size]
        info = rng.choice(stored)
        at = info.header_offset + 30 + rng.randrange(info.file_size)
        flip(path, at, rng.randrange(8))
        return f"bit flipped in byte {at} of {size}"
    if kind == "empty":
        path.write_bytes(b"")
        return "emptied"
    start = rng.randrange(size)
    content = bytearray(path.read_bytes())
    content[start:] = bytes(size - start)
    path.write_bytes(content)
    return f"zeros from byte {start} of {size}"


def png_bytes(width: int = 8, height: int = 8) -> bytes:
    """A picture file; its header may lie about the size."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", __import__("zlib").crc32(bytes(content[12:29])))
    return bytes(content)
