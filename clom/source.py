"""What the commands of this family read: prepared sets in their normalisation, fresh networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from clom.config import CommonFlags
from data.load import ImageSet, load_set
from data.meta import read_meta
from data.prepared import default_size, tensor_path
from data.specs import DC_SPECS, KRR_SPECS
from models import get_network
from models.layout import arranged
from utils.errors import UserError
from utils.seed import local_seed


def find_data_dir(dataset: str, data_path: Path | None, img_size: int | None) -> Path:
    """The folder that holds the prepared set's folder.

    `--data_path` if given (or its parent, where it is the set's own folder), else
    ./data/[dataset] if the set is there, else ./datasets.
    """
    spec = DC_SPECS.get(dataset)
    folder = spec.folder if spec else dataset
    places = [Path("./data") / dataset, Path("./datasets")]
    if data_path is not None:
        places = [data_path.parent] * (data_path.name == folder) + [data_path]
    for parent in places:
        pattern = img_size or (spec.sizes[0] if spec else "*")
        if list((parent / folder).glob(f"X_tr_{pattern}.pth")):
            return parent
    return places[-1]


def keeps_meaning_mirrored(flags: CommonFlags) -> bool:
    """Whether a mirrored picture of the set means the same: the tables know, or its owner."""
    spec = DC_SPECS.get(flags.dataset) or KRR_SPECS.get(flags.dataset)
    if spec is not None:
        return spec.hflip
    folder = find_data_dir(flags.dataset, flags.data_path, flags.img_size) / flags.dataset
    return bool(read_meta(folder).get("hflip", True))


def count_classes(flags: CommonFlags) -> int:
    """Classes of the set: the tables know, or its meta.json.

    Raises:
        UserError: neither says it.
    """
    if flags.dataset in DC_SPECS:
        return DC_SPECS[flags.dataset].num_classes
    folder = find_data_dir(flags.dataset, flags.data_path, flags.img_size) / flags.dataset
    names = read_meta(folder).get("class_names")
    if not names:
        raise UserError(f"{folder / 'meta.json'} names no classes; use --ipc for --num_images")
    return len(names)


def load_data(flags: CommonFlags) -> ImageSet:
    """Read the labelled set that `flags` name, with this family's statistics.

    Raises:
        UserError: missing (with the command that prepares it), damaged, or without labels.
    """
    data_dir = find_data_dir(flags.dataset, flags.data_path, flags.img_size)
    size = flags.img_size or default_size(flags.dataset, data_dir, "dc")
    image_set = _load(flags.dataset, size, data_dir)
    if image_set.train.labels is None:
        raise UserError(f"{image_set.train.path.parent} has no labels; this family needs them")
    if image_set.test is None:
        spec = DC_SPECS.get(flags.dataset)
        if spec is not None and spec.has_test:
            path = tensor_path(data_dir, spec.folder, "X", "test", size)
            raise UserError(f"{path} does not exist; prepare {spec.folder} again with its test split")
        print(f"{flags.dataset} has no test split: accuracies are on the training images")
    return image_set


def _load(dataset: str, size: int, data_dir: Path) -> ImageSet:
    """`load_set`; where it cannot prepare a missing set by itself, the error has the command."""
    folder = DC_SPECS[dataset].folder if dataset in DC_SPECS else dataset
    path = tensor_path(data_dir, folder, "X", "train", size)
    missing = not path.exists()
    try:
        return load_set(dataset, size, data_dir, family="dc")
    except UserError as error:
        if not missing or "python -m data.prepare" in str(error):
            raise
        raise UserError(
            f"{path} does not exist: {error}; then: python -m data.prepare --data_name {folder} "
            f"--size {size} --data_dir {data_dir}"
        ) from None


def network_factory(name: str, image_set: ImageSet, device: torch.device) -> Callable[[int], nn.Module]:
    """Seed -> a DC-zoo network for the images, initialised from that seed alone.

    Raises:
        UserError: an unknown name, or images too small for it (at once, not at the first call).
    """
    channels, *size = image_set.img_shape

    def build(seed: int) -> nn.Module:
        with local_seed(seed):
            network = get_network(name, channels, image_set.num_classes, tuple(size))
        return arranged(network, device)

    build(0)
    return build
