"""Streaming a source into prepared tensors: worker processes, bounded memory, all files or none.

Workers write their rows into one scratch file per split by ordinary writes: on a full disk those
fail like any other, where a mapped file would kill the process. The scratch file is then mapped
and saved, so no pixel is held twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import pictures
from data.convert import Job, convert_all, default_workers
from data.load import SPLITS, tensor_path
from data.meta import merge_meta, read_meta
from data.raw import Part, Source
from utils.checkpoint import atomic_path
from utils.errors import UserError
from utils.locks import in_use, is_left_over


class _Bar(tqdm):
    monitor_interval = 0  # no thread of tqdm's own: worker processes are forked while it shows


@dataclass
class _Rows:
    """One converted split: its rows in the file `scratch`, and what was learnt on the way."""

    scratch: Path
    totals: np.ndarray
    rows: int = 0
    labels: list[np.ndarray] = field(default_factory=list)
    broken: list[dict[str, str]] = field(default_factory=list)


def write_prepared(
    data_dir: Path,
    folder: str,
    size: int,
    channels: int,
    source: Source,
    *,
    workers: int,
    skip_broken: bool = False,
) -> dict[str, Any]:
    """Convert `source` and put X/Y tensors and meta.json into `data_dir/folder`.

    All files of this size appear together at the end; after any failure the folder is as before.

    Args:
        data_dir: the folder that holds one folder a set.
        folder: the set's folder.
        size: height = width in pixels.
        channels: 1 or 3.
        source: the raw set.
        workers: number of processes that decode and resize.
        skip_broken: leave unreadable pictures out and list them in meta.json.

    Returns:
        The entry of this size in meta.json.

    Raises:
        UserError: unreadable pictures (without `skip_broken`), labels that do not fit, a disk that
            is full or cannot be written, or other classes than this set's other sizes have.
    """
    target = data_dir / folder
    fresh = not target.exists()
    try:
        with _disk_errors(target):
            target.mkdir(parents=True, exist_ok=True)
        _check_same_classes(target, size, source)
        with (
            _scratch_folder(target) as scratch,
            contextlib.ExitStack() as finals,  # new files take their names as it closes
            _disk_errors(target),
        ):
            entry = _convert_and_save(
                data_dir, folder, size, channels, source, workers, skip_broken, scratch, finals
            )
            _remove_stale(data_dir, folder, size, source)
        return entry
    finally:
        if fresh:
            with contextlib.suppress(OSError):
                target.rmdir()  # only if nothing was written


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn what a full disk or a killed worker raises into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?); try --workers 1") from None


def _convert_and_save(
    data_dir: Path,
    folder: str,
    size: int,
    channels: int,
    source: Source,
    workers: int,
    skip_broken: bool,
    scratch: Path,
    stack: contextlib.ExitStack,
) -> dict[str, Any]:
    """Convert every split and leave the new files on `stack` under temporary names."""
    meta_path = stack.enter_context(atomic_path(data_dir / folder / "meta.json"))
    entry: dict[str, Any] = {"resize": pictures.RESIZE_RULE, "counts": {}, "sha256": {}}
    broken: dict[str, list[dict[str, str]]] = {}
    for split, parts in source.splits.items():
        total = source.counts.get(split)
        rows = _convert_split(parts(), scratch / split, size, channels, workers, split, total)
        if rows.broken:
            broken[split] = rows.broken
            if not skip_broken:
                continue  # look at the rest too, then name them all
        if not rows.rows:
            raise UserError(f"the {split} split has no readable picture")
        images = torch.from_file(
            str(rows.scratch), size=rows.rows * channels * size * size, dtype=torch.uint8
        ).view(rows.rows, channels, size, size)
        entry["counts"][split] = rows.rows
        tensors = {"X": images}
        if source.class_names is not None:
            tensors["Y"] = _checked_labels(rows, split, source.class_names)
        for kind, tensor in tensors.items():
            final = tensor_path(data_dir, folder, kind, split, size)
            entry["sha256"][f"{kind}_{SPLITS[split]}"] = checksum(tensor)
            _save(tensor, stack.enter_context(atomic_path(final)))
        del images, tensors
        rows.scratch.unlink()
        if split == "train":
            entry["mean"], entry["std"] = pictures.statistics(rows.totals, rows.rows * size * size)
    if broken and not skip_broken:
        raise UserError(_describe_broken(broken))
    entry["skipped"] = broken
    names = None if source.class_names is None else list(source.class_names)
    meta = merge_meta(
        data_dir / folder, size, entry, replace=True, source=source.origin, class_names=names
    )
    meta_path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return entry


def _convert_split(
    parts: Iterable[Part],
    scratch: Path,
    size: int,
    channels: int,
    workers: int,
    split: str,
    total: int | None,
) -> _Rows:
    """Convert the parts of one split one after another into the file `scratch`."""
    done = _Rows(scratch, np.zeros((channels, 2)))
    scratch.touch()
    with _Bar(total=total, desc=f"{split} {size}px", unit="img", disable=None) as bar:
        for part in parts:
            job = Job(part.images, scratch, done.rows, size, channels)
            if part.labels is not None and len(part.labels) != len(part.images):
                raise UserError(
                    f"{split} split: {len(part.labels)} labels for {len(part.images)} pictures"
                )
            keep = np.ones(len(part.images), dtype=bool)
            bar.total = total or done.rows + len(part.images)
            for span, broken, totals in convert_all(job, workers):
                done.totals += totals
                bar.update(len(span))
                for position, reason in broken:
                    keep[position] = False
                    picture = str(part.images[position])
                    done.broken.append({"picture": picture, "reason": reason})
            _close_gaps(job, keep)
            done.rows += int(keep.sum())
            if part.labels is not None:
                done.labels.append(part.labels[keep])
            del part, job  # before the next one is read
    return done


def _close_gaps(job: Job, keep: np.ndarray) -> None:
    """Move the rows marked in `keep` together and cut the file after them."""
    if keep.all():
        return
    with job.scratch.open("rb+") as file:
        position = job.first_row + int(np.argmin(keep))
        for row in np.flatnonzero(keep)[np.argmin(keep) :]:
            file.seek((job.first_row + int(row)) * job.row_bytes)
            content = file.read(job.row_bytes)
            file.seek(position * job.row_bytes)
            file.write(content)
            position += 1
        file.truncate(position * job.row_bytes)


def _checked_labels(rows: _Rows, split: str, class_names: tuple[str, ...]) -> Tensor:
    """The labels of a split as an int64 tensor, each one the index of a class name."""
    labels = torch.from_numpy(np.concatenate(rows.labels).astype(np.int64))
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(class_names):
        raise UserError(
            f"{split} split: labels from {low} to {high}, expected 0 to {len(class_names) - 1}"
        )
    return labels


def checksum(tensor: Tensor) -> str:
    """SHA-256 over the SHA-256 digests of a tensor's bytes in blocks of 16 MiB, on all cores."""
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    blocks = [content[start : start + (1 << 24)] for start in range(0, len(content), 1 << 24)]
    with ThreadPoolExecutor(min(len(blocks), default_workers()) or 1) as pool:
        digests = pool.map(lambda block: hashlib.sha256(block).digest(), blocks)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _save(tensor: Tensor, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(tensor, file)
    except RuntimeError as error:  # torch reports a full disk this way
        raise OSError(str(error).splitlines()[0]) from error


@contextlib.contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """A folder for scratch files beside the results (same disk), removed at the end.

    Those of processes that were killed go, too.
    """
    for old in target.glob(".prepare_*"):
        if is_left_over(old):
            shutil.rmtree(old, ignore_errors=True)
    name = tempfile.mkdtemp(prefix=".prepare_", dir=target)
    try:
        with in_use(Path(name)):
            yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def _check_same_classes(target: Path, size: int, source: Source) -> None:
    """Refuse to mix two different sets under one name; the class names belong to all sizes."""
    meta = read_meta(target)
    others = [other for other in meta["sizes"] if other != str(size)]
    names = None if source.class_names is None else list(source.class_names)
    if others and "class_names" in meta and meta["class_names"] != names:
        raise UserError(
            f"{target} is prepared at size {others[0]} with other classes; "
            "choose another --data_name or remove that folder"
        )


def _remove_stale(data_dir: Path, folder: str, size: int, source: Source) -> None:
    """Remove tensors of an earlier set under this name that the new one does not have."""
    for split in SPLITS:
        for kind in "XY":
            if split not in source.splits or (kind == "Y" and source.class_names is None):
                tensor_path(data_dir, folder, kind, split, size).unlink(missing_ok=True)


def _describe_broken(broken: dict[str, list[dict[str, str]]]) -> str:
    """One line with the count and the first few names."""
    every = [item for items in broken.values() for item in items]
    shown = "; ".join(f"{item['picture']}: {item['reason']}" for item in every[:5])
    more = f"; and {len(every) - 5} more" if len(every) > 5 else ""
    return (
        f"{len(every)} unreadable picture{'s' * (len(every) > 1)} ({shown}{more}); "
        "mend them, or leave them out with --skip_broken"
    )
