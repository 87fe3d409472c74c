"""Raw sets that torchvision has a class for; it fetches, unpacks and checks them."""

from __future__ import annotations

import contextlib
import inspect
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision import datasets

from data.raw import (
    Part,
    Source,
    check_no_html_archive,
    file_source,
    locate,
    require_pictures,
)
from data.raw_folder import read_folder
from data.raw_lists import refuse_download
from utils.errors import UserError


@contextlib.contextmanager
def _one_line(name: str, raw: Path, inside: str, download: bool) -> Iterator[None]:
    """Turn whatever torchvision raises into one line.

    Args:
        name: of the set.
        raw: torchvision's root.
        inside: what the root has to hold.
        download: whether fetching was asked for.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # torchvision raises all sorts, down to AssertionError
        check_no_html_archive(raw)
        reason = " ".join(str(error).split()) or type(error).__name__
        by_hand = f"give the folder that holds {inside} with --raw PATH"
        if isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError) or (
            download and "downloading" in reason
        ):
            reason = str(getattr(error, "reason", reason))
            raise UserError(
                f"cannot fetch {name} ({reason}); try again later, or {by_hand}"
            ) from None
        if download:
            raise UserError(
                f"cannot fetch and unpack {name} into {raw} ({reason}); delete what is there and "
                f"try again, or {by_hand}"
            ) from None
        if "not found" in reason:
            raise UserError(
                f"no raw {name} in {raw}, or it is not whole: fetch (or unpack) it with "
                f"--download, or {by_hand}"
            ) from None
        raise UserError(f"raw {name} in {raw} is damaged ({reason})") from None


def _root(raw: Path, inside: str) -> Path:
    """Torchvision wants the parent of its own folder; accept that folder itself, too."""
    return raw.parent if raw.name == inside and raw.is_dir() else raw


def _array_set(
    name: str,
    inside: str,
    build: Callable[[Path, str, bool], Any],
    class_names: Callable[[Any], tuple[str, ...]],
) -> Callable[[Path, bool], Source]:
    """Reader of a torchvision class that holds all pictures in one array.

    Args:
        name: of the set.
        inside: what the root folder has to hold.
        build: (root, split, download) -> dataset with `data` and `targets` or `labels`.
        class_names: dataset -> names in label order.
    """

    def read(raw: Path, download: bool) -> Source:
        root = _root(raw, inside)

        def open_split(split: str) -> Any:
            with _one_line(name, root, inside, download):
                return build(root, split, download)

        def parts(split: str) -> Iterator[Part]:
            dataset = open_split(split)
            labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
            yield Part(_pixels_last(np.asarray(dataset.data)), np.asarray(labels, np.int64))

        names = class_names(open_split("test"))  # the smaller one; tells early if it is missing
        splits = {split: lambda split=split: parts(split) for split in ("train", "test")}
        return Source(f"torchvision {name}", names, splits, {})

    return read


def _pixels_last(images: np.ndarray) -> np.ndarray:
    """N×3×H×W (SVHN) to N×H×W×3; others as they are."""
    if images.ndim == 4 and images.shape[1] == 3:
        return images.transpose(0, 2, 3, 1)
    return images


class _Listed(NamedTuple):
    """Files and labels of a torchvision split, and the names of its classes."""

    pairs: list[tuple[str, int]]
    classes: list[Any]


def _listed(kind: Callable[..., Any], *args: Any, **options: Any) -> _Listed:
    """What a torchvision class lists, without opening the pictures."""
    if "loader" in inspect.signature(kind).parameters:
        dataset = kind(*args, loader=str, **options)
        pairs = [dataset[i] for i in range(len(dataset))]
    else:  # torchvision 0.21 opens the pictures itself; only its private lists have the paths
        dataset = kind(*args, **options)
        pairs = getattr(dataset, "_samples", None)
        pairs = pairs or list(zip(dataset._image_files, dataset._labels, strict=True))
    return _Listed(pairs, list(getattr(dataset, "classes", [])))


def _file_set(
    name: str,
    inside: str,
    build: Callable[[Path, str, bool], _Listed],
    splits: dict[str, tuple[str, ...]],
) -> Callable[[Path, bool], Source]:
    """Reader of a torchvision class that lists picture files.

    Args:
        name: of the set.
        inside: what the root folder has to hold.
        build: (root, torchvision's split, download) -> what it lists.
        splits: our split -> torchvision's splits, put one after the other.
    """

    def read(raw: Path, download: bool) -> Source:
        root = _root(raw, inside)
        found = {}
        for split, theirs in splits.items():
            files, labels = [], []
            for part in theirs:
                with _one_line(name, root, inside, download):
                    listed = build(root, part, download)
                files += [Path(path) for path, _ in listed.pairs]
                labels += [int(label) for _, label in listed.pairs]
            require_pictures(files, f"the {split} list of {root / inside}")
            found[split] = (files, labels)
        names = [n if isinstance(n, str) else n[0] for n in listed.classes]
        return file_source(f"torchvision {name}", names, **found)

    return read


def _imagenette(root: Path, split: str, download: bool) -> _Listed:
    """The largest of the three releases that is there; --download takes the 320-pixel one."""
    sizes = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
    size = next((size for size, inside in sizes.items() if (root / inside).is_dir()), "320px")
    return _listed(datasets.Imagenette, root, split, size, download=download)


def _flowers(root: Path, split: str, download: bool) -> _Listed:
    """With numbers for names where torchvision (0.21) has none."""
    listed = _listed(datasets.Flowers102, root, split, download=download)
    return listed if listed.classes else listed._replace(classes=[str(i + 1) for i in range(102)])


def read_imagewoof(raw: Path, download: bool) -> Source:
    """ImageWoof, which torchvision lacks: `train/` and `val/` with a folder for each WordNet id."""
    help = "unpack imagewoof2-320.tgz (github.com/fastai/imagenette)"
    if download:
        refuse_download("imagewoof", help)
    return read_folder(locate(raw, "train", "val", what="imagewoof", help=help))


_DIGITS = tuple("0123456789")

read_mnist = _array_set(
    "MNIST", "MNIST", lambda root, split, get: datasets.MNIST(root, split == "train", download=get),
    lambda dataset: _DIGITS,
)  # fmt: skip
read_fashionmnist = _array_set(
    "FashionMNIST", "FashionMNIST",
    lambda root, split, get: datasets.FashionMNIST(root, split == "train", download=get),
    lambda dataset: tuple(dataset.classes),
)  # fmt: skip
read_svhn = _array_set(
    "SVHN", "train_32x32.mat and test_32x32.mat",
    lambda root, split, get: datasets.SVHN(root, split, download=get),
    lambda dataset: _DIGITS,
)  # fmt: skip
read_cifar10 = _array_set(
    "CIFAR-10", "cifar-10-batches-py",
    lambda root, split, get: datasets.CIFAR10(root, split == "train", download=get),
    lambda dataset: tuple(dataset.classes),
)  # fmt: skip
read_cifar100 = _array_set(
    "CIFAR-100", "cifar-100-python",
    lambda root, split, get: datasets.CIFAR100(root, split == "train", download=get),
    lambda dataset: tuple(dataset.classes),
)  # fmt: skip
# 6667 pictures of train and val together, as usual for this benchmark; 3333 for test.
read_aircraft = _file_set(
    "FGVC-Aircraft", "fgvc-aircraft-2013b",
    lambda root, split, get: _listed(datasets.FGVCAircraft, root, split, download=get),
    {"train": ("trainval",), "test": ("test",)},
)  # fmt: skip
# 1020 + 1020 pictures of train and val together, 6149 for test.
read_flowers = _file_set(
    "Flowers-102", "flowers-102", _flowers, {"train": ("train", "val"), "test": ("test",)}
)
read_imagenette = _file_set(
    "Imagenette", "imagenette2-320", _imagenette, {"train": ("train",), "test": ("val",)}
)
