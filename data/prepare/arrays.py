"""Raw sets that come as arrays: the embedded digits, PathMNIST, down-sampled ImageNet batches."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.prepare.files import load_arrays, read_lines
from data.prepare.folder import read_folder
from data.prepare.raw import Part, Source, find_folder, locate, one_part, stratified_split, with_subfolders
from utils.errors import UserError

_TISSUES = (
    "adipose, background, debris, lymphocytes, mucus, smooth muscle, normal colon mucosa, "
    "cancer-associated stroma, colorectal adenocarcinoma epithelium"
)


def read_digits(raw: Path, download: bool) -> Source:
    """scikit-learn's 1797 handwritten digits (8×8 scans, values 0..16), nothing to fetch.

    Test: 50 pictures per class drawn with seed 0; train: the other 1297.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    rows = zip(("train", "test"), stratified_split(digits.target, lambda count: 50), strict=True)
    return Source(
        "scikit-learn load_digits (UCI optical recognition of handwritten digits)",
        tuple(map(str, digits.target_names)),
        {split: one_part(images[chosen], digits.target[chosen]) for split, chosen in rows},
    )


def read_pathmnist(raw: Path, download: bool) -> Source:
    """MedMNIST's PathMNIST from `pathmnist.npz` (or `pathmnist_64.npz` and so on)."""
    path = raw
    if download or not raw.is_file():
        help = "get pathmnist.npz of MedMNIST (zenodo.org/records/10519652)"
        folder = locate(raw, download, "pathmnist", help, "pathmnist*.npz")
        path = min(folder.glob("pathmnist*.npz"))

    def parts(split: str) -> Iterator[Part]:
        images, labels = load_arrays(path, f"{split}_images", f"{split}_labels")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(f"{path}: {split}_images must be uint8 of shape N x H x W x 3")
        yield Part(images, labels.reshape(-1).astype(np.int64))

    names = tuple(_TISSUES.split(", "))
    return Source("MedMNIST PathMNIST", names, {split: parts(split) for split in ("train", "test")})


def read_imagenet(raw: Path, download: bool) -> Source:
    """Down-sampled ImageNet batches, or a folder of class sub-folders.

    Batches: `train_data_batch_1` to `_10`, pickled or .npz, each with `data` N×(3·S·S) uint8 and
    1-based `labels`; the test split is `val_data` in the same folder or in a `val` beside it, if it
    exists. The label order is that of the release (`map_clsloc.txt` gives the names), which is not the
    sorted WordNet order.
    """
    folder = None if download else find_folder(raw, "train_data_batch_*")
    if folder is None:
        help = "get the ten train_data_batch files of down-sampled ImageNet (image-net.org)"
        return read_folder(locate(raw, download, "imagenet", help, "train") / "train")
    batches = [_batch_path(folder, f"train_data_batch_{number}") for number in range(1, 11)]
    if None in batches:
        number = batches.index(None) + 1
        raise UserError(f"{folder} has no train_data_batch_{number}; expected 1 to 10")
    splits = {"train": map(_read_batch, batches)}
    places = [_batch_path(f, "val_data") for f in (*with_subfolders(raw), folder.parent / "val")]
    held_out = [path for path in places if path is not None]
    if held_out:
        splits["test"] = map(_read_batch, held_out[:1])
    return Source("down-sampled ImageNet", _imagenet_names(folder), splits)


def _batch_path(folder: Path, stem: str) -> Path | None:
    """The file of one batch, pickled or .npz; None if there is neither."""
    paths = (folder / f"{stem}{suffix}" for suffix in ("", ".npz"))
    return next((path for path in paths if path.is_file()), None)


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
    data, labels = map(np.asarray, load_arrays(path, "data", "labels"))
    side = round((data.shape[-1] / 3) ** 0.5) if data.ndim == 2 else 0
    if data.dtype != np.uint8 or not side or data.shape[1] != 3 * side * side:
        raise UserError(f"{path}: data must be uint8 of shape N x (3*S*S), got {data.shape}")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{path}: labels must be whole numbers, got {labels.dtype}")
    labels = labels.reshape(-1).astype(np.int64) - 1
    if len(labels) != len(data) or not len(data) or labels.min() < 0 or labels.max() > 999:
        raise UserError(f"{path}: expected one label from 1 to 1000 for each of {len(data)} rows")
    return Part(data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1), labels)
