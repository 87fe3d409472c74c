"""What the commands of this family read: prepared sets in their normalisation, fresh networks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from clom.config import CommonFlags
from data.augment import normalize
from data.load import ImageSet, load_set
from data.prepared import default_size, file_name, labelled_classes, prepare_command
from data.specs import DC_SPECS, Stats
from data.synthetic import SyntheticSet
from models import get_network
from models.layout import arranged
from utils.errors import UserError
from utils.seed import local_seed


def set_folder(dataset: str) -> str:
    """The name of a data set's folder."""
    return DC_SPECS[dataset].folder if dataset in DC_SPECS else dataset


def find_data_dir(flags: CommonFlags) -> Path:
    """The folder that holds the set's own: --data_path or its parent, else ./data/[dataset] or ./datasets."""
    folder, spec = set_folder(flags.dataset), DC_SPECS.get(flags.dataset)
    places = [Path("./data") / flags.dataset, Path("./datasets")]
    if flags.data_path is not None:
        places = [flags.data_path.parent] * (flags.data_path.name == folder) + [flags.data_path]
    size = flags.img_size or (spec.sizes[0] if spec else "*")
    return next((p for p in places if list((p / folder).glob(f"X_tr_{size}.pth"))), places[-1])


def count_classes(flags: CommonFlags) -> int:
    """Classes of the set, from the table or the set; a UserError without labels. Nothing is written."""
    data_dir = find_data_dir(flags)
    size = flags.img_size or default_size(flags.dataset, data_dir, "dc")
    classes = labelled_classes(flags.dataset, data_dir, size, "dc")
    if classes is None:
        folder = data_dir / set_folder(flags.dataset)
        raise UserError(f"--num_images: {folder} has no labelled training images of size {size}")
    return classes


def load_data(flags: CommonFlags) -> ImageSet:
    """Read the labelled set that `flags` name, with this family's statistics.

    A UserError if it is missing (with the command that prepares it), damaged, or without labels.
    """
    data_dir, folder = find_data_dir(flags), set_folder(flags.dataset)
    size = flags.img_size or default_size(flags.dataset, data_dir, "dc")
    path = data_dir / folder / file_name("X", "train", size)
    missing = not path.exists()
    try:
        image_set = load_set(flags.dataset, size, data_dir, family="dc")
    except UserError as error:  # also where a missing set cannot prepare itself
        if not missing or "python -m data.prepare" in str(error):
            raise
        command = prepare_command(folder, size, data_dir)
        raise UserError(f"{path} does not exist: {error}; then: {command}") from None
    if not image_set.labelled:
        raise UserError(f"{path.parent} has no labels in each split; this family needs them")
    if image_set.test is None:
        if flags.dataset in DC_SPECS and DC_SPECS[flags.dataset].has_test:
            test = path.with_name(file_name("X", "test", size))
            raise UserError(f"{test} does not exist; prepare {folder} again with its test split")
        print(f"{flags.dataset} has no test split: accuracies are on the training images")
    return image_set


def to_space(synthetic: SyntheticSet, stats: Stats) -> SyntheticSet:
    """The set in the space that `stats` normalise to, whatever its own was."""
    if synthetic.stats == stats:
        return synthetic
    images, training = normalize(synthetic.unclamped_pixels(), stats), synthetic.training
    if training.whitening is not None:
        moved = training.whitening.moved(synthetic.stats, stats, images.shape[1:])
        training = replace(training, whitening=moved)
    return replace(synthetic, images=images, stats=stats, training=training)


def network_factory(name: str, image_set: ImageSet, device: torch.device) -> Callable[[int], nn.Module]:
    """Seed -> a DC-zoo network for the images, initialised from that seed alone.

    A UserError for an unknown name or images too small for it, at once, not at the first call.
    """
    channels, *size = image_set.img_shape

    def build(seed: int) -> nn.Module:
        with local_seed(seed):
            network = get_network(name, channels, image_set.num_classes, tuple(size))
        return arranged(network, device)

    build(0)
    return build
