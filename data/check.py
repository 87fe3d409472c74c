"""Verifying a prepared set: shapes, ranges, labels, checksums, statistics against the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.load import SPLITS, check_images, check_labels, tensor_path
from data.meta import measure_statistics, read_meta
from data.specs import DC_SPECS, KRR_SPECS, DatasetSpec, Stats
from data.write import checksum
from utils.checkpoint import check_sums, load_tensor
from utils.errors import UserError

_TOLERANCE = 0.01  # of mean and std: other resizers move the third digit, other pictures the second


def check_prepared(
    data_dir: Path, folder: str, spec: DatasetSpec | None, size: int | None = None
) -> None:
    """Check every prepared size of a set, or one, and print what was found.

    Args:
        data_dir: the folder that holds one folder a set.
        folder: the set's folder.
        spec: its row in a table, or None for an own set.
        size: only this size.

    Raises:
        UserError: nothing prepared, or any check failed; the report above it has all failures.
    """
    found = sorted((data_dir / folder).glob("X_*_*.pth"))
    sizes = sorted({int(p.stem.rsplit("_", 1)[1]) for p in found if p.stem[-1].isdigit()})
    if size is not None:
        sizes = [size] if size in sizes else []
    if not sizes:
        wanted = f" at size {size}" if size else ""
        raise UserError(f"{data_dir / folder} holds no prepared tensors{wanted}")
    problems = []
    for each in sizes:
        problems += _check_size(data_dir, folder, spec, each)
    if problems:
        for problem in problems:
            print(f"  FAILED {problem}")
        raise UserError(f"{data_dir / folder}: {len(problems)} checks failed; first: {problems[0]}")
    print("all checks passed")


def _check_size(data_dir: Path, folder: str, spec: DatasetSpec | None, size: int) -> list[str]:
    """Check both splits at one size; returns the failures."""
    print(f"{data_dir / folder} at size {size}")
    problems: list[str] = []
    try:
        meta = read_meta(data_dir / folder)
    except UserError as error:
        return [str(error)]
    entry = meta["sizes"].get(str(size), {})
    if not entry.get("sha256"):
        print("  no checksums on record (not written by data.prepare)")
    names = meta.get("class_names")
    classes = spec.num_classes if spec else (len(names) if names else None)
    for split in SPLITS:
        x_path = tensor_path(data_dir, folder, "X", split, size)
        y_path = tensor_path(data_dir, folder, "Y", split, size)
        if not x_path.exists() and not y_path.exists():
            if split == "train" or split in entry.get("counts", {}) or (spec and spec.has_test):
                problems.append(f"{x_path} does not exist")
            continue
        try:
            problems += _check_split(x_path, y_path, split, spec, size, classes, entry)
        except UserError as error:
            problems.append(str(error))
    return problems


def _check_split(
    x_path: Path,
    y_path: Path,
    split: str,
    spec: DatasetSpec | None,
    size: int,
    classes: int | None,
    entry: dict[str, Any],
) -> list[str]:
    """Check one pair of files; returns the failures that leave the rest checkable."""
    problems = []
    images = load_tensor(x_path, what="image tensor", mmap=True)
    check_sums(x_path, what="image tensor")
    check_images(images, x_path, size, spec.channels if spec else None)
    tensors = {"X": images}
    counted = ""
    if classes is not None or y_path.exists():
        labels = check_labels(
            load_tensor(y_path, what="label tensor"), y_path, len(images), classes
        )
        tensors["Y"] = labels
        per_class = torch.bincount(labels, minlength=classes or 0)
        counted = f", {int(per_class.min())} to {int(per_class.max())} a class"
        if split == "train" and not per_class.all():
            empty = int((per_class == 0).sum())
            problems.append(f"{y_path}: {empty} of {len(per_class)} classes have no picture")
    print(f"  {split}: {len(images)} images {tuple(images.shape[1:])} {images.dtype}{counted}")
    expected = entry.get("counts", {}).get(split)
    if expected not in (None, len(images)):
        problems.append(f"{x_path} holds {len(images)} images, meta.json says {expected}")
    for kind, tensor in tensors.items():
        recorded = entry.get("sha256", {}).get(f"{kind}_{SPLITS[split]}")
        if recorded is not None and recorded != checksum(tensor):
            path = x_path if kind == "X" else y_path
            problems.append(f"{path} does not match its checksum in meta.json")
    if split == "train":
        problems += _check_statistics(measure_statistics(images), x_path, spec, size, entry)
    return problems


def _check_statistics(
    measured: Stats, path: Path, spec: DatasetSpec | None, size: int, entry: dict[str, Any]
) -> list[str]:
    """Compare with meta.json and the KRR-ST table; the DC table only informs.

    Several rows of the DC table are another set's values or means of per-picture deviations.
    """
    print(f"  mean {_show(measured.mean)}, std {_show(measured.std)}")
    problems = []
    if "mean" in entry and "std" in entry:
        recorded = Stats(tuple(entry["mean"]), tuple(entry["std"]))
        if _distance(measured, recorded) > 1e-4:
            problems.append(f"{path}: mean and std differ from meta.json")
    for family, table in (("KRR-ST", KRR_SPECS), ("DC", DC_SPECS)):
        rows = [row for row in table.values() if spec and row.folder == spec.folder]
        published = next((row.stats[size] for row in rows if size in row.stats), None)
        if published is None:
            continue
        distance = _distance(measured, published)
        print(f"  largest difference from the {family} table: {distance:.4f}")
        if family == "KRR-ST" and distance > _TOLERANCE:
            problems.append(
                f"{path}: mean {_show(measured.mean)} and std {_show(measured.std)} are off the "
                f"published {_show(published.mean)} and {_show(published.std)}"
            )
    return problems


def _distance(one: Stats, other: Stats) -> float:
    pairs = zip(one.mean + one.std, other.mean + other.std, strict=False)
    return max(abs(a - b) for a, b in pairs)


def _show(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
