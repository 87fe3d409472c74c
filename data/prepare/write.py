"""Streaming a source into prepared tensors: worker processes, bounded memory, all files or none.

The rows of a split are written to a nameless scratch file, which is then mapped and saved, so that no
split has to fit in memory. (Writing to a mapped file would kill the process on a full disk.)
"""

import contextlib
import functools
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.meta import checksum, measure_statistics, read_meta
from data.prepare import images
from data.prepare.raw import Part, Source
from data.prepared import SPLITS, file_name, sample
from utils.checkpoint import atomic_path, torch_writing, write_text
from utils.errors import UserError
from utils.stop import end_with_parent

# Pictures converted together: few, so that all workers finish at about the same time.
_FILES, _ROWS = 64, 256
_BLOCK_BYTES = 1 << 26


class _Bar(tqdm):
    monitor_interval = 0  # no thread of its own: worker processes are forked while the bar shows


def default_workers() -> int:
    """One process per core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_prepared(
    folder: Path,
    size: int,
    channels: int,
    source: Source,
    *,
    workers: int,
    skip_broken: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Convert `source`, put X/Y tensors of one size and meta.json into `folder`; what that says of this size.

    All files of this size appear together at the end; after any failure the folder is as before. A
    process that is killed while they appear leaves files that meta.json does not describe, which
    `data.load` refuses. `skip_broken` leaves unreadable pictures out and lists them in meta.json;
    `facts` go to its top level. A UserError for unreadable pictures (without `skip_broken`), labels out of
    range, a disk that is full or cannot be written, and other classes than this set's other sizes have.
    """
    fresh, unreadable = not folder.exists(), folder.with_name(f"{folder.name}.unreadable.txt")
    try:
        # New files take their names as `files` closes.
        with contextlib.ExitStack() as files, _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _check_same_classes(folder, size, source)
            tensors, broken = {}, {}
            for split in source.splits:
                scratch = files.enter_context(tempfile.TemporaryFile(dir=folder))
                shape = channels, size, size
                rows, labels, skipped = _convert_split(source, split, shape, workers, scratch)
                tensors |= {("X", split): rows, ("Y", split): labels}
                if skipped:
                    broken[split] = skipped
            if broken and not skip_broken:
                raise UserError(_describe_broken(broken, unreadable))
            entry = _describe(tensors) | {"skipped": broken}
            for (kind, split), tensor in tensors.items():
                path = folder / file_name(kind, split, size)
                if tensor is not None:
                    temporary = files.enter_context(atomic_path(path))
                    with temporary.open("wb") as file, torch_writing():
                        torch.save(tensor, file)
            meta = read_meta(folder) | {"source": source.origin, "class_names": source.class_names, **facts}
            meta["sizes"][str(size)] = entry
            meta_path = files.enter_context(atomic_path(folder / "meta.json"))  # takes its name first
            meta_path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            for kind, split in itertools.product("XY", SPLITS):  # of an earlier set under this name
                if tensors.get((kind, split)) is None:
                    (folder / file_name(kind, split, size)).unlink(missing_ok=True)
        unreadable.unlink(missing_ok=True)  # of an earlier try
        return entry
    finally:
        if fresh:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing was written


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full disk, too little memory or a killed worker raises into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    except MemoryError as error:  # of a worker: its message ends with that of the original
        reason = str(error).split("MemoryError:")[-1].strip().split("\n")[0]
        raise UserError(f"out of memory{' at ' * bool(reason)}{reason}; try --workers 1") from None
    except RuntimeError as error:
        if "worker (pid" not in str(error):
            raise
        raise UserError("a worker process was killed (out of memory?); try --workers 1") from None


