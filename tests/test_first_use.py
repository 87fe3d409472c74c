"""The DC family's names prepare themselves from raw data on first use."""

import sys

import numpy as np
import pytest
import torch
from conftest import write_set

from data.load import load_set
from data.prepare import sources
from data.prepare.raw import Source, one_part
from utils import checkpoint
from utils.errors import UserError


def fake_mnist(calls):
    def read(raw, download):
        calls.append((raw, download))
        pixels = np.arange(20 * 28 * 28).astype(np.uint8).reshape(20, 28, 28)
        labels = np.arange(20) % 10
        splits = {"train": one_part(pixels, labels), "test": one_part(pixels[:10], labels[:10])}
        return Source("drawn here", tuple(map(str, range(10))), splits)

    return read


def test_dc_names_are_prepared_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sources.SOURCES, "mnist", fake_mnist(calls))
    first = load_set("MNIST", 28, tmp_path, family="dc")
    assert calls == [(tmp_path / "raw" / "mnist", True)]
    assert first.train.images.shape == (20, 1, 28, 28)
    assert first.train.images.dtype == torch.uint8
    assert first.stats.mean == (0.1307,)
    load_set("MNIST", 28, tmp_path, family="dc")
    assert len(calls) == 1


def test_no_network_is_one_clear_error(tmp_path, monkeypatch):
    def read(raw, download):
        raise UserError(f"cannot fetch MNIST; looked in {raw}")

    monkeypatch.setitem(sources.SOURCES, "mnist", read)
    with pytest.raises(UserError, match="raw/mnist"):
        load_set("MNIST", 28, tmp_path, family="dc")
    assert not list(tmp_path.glob("mnist/*"))


def test_both_families_read_one_file_with_their_own_statistics(tmp_path):
    from conftest import write_set

    write_set(tmp_path, "cifar10", size=32, classes=10, train=20, test=10)
    ours = load_set("cifar10", 32, tmp_path)
    dc = load_set("CIFAR10", 32, tmp_path, family="dc")
    assert torch.equal(ours.train.images, dc.train.images)
    assert ours.stats.std == (0.2470, 0.2435, 0.2616)
    assert dc.stats.std == (0.2023, 0.1994, 0.2010)
    from data.specs import DC_SPECS as tiny

    assert tiny["TinyImageNet"] is tiny["tinyimagenet"]


def test_large_files_are_mapped_and_read_the_same(tmp_path, monkeypatch):
    from conftest import write_set

    write_set(tmp_path, "own")
    read = load_set("own", 8, tmp_path).train.images
    calls = []
    real = torch.load

    def spy(*args, **kwargs):
        calls.append(kwargs["mmap"])
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    module = sys.modules["data.prepared"]
    monkeypatch.setattr(module, "_MAP_FROM_BYTES", 1000)
    assert torch.equal(load_set("own", 8, tmp_path, splits=("train",)).train.images, read)
    assert calls == [True, False]  # the images, but not the small label file


def test_pictures_that_must_not_be_mirrored(tmp_path):
    from PIL import Image

    from data.prepare import __main__ as prepare

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9), (60 * i, 0, 0)).save(folder / f"{i}.png")
    argv = ["--from_folder", str(folder), "--size", "8", "--data_dir", str(tmp_path), "--workers", "1"]
    assert prepare.main([*argv, "--data_name", "mirrored"]) == 0
    assert prepare.main([*argv, "--data_name", "upright", "--no_hflip"]) == 0
    assert load_set("mirrored", 8, tmp_path).hflip
    assert not load_set("upright", 8, tmp_path).hflip
    assert prepare.main([*argv, "--data_name", "upright", "--size", "6"]) == 0  # as it was begun
    assert not load_set("upright", 6, tmp_path).hflip
    assert prepare.main([*argv, "--data_name", "upright", "--overwrite"]) == 0
    assert load_set("upright", 8, tmp_path).hflip
    assert prepare.main(["--data_name", "digits", "--no_hflip", "--data_dir", str(tmp_path)]) == 2


def test_labels_that_are_no_classes_are_refused(tmp_path):
    """One huge label is not a hundred billion classes."""
    folder = write_set(tmp_path, "mine", train=4, test=4)
    checkpoint.save(torch.tensor([0, 1, 2, 10**11]), folder / "Y_tr_8.pth")
    with pytest.raises(UserError, match="labels from 0 to 100000000000, expected 0 to 1048575"):
        load_set("mine", 8, tmp_path)
