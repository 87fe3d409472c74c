"""Raw sets that torchvision has a class for; it fetches, unpacks and checks them."""

import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.raw import Part, Source, check_data_files, file_source, require_pictures
from utils.checkpoint import check_files
from utils.errors import UserError, message


@dataclass(frozen=True)
class TorchvisionSet:
    """Reader of one of torchvision's classes."""

    name: str
    inside: str  # what torchvision's root folder has to hold
    build: Callable[..., Any]  # gives torchvision's object
    # Its options for our splits; several of its own may make up our training split.
    train: tuple[dict[str, Any], ...] = ({"split": "train"},)
    test: dict[str, Any] = field(default_factory=lambda: {"split": "test"})
    class_names: tuple[str, ...] = ()  # in label order, in place of torchvision's

    def __call__(self, raw: Path, download: bool) -> Source:
        """Read the set; arrays are loaded split by split, when their turn comes."""
        # Torchvision wants the parent of its own folder; accept that folder itself, too.
        root = raw.parent if raw.name == self.inside and raw.is_dir() else raw
        first = self._open(root, self.test, download)  # the smaller; tells early if it is missing
        origin = f"torchvision {self.name}"
        names = self.class_names or getattr(first, "classes", ())
        names = tuple(name if isinstance(name, str) else name[0] for name in names)
        splits = {
            split: (self._open(root, options, download) for options in theirs)
            for split, theirs in (("train", self.train), ("test", (self.test,)))
        }
        if hasattr(first, "data"):
            return Source(origin, names, {split: map(_array_part, sets) for split, sets in splits.items()})
        found = {}
        for split, sets in splits.items():
            pairs = [pair for one in sets for pair in _listed(one)]
            files, labels = [Path(path) for path, _ in pairs], [label for _, label in pairs]
            require_pictures(files, f"the {split} list of {root / self.inside}")
            found[split] = files, labels
        # Torchvision 0.21 has no names for the flowers; numbers stand in.
        numbers = [str(label + 1) for label in range(max(found["train"][1]) + 1)]
        return file_source(origin, names or numbers, **found)

    def _open(self, root: Path, options: dict[str, Any], download: bool) -> Any:
        """Torchvision's object; whatever it raises becomes one line."""
        check_files(root / self.inside if (root / self.inside).is_dir() else root)
        try:
            return self.build(root, **options, download=download)
        except MemoryError:
            raise
        except Exception as error:  # torchvision raises all sorts, down to AssertionError
            check_data_files(root)
            reason = " ".join(message(error).split()) or type(error).__name__
            by_hand = f"give the folder that holds {self.inside} with --raw PATH"
            offline = isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError)
            if offline or (download and "downloading" in reason):
                reason = getattr(error, "reason", reason)
                text = f"cannot fetch {self.name} ({reason}); try again later, or {by_hand}"
            elif download:
                text = (
                    f"cannot fetch and unpack {self.name} into {root} ({reason}); delete what is there "
                    f"and try again, or {by_hand}"
                )
            elif "not found" in reason:
                text = (
                    f"no raw {self.name} in {root}, or it is incomplete: fetch (or unpack) it with "
                    f"--download, or {by_hand}"
                )
            else:
                text = f"raw {self.name} in {root} is damaged ({reason})"
            raise UserError(text) from None


def _array_part(dataset: Any) -> Part:
    """The whole array of a torchvision set, channels last (SVHN keeps them first)."""
    images = np.asarray(dataset.data)
    if images.ndim == 4 and images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return Part(images, np.asarray(labels, np.int64))


def _listed(dataset: Any) -> list[tuple[str, int]]:
    """(path, label) of every picture; only torchvision's private lists tell without opening it."""
    if hasattr(dataset, "_samples"):
        return dataset._samples
    return list(zip(dataset._image_files, map(int, dataset._labels), strict=True))


def _of(name: str) -> Callable[..., Any]:
    """What builds an object of one of torchvision's classes."""

    def build(root: Path, **options: Any) -> Any:
        from torchvision import datasets  # slow to import, and only reading such a set needs it

        return getattr(datasets, name)(root, **options)

    return build


def _imagenette(root: Path, *, split: str, download: bool) -> Any:
    """The largest of the three releases that is there; --download takes the 320-pixel one."""
    sizes = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
    size = next((size for size, inside in sizes.items() if (root / inside).is_dir()), "320px")
    return _of("Imagenette")(root, split=split, size=size, download=download)


_BY_FLAG = {"train": ({"train": True},), "test": {"train": False}}
_DIGITS = tuple("0123456789")

# By the name of the prepared folder.
TORCHVISION_SETS = {
    "mnist": TorchvisionSet("MNIST", "MNIST", _of("MNIST"), **_BY_FLAG, class_names=_DIGITS),
    "fashionmnist": TorchvisionSet("FashionMNIST", "FashionMNIST", _of("FashionMNIST"), **_BY_FLAG),
    "svhn": TorchvisionSet("SVHN", "train_32x32.mat and test_32x32.mat", _of("SVHN"), class_names=_DIGITS),
    "cifar10": TorchvisionSet("CIFAR-10", "cifar-10-batches-py", _of("CIFAR10"), **_BY_FLAG),
    "cifar100": TorchvisionSet("CIFAR-100", "cifar-100-python", _of("CIFAR100"), **_BY_FLAG),
    # 6667 pictures of train and val together, as usual for this benchmark; 3333 for test.
    "aircraft": TorchvisionSet(
        "FGVC-Aircraft", "fgvc-aircraft-2013b", _of("FGVCAircraft"), train=({"split": "trainval"},)
    ),
    # 1020 + 1020 pictures of train and val together, 6149 for test.
    "flowers": TorchvisionSet(
        "Flowers-102", "flowers-102", _of("Flowers102"), train=({"split": "train"}, {"split": "val"})
    ),
    "imagenette": TorchvisionSet("Imagenette", "imagenette2-320", _imagenette, test={"split": "val"}),
}
