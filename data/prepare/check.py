"""Verifying a prepared set: shapes, ranges, labels, checksums, statistics against the tables."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.meta import checksum, measure_statistics, read_meta, stored_statistics
from data.prepared import SPLITS, ImageSplit, file_name, prepared_sizes, read_split
from data.specs import DC_SPECS, KRR_SPECS, DatasetSpec, Stats
from utils.checkpoint import check_sums
from utils.errors import UserError

_TOLERANCE = 0.01  # of mean and std: other resizers move the third digit, other pictures the second


def check_prepared(data_dir: Path, folder: str, spec: DatasetSpec | None, size: int | None = None) -> None:
    """Check one prepared size of a set, or all, and print a report; a UserError if anything is wrong."""
    path = data_dir / folder
    sizes = [each for each in prepared_sizes(path) if size in (None, each)]
    if not sizes:
        raise UserError(f"{path} holds no prepared tensors{f' at size {size}' if size else ''}")
    meta, problems = read_meta(path), []
    for each in sizes:
        print(f"{path} at size {each}")
        for split in SPLITS:
            try:
                problems += _check_split(path, split, each, spec, meta)
            except UserError as error:
                problems.append(str(error))
    for problem in problems:
        print(f"  FAILED {problem}")
    if problems:
        raise UserError(f"{path}: {len(problems)} checks failed; first: {problems[0]}")
    print("all checks passed")


def _check_split(
    folder: Path, split: str, size: int, spec: DatasetSpec | None, meta: dict[str, Any]
) -> Iterator[str]:
    """Check one split and compare it with meta.json; yields the failures."""
    entry, names = meta["sizes"].get(str(size), {}), meta.get("class_names") or ()
    sums, counts = entry.get("sha256", {}), entry.get("counts", {})
    classes = spec.num_classes if spec else len(names)
    if split == "train" and not sums:
        print("  no checksums on record (not written by data.prepare)")
    x_path, y_path = (folder / file_name(kind, split, size) for kind in "XY")
    found = read_split(folder, split, size, spec, mmap=True)
    if found is None:
        if split == "train" or split in counts or (spec and spec.has_test):
            yield f"{x_path} does not exist"
        return
    check_sums(x_path, what="image tensor")
    images, labels = found.images, found.labels
    counted = ""
    if labels is not None:
        per_class = labels.bincount(minlength=classes)
        counted = f", {int(per_class.min())} to {int(per_class.max())} per class"
        if classes and len(per_class) > classes:
            yield f"{y_path} holds label {len(per_class) - 1} of {classes} classes"
        if split == "train" and not per_class.all():
            empty = int((per_class == 0).sum())
            yield f"{y_path}: {empty} of {len(per_class)} classes have no picture"
    elif classes:
        yield f"{y_path} does not exist"
    print(f"  {split}: {len(images)} images {tuple(images.shape[1:])} {images.dtype}{counted}")
    if counts.get(split) not in (None, len(images)):
        yield f"{x_path} holds {len(images)} images, meta.json says {counts[split]}"
    for kind, tensor, path in (("X", images, x_path), ("Y", labels, y_path)):
        recorded = sums.get(f"{kind}_{SPLITS[split]}")
        if tensor is not None and recorded not in (None, checksum(tensor)):
            yield f"{path} does not match its checksum in meta.json"
    if split == "train":
        yield from _check_statistics(found, spec, size)


def _check_statistics(train: ImageSplit, spec: DatasetSpec | None, size: int) -> Iterator[str]:
    """Compare with meta.json and the KRR-ST table; the DC table only informs.

    Several rows of the DC table are another set's values or means of per-picture deviations.
    """
    measured, path = measure_statistics(train.images), train.path
    print(f"  mean {_show(measured.mean)}, std {_show(measured.std)}")
    recorded = stored_statistics(path.parent, size, len(measured.mean))
    if recorded is not None and _distance(measured, recorded) > 1e-4:
        yield f"{path}: mean and std differ from meta.json"
    for family, table in (("KRR-ST", KRR_SPECS), ("DC", DC_SPECS)):
        rows = [row for row in table.values() if spec and row.folder == spec.folder and size in row.stats]
        if not rows:
            continue
        published = rows[0].stats[size]
        distance = _distance(measured, published)
        print(f"  largest difference from the {family} table: {distance:.4f}")
        if family == "KRR-ST" and distance > _TOLERANCE:
            yield (
                f"{path}: mean {_show(measured.mean)} and std {_show(measured.std)} are off the "
                f"published {_show(published.mean)} and {_show(published.std)}"
            )


def _distance(one: Stats, other: Stats) -> float:
    pairs = zip(one.mean + one.std, other.mean + other.std, strict=False)
    return max(abs(a - b) for a, b in pairs)


def _show(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
