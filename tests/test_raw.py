"""Raw folders with list files, drawn here in miniature and read by the true readers."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from raw_drawing import cells, content, draw, structs
from scipy.io import savemat
from torchvision import datasets

from data.prepare import lists
from data.prepare.sources import SOURCES
from data.specs import DC_SPECS, KRR_SPECS
from utils.errors import UserError


def test_every_row_of_both_tables_has_a_reader():
    assert {row.folder for row in [*KRR_SPECS.values(), *DC_SPECS.values()]} == set(SOURCES)


@pytest.fixture
def tiny(tmp_path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    for wnid in ("n02", "n01"):
        for i in range(2):
            draw(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 40 * i, "L" if i else "RGB")
    draw(root / "val" / "images" / "val_0.JPEG", 9, "L")
    draw(root / "val" / "images" / "val_1.JPEG", 9)
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t0\t62\t62\nval_1.JPEG\tn01\t0\t0\t62\t62\n"
    )
    return tmp_path


def test_tinyimagenet_sorts_classes_and_reads_val_as_test(tiny):
    source = lists.read_tinyimagenet(tiny, False)
    assert source.class_names == ("n01", "n02")
    assert content(source, "train") == [
        ("n01_0.JPEG", 0),
        ("n01_1.JPEG", 0),
        ("n02_0.JPEG", 1),
        ("n02_1.JPEG", 1),
    ]
    assert content(source, "test") == [("val_0.JPEG", 1), ("val_1.JPEG", 0)]


def test_tinyimagenet_bad_lists(tiny):
    root = tiny / "tiny-imagenet-200"
    (root / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_annotations.txt names .*val_1.JPEG.* not exist"):
        lists.read_tinyimagenet(tiny, False)
    (root / "wnids.txt").write_text("n02\nn01\nn03\n")
    with pytest.raises(UserError, match="n03 holds no pictures"):
        lists.read_tinyimagenet(tiny, False)
    (root / "wnids.txt").write_text("n02\nn02\nn01\n")
    with pytest.raises(UserError, match="twice"):
        lists.read_tinyimagenet(tiny, False)


@pytest.fixture
def cub(tmp_path) -> Path:
    root = tmp_path / "CUB_200_2011"
    names = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auklet/c.jpg", "002.Auklet/d.jpg"]
    for name in names:
        draw(root / "images" / name)
    for file, values in {
        "images.txt": names,
        "image_class_labels.txt": [1, 1, 2, 2],
        "train_test_split.txt": [1, 0, 0, 1],
    }.items():
        (root / file).write_text("".join(f"{i} {v}\n" for i, v in enumerate(values, 1)))
    (root / "classes.txt").write_text("1 001.Albatross\n2 002.Auklet\n")
    return root


def test_cub_labels_are_one_based_and_split_flag_one_is_train(cub):
    source = lists.read_cub(cub, False)
    assert source.class_names == ("001.Albatross", "002.Auklet")
    assert content(source, "train") == [("a.jpg", 0), ("d.jpg", 1)]
    assert content(source, "test") == [("b.jpg", 0), ("c.jpg", 1)]
    assert content(lists.read_cub(cub.parent, False), "train") == content(source, "train")


def test_cub_bad_lists(cub):
    (cub / "train_test_split.txt").write_text("1 1\n2 0\n3 0\n")
    with pytest.raises(UserError, match=r"train_test_split.txt and images.txt"):
        lists.read_cub(cub, False)
    (cub / "train_test_split.txt").write_text("1 1\n2 0\n3 0\n4 1\n")
    (cub / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 3\n")
    with pytest.raises(UserError, match="names class 3"):
        lists.read_cub(cub, False)
    (cub / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n4 2\n")
    with pytest.raises(UserError, match="id 4 twice"):
        lists.read_cub(cub, False)
    (cub / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n")
    (cub / "images" / "002.Auklet" / "d.jpg").unlink()
    with pytest.raises(UserError, match=r"images.txt names .*d.jpg"):
        lists.read_cub(cub, False)


@pytest.fixture
def dogs(tmp_path) -> Path:
    lists = {"train": ["n1-Pug/a.jpg", "n2-Lab/b.jpg"], "test": ["n2-Lab/c.jpg"]}
    for split, labels in (("train", [[1], [2]]), ("test", [[2]])):
        for name in lists[split]:
            draw(tmp_path / "Images" / name)
        savemat(
            tmp_path / f"{split}_list.mat",
            {"file_list": cells(*lists[split]), "labels": np.array(labels, np.uint8)},
        )
    return tmp_path


def test_dogs(dogs):
    source = lists.read_dogs(dogs, False)
    assert source.class_names == ("n1-Pug", "n2-Lab")
    assert content(source, "train") == [("a.jpg", 0), ("b.jpg", 1)]
    assert content(source, "test") == [("c.jpg", 1)]


def test_dogs_bad_lists(dogs):
    (dogs / "Images" / "n2-Lab" / "c.jpg").unlink()
    with pytest.raises(UserError, match=r"test_list.mat names .*c.jpg"):
        lists.read_dogs(dogs, False)
    (dogs / "train_list.mat").write_bytes(b"MATLAB 5.0 but cut")
    with pytest.raises(UserError, match="damaged or not a MATLAB file"):
        lists.read_dogs(dogs, False)
    savemat(dogs / "train_list.mat", {"labels": np.zeros(1)})
    with pytest.raises(UserError, match="no variable file_list"):
        lists.read_dogs(dogs, False)
    (dogs / "train_list.mat").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(UserError, match="web page"):
        lists.read_dogs(dogs, False)


def test_cars_with_one_list(tmp_path):
    rows = [
        {"relative_im_path": f"car_ims/{i}.jpg", "class": label, "test": test}
        for i, (label, test) in enumerate([(1, 0), (2, 0), (2, 1)])
    ]
    for row in rows:
        draw(tmp_path / row["relative_im_path"])
    names = cells("Audi", "BMW").T
    savemat(tmp_path / "cars_annos.mat", {"annotations": structs(*rows), "class_names": names})
    source = lists.read_cars(tmp_path, False)
    assert source.class_names == ("Audi", "BMW")
    assert content(source, "train") == [("0.jpg", 0), ("1.jpg", 1)]
    assert content(source, "test") == [("2.jpg", 1)]
    (tmp_path / "car_ims" / "2.jpg").unlink()
    with pytest.raises(UserError, match=r"cars_annos.mat names .*2.jpg"):
        lists.read_cars(tmp_path, False)
    rows = [{k: v for k, v in row.items() if k != "test"} for row in rows[:2]]
    savemat(tmp_path / "cars_annos.mat", {"annotations": structs(*rows), "class_names": names})
    with pytest.raises(UserError, match="the annotations have no field 'test'"):
        lists.read_cars(tmp_path, False)


@pytest.mark.parametrize("inside", [True, False])
def test_cars_devkit(tmp_path, inside):
    devkit = tmp_path / "stanford_cars" / "devkit"
    devkit.mkdir(parents=True)
    test_list = (devkit if inside else devkit.parent) / "cars_test_annos_withlabels.mat"
    for split, path, labels in (
        ("train", devkit / "cars_train_annos.mat", (2, 1)),
        ("test", test_list, (1, 2)),
    ):
        rows = [{"class": y, "fname": f"{i}.jpg"} for i, y in enumerate(labels)]
        for row in rows:
            draw(tmp_path / "stanford_cars" / f"cars_{split}" / row["fname"])
        savemat(path, {"annotations": structs(*rows)})
    savemat(devkit / "cars_meta.mat", {"class_names": cells("Audi", "BMW").T})
    source = lists.read_cars(tmp_path, False)
    assert source.class_names == ("Audi", "BMW")
    assert content(source, "train") == [("0.jpg", 1), ("1.jpg", 0)]
    assert content(source, "test") == [("0.jpg", 0), ("1.jpg", 1)]
    if not inside:  # torchvision reads this form: an independent reader of the same bytes
        for split in ("train", "test"):
            theirs = datasets.StanfordCars(tmp_path, split)
            assert theirs.classes == list(source.class_names)
            assert [(Path(p).name, y) for p, y in theirs._samples] == content(source, split)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"digits"}))
def test_absent_raw_data_is_one_clear_line(name, tmp_path):
    with pytest.raises(UserError, match=r"no raw .*--raw PATH") as caught:
        SOURCES[name](tmp_path / "nothing", False)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["cars", "cub2011", "dogs", "imagefruit", "imagenet", "imagewoof", "pathmnist", "tinyimagenet"]
)
def test_sets_that_cannot_be_fetched_say_so(name, tmp_path):
    with pytest.raises(UserError, match=r"--download cannot fetch .*--raw PATH"):
        SOURCES[name](tmp_path, True)


def test_web_page_instead_of_an_archive(tmp_path):
    (tmp_path / "CUB_200_2011.tgz").write_text("\n<!DOCTYPE html><title>Sign in</title>")
    with pytest.raises(UserError, match=r"CUB_200_2011.tgz holds a web page"):
        lists.read_cub(tmp_path, False)
    (tmp_path / "CUB_200_2011.tgz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match=r"unpack CUB_200_2011.tgz there first"):
        lists.read_cub(tmp_path, False)