def _convert_split(
    source: Source, split: str, shape: tuple[int, int, int], workers: int, scratch: BinaryIO
) -> tuple[Tensor | None, Tensor | None, list[dict[str, str]]]:
    """Convert the parts of one split, one after another, to rows of `shape` in the file `scratch`.

    Returns the images, mapped from the file, the labels, if any (both None if no picture is readable),
    and the unreadable pictures with the reasons.
    """
    labels, skipped = [], []
    with _Bar(total=0, desc=f"{split} {shape[1]}px", unit="img", disable=None) as bar:
        for part in source.splits[split]:
            if part.labels is not None and len(part.labels) != len(part.images):
                raise UserError(f"{split} split: {len(part.labels)} labels for {len(part.images)} pictures")
            keep = np.ones(len(part.images), dtype=bool)
            bar.total += len(part.images)
            for span, rows, broken in _convert(part, *shape[:2], workers):
                scratch.write(rows.tobytes())
                bar.update(len(span))
                for offset, reason in broken:
                    keep[span[offset]] = False
                    skipped.append({"picture": str(part.images[span[offset]]), "reason": reason})
            if part.labels is not None:
                labels.append(part.labels[keep])
            del part  # before the next one is read
    scratch.flush()
    count = scratch.tell() // math.prod(shape)
    if not count:
        return None, None, skipped
    rows = torch.from_numpy(np.memmap(scratch, np.uint8, "r+", shape=(count, *shape)))
    if source.class_names is None:
        return rows, None, skipped
    joined, last = torch.from_numpy(np.concatenate(labels)).long(), len(source.class_names) - 1
    low, high = int(joined.min()), int(joined.max())
    if low < 0 or high > last:
        raise UserError(f"{split} split: labels from {low} to {high}, expected 0 to {last}")
    empty = joined.bincount(minlength=last + 1).eq(0).nonzero().flatten().tolist()
    if skipped and empty and split == "train":
        name = source.class_names[empty[0]]
        raise UserError(f"class {name} of {source.origin} has no readable picture; mend one, or remove it")
    return rows, joined, skipped


def _convert(part: Part, channels: int, size: int, workers: int) -> DataLoader:
    """The blocks of a part in order, from worker processes where that pays."""
    array, count = isinstance(part.images, np.ndarray), len(part.images)
    resized = not array or part.images.shape[1:3] != (size, size)
    step = min(max(1, _BLOCK_BYTES // (channels * size * size)), _ROWS if array else _FILES)
    spans = [range(count)[start : start + step] for start in range(0, count, step)]
    return DataLoader(
        spans,
        batch_size=None,
        num_workers=min(workers, len(spans)) if resized and workers > 1 and len(spans) > 1 else 0,
        # Not tensors, which would travel in scarce shared memory.
        collate_fn=functools.partial(_convert_block, part.images, size, channels),
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )


def _convert_block(
    pictures: Sequence[Path] | np.ndarray, size: int, channels: int, span: range
) -> tuple[range, np.ndarray, list[tuple[int, str]]]:
    """The positions `span`, the rows of its readable pictures, the unreadable ones."""
    read = images.rows_from_array if isinstance(pictures, np.ndarray) else images.rows_from_files
    return span, *read(pictures[span.start : span.stop], size, channels)


def _describe(tensors: dict[tuple[str, str], Tensor | None]) -> dict[str, Any]:
    """What meta.json says about X and Y of the splits."""
    entry = {"resize": images.RESIZE_RULE, "counts": {}, "sha256": {}, "sample": {}}
    for (kind, split), tensor in tensors.items():
        if tensor is not None:
            entry["counts"][split] = len(tensor)
            key, rows = f"{kind}_{SPLITS[split]}", sample(tensor)
            entry["sha256"][key] = checksum(tensor)
            if rows is not tensor:
                entry["sample"][key] = checksum(rows)
        elif kind == "X":
            raise UserError(f"the {split} split has no readable picture")
    stats = measure_statistics(tensors["X", "train"])
    return entry | {"mean": list(stats.mean), "std": list(stats.std)}


def _check_same_classes(folder: Path, size: int, source: Source) -> None:
    """Refuse to mix two different sets under one name; the class names belong to all sizes."""
    meta, names = read_meta(folder), source.class_names and list(source.class_names)
    others = [other for other in meta["sizes"] if other != str(size)]
    if others and meta.get("class_names", names) != names:
        raise UserError(
            f"{folder} is prepared at size {others[0]} with other classes; "
            "choose another --data_name or remove that folder"
        )


def _describe_broken(broken: dict[str, list[dict[str, str]]], path: Path) -> str:
    """One line with the count and the first five names; if there are more, all go to the file `path`."""
    every = [f"{item['picture']}: {item['reason']}" for items in broken.values() for item in items]
    shown, more = "; ".join(every[:5]), ""
    if len(every) > 5:
        write_text(path, "\n".join(every) + "\n")
        more = f"; all of them in {path}"
    return (
        f"{len(every)} unreadable picture{'s' * (len(every) > 1)} ({shown}{more}); "
        "repair or remove them, or leave them out with --skip_broken"
    )
