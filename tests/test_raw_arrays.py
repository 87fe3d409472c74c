"""Raw sets that are arrays or torchvision's, in miniature copies of the published files."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from raw_drawing import content, draw
from scipy.io import savemat
from torchvision import datasets
from torchvision.models._meta import _IMAGENET_CATEGORIES

from clom.config import DistillFlags
from clom.source import load_data
from data.prepare import __main__ as prepare
from data.prepare import arrays
from data.prepare.sources import SOURCES
from data.prepare.subsets import SUBSETS
from utils.errors import UserError


@pytest.fixture
def batches(tmp_path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Ten batches of 3 pictures 4×4, in turn pickled by protocol 2 and 5 and as .npz."""
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (30, 48), dtype=np.uint8)
    labels = generator.integers(1, 1001, 30)
    labels[:2] = 1, 1000
    for i in range(10):
        rows = slice(3 * i, 3 * i + 3)
        batch = {"data": data[rows], "labels": labels[rows].tolist(), "mean": data.mean(0)}
        path = tmp_path / f"train_data_batch_{i + 1}"
        if i % 3 == 0:
            np.savez(path.with_suffix(".npz"), **batch)
        else:
            path.write_bytes(pickle.dumps(batch, protocol=2 if i % 3 == 1 else 5))
    return tmp_path, data, labels


def test_imagenet_batches(batches):
    root, data, labels = batches
    source = arrays.read_imagenet(root, False)
    assert set(source.splits) == {"train"}
    assert len(source.class_names) == 1000
    parts = list(source.splits["train"])
    assert len(parts) == 10
    images = np.concatenate([part.images for part in parts])
    assert images.shape == (30, 4, 4, 3)
    # Element by element: red plane first, then rows.
    for n, c, h, w in ((0, 0, 0, 0), (7, 1, 2, 3), (29, 2, 3, 1)):
        assert images[n, h, w, c] == data[n, c * 16 + h * 4 + w]
    assert np.array_equal(np.concatenate([part.labels for part in parts]), labels - 1)


@pytest.mark.parametrize("place", ["val_data", "val/val_data.npz", "train/../val/val_data"])
def test_imagenet_validation_data_is_the_test_split(batches, place):
    """Of the same folder or of `val` beside `train`, as the release reads it."""
    root, data, labels = batches
    raw = root
    if place.startswith("train"):
        raw = root / "train"
        raw.mkdir()
        for path in root.glob("train_data_batch_*"):
            path.rename(raw / path.name)
    rows = {"data": data[::-1][:4], "labels": labels[::-1][:4].tolist()}
    path = raw.parent / "val" / "val_data" if raw is not root else root / place
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **rows) if path.suffix else path.write_bytes(pickle.dumps(rows))
    for given in {raw, root}:
        source = arrays.read_imagenet(given, False)
        assert set(source.splits) == {"train", "test"}
        (part,) = source.splits["test"]
        pictures = data[::-1][:4].reshape(4, 3, 4, 4).transpose(0, 2, 3, 1)
        assert np.array_equal(part.images, pictures)
        assert part.labels.tolist() == (labels[::-1][:4] - 1).tolist()
        assert len(list(source.splits["train"])) == 10


def test_prepared_imagenet_32_is_tested_on_its_validation_data(batches, capsys):
    root, values, labels = batches
    argv = [
        "--data_name",
        "imagenet",
        "--size",
        "4",
        "--raw",
        str(root),
        "--data_dir",
        str(root / "prepared"),
        "--workers",
        "1",
    ]
    assert prepare.main(argv) == 0
    flags = DistillFlags(dataset="ImageNet", data_path=root / "prepared", img_size=4)
    assert load_data(flags).test is None
    assert "accuracies are on the training images" in capsys.readouterr().out
    rows = {"data": values[:5], "labels": labels[:5].tolist()}
    (root / "val_data").write_bytes(pickle.dumps(rows))
    assert prepare.main([*argv, "--overwrite"]) == 0
    capsys.readouterr()
    image_set = load_data(flags)
    assert np.array_equal(image_set.test.images, values[:5].reshape(5, 3, 4, 4))
    assert image_set.test.labels.tolist() == (labels[:5] - 1).tolist()
    assert len(image_set.train) == 30 and "accuracies" not in capsys.readouterr().out


def test_imagenet_class_names_follow_the_release_order(batches):
    root = batches[0]
    lines = [f"n{9000 - i} {i} name_{i}" for i in range(1, 1001)]
    (root / "map_clsloc.txt").write_text("\n".join(sorted(lines)))
    names = arrays.read_imagenet(root, False).class_names
    assert names[0] == "n8999 name_1" and names[999] == "n8000 name_1000"


