"""A synthetic set as a folder of 8-bit PNGs, for people and for other tools.

`labels.csv` (file,label[,class_name]) says which files belong to the set and in which order;
`meta.json` holds the mean and std that lead back to normalised space. The form loses what lies
outside [0, 1] and everything below 1/255.
"""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.augment import normalize
from data.specs import Stats
from data.synthetic_forms import read_description, write_description
from utils.errors import UserError

if TYPE_CHECKING:
    from data.synthetic import SyntheticSet


def read_png(path: Path, stats: Stats | None, experiment: int) -> dict[str, Any]:
    """Read the listed images and normalise them with `stats`, else the stored ones."""
    content = read_description(path / "meta.json")
    stats = stats or content.get("stats")
    if stats is None:
        raise UserError(f"{path / 'meta.json'} gives no mean and std, and none were passed")
    try:
        with (path / "labels.csv").open(newline="", encoding="utf-8") as file:
            rows = [(row["file"], int(row["label"])) for row in csv.DictReader(file)]
        labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RuntimeError, csv.Error):
        raise UserError(
            f"{path / 'labels.csv'} is not a table with the columns file and label (an integer)"
        ) from None
    if not rows:
        raise UserError(f"{path / 'labels.csv'} lists no image")
    pixels = [_read_image(path, name) for name, _ in rows]
    for (name, _), image in zip(rows, pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise UserError(
                f"{path / name} has shape {tuple(image.shape)}, the first image "
                f"{tuple(pixels[0].shape)}; expected equal shapes"
            )
    images = torch.stack(pixels).float() / 255
    if not len(stats.mean) == len(stats.std) == images.shape[1]:
        raise UserError(f"{path}: mean and std do not fit images of {images.shape[1]} channels")
    return content | {
        "images": normalize(images, stats),
        "targets": labels,
    }


def _read_image(folder: Path, name: str) -> Tensor:
    """One 8-bit image of the folder: C×H×W uint8."""
    if Path(name).name != name:
        raise UserError(f"{folder / 'labels.csv'} names {name!r}, expected a file in that folder")
    try:
        with Image.open(folder / name) as image:
            mode, array = image.mode, np.array(image)
    except Exception as error:  # Pillow raises many types on damaged files
        raise UserError(f"{folder / name} cannot be read ({type(error).__name__})") from None
    if mode not in ("L", "RGB"):
        raise UserError(f"{folder / name} has mode {mode}, expected 8-bit grayscale or RGB")
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def write_png(synthetic: SyntheticSet, path: Path) -> None:
    """Write the folder, whole or not at all; `path` must be absent or empty."""
    if synthetic.soft:
        raise UserError(
            f"cannot write {path}: a PNG folder cannot hold float targets; "
            "use --form pair or safetensors"
        )
    if synthetic.images.shape[1] not in (1, 3):
        raise UserError(f"cannot write {path}: PNG needs 1 or 3 channels")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"cannot write {path}: it exists and is not an empty folder")
    pixels = synthetic.to_pixels().mul(255).round().byte().permute(0, 2, 3, 1).squeeze(-1).numpy()
    names = [f"{i:05d}.png" for i in range(len(pixels))]
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        for name, image in zip(names, pixels, strict=True):
            Image.fromarray(image).save(temporary / name)
        _write_labels(temporary / "labels.csv", names, synthetic)
        write_description(synthetic, temporary / "meta.json")
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes private folders
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_labels(path: Path, names: list[str], synthetic: SyntheticSet) -> None:
    """`file,label` and, where info names the classes, `class_name`."""
    labels = synthetic.targets.tolist()
    classes = synthetic.info.get("class_names")
    named = isinstance(classes, list) and len(classes) > max(labels)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "class_name"] if named else ["file", "label"])
        for name, y in zip(names, labels, strict=True):
            writer.writerow([name, y, classes[y]] if named else [name, y])
