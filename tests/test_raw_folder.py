"""Any folder of images as a data set."""

from __future__ import annotations

import os

import numpy as np
import pytest
from raw_drawing import content, draw

from data.prepare.folder import read_folder
from utils import checkpoint
from utils.errors import UserError


def test_folder_of_class_folders(tmp_path):
    draw(tmp_path / "bee" / "deep" / "2.PNG")
    draw(tmp_path / "bee" / "1.jpg")
    draw(tmp_path / "ant" / "3.bmp")
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    source = read_folder(tmp_path)
    assert source.class_names == ("ant", "bee")
    assert content(source, "train") == [("3.bmp", 0), ("1.jpg", 1), ("2.PNG", 1)]


def test_folder_without_classes_is_unlabelled(tmp_path):
    draw(tmp_path / "1.png")
    (part,) = read_folder(tmp_path).splits["train"]
    assert part.labels is None and [p.name for p in part.images] == ["1.png"]
    draw(tmp_path / "sub" / "2.png")
    with pytest.raises(UserError, match=r"loose pictures .*--unlabelled"):
        read_folder(tmp_path)
    source = read_folder(tmp_path, unlabelled=True)
    assert source.class_names is None and len(source.splits["train"][0].images) == 2


def test_val_fraction_is_stratified_and_repeatable(tmp_path):
    for name, count in (("a", 10), ("b", 4), ("c", 1)):
        for i in range(count):
            draw(tmp_path / name / f"{i:02d}.png")
    source = read_folder(tmp_path, val_fraction=0.2)
    train, test = content(source, "train"), content(source, "test")
    assert np.bincount([y for _, y in test], minlength=3).tolist() == [2, 1, 0]
    assert len(set(train) | set(test)) == 15 == len(train) + len(test)
    assert content(read_folder(tmp_path, val_fraction=0.2), "test") == test


@pytest.mark.parametrize("train, held_out", [("train", "val"), ("Train", "Test"), ("training", "testing")])
def test_folder_that_is_split_already(tmp_path, capsys, train, held_out):
    for split in (train, held_out):
        for name in ("x", "y"):
            draw(tmp_path / split / name / f"{split}.png")
    source = read_folder(tmp_path)
    assert content(source, "train") == [(f"{train}.png", 0), (f"{train}.png", 1)]
    assert content(source, "test") == [(f"{held_out}.png", 0), (f"{held_out}.png", 1)]
    with pytest.raises(UserError, match="val_fraction"):
        read_folder(tmp_path, val_fraction=0.1)
    (tmp_path / "notes.txt").write_text("no picture")
    draw(tmp_path / "extra" / "1.png")
    assert content(read_folder(tmp_path), "train") == content(source, "train")
    said = capsys.readouterr().out
    assert "left out: extra" in said and "left out (notes.txt)" in said
    draw(tmp_path / "loose.png")
    with pytest.raises(UserError, match=rf"loose pictures \(such as loose.png\) beside {train}/; sort"):
        read_folder(tmp_path)
    (tmp_path / "loose.png").unlink()
    draw(tmp_path / held_out / "z" / "1.png")
    with pytest.raises(UserError, match=r"differ in 1 class folders \(z\)"):
        read_folder(tmp_path)


def test_loose_pictures_beside_a_lone_train_folder(tmp_path):
    draw(tmp_path / "train" / "x" / "1.png")
    assert content(read_folder(tmp_path), "train") == [("1.png", 0)]
    draw(tmp_path / "2.png")
    with pytest.raises(UserError, match="loose pictures"):
        read_folder(tmp_path)


def test_a_class_called_train_is_no_split(tmp_path):
    draw(tmp_path / "train" / "1.png")
    draw(tmp_path / "car" / "2.png")
    assert read_folder(tmp_path).class_names == ("car", "train")


def test_split_folders_of_unlike_layout(tmp_path):
    draw(tmp_path / "train" / "x" / "1.png")
    draw(tmp_path / "val" / "1.png")
    with pytest.raises(UserError, match="train/ has class folders and val/ has none"):
        read_folder(tmp_path)


def test_names_that_are_not_utf_8(tmp_path, capsys):
    """As old archives leave them: they are shown, and no error of their own."""
    draw(tmp_path / "1.png")
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        (tmp_path / name).write_text("")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    read_folder(tmp_path)
    assert r"left out (caf\udce9.txt)" in capsys.readouterr().out
    checkpoint.write_text(tmp_path / "list", name)
    assert (tmp_path / "list").read_text() == r"caf\udce9.txt"


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="no pictures"):
        read_folder(tmp_path)
    draw(tmp_path / "Cat" / "1.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match=r"class folder .*dog holds no pictures"):
        read_folder(tmp_path)
    draw(tmp_path / "dog" / "1.png")
    draw(tmp_path / "cat" / "1.png")
    if len({p.name for p in tmp_path.iterdir()}) == 3:  # not on a case-blind file system
        with pytest.raises(UserError, match="'Cat' and 'cat'"):
            read_folder(tmp_path)
