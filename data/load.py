"""Reading prepared tensors: `X_{tr,te}_{size}.pth` and `Y_{tr,te}_{size}.pth` in one folder a set.

Everything a later stage relies on is checked here once, so that no loop has to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.meta import own_statistics, read_meta
from data.specs import DC_SPECS, KRR_SPECS, DatasetSpec, Stats
from utils import checkpoint
from utils.errors import UserError

SPLITS = {"train": "tr", "test": "te"}
_MAP_FROM_BYTES = 1 << 30
_FAMILIES = {"krr": KRR_SPECS, "dc": DC_SPECS}


@dataclass(frozen=True)
class ImageSplit:
    """One split of a prepared set.

    Attributes:
        images: N×C×H×W, uint8 in [0, 255] or float32 in [0, 1], on the CPU (perhaps mapped).
        labels: N int64 class indices, or None for an unlabelled set.
        path: the file the images came from, for messages.
    """

    images: Tensor
    labels: Tensor | None
    path: Path

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageSet:
    """A prepared set with the statistics of one family.

    Attributes:
        name: as the user spelt it.
        size: height and width in pixels.
        train: training split.
        test: test split; None if there is none on disk.
        num_classes: None for an unlabelled set.
        stats: mean and std used to normalise.
        hflip: whether mirroring keeps the meaning.
    """

    name: str
    size: int
    train: ImageSplit
    test: ImageSplit | None
    num_classes: int | None
    stats: Stats
    hflip: bool

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return self.train.images.shape[1]

    @property
    def img_shape(self) -> tuple[int, int, int]:
        """(C, H, W), what the model zoos take."""
        return tuple(self.train.images.shape[1:])


def tensor_path(data_dir: Path | str, folder: str, kind: str, split: str, size: int) -> Path:
    """Where one tensor of the prepared layout lies; kind is X or Y, split train or test."""
    return Path(data_dir) / folder / f"{kind}_{SPLITS[split]}_{size}.pth"


def prepared_names(data_dir: Path | str) -> list[str]:
    """Folders below `data_dir` that hold at least one prepared tensor."""
    return sorted({p.parent.name for p in Path(data_dir).glob("*/[XY]_t[re]_*.pth")})


def find_spec(name: str, data_dir: Path | str, family: str = "krr") -> DatasetSpec | None:
    """The family's row for `name`; None for an own set that is prepared under that name.

    Raises:
        UserError: neither listed nor prepared; the message lists the valid names.
    """
    specs = _FAMILIES[family]
    if name in specs:
        return specs[name]
    own = prepared_names(data_dir)
    if name in own:
        return None
    raise UserError(
        f"unknown data set {name!r}; known: {', '.join(sorted(specs))}; "
        f"prepared in {data_dir}: {', '.join(own) or 'none'}; an own folder of images becomes one "
        f"with: python -m data.prepare --from_folder PATH --data_name {name} --size 32"
    )


def default_size(name: str, data_dir: Path | str, family: str = "krr") -> int:
    """The size to use when none is given: the published one, or the only one prepared.

    Raises:
        UserError: an own set prepared at several sizes.
    """
    spec = find_spec(name, data_dir, family)
    if spec is not None:
        return spec.sizes[0]
    files = (Path(data_dir) / name).glob("[XY]_t[re]_*.pth")
    sizes = sorted({int(n) for n in (p.stem.split("_")[-1] for p in files) if n.isdecimal()})
    if len(sizes) != 1:
        raise UserError(f"{Path(data_dir) / name} is prepared at sizes {sizes}; choose --img_size")
    return sizes[0]


def load(
    name: str,
    size: int,
    data_dir: Path | str = "./datasets",
    *,
    family: str = "krr",
    splits: tuple[str, ...] = ("train", "test"),
    mmap: bool | None = None,
) -> ImageSet:
    """Read a prepared set.

    Args:
        name: data set name of the family, or of an own prepared set.
        size: height = width in pixels.
        data_dir: the folder that holds one folder a set.
        family: "krr" or "dc": whose statistics to use. Listed sets of "dc" are prepared on first
            use, by download through torchvision where it can.
        splits: what to read. Without "train" no training file is opened and the training split
            is empty; an own set then needs its statistics in meta.json.
        mmap: map the image files instead of reading them; None: from 1 GiB on.

    Raises:
        UserError: unknown name, missing or damaged files, wrong dtype, shape, range or lengths.
    """
    spec = find_spec(name, data_dir, family)
    folder = spec.folder if spec else name
    first = "train" if "train" in splits else "test"
    if family == "dc" and not tensor_path(data_dir, folder, "X", first, size).exists():
        _prepare_on_first_use(folder, size, data_dir)
    parts = {s: _read_split(data_dir, folder, size, s, spec, mmap) for s in SPLITS if s in splits}
    if parts[first] is None:
        path = tensor_path(data_dir, folder, "X", first, size)
        how = f"--data_name {folder} --size {size} --data_dir {data_dir}"
        how = how if spec else f"--from_folder PATH {how}"
        raise UserError(f"{path} does not exist; make it with: python -m data.prepare {how}")
    test = parts.get("test")
    train = parts["train"] if "train" in splits else _emptied(test, data_dir, folder, size)
    num_classes = _count_classes(Path(data_dir) / folder, train, test, spec)
    if test is not None and test.images.shape[1:] != train.images.shape[1:]:
        raise UserError(
            f"{test.path} holds images of shape {tuple(test.images.shape[1:])}, "
            f"expected {tuple(train.images.shape[1:])} like the training images"
        )
    stats = spec.stats.get(size) if spec else None
    if stats is None:
        if not len(train):
            _require_stored_statistics(Path(data_dir) / folder, size)
        stats = own_statistics(Path(data_dir) / folder, size, train.images)
    hflip = spec.hflip if spec else bool(read_meta(Path(data_dir) / folder).get("hflip", True))
    return ImageSet(name, size, train, test, num_classes, stats, hflip)


def _prepare_on_first_use(folder: str, size: int, data_dir: Path | str) -> None:
    """What the DC family's users expect: a listed set is fetched when it is first asked for.

    Raises:
        UserError: no raw data here and no network; the message says what was looked for.
    """
    from data.prepare import PrepareConfig, find_row, prepare  # it imports this module

    if find_row(folder) is not None:
        print(f"{folder} at size {size} is not prepared in {data_dir}: preparing it now")
        prepare(PrepareConfig(data_name=folder, size=size, data_dir=Path(data_dir), download=True))


def _emptied(test: ImageSplit, data_dir: Path | str, folder: str, size: int) -> ImageSplit:
    """A training split without images, of the test split's shape; no training file is touched."""
    labels = None if test.labels is None else test.labels[:0]
    return ImageSplit(
        test.images[:0], labels, tensor_path(data_dir, folder, "X", "train", size)
    )  # fmt: skip


