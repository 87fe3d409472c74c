"""Loading a prepared set with the statistics of one family."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from data.meta import keeps_meaning_mirrored, own_statistics
from data.prepared import (
    SPLITS,
    ImageSplit,
    check_recorded,
    count_classes,
    file_name,
    find_spec,
    prepare_command,
    read_split,
    sample,
)
from data.specs import Stats, find_row
from utils.checkpoint import fingerprint
from utils.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """A prepared set with the statistics of one family."""

    name: str  # as the user spelt it
    size: int  # height = width in pixels
    train: ImageSplit
    test: ImageSplit | None  # None if there is none on disk
    num_classes: int | None  # None for an unlabelled set
    stats: Stats  # used to normalise
    hflip: bool  # whether mirroring keeps the meaning

    @property
    def img_shape(self) -> tuple[int, int, int]:
        """(C, H, W), what the model zoos take."""
        return tuple(self.train.images.shape[1:])

    @property
    def labelled(self) -> bool:
        """Whether each split that there is has labels."""
        return all(part.labels is not None for part in (self.train, self.test) if part is not None)

    @cached_property
    def fingerprint(self) -> str:
        """Which data it is: images and labels (from 1 GiB on a sample of them), statistics, mirroring.

        And the number of classes, where it is not that of the labels.
        """
        parts = [part for part in (self.train, self.test) if part is not None]
        tensors = [t for part in parts for t in (sample(part.images), part.labels) if t is not None]
        rest = [*self.stats.mean, *self.stats.std, self.hflip]
        seen = [int(part.labels.max()) + 1 for part in parts if part.labels is not None and len(part.labels)]
        if self.num_classes not in (None, max(seen, default=None)):
            rest.append(self.num_classes)
        return fingerprint(*tensors, torch.tensor(rest, dtype=torch.float64))


def load_set(
    name: str,
    size: int,
    data_dir: Path | str = "./datasets",
    *,
    family: str = "krr",
    splits: tuple[str, ...] = ("train", "test"),
) -> ImageSet:
    """Read the set of a name of the family, or an own prepared set, from its folder in `data_dir`.

    Height and width are `size` pixels. The family ("krr" or "dc") says whose statistics to use; listed
    sets of "dc" are prepared on first use, downloaded through torchvision where it can. Without "train" in
    `splits` no training file is opened and the training split is empty; an own set then needs its
    statistics in meta.json. Files are mapped from 1 GiB on. A UserError for an unknown name, missing or
    damaged files, and a wrong dtype, shape, range or length.
    """
    spec = find_spec(name, data_dir, family)
    folder = Path(data_dir) / (spec.folder if spec else name)
    first = "train" if "train" in splits else "test"
    path = folder / file_name("X", first, size)
    if family == "dc" and not path.exists() and find_row(folder.name) is not None:
        from data.prepare.__main__ import PrepareFlags, prepare  # a first use alone needs it

        print(f"{folder.name} at size {size} is not prepared in {data_dir}: preparing it now")
        prepare(PrepareFlags(folder.name, size, Path(data_dir), download=True))
    parts = {s: read_split(folder, s, size, spec) for s in SPLITS if s in splits}
    if parts[first] is None:
        command = prepare_command(folder.name, size, data_dir)
        raise UserError(f"{path} does not exist; make it with: {command}")
    check_recorded(folder, size, parts)
    train, test = parts.get("train"), parts.get("test")
    if train is None:  # an empty split of the test split's shape; no training file is touched
        labels = None if test.labels is None else test.labels[:0]
        train = ImageSplit(test.images[:0], labels, folder / file_name("X", "train", size))
    num_classes = count_classes(folder, train, test, spec)
    if test is not None and test.images.shape[1:] != train.images.shape[1:]:
        raise UserError(
            f"{test.path} holds images of shape {tuple(test.images.shape[1:])}, "
            f"expected {tuple(train.images.shape[1:])} like the training images"
        )
    stats = (spec and spec.stats.get(size)) or own_statistics(folder, size, train.images)
    return ImageSet(name, size, train, test, num_classes, stats, keeps_meaning_mirrored(folder))
