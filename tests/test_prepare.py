"""data.prepare end to end: conversion, writing, failures that leave nothing, --check."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from raw_drawing import draw

from data.load import load_set
from data.prepare import __main__ as prepare
from data.prepare import images, write
from data.prepare.raw import Part, Source, one_part
from data.prepare.write import write_prepared
from data.prepared import read_split
from utils.cli import parse
from utils.errors import UserError


def noise(path: Path, seed: int, size: tuple[int, int] = (21, 13)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of noise, 150 pictures: three tasks for the workers."""
    for i in range(150):
        noise(tmp_path / "pictures" / ("ant", "bee")[i % 2] / f"{i:03d}.png", i)
    return tmp_path / "pictures"


def plain_loop(paths: list[Path], size: int) -> np.ndarray:
    """The oracle: PIL, one picture after the other."""
    rows = []
    for path in paths:
        picture = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        rows.append(np.asarray(picture).transpose(2, 0, 1))
    return np.stack(rows)


def run(*flags: str | Path) -> int:
    return prepare.main([str(flag) for flag in flags])


def listing(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, hidden ones too, but for locks."""
    files = (p for p in path.rglob("*") if p.is_file() and p.parent.name != ".locks")
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


@pytest.mark.parametrize("workers", [1, 2])
def test_folder_equals_a_plain_loop(folder, tmp_path, workers):
    out = tmp_path / "out"
    flags = ("--from_folder", folder, "--data_name", "own", "--size", 8, "--data_dir", out)
    assert run(*flags, "--workers", workers) == 0
    expected = plain_loop(sorted(folder.rglob("*.png")), 8)
    images = torch.load(out / "own" / "X_tr_8.pth", weights_only=True, mmap=True)
    assert np.array_equal(images.numpy(), expected)
    assert set(listing(out / "own")) == {"X_tr_8.pth", "Y_tr_8.pth", "meta.json"}
    loaded = load_set("own", 8, out)
    assert loaded.num_classes == 2 and loaded.test is None
    assert loaded.train.labels.tolist() == [0] * 75 + [1] * 75
    scaled = expected.astype(np.float64) / 255
    assert np.allclose(loaded.stats.mean, scaled.mean((0, 2, 3)), atol=1e-12)
    assert np.allclose(loaded.stats.std, scaled.std((0, 2, 3)), atol=1e-12)
    assert run("--check", "own", "--data_dir", out) == 0


def test_arrays_in_parts_and_at_both_channel_counts(tmp_path):
    generator = np.random.default_rng(0)
    grey = generator.integers(0, 256, (5, 6, 6), dtype=np.uint8)
    colour = generator.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    labels = np.arange(5)

    def parts(images):
        return (Part(images[i : i + 2], labels[i : i + 2]) for i in range(0, 5, 2))

    def source():
        return Source("drawn", (*"abcde",), {"train": parts(colour), "test": parts(grey)})

    write_prepared(tmp_path / "own", 6, 3, source(), workers=2)
    loaded = load_set("own", 6, tmp_path)
    assert np.array_equal(loaded.train.images.numpy(), colour.transpose(0, 3, 1, 2))
    assert np.array_equal(loaded.test.images.numpy(), grey[:, None].repeat(3, 1))
    assert loaded.train.labels.tolist() == [0, 1, 2, 3, 4]
    write_prepared(tmp_path / "grey", 6, 1, source(), workers=1)
    loaded = load_set("grey", 6, tmp_path)
    assert np.array_equal(loaded.test.images.numpy(), grey[:, None])
    luma = np.asarray(Image.fromarray(colour[3]).convert("L"))
    assert np.array_equal(loaded.train.images[3, 0].numpy(), luma)
    write_prepared(tmp_path / "own", 3, 3, source(), workers=2)
    halved = np.asarray(Image.fromarray(colour[4]).resize((3, 3), Image.Resampling.BILINEAR))
    assert np.array_equal(load_set("own", 3, tmp_path).train.images[4].numpy().transpose(1, 2, 0), halved)


def test_digits_are_prepared_by_name_alone_and_only_once(tmp_path, capsys):
    assert run("--data_name", "digits", "--data_dir", tmp_path) == 0
    before = listing(tmp_path)
    digits = load_set("digits", 16, tmp_path)
    assert digits.train.images.shape == (1297, 3, 16, 16) and len(digits.test) == 500
    assert (digits.train.images[:, 0] == digits.train.images[:, 2]).all()
    assert run("--data_name", "digits", "--data_dir", tmp_path) == 0
    assert "already" in capsys.readouterr().out
    assert listing(tmp_path) == before
    (tmp_path / "digits" / "Y_te_16.pth").unlink()
    assert run("--data_name", "digits", "--data_dir", tmp_path) == 2
    assert "lacks Y_te_16.pth" in capsys.readouterr().err
    assert run("--data_name", "digits", "--data_dir", tmp_path, "--overwrite") == 0
    assert {k: v for k, v in listing(tmp_path).items() if k != "digits/meta.json"} == {
        k: v for k, v in before.items() if k != "digits/meta.json"
    }


def test_unlabelled_set_replaces_a_labelled_one(folder, tmp_path, capsys):
    flags = ("--from_folder", folder, "--data_name", "own", "--size", 8, "--data_dir", tmp_path)
    assert run(*flags, "--val_fraction", 0.1) == 0
    assert len(load_set("own", 8, tmp_path).test) == 16
    assert run(*flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*flags, "--unlabelled", "--overwrite") == 0
    assert set(listing(tmp_path / "own")) == {"X_tr_8.pth", "meta.json"}
    assert load_set("own", 8, tmp_path).num_classes is None
    assert run("--check", "own", "--data_dir", tmp_path) == 0


@pytest.fixture
def damaged(folder) -> Path:
    """The folder with one truncated JPEG in the middle and one text file called .png."""
    whole = noise(folder / "ant" / "050.jpg", 7, (300, 200)).read_bytes()
    (folder / "ant" / "050.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bee" / "001.png").write_text("no picture")
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_pictures_stop_the_run_and_leave_nothing(damaged, tmp_path, capsys, workers):
    out = tmp_path / "out"
    flags = ("--from_folder", damaged, "--data_name", "own", "--size", 8, "--data_dir", out)
    assert run(*flags, "--workers", workers) == 2
    message = capsys.readouterr().err
    assert "2 unreadable pictures" in message and "--skip_broken" in message
    assert "050.jpg: image file is truncated" in message and "001.png: not a picture" in message
    assert message.count("\n") == 1
    assert listing(out) == {} and not (out / "own").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_skip_broken_keeps_the_others_with_their_labels(damaged, tmp_path, workers):
    out = tmp_path / "out"
    flags = ("--from_folder", damaged, "--data_name", "own", "--size", 8, "--data_dir", out)
    assert run(*flags, "--skip_broken", "--workers", workers) == 0
    good = [p for p in sorted(damaged.rglob("*.png")) if p.name != "001.png"]
    loaded = load_set("own", 8, out)
    assert np.array_equal(loaded.train.images.numpy(), plain_loop(good, 8))
    assert loaded.train.labels.tolist() == [0] * 75 + [1] * 74
    entry = json.loads((out / "own" / "meta.json").read_text())["sizes"]["8"]
    skipped = [Path(item["picture"]).name for item in entry["skipped"]["train"]]
    assert skipped == ["050.jpg", "001.png"]
    expected = plain_loop(good, 8).astype(np.float64) / 255
    assert np.allclose(entry["mean"], expected.mean((0, 2, 3)), atol=1e-12)


def test_a_class_of_nothing_but_broken_pictures(tmp_path, capsys):
    for name in "ab":
        for i in range(3):
            draw(tmp_path / "mix" / name / f"{i}.png")
    for i in range(3):
        (tmp_path / "mix" / "b" / f"{i}.png").write_text("no")
    flags = ("--from_folder", tmp_path / "mix", "--size", 8, "--data_dir", tmp_path / "out")
    assert run(*flags, "--skip_broken") == 2
    assert "class b of folder mix has no readable picture" in capsys.readouterr().err
    assert not (tmp_path / "out" / "mix").exists()


def test_a_set_of_nothing_but_broken_pictures(tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_text("no")
    flags = ("--from_folder", tmp_path / "bad", "--size", 8, "--data_dir", tmp_path / "out")
    assert run(*flags, "--skip_broken") == 2
    assert "no readable picture" in capsys.readouterr().err
    assert not (tmp_path / "out" / "bad").exists()


@pytest.mark.parametrize("stage", ["rows", "first tensor", "last tensor"])
def test_full_disk_leaves_the_old_set_whole(folder, tmp_path, monkeypatch, capsys, stage):
    flags = ("--from_folder", folder, "--data_name", "own", "--size", 8, "--data_dir", tmp_path)
    assert run(*flags, "--val_fraction", 0.2) == 0
    before = listing(tmp_path / "own")
    saves = []
    real = torch.save

    def full(*arguments):
        saves.append(arguments)
        if stage == "first tensor" or len(saves) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    if stage == "rows":
        monkeypatch.setattr(write.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "r+b"))  # noqa: SIM115
    else:
        monkeypatch.setattr(torch, "save", full)
    assert run(*flags, "--val_fraction", 0.5, "--overwrite", "--workers", 2) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert listing(tmp_path / "own") == before


def test_killed_worker_is_an_error(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "picture_row", lambda *_: os._exit(9))
    flags = ("--from_folder", folder, "--size", 8, "--data_dir", tmp_path / "out", "--workers", 2)
    assert run(*flags) == 2
    assert "a worker process was killed" in capsys.readouterr().err
    assert listing(tmp_path / "out") == {}


def test_labels_that_do_not_fit(tmp_path):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    for labels, match in (([0, 1], "2 labels for 3"), ([0, 1, 2], "labels from 0 to 2")):
        source = Source("drawn", ("a", "b"), {"train": one_part(images, labels)})
        with pytest.raises(UserError, match=match):
            write_prepared(tmp_path / "own", 4, 3, source, workers=1)
    assert not (tmp_path / "own").exists()


def test_two_sets_under_one_name_are_refused(folder, tmp_path, capsys):
    flags = ("--data_name", "own", "--data_dir", tmp_path / "out")
    assert run("--from_folder", folder, "--size", 8, *flags) == 0
    draw(tmp_path / "other" / "cat" / "1.png")
    assert run("--from_folder", tmp_path / "other", "--size", 6, *flags) == 2
    assert "other classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--data_name NAME"),
        (("--data_name", "nope"), "unknown data set 'nope'; valid: "),
        (("--data_name", "cifar10", "--val_fraction", "0.1"), "--val_fraction is for"),
        (("--from_folder", "x", "--raw", "y"), "--raw and --download"),
        (("--from_folder", "x"), "--size is needed"),
        (("--from_folder", "x", "--data_name", "../x", "--size", "8"), "--data_name takes letters"),
        (("--from_folder", "my pictures", "--size", "8"), "'my pictures' cannot name a set"),
        (("--from_folder", "x", "--data_name", "raw", "--size", "8"), "raw is taken"),
        (("--from_folder", "absent", "--data_name", "cifar10"), "absent is not a folder"),
        (("--check", "nope"), "holds no prepared tensors"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    assert run(*flags, "--data_dir", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_folder_under_a_listed_name_must_have_its_classes(folder, tmp_path, capsys):
    assert run("--from_folder", folder, "--data_name", "CIFAR10", "--data_dir", tmp_path) == 2
    assert "cifar10 has 10 classes, but the raw set has 2" in capsys.readouterr().err


def test_check_finds_changes(tmp_path, capsys):
    run("--data_name", "digits", "--data_dir", tmp_path)
    path = tmp_path / "digits" / "X_te_16.pth"
    good = torch.load(path, weights_only=True)

    def failure(images: torch.Tensor | None) -> str:
        if images is not None:
            torch.save(images, path)
        assert run("--check", "digits", "--data_dir", tmp_path) == 2
        return capsys.readouterr().err

    changed = good.clone()
    changed[7, 0, 0, 0] ^= 1
    assert "X_te_16.pth does not match its checksum" in failure(changed)
    assert "meta.json says 500" in failure(good[:-1].clone()) or "expected (499,)" in failure(None)
    assert "expected N x 3 x 16 x 16" in failure(good[:, :1].clone())
    path.write_bytes(path.read_bytes()[:5000])
    assert "truncated" in failure(None)
    path.unlink()
    assert "X_te_16.pth does not exist" in failure(None)
    torch.save(good, path)
    assert run("--check", "digits", "--data_dir", tmp_path) == 0


def test_check_compares_statistics_with_the_published_ones(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    splits = {s: one_part(images, np.arange(100) % 10) for s in ("train", "test")}
    write_prepared(tmp_path / "cifar10", 32, 3, Source("noise", (*"abcdefghij",), splits), workers=1)
    assert run("--check", "CIFAR10", "--data_dir", tmp_path) == 2
    assert "off the published 0.4914 0.4822 0.4465" in capsys.readouterr().err


def test_check_reports_absent_classes(tmp_path, capsys):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    source = Source("drawn", ("a", "b", "c"), {"train": one_part(images, [0, 0, 2])})
    write_prepared(tmp_path / "own", 4, 3, source, workers=1)
    assert run("--check", "own", "--data_dir", tmp_path) == 2
    assert "1 of 3 classes have no picture" in capsys.readouterr().err


def test_two_processes_prepare_a_set_one_after_another(folder, tmp_path, monkeypatch, capsys):
    out, busy, written = tmp_path / "out", threading.Event(), []
    write, flags = prepare.write_prepared, ("--from_folder", folder, "--size", 8, "--data_dir", out)

    def slow(*args, **kwargs):
        written.append(1)
        busy.set()
        time.sleep(1)  # the other one asks meanwhile
        return write(*args, **kwargs)

    monkeypatch.setattr(prepare, "write_prepared", slow)
    first = threading.Thread(target=lambda: prepare.prepare(options(*flags)))
    first.start()
    assert busy.wait(60)
    with pytest.raises(UserError, match="is prepared at size 8"):  # not: lacks half of its files
        prepare.prepare(options(*flags))
    first.join()
    assert "another process prepares" in capsys.readouterr().out and len(written) == 1
    assert len(read_split(out / "pictures", "train", 8, None).images) == 150


def options(*flags):
    return parse(prepare.PrepareFlags, [str(flag) for flag in flags], prog="", description="")
