"""Running the conversion of one part over worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from data import pictures

_BLOCK = 1 << 20  # bytes of rows in one task: small enough for the cache
_MOST_PICTURES = 64  # in one task, so that all workers finish together

_Result = tuple[range, list[tuple[int, str]], np.ndarray]
_job: Job | None = None  # of a worker process; set once when it starts


@dataclass(frozen=True)
class Job:
    """What every task of one part needs; a worker gets it once.

    Attributes:
        images: picture files, or a uint8 array.
        scratch: file that receives the rows.
        first_row: row of the file where this part begins.
        size: height = width in pixels.
        channels: 1 or 3.
    """

    images: Sequence[Path] | np.ndarray
    scratch: Path
    first_row: int
    size: int
    channels: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.channels * self.size * self.size


def default_workers() -> int:
    """One process per core this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def convert_all(job: Job, workers: int) -> Iterator[_Result]:
    """Convert all pictures of `job`; yields (span, unreadable ones, moments) per task.

    Forked workers share a raw array with this process; they touch NumPy and PIL only. Where
    forking is unsafe (macOS, Windows) they are spawned and get a copy.
    """
    by_file = not isinstance(job.images, np.ndarray)
    step = max(1, _BLOCK // job.row_bytes)
    copies = not by_file and job.images.shape[1:3] == (job.size, job.size)
    if not copies:
        step = min(step, _MOST_PICTURES if by_file else 16 * _MOST_PICTURES)
    total = len(job.images)
    spans = [range(start, min(start + step, total)) for start in range(0, total, step)]
    if copies or workers == 1 or len(spans) == 1:
        for span in spans:
            yield _convert(job, span)
        return
    method = "fork" if sys.platform == "linux" else "spawn"
    with ProcessPoolExecutor(
        min(workers, len(spans)), multiprocessing.get_context(method), _start, (job,)
    ) as pool:
        try:
            yield from pool.map(_convert_own, spans)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start(job: Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent would leave its workers waiting for ever: they hold each other's pipes."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _convert_own(span: range) -> _Result:
    return _convert(_job, span)


def _convert(job: Job, span: range) -> _Result:
    """Convert the pictures of `span` and write their rows; an unreadable one leaves a gap."""
    chosen = job.images[span.start : span.stop]
    if isinstance(job.images, np.ndarray):
        good, broken = None, []
        rows = pictures.rows_from_array(chosen, job.size, job.channels)
    else:
        rows, good, broken = pictures.rows_from_files(chosen, job.size, job.channels)
    totals = pictures.moments(rows)
    if broken:
        gapped = np.zeros((len(span), *rows.shape[1:]), np.uint8)
        gapped[good] = rows
        rows = gapped
    with job.scratch.open("rb+", buffering=0) as file:
        file.seek((job.first_row + span.start) * job.row_bytes)
        rest = memoryview(rows.reshape(-1))
        while rest:
            rest = rest[file.write(rest) :]
    return span, [(span.start + position, reason) for position, reason in broken], totals
