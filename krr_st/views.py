"""Targets of real batches: computed each time, or once for every view of every image.

Crop offsets times flip give only (2·pad+1)²·2 views of an image (162 at the published padding), so
that the target model's representation of each can be kept and looked up ever after. The
distribution of batches and of their targets stays what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from data.augment import apply_crop_flip, count_views, default_padding, normalize, views_from_numbers
from data.specs import Stats
from distillation.problem import Problem
from evaluation.target import target_sample
from krr_st.config import TrainFlags
from utils import checkpoint
from utils.device import free_memory
from utils.errors import UserError
from utils.precision import DTYPES

TargetFunction = Callable[[Tensor], Tensor]
# With fewer rows in a batch some CPU kernels round differently: a view's value would depend on
# which others were missing beside it, and a resumed run would differ in the last bit.
_LEAST_ROWS = 16
_FILL_ROWS = 2048


class RealBatch(NamedTuple):
    """Augmented real images and which views they are.

    Attributes:
        x: (b, C, H, W) normalised, on the device.
        index: (b,) int64 row of each image in the training split, on the CPU.
        view: (b,) int64 number of its view, on the CPU.
    """

    x: Tensor
    index: Tensor
    view: Tensor


class Targets(Protocol):
    """Maps a real batch to target representations (b, D), float32 on its device."""

    def __call__(self, batch: RealBatch) -> Tensor:
        """The representations."""

    def flush(self) -> None:
        """Make what was computed outlast this process, where it is meant to."""


def on_enough_rows(target: TargetFunction, x: Tensor) -> Tensor:
    """`target(x)`, computed on at least _LEAST_ROWS rows."""
    filling = max(0, _LEAST_ROWS - len(x))
    if filling:
        x = torch.cat([x, x[:1].expand(filling, *x.shape[1:])])
    return target(x)[: len(x) - filling]


class OnlineTargets:
    """The target model's forward pass at every step, as published.

    Args:
        target: (b, C, H, W) -> (b, D), frozen.
        dtype: what a table would keep; rounded the same way, so that both give the same values.
    """

    def __init__(self, target: TargetFunction, dtype: torch.dtype = torch.float32) -> None:
        self.target, self.dtype = target, dtype

    def __call__(self, batch: RealBatch) -> Tensor:
        """(b, D)."""
        return on_enough_rows(self.target, batch.x).to(self.dtype).float()

    def flush(self) -> None:
        """Nothing is kept."""


class TargetViews:
    """A table of representations, filled where a view is first drawn.

    Which entries are there is known on the CPU, where views are drawn: looking up never makes the
    host wait for the device.

    Args:
        target: (b, C, H, W) -> (b, D), frozen.
        table: (N·V, D) float32 or bfloat16: on the device, or a file mapped into memory.
        views: V, number of views of an image.
        known: (N·V,) bool on the CPU, which rows of the table are there; None: none.
        on_flush: called with `known`.
    """

    def __init__(
        self,
        target: TargetFunction,
        table: Tensor,
        views: int,
        known: Tensor | None = None,
        on_flush: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.target, self.table, self.views = target, table, views
        self.known = torch.zeros(len(table), dtype=torch.bool) if known is None else known
        self.complete = bool(self.known.all())
        self._on_flush = on_flush
        self._fresh = 0

    def __call__(self, batch: RealBatch) -> Tensor:
        """(b, D) float32 on the batch's device; computes only what is not known."""
        rows = batch.index * self.views + batch.view
        if not self.complete:
            missing = (~self.known[rows]).nonzero().flatten()
            if len(missing):
                self._compute(batch.x, missing, rows[missing])
        return self._at(rows).to(batch.x.device, torch.float32, non_blocking=True)

    def flush(self) -> None:
        """Write which entries are there, after the entries themselves (a mapped table only)."""
        if self._on_flush is not None and self._fresh:
            self._on_flush(self.known)
            self._fresh = 0
        self.complete = self.complete or bool(self.known.all())

    @torch.no_grad()
    def fill(self, images: Tensor, stats: Stats, pad: int, progress: bool = True) -> None:
        """Compute all that is missing.

        Args:
            images: (N, C, H, W) training images in pixel space.
            stats: their normalisation.
            pad: padding of the crop.
            progress: show a bar.
        """
        device = self.table.device
        numbers = torch.arange(self.views)
        todo = (~self.known.view(-1, self.views).all(1)).nonzero().flatten()
        group = max(1, _FILL_ROWS // self.views)
        for index in tqdm(todo.split(group), desc="target views", disable=None if progress else 1):
            views = views_from_numbers(numbers.repeat(len(index)), pad)
            x = images[index].to(device).repeat_interleave(self.views, 0)
            x = normalize(apply_crop_flip(x, views, pad), stats)
            rows = (index[:, None] * self.views + numbers).flatten()
            for part, own in zip(x.split(_FILL_ROWS), rows.split(_FILL_ROWS), strict=True):
                self._store(own, self.target(part))
        self.complete = True
        self.flush()

    def _at(self, rows: Tensor) -> Tensor:
        return self.table[rows.to(self.table.device, non_blocking=True)]

    def _compute(self, x: Tensor, places: Tensor, rows: Tensor) -> None:
        missing = x[places.to(x.device, non_blocking=True)]
        self._store(rows, on_enough_rows(self.target, missing))

    def _store(self, rows: Tensor, y: Tensor) -> None:
        where = rows.to(self.table.device, non_blocking=True)
        self.table[where] = y.to(self.table.device, self.table.dtype)
        self.known[rows] = True
        self._fresh += len(rows)


@dataclass(frozen=True)
class Plan:
    """What `plan_views` decided.

    Attributes:
        kind: online, memory or file.
        dtype: of the table.
        why: for the user.
    """

    kind: str
    dtype: torch.dtype
    why: str


def plan_views(
    mode: str, dtype: torch.dtype, *, rows: int, dim: int, draws: int, free: int, keep: bool
) -> Plan:
    """Where targets come from. The values are the same wherever that is.

    Args:
        mode: auto, exact or online.
        dtype: of the entries.
        rows: N·V.
        dim: D.
        draws: views that the run draws in all.
        free: bytes that are free on the device.
        keep: a folder to keep the table in was named.
    """
    size = rows * dim * dtype.itemsize
    shown = f"{rows} views x {dim} are {_gigabytes(size)} as {str(dtype)[6:]}"
    if mode == "online":
        return Plan("online", dtype, "--target_views online")
    if keep:
        return Plan("file", dtype, f"{shown}, kept on disk")
    fits = size <= free // 2
    if mode == "exact":
        return Plan(*(("memory", dtype, shown) if fits else ("file", dtype, f"{shown}, on disk")))
    if not fits:
        return Plan("online", dtype, f"{shown}, more than half of the free memory")
    if draws < rows // 10:
        return Plan("online", dtype, f"{draws} draws from {rows} views would hardly repeat one")
    return Plan("memory", dtype, shown)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def mapped_table(
    folder: Path, rows: int, dim: int, dtype: torch.dtype, about: dict[str, object]
) -> tuple[Tensor, Tensor, Callable[[Tensor], None]]:
    """A table in a file that later runs with the same `about` fill further.

    Args:
        folder: of all tables; this one has a sub-folder named after `about`.
        rows: N·V.
        dim: D.
        dtype: of the entries.
        about: everything an entry depends on, plain values.

    Returns:
        The (rows, dim) table, its `known` so far, and what makes both outlast a crash.

    Raises:
        UserError: the folder cannot be written or has no room.
    """
    about = {**about, "rows": rows, "dim": dim, "dtype": str(dtype)}
    text = json.dumps(about, indent=2, sort_keys=True)
    key = checkpoint.fingerprint(torch.tensor(list(text.encode()), dtype=torch.uint8))
    place = folder / key
    path, known_path = place / "table.bin", place / "known.pt"
    size = rows * dim * dtype.itemsize
    try:
        place.mkdir(parents=True, exist_ok=True)
        there = path.exists() and path.stat().st_size == size
        if not there:
            known_path.unlink(missing_ok=True)
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now, not later
                else:
                    file.truncate(size)
        table = torch.from_file(str(path), shared=True, size=rows * dim, dtype=dtype)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"--views_dir {folder}: cannot make a table of target views of {_gigabytes(size)} "
            f"there ({reason}); name another folder or use --target_views online"
        ) from None
    checkpoint.write_text(place / "about.json", text + "\n")
    known = torch.zeros(rows, dtype=torch.bool)
    if known_path.exists():
        known = checkpoint.load_tensor(known_path, what="index of target views")
        if known.shape != (rows,) or known.dtype != torch.bool:
            raise UserError(f"{known_path} does not belong to {path}; delete {place}")

    def flush(present: Tensor) -> None:
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # entries first: what is said to be there must be there
        checkpoint.save(present, known_path)

    return table.view(rows, dim), known, flush