def _require_stored_statistics(folder: Path, size: int) -> None:
    """Statistics belong to training images: nothing stands in for them when these stay closed."""
    if not {"mean", "std"} <= read_meta(folder)["sizes"].get(str(size), {}).keys():
        raise UserError(
            f"{folder / 'meta.json'} holds no mean and std at size {size}, and the training images "
            "are not to be read; any command that trains on them (krr_st.kd_teacher) stores them"
        )


def _read_split(
    data_dir: Path | str,
    folder: str,
    size: int,
    split: str,
    spec: DatasetSpec | None,
    mmap: bool | None,
) -> ImageSplit | None:
    """Read and check one split; None if its image file does not exist."""
    x_path = tensor_path(data_dir, folder, "X", split, size)
    y_path = tensor_path(data_dir, folder, "Y", split, size)
    if not x_path.exists():
        if y_path.exists():
            raise UserError(f"{y_path} exists but its images {x_path} do not")
        return None
    if mmap is None:
        mmap = x_path.stat().st_size >= _MAP_FROM_BYTES
    images = checkpoint.load_tensor(x_path, what="image tensor", mmap=mmap)
    check_images(images, x_path, size, spec.channels if spec else None)
    labels = None
    if y_path.exists():
        labels = checkpoint.load_tensor(y_path, what="label tensor")
        labels = check_labels(labels, y_path, len(images), spec.num_classes if spec else None)
    elif spec is not None:
        raise UserError(f"{y_path} does not exist, but its images {x_path} do; expected the pair")
    return ImageSplit(images, labels, x_path)


def check_images(images: Tensor, path: Path, size: int, channels: int | None) -> None:
    """Check shape, dtype and pixel range of an image tensor (in chunks; no full float copy).

    Raises:
        UserError: names `path` and what was expected.
    """
    shape = tuple(images.shape)
    valid_channels = (channels,) if channels else (1, 3)
    if images.dim() != 4 or shape[1] not in valid_channels or shape[2:] != (size, size):
        wanted = " x ".join(["N", "/".join(map(str, valid_channels)), str(size), str(size)])
        raise UserError(f"{path} has shape {shape}, expected {wanted}")
    if not len(images):
        raise UserError(f"{path} is empty, expected at least one image")
    if images.dtype == torch.uint8:
        return
    if images.dtype != torch.float32:
        raise UserError(f"{path} has dtype {images.dtype}, expected uint8 or float32")
    for chunk in images.split(4096):
        low, high = chunk.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(f"{path} holds non-finite pixels, expected float32 in [0, 1]")
        if low < -1e-3 or high > 1 + 1e-3:
            raise UserError(
                f"{path} holds pixels from {low:.3g} to {high:.3g}, expected float32 in [0, 1]"
            )


def check_labels(labels: Tensor, path: Path, count: int, num_classes: int | None) -> Tensor:
    """Check a label tensor against its images; returns it as int64.

    Raises:
        UserError: names `path` and what was expected.
    """
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8, torch.int16):
        raise UserError(f"{path} has dtype {labels.dtype}, expected int64 class indices")
    if labels.shape != (count,):
        raise UserError(
            f"{path} has shape {tuple(labels.shape)}, expected ({count},) as its images"
        )
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    limit = num_classes if num_classes is not None else high + 1
    if low < 0 or high >= limit:
        raise UserError(f"{path} holds labels from {low} to {high}, expected 0 to {limit - 1}")
    return labels


def _count_classes(
    folder: Path, train: ImageSplit, test: ImageSplit | None, spec: DatasetSpec | None
) -> int | None:
    """The class count of the row, of meta.json, or else of the labels themselves."""
    if spec is not None:
        return spec.num_classes
    if train.labels is None:
        if test is not None and test.labels is not None:
            raise UserError(
                f"{folder} has test labels but no training labels; expected both or none"
            )
        return None
    names = read_meta(folder).get("class_names")
    count = 1 + max(int(s.labels.max()) for s in (train, test) if s and s.labels is not None)
    if names is not None and count > len(names):
        raise UserError(
            f"{folder} holds label {count - 1}, but meta.json names {len(names)} classes"
        )
    return len(names) if names is not None else count
