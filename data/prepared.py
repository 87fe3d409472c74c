"""Prepared tensors on disk: `X_{tr,te}_{size}.pth` and `Y_{tr,te}_{size}.pth`, one folder per set.

Everything a later stage relies on is checked here once, so that no loop has to.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.meta import checksum, read_meta
from data.prepare.torchvision_sets import TORCHVISION_SETS
from data.specs import DC_SPECS, KRR_SPECS, DatasetSpec, find_row
from utils import checkpoint
from utils.errors import UserError

SPLITS = {"train": "tr", "test": "te"}
_MAP_FROM_BYTES = 1 << 30
_MOST_CLASSES = 1 << 20  # where no row says how many


@dataclass(frozen=True)
class ImageSplit:
    """One split of a prepared set."""

    images: Tensor  # N×C×H×W, uint8 in [0, 255] or float32 in [0, 1], on the CPU (perhaps mapped)
    labels: Tensor | None  # N int64 class indices; None for an unlabelled set
    path: Path  # the file the images came from, for messages

    def __len__(self) -> int:
        return len(self.images)


def file_name(kind: str, split: str, size: int) -> str:
    """Name of the file of one tensor; kind is X or Y, split train or test."""
    return f"{kind}_{SPLITS[split]}_{size}.pth"


def prepared_names(data_dir: Path | str) -> list[str]:
    """Folders below `data_dir` that hold at least one prepared tensor."""
    return sorted({p.parent.name for p in Path(data_dir).glob("*/[XY]_t[re]_*.pth")})


def prepared_sizes(folder: Path) -> list[int]:
    """The sizes at which a set is prepared."""
    sizes = {p.stem.split("_")[-1] for p in folder.glob("[XY]_t[re]_*.pth")}
    return sorted(int(size) for size in sizes if size.isdecimal())


def find_spec(name: str, data_dir: Path | str, family: str = "krr") -> DatasetSpec | None:
    """The family's row for `name`; None for an own set prepared under it; a UserError for neither."""
    specs = {"krr": KRR_SPECS, "dc": DC_SPECS}[family]
    if name in specs:
        return specs[name]
    own = prepared_names(data_dir)
    if name in own:
        return None
    raise UserError(
        f"unknown data set {name!r}; known: {', '.join(sorted(specs))}; "
        f"prepared in {data_dir}: {', '.join(own) or 'none'}; an own folder of images becomes one "
        f"with: {prepare_command(name, 32, data_dir)}"
    )


def prepare_command(folder: str, size: int, data_dir: Path | str) -> str:
    """The command that prepares a set there, quoted for a shell."""
    flags = ["--data_name", folder, "--size", str(size), "--data_dir", str(data_dir)]
    if find_row(folder) is None:
        flags = ["--from_folder", "PATH", *flags]
    else:
        flags += ["--download"] * (folder in TORCHVISION_SETS)
    return shlex.join(["python", "-m", "data.prepare", *flags])


def default_size(name: str, data_dir: Path | str, family: str = "krr") -> int:
    """The size to use when none is given: the published one, or the only one prepared (else a UserError)."""
    spec = find_spec(name, data_dir, family)
    if spec is not None:
        return spec.sizes[0]
    sizes = prepared_sizes(Path(data_dir) / name)
    if len(sizes) != 1:
        raise UserError(f"{Path(data_dir) / name} is prepared at sizes {sizes}; choose --img_size")
    return sizes[0]


def read_split(
    folder: Path, split: str, size: int, spec: DatasetSpec | None, mmap: bool = False
) -> ImageSplit | None:
    """Read one split and check it, also against `spec`, the set's row; None if neither file exists.

    `mmap` maps the image file instead of reading it; from 1 GiB on it always is. A UserError where one file
    of the pair is missing, or either is damaged or holds something else.
    """
    x_path, y_path = (folder / file_name(kind, split, size) for kind in "XY")
    if not x_path.exists():
        if y_path.exists():
            raise UserError(f"{x_path} does not exist, but its labels {y_path} do; expected the pair")
        return None
    large = x_path.stat().st_size >= _MAP_FROM_BYTES
    images = checkpoint.load_tensor(x_path, what="image tensor", mmap=mmap or large)
    _check_images(images, x_path, size, spec.channels if spec else None)
    labels = None
    if y_path.exists():
        labels = checkpoint.load_tensor(y_path, what="label tensor")
        labels = _check_labels(labels, y_path, len(images), spec.num_classes if spec else None)
    elif spec is not None and any((folder / file_name("Y", other, size)).exists() for other in SPLITS):
        raise UserError(f"{y_path} does not exist, but its images {x_path} do; expected the pair")
    return ImageSplit(images, labels, x_path)


