"""Raw sets that come as arrays: the embedded digits, PathMNIST, down-sampled ImageNet batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data.raw import (
    Part,
    Source,
    check_no_html_archive,
    check_not_html,
    one_part,
    read_lines,
    stratified_split,
)
from data.raw_folder import read_folder
from data.raw_pickle import load_pickled_arrays
from utils.errors import UserError


def read_digits(raw: Path, download: bool) -> Source:
    """scikit-learn's 1797 handwritten digits (8×8 scans, values 0..16), nothing to fetch.

    Test: 50 pictures a class drawn with seed 0; train: the other 1297.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = stratified_split(digits.target, lambda count: 50)
    return Source(
        "scikit-learn load_digits (UCI optical recognition of handwritten digits)",
        tuple(map(str, digits.target_names)),
        {
            "train": one_part(images[train], digits.target[train]),
            "test": one_part(images[test], digits.target[test]),
        },
        {"train": len(train), "test": len(test)},
    )


def read_pathmnist(raw: Path, download: bool) -> Source:
    """MedMNIST's PathMNIST from `pathmnist.npz` (or `pathmnist_64.npz` and so on)."""
    help = "get pathmnist.npz of MedMNIST (zenodo.org/records/10519652)"
    if download:
        raise UserError(f"--download cannot fetch pathmnist; {help}, and name it with --raw PATH")
    path = raw
    if not raw.is_file():
        found = sorted(raw.glob("pathmnist*.npz"))
        if not found:
            raise UserError(f"no raw pathmnist in {raw}: {help}, and name it with --raw PATH")
        path = found[0]

    def split(name: str) -> Callable[[], Iterator[Part]]:
        def parts() -> Iterator[Part]:
            images, labels = _load_npz(path, f"{name}_images", f"{name}_labels")
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
                raise UserError(f"{path}: {name}_images must be uint8 of shape N x H x W x 3")
            yield Part(images, labels.reshape(-1).astype(np.int64))

        return parts

    names = (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle",
        "normal colon mucosa", "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
    )  # fmt: skip
    return Source("MedMNIST PathMNIST", names, {n: split(n) for n in ("train", "test")}, {})


def _load_npz(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of an .npz file, without pickled objects.

    Raises:
        UserError: a web page, damaged, or without a key.
    """
    check_not_html(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive]
            if not missing:
                return [archive[key] for key in keys]
    except Exception as error:  # zip, zlib and NumPy errors of a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or not an .npz file ({reason})") from None
    raise UserError(f"{path} has no array {', '.join(missing)}")


def read_imagenet(raw: Path, download: bool) -> Source:
    """Down-sampled ImageNet batches, or a folder of class sub-folders.

    The test split is `val_data`, in the same folder or a `val` beside it, where it is there.
    Batches: `train_data_batch_1` to `_10`, pickled or .npz, each with `data` N×(3·S·S) uint8 and
    1-based `labels`. One batch lies in memory at a time. The label order is that of the release
    (its `map_clsloc.txt`, read for names if present), which is not the sorted WordNet order.
    """
    help = "get the ten train_data_batch files of down-sampled ImageNet (image-net.org)"
    if download:
        raise UserError(f"--download cannot fetch imagenet; {help}, and name them with --raw PATH")
    folders = [raw, *sorted(p for p in raw.glob("*") if p.is_dir())] if raw.is_dir() else []
    for folder in folders:
        batches = [_data_path(folder, f"train_data_batch_{number}") for number in range(1, 11)]
        missing = [number for number, path in enumerate(batches, 1) if path is None]
        if len(missing) == 10:
            continue
        if missing:
            raise UserError(f"{folder} has no train_data_batch_{missing[0]}; expected 1 to 10")
        splits = {"train": batches}
        held_out = [_data_path(place, "val_data") for place in (*folders, folder.parent / "val")]
        if any(held_out):
            splits["test"] = [next(filter(None, held_out))]
        readers = {
            name: functools.partial(map, _read_batch, found) for name, found in splits.items()
        }
        return Source("down-sampled ImageNet", _imagenet_names(folder), readers, {})
    for folder in folders:
        if (folder / "train").is_dir():
            return read_folder(folder / "train")
    if raw.is_dir():
        check_no_html_archive(raw)
    raise UserError(f"no raw imagenet in {raw}: {help}, and name their folder with --raw PATH")


def _data_path(folder: Path, stem: str) -> Path | None:
    """The file of one batch, or of the validation data, in either form."""
    for suffix in ("", ".npz"):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    return None


def _imagenet_names(folder: Path) -> tuple[str, ...]:
    """The 1000 names in label order; numbers where `map_clsloc.txt` is absent."""
    path = folder / "map_clsloc.txt"
    if not path.is_file():
        return tuple(f"class {number}" for number in range(1, 1001))
    rows = [line.split() for line in read_lines(path)]
    if sorted(row[1] for row in rows if len(row) > 2) != sorted(map(str, range(1, 1001))):
        raise UserError(f"{path} must hold 1000 lines 'wnid number name'")
    return tuple(f"{row[0]} {row[2]}" for row in sorted(rows, key=lambda row: int(row[1])))


def _read_batch(path: Path) -> Part:
    """One batch as N×S×S×3 pictures and labels from 0."""
    if path.suffix == ".npz":
        data, labels = _load_npz(path, "data", "labels")
    else:
        content = load_pickled_arrays(path)
        if not isinstance(content, dict) or not {"data", "labels"} <= content.keys():
            raise UserError(f"{path} must hold a dict with data and labels")
        data, labels = np.asarray(content["data"]), np.asarray(content["labels"])
    side = round((data.shape[-1] / 3) ** 0.5) if data.ndim == 2 else 0
    if data.dtype != np.uint8 or not side or data.shape[1] != 3 * side * side:
        raise UserError(f"{path}: data must be uint8 of shape N x (3*S*S), got {data.shape}")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{path}: labels must be whole numbers, got {labels.dtype}")
    labels = labels.reshape(-1).astype(np.int64) - 1
    if len(labels) != len(data) or not len(data) or labels.min() < 0 or labels.max() > 999:
        raise UserError(f"{path}: expected one label from 1 to 1000 for each of {len(data)} rows")
    return Part(data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1), labels)
