"""Which reader belongs to which prepared folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data import raw_arrays, raw_lists, raw_torchvision
from data.raw import Source
from data.raw_subsets import SUBSETS, subset_reader

# (raw folder, whether to download) -> source, by the name of the prepared folder.
SOURCES: dict[str, Callable[[Path, bool], Source]] = {
    "digits": raw_arrays.read_digits,
    "mnist": raw_torchvision.read_mnist,
    "fashionmnist": raw_torchvision.read_fashionmnist,
    "svhn": raw_torchvision.read_svhn,
    "cifar10": raw_torchvision.read_cifar10,
    "cifar100": raw_torchvision.read_cifar100,
    "aircraft": raw_torchvision.read_aircraft,
    "flowers": raw_torchvision.read_flowers,
    "imagenette": raw_torchvision.read_imagenette,
    "imagewoof": raw_torchvision.read_imagewoof,
    **{folder: subset_reader(folder) for folder in SUBSETS},
    "pathmnist": raw_arrays.read_pathmnist,
    "imagenet": raw_arrays.read_imagenet,
    "tinyimagenet": raw_lists.read_tinyimagenet,
    "cub2011": raw_lists.read_cub,
    "dogs": raw_lists.read_dogs,
    "cars": raw_lists.read_cars,
}