def targets_for(problem: Problem, flags: TrainFlags) -> Targets:
    """Where a run's targets come from: a table of views, or the target model at every step.

    Raises:
        UserError: a table on disk cannot be made.
    """
    image_set, target, device = problem.image_set, problem.target, problem.device
    images, stats, hflip = image_set.train.images, image_set.stats, image_set.hflip
    pad, dim = default_padding(image_set.size), target.dim
    views = count_views(pad, hflip)
    rows = len(images) * views
    draws = flags.outer_iteration * min(flags.outer_batch_size, len(images))
    dtype = DTYPES[flags.views_dtype or ("bf16" if flags.precision == "bf16" else "fp32")]
    plan = plan_views(
        flags.target_views,
        dtype,
        rows=rows,
        dim=dim,
        draws=draws,
        free=free_memory(device),
        keep=flags.views_dir is not None,
    )
    print(f"targets: {plan.kind} ({plan.why})")
    if plan.kind == "online":
        return OnlineTargets(target, plan.dtype)
    if plan.kind == "file":
        about = {
            "target_model": flags.target_model,
            "target": checkpoint.fingerprint(
                target_sample(problem.target, problem.image_set, problem.device)
            ),
            "images": checkpoint.fingerprint(images),
            "stats": [stats.mean, stats.std],
            "pad": pad,
            "hflip": hflip,
            "precision": flags.precision,
        }
        if flags.target_ckpt is not None:
            about["checkpoint"] = hashlib.sha256(flags.target_ckpt.read_bytes()).hexdigest()[:16]
        folder = flags.views_dir or Path(flags.save_dir) / "target_views"
        table, known, flush = mapped_table(folder, rows, dim, plan.dtype, about)
        targets = TargetViews(target, table, views, known, flush)
        if device.type == "cuda" and table.nbytes <= free_memory(device) // 2 and targets.complete:
            targets.table = table.to(device)
    else:
        table = torch.empty(rows, dim, dtype=plan.dtype, device=device)
        targets = TargetViews(target, table, views)
    # On a GPU all at once: a view at a time leaves it idle. A CPU computes what is drawn.
    if device.type == "cuda" and draws >= rows and not targets.complete:
        targets.fill(images, stats, pad)
    return targets
