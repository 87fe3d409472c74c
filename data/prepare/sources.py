"""Which reader belongs to which prepared folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.prepare import arrays, lists, subsets
from data.prepare.raw import Source
from data.prepare.torchvision_sets import TORCHVISION_SETS

# (raw folder, whether to download) -> source, by the name of the prepared folder.
SOURCES: dict[str, Callable[[Path, bool], Source]] = {
    **TORCHVISION_SETS,
    "digits": arrays.read_digits,
    "pathmnist": arrays.read_pathmnist,
    "imagenet": arrays.read_imagenet,
    "tinyimagenet": lists.read_tinyimagenet,
    "cub2011": lists.read_cub,
    "dogs": lists.read_dogs,
    "cars": lists.read_cars,
    "imagewoof": subsets.read_imagewoof,
    **{folder: partial(subsets.read_subset, folder) for folder in subsets.SUBSETS},
}