def check_recorded(folder: Path, size: int, parts: Mapping[str, ImageSplit | None]) -> None:
    """Refuse splits other than those in meta.json, if that has checksums (UserError).

    Such a set was replaced in part, by hand or by a killed data.prepare. Of tensors from 1 GiB on a
    sample of the rows is compared.
    """
    facts = read_meta(folder)["sizes"].get(str(size), {})
    sums, samples = facts.get("sha256"), facts.get("sample", {})
    for split, part in parts.items() if sums else ():
        for kind, tensor in zip("XY", (part.images, part.labels) if part else (None, None), strict=True):
            key = f"{kind}_{SPLITS[split]}"
            wanted, rows = sums.get(key), tensor
            if tensor is not None and key in samples:
                wanted, rows = samples[key], sample(tensor)
            if wanted != (None if rows is None else checksum(rows)):
                raise UserError(
                    f"{folder / file_name(kind, split, size)} is not what meta.json beside it describes, "
                    "as after a data.prepare that was killed; prepare the set again with --overwrite"
                )


def spaced(total: int, count: int) -> Tensor:
    """At most `count` of `total` rows, evenly spaced: (n,) int64."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def sample(tensor: Tensor) -> Tensor:
    """Some 1024 rows of a tensor that is mapped because of its size; any other tensor itself."""
    if tensor.numel() * tensor.element_size() < _MAP_FROM_BYTES:
        return tensor
    return tensor[:: max(1, len(tensor) // 1024)]


def _check_images(images: Tensor, path: Path, size: int, channels: int | None) -> None:
    """Check shape, dtype and pixel range of an image tensor (in chunks; no full float copy)."""
    shape, valid = tuple(images.shape), (channels,) if channels else (1, 3)
    if images.dim() != 4 or shape[1] not in valid or shape[2:] != (size, size):
        raise UserError(f"{path} has shape {shape}, expected N x {channels or '1/3'} x {size} x {size}")
    if not len(images):
        raise UserError(f"{path} is empty, expected at least one image")
    if images.dtype == torch.uint8:
        return
    if images.dtype != torch.float32:
        raise UserError(f"{path} has dtype {images.dtype}, expected uint8 or float32")
    for chunk in images.split(4096):
        low, high = chunk.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise UserError(f"{path} holds non-finite pixels, expected float32 in [0, 1]")
        if low < -1e-3 or high > 1 + 1e-3:
            raise UserError(f"{path} holds pixels from {low:.3g} to {high:.3g}, expected float32 in [0, 1]")


def _check_labels(labels: Tensor, path: Path, count: int, num_classes: int | None) -> Tensor:
    """Check a label tensor against its images; returns it as int64."""
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8, torch.int16):
        raise UserError(f"{path} has dtype {labels.dtype}, expected int64 class indices")
    if labels.shape != (count,):
        raise UserError(f"{path} has shape {tuple(labels.shape)}, expected ({count},) as its images")
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    last = _MOST_CLASSES - 1 if num_classes is None else num_classes - 1
    if low < 0 or high > last:
        raise UserError(f"{path} holds labels from {low} to {high}, expected 0 to {last}")
    return labels


def labelled_classes(name: str, data_dir: Path | str, size: int, family: str = "krr") -> int | None:
    """Classes of a set of a family, by its row, or else read from its files; None: unlabelled.

    A UserError for a set that is neither listed nor prepared at that size, or damaged.
    """
    spec, folder = find_spec(name, data_dir, family), Path(data_dir) / name
    if spec is not None:
        x_path, y_path = (Path(data_dir) / spec.folder / file_name(kind, "train", size) for kind in "XY")
        return None if x_path.exists() and not y_path.exists() else spec.num_classes
    train, test = (read_split(folder, split, size, None) for split in SPLITS)
    if train is None:
        path, command = folder / file_name("X", "train", size), prepare_command(name, size, data_dir)
        raise UserError(f"{path} does not exist; make it with: {command}")
    return count_classes(folder, train, test, None)


def count_classes(
    folder: Path, train: ImageSplit, test: ImageSplit | None, spec: DatasetSpec | None
) -> int | None:
    """The class count of the row, of meta.json, or else of the labels; None for an unlabelled set."""
    if spec is not None and train.labels is not None:
        return spec.num_classes
    labels = [s.labels for s in (train, test) if s is not None and s.labels is not None]
    if train.labels is None:
        if labels:
            raise UserError(f"{folder} has test labels but no training labels; expected both or none")
        return None
    names = read_meta(folder).get("class_names")
    count = int(torch.cat(labels).max()) + 1
    if names is None:
        return count
    if count > len(names):
        raise UserError(f"{folder} holds label {count - 1}, but meta.json names {len(names)} classes")
    return len(names)
