"""What the commands read: prepared data, pre-trained models, networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import data
from clom.config import CommonFlags, DistillFlags
from clom.layout import arranged
from clom.loss import CLoM
from clom.real import FeatureCache, RealImages
from clom.teachers import PREFIX, TeacherPool, load_family, load_foundation, pair_alphas
from data.load import ImageSet, default_size, tensor_path
from data.meta import read_meta
from data.space import Space
from data.specs import DC_SPECS, KRR_SPECS
from models import get_network
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
            raise UserError(
                f"{path} does not exist; prepare {spec.folder} again with its test split"
            )
        print(f"{flags.dataset} has no test split: accuracies are on the training images")
    return image_set


def _load(dataset: str, size: int, data_dir: Path) -> ImageSet:
    """`data.load`; where it cannot prepare a missing set by itself, the error has the command."""
    folder = DC_SPECS[dataset].folder if dataset in DC_SPECS else dataset
    path = tensor_path(data_dir, folder, "X", "train", size)
    missing = not path.exists()
    try:
        return data.load(dataset, size, data_dir, family="dc")
    except UserError as error:
        if not missing or "python -m data.prepare" in str(error):
            raise
        raise UserError(
            f"{path} does not exist: {error}; then: python -m data.prepare --data_name {folder} "
            f"--size {size} --data_dir {data_dir}"
        ) from None


def network_factory(
    name: str, image_set: ImageSet, device: torch.device
) -> Callable[[int], nn.Module]:
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


def load_pool(flags: DistillFlags, image_set: ImageSet, device: torch.device) -> TeacherPool:
    """The pre-trained models of `flags`, ready for this set's images.

    Raises:
        UserError: too few, damaged, or of other labels than the set's with ce.
    """
    channels, *size = image_set.img_shape
    given = Space(image_set.stats, channels, tuple(size))
    families = []
    for name, alpha in zip(
        flags.models_pool, pair_alphas(flags.models_pool, flags.alphas), strict=True
    ):
        if name.startswith(PREFIX):
            families.append(load_foundation(name, alpha=alpha, given=given, device=device))
            continue
        family, num_classes = load_family(
            flags.pretrained_path, flags.source_dataset, name, epoch=flags.epoch,
            count=flags.model_num, alpha=alpha, given=given, device=device,
            stats=flags.CLoM_teacher_stats,
        )  # fmt: skip
        families.append(family)
        if flags.CLoM_distance == "ce" and not same_labels(flags, image_set, num_classes):
            raise UserError(
                f"--CLoM_distance ce needs models of the same labels: {flags.source_dataset} "
                f"({num_classes} classes) is not {flags.dataset} ({image_set.num_classes} "
                "classes); use --CLoM_distance cos"
            )
    return TeacherPool(families)


def same_labels(flags: DistillFlags, image_set: ImageSet, num_classes: int) -> bool:
    """Whether the source's classes are the target's: one prepared set, or equal class names."""
    if num_classes != image_set.num_classes:
        return False
    folders = [
        DC_SPECS[name].folder if name in DC_SPECS else name
        for name in (flags.source_dataset, flags.dataset)
    ]
    if folders[0] == folders[1]:
        return True
    data_dir = image_set.train.path.parents[1]
    names = [read_meta(data_dir / folder).get("class_names") for folder in folders]
    return names[0] is not None and names[0] == names[1]


def make_clom(
    flags: DistillFlags,
    image_set: ImageSet,
    real: RealImages,
    device: torch.device,
) -> Callable[[torch.Generator], CLoM] | None:
    """Load the pool once; returns generator -> the CLoM term of one experiment.

    The experiments share the features of the real images.
    """
    if not flags.CLoM:
        return None
    pool, cache = load_pool(flags, image_set, device), FeatureCache(real)

    def new(generator: torch.Generator) -> CLoM:
        return CLoM(
            pool, distance=flags.CLoM_distance, ce_form=flags.CLoM_ce_form, real=real,
            batch_size=flags.CLoM_batch_size, generator=generator, cache=cache,
        )  # fmt: skip

    return new