class _Evil:
    def __reduce__(self):
        return print, ("code from the file ran",)


def test_imagenet_batches_run_no_code(batches, capsys):
    path = batches[0] / "train_data_batch_2"
    path.write_bytes(pickle.dumps({"data": _Evil(), "labels": []}))
    with pytest.raises(UserError, match=r"would run builtins.print"):
        list(arrays.read_imagenet(batches[0], False).splits["train"])
    assert "ran" not in capsys.readouterr().out


def test_imagenet_bad_batches(batches):
    root = batches[0]
    path = root / "train_data_batch_2"
    whole = path.read_bytes()
    for damaged, match in (
        (whole[:-40], "damaged"),
        (b"<html>login</html>", "web page"),
        (pickle.dumps({"data": np.zeros((2, 47), np.uint8), "labels": [1, 2]}), "shape"),
        (pickle.dumps({"data": np.zeros((2, 48), np.uint8), "labels": [0, 2]}), "1 to 1000"),
        (pickle.dumps([1]), "dict"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=match):
            list(arrays.read_imagenet(root, False).splits["train"])
    path.unlink()
    with pytest.raises(UserError, match="no train_data_batch_2"):
        arrays.read_imagenet(root, False)


def test_imagenet_from_a_folder_of_classes(tmp_path):
    draw(tmp_path / "train" / "n02" / "b.JPEG")
    draw(tmp_path / "train" / "n01" / "a.JPEG")
    source = arrays.read_imagenet(tmp_path, False)
    assert content(source, "train") == [("a.JPEG", 0), ("b.JPEG", 1)]


def test_pathmnist(tmp_path):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    held = {
        f"{split}_{kind}": value
        for split in ("train", "val", "test")
        for kind, value in (("images", images), ("labels", np.array([[3], [8]], np.uint8)))
    }
    np.savez(tmp_path / "pathmnist.npz", **held)
    for raw in (tmp_path, tmp_path / "pathmnist.npz"):
        (part,) = arrays.read_pathmnist(raw, False).splits["train"]
        assert np.array_equal(part.images, images)
        assert part.labels.tolist() == [3, 8]
    (tmp_path / "pathmnist.npz").write_text("<html></html>")
    with pytest.raises(UserError, match="web page"):
        list(arrays.read_pathmnist(tmp_path, False).splits["train"])


def test_digits_split_is_fixed_and_stratified():
    source = arrays.read_digits(Path("unused"), False)
    (train,), (test,) = source.splits["train"], source.splits["test"]
    assert len(train.labels) == 1297
    assert np.bincount(test.labels).tolist() == [50] * 10
    assert test.images.max() == 255 and test.images.min() == 0
    again = arrays.read_digits(Path("unused"), False)
    assert np.array_equal(again.splits["test"][0].images, test.images)
    together = {image.tobytes() for part in (train, test) for image in part.images}
    assert len(together) == 1797  # all scans differ, so none is in both splits


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_mnist_from_raw_idx_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for name, count in (("train", 5), ("t10k", 3)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(_idx(images[:count]))
        labels = np.arange(count, dtype=np.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(_idx(labels))
    for given in (tmp_path, tmp_path / "MNIST"):
        (part,) = SOURCES["mnist"](given, False).splits["train"]
        assert np.array_equal(part.images, images)
        assert part.labels.tolist() == [0, 1, 2, 3, 4]
    (raw / "t10k-images-idx3-ubyte").write_text("<html>")
    with pytest.raises(UserError, match="web page"):
        SOURCES["mnist"](tmp_path, False)


def test_cifar10_from_raw_batches(tmp_path, monkeypatch):
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    md5 = {}
    for i, name in enumerate(names):
        batch = {"data": data[2 * i : 2 * i + 2], "labels": [i, 9 - i]}
        (root / name).write_bytes(pickle.dumps(batch))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))
    for name in [*names, "batches.meta"]:
        md5[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, md5[n]] for n in names[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    source = SOURCES["cifar10"](root, False)  # the inner folder is accepted, too
    (part,) = source.splits["train"]
    assert source.class_names == tuple("abcdefghij")
    assert np.array_equal(part.images, data[:10].reshape(10, 3, 32, 32).transpose(0, 2, 3, 1))
    assert part.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    with (root / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"no raw CIFAR-10 .* incomplete"):
        SOURCES["cifar10"](tmp_path, False)


def test_svhn_from_raw_mat_files(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    table = {}
    for split in ("train", "test"):
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": images, "y": np.array([[1], [10], [9], [2]], np.uint8)})
        table[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    (part,) = SOURCES["svhn"](tmp_path, False).splits["train"]
    assert np.array_equal(part.images, images.transpose(3, 0, 1, 2))
    assert part.labels.tolist() == [1, 0, 9, 2]  # ten stands for the digit 0


def test_aircraft_from_raw_folder(tmp_path):
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    for name in ("001", "002", "003"):
        draw(data / "images" / f"{name}.jpg")
    (data / "variants.txt").write_text("707-320\nA300 B4\n")
    (data / "images_variant_trainval.txt").write_text("002 A300 B4\n001 707-320\n")
    (data / "images_variant_test.txt").write_text("003 A300 B4\n")
    source = SOURCES["aircraft"](tmp_path, False)
    assert source.class_names == ("707-320", "A300 B4")
    assert content(source, "train") == [("002.jpg", 1), ("001.jpg", 0)]
    (data / "images" / "003.jpg").unlink()
    with pytest.raises(UserError, match=r"test list .* names .*003.jpg"):
        SOURCES["aircraft"](tmp_path, False)


def test_flowers_put_train_and_val_together(tmp_path, monkeypatch):
    root = tmp_path / "flowers-102"
    for i in range(1, 5):
        draw(root / "jpg" / f"image_{i:05d}.jpg")
    savemat(root / "imagelabels.mat", {"labels": np.array([[1, 102, 3, 4]], np.uint8)})
    savemat(root / "setid.mat", {"trnid": [[2, 2]], "valid": [[1, 1]], "tstid": [[3, 4]]})
    files = {"image": ("102flowers.tgz", "")}
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        files[key] = (name, hashlib.md5((root / name).read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    source = SOURCES["flowers"](tmp_path, False)
    assert [label for _, label in content(source, "train")] == [101, 101, 0, 0]
    assert content(source, "test") == [("image_00003.jpg", 2), ("image_00004.jpg", 3)]
    assert len(source.class_names) == 102


def test_imagenette_and_imagewoof(tmp_path):
    for top in ("imagenette2-320", "woof/imagewoof2-320"):
        for split, name in (("train", "a"), ("val", "b")):
            for wnid in ("n01440764", "n02102040"):
                draw(tmp_path / top / split / wnid / f"{name}.JPEG")
    source = SOURCES["imagenette"](tmp_path, False)
    assert source.class_names == ("tench", "English springer")
    assert content(source, "test") == [("b.JPEG", 0), ("b.JPEG", 1)]
    source = SOURCES["imagewoof"](tmp_path / "woof", False)
    assert content(source, "train") == [("a.JPEG", 0), ("a.JPEG", 1)]


# The published class numbers of each subset, among torchvision's 1000 in the order of WordNet ids.
PUBLISHED_CLASSES = {
    "imagefruit": [953, 954, 949, 950, 951, 957, 952, 945, 943, 948],
    "imageyellow": [309, 986, 954, 951, 987, 779, 599, 291, 72, 11],
    "imagemeow": [281, 282, 283, 284, 285, 291, 292, 290, 289, 287],
    "imagesquawk": [84, 130, 88, 144, 145, 22, 96, 9, 100, 89],
}


@pytest.mark.parametrize("name", PUBLISHED_CLASSES)
def test_imagenet_subsets(name, tmp_path):
    wnids, names = zip(*SUBSETS[name], strict=True)
    numbers = PUBLISHED_CLASSES[name]
    found = [_IMAGENET_CATEGORIES[number].removesuffix(" cat") for number in numbers]
    assert [n.removesuffix(" cat") for n in names] == found
    assert np.argsort(wnids).tolist() == np.argsort(numbers).tolist()
    for split, picture in (("train", "a"), ("val", "b")):
        for wnid in (*wnids, "n00000001"):  # the rest of ImageNet may lie there, too
            draw(tmp_path / "top" / split / wnid / f"{picture}_{wnid}.JPEG")
    source = SOURCES[name](tmp_path, False)
    assert source.class_names == names and set(SUBSETS) == set(PUBLISHED_CLASSES)
    assert content(source, "train") == [(f"a_{w}.JPEG", i) for i, w in enumerate(wnids)]
    assert content(source, "test") == [(f"b_{w}.JPEG", i) for i, w in enumerate(wnids)]
    (tmp_path / "top" / "val" / wnids[3] / f"b_{wnids[3]}.JPEG").unlink()
    with pytest.raises(UserError, match=f"class folder .*val/{wnids[3]} holds no pictures"):
        SOURCES[name](tmp_path, False)


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError("Connection reset")

    monkeypatch.setattr(datasets.CIFAR10, "download", refuse)
    with pytest.raises(UserError, match=r"cannot fetch .*Connection reset.*--raw PATH"):
        SOURCES["cifar10"](tmp_path, True)
