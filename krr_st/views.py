"""Targets of real batches: computed each time, or once for every view of every image.

Crop offsets and flips give only V = (2·pad+1)²·2 views of an image (162 at the published padding):
the target model's features of each can be kept and looked up. Batches and targets stay the same.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from data.augment import normalize
from data.augment.crop_flip import apply_crop_flip, count_views, default_padding
from data.load import ImageSet
from data.loader import TensorLoader, ViewPipeline, fits
from data.specs import Stats
from distillation.problem import Problem
from evaluation.target import target_sample
from krr_st.config import TrainFlags
from utils import checkpoint
from utils.device import free_memory, upload
from utils.errors import UserError
from utils.precision import DTYPES

Function, Flush = Callable[[Tensor], Tensor], Callable[[Tensor], None]
# With fewer rows in a batch some CPU kernels round differently: a view's value would depend on
# which others were missing with it, and a resumed run would differ in the last bit.
_LEAST_ROWS = 16
_ROWS_AT_ONCE, _CUDA_ROWS_AT_ONCE = 2048, 8192


def padding_and_flip(image_set: ImageSet, flags: TrainFlags) -> tuple[int, bool]:
    """What makes the views of real images: by how many pixels they are shifted, whether they are mirrored."""
    return (0, False) if flags.augment is False else (default_padding(image_set.size), image_set.hflip)


def real_loader(problem: Problem, flags: TrainFlags, generator: torch.Generator) -> TensorLoader:
    """Endless batches of the training images, normalised: ((x, views), index); --augment crops and flips.

    The batch size is that over all processes; `generator` draws order and views. The last, smaller
    batch of each pass is kept, as in the released code.
    """
    pad, hflip = padding_and_flip(problem.image_set, flags)
    views = ViewPipeline(problem.image_set.stats, pad=pad, hflip=hflip, shard=problem.group)
    return problem.loader(flags.outer_batch_size, generator, views)


class OnlineTargets:
    """The frozen target model's features, computed at every step as published; rounded like a table's."""

    def __init__(self, target: Function, dtype: torch.dtype = torch.float32) -> None:
        self.target, self.dtype = target, dtype

    def compute(self, x: Tensor) -> Tensor:
        """`target(x)`, computed on at least _LEAST_ROWS rows."""
        filling = max(0, _LEAST_ROWS - len(x))
        if filling:
            x = torch.cat([x, x[:1].expand(filling, *x.shape[1:])])
        return self.target(x)[: len(x) - filling]

    def __call__(self, x: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """Targets (b, D) of normalised views x (b, C, H, W), float32 on their device.

        On the CPU, int64: `index` (b,), the row of each image in the training split, and the number of its
        `view` (b,).
        """
        return self.compute(x).to(self.dtype).float()

    def flush(self) -> None:
        """Keep what was computed for later processes (a mapped table only)."""


class TargetViews(OnlineTargets):
    """A table of targets, each computed when its view is first drawn.

    `table` is (N·V, D) in float32 or bfloat16, on the device or a file mapped into memory, with V =
    `views` of each image. `known` (N·V,) says which rows are there (None: none yet); it is on the CPU,
    where views are drawn, so that looking up never makes the host wait for the device. `on_flush`
    is called with `known` after entries were added to a mapped table.
    """

    def __init__(
        self,
        target: Function,
        table: Tensor,
        views: int,
        known: Tensor | None = None,
        on_flush: Flush | None = None,
    ) -> None:
        super().__init__(target, table.dtype)
        self.table, self.views = table, views
        self.known = torch.zeros(len(table), dtype=torch.bool) if known is None else known
        self.complete = bool(self.known.all())
        self._on_flush, self._changed = on_flush, False

    def __call__(self, x: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """The same; computes only what is not known."""
        rows = index * self.views + view
        if not self.complete:
            missing = (~self.known[rows]).nonzero().flatten()
            if len(missing):
                self._store(rows[missing], self.compute(x[upload(missing, x.device)]))
        found = self.table[upload(rows, self.table.device)]
        return upload(found, x.device).float()

    def flush(self) -> None:
        """Write new entries of a mapped table, then which ones are there."""
        if self._on_flush is not None and self._changed:
            self._on_flush(self.known)
            self._changed = False
        self.complete = self.complete or bool(self.known.all())

    @torch.no_grad()
    def fill(self, images: Tensor, stats: Stats, pad: int, device: torch.device) -> None:
        """Compute all missing entries on `device` from the training images (N, C, H, W) in pixel space."""
        todo = (~self.known).nonzero().flatten()
        images = images.to(device) if fits(images, device) else images
        size = _CUDA_ROWS_AT_ONCE if device.type == "cuda" else _ROWS_AT_ONCE
        for rows in tqdm(todo.split(size), desc="target views", disable=None):
            x = upload(images[upload(rows // self.views, images.device)], device)
            x = apply_crop_flip(x, rows % self.views, pad)
            self._store(rows, self.compute(normalize(x, stats)))
        self.flush()

    def _store(self, rows: Tensor, y: Tensor) -> None:
        self.table[upload(rows, self.table.device)] = y.to(self.dtype).to(self.table.device)
        self.known[rows] = True
        self._changed = True


def plan_views(
    mode: str, dtype: torch.dtype, *, rows: int, dim: int, draws: int, free: int, keep: bool
) -> tuple[str, str]:
    """Where targets come from (online, memory or file) and why; their values are the same.

    The table has `rows` N·V of `dim` D, the run makes `draws`, the device has `free` bytes, and `keep`
    says that a folder for the table was named.
    """
    size = rows * dim * dtype.itemsize
    shown = f"{rows} views x {dim} are {size / 1e9:.2f} GB as {str(dtype)[6:]}"
    fits = size <= free // 2
    if mode == "online":
        return "online", "computed at every step"
    if keep:
        return "file", f"{shown}, kept on disk"
    if mode == "exact":
        return ("memory", shown) if fits else ("file", f"{shown}, on disk")
    if not fits:
        return "online", f"{shown}, more than half of the free memory"
    if draws < rows // 10:
        return "online", f"{draws} draws from {rows} views would hardly repeat one"
    return "memory", shown


def mapped_table(
    folder: Path, rows: int, dim: int, dtype: torch.dtype, about: dict[str, object]
) -> tuple[Tensor, Tensor, Flush]:
    """A table in a file, which later runs with the same `about` fill further.

    `about` holds everything an entry depends on, as plain values; it names the table's sub-folder. A
    row that does not fit its checksum, kept beside the table, counts as unknown. Returns the (rows,
    dim) table, which rows are known, and what makes both outlast a crash.

    Raises:
        UserError: the folder cannot be written or has no room.
    """
    about = {**about, "rows": rows, "dim": dim, "dtype": str(dtype)}
    text = json.dumps(about, indent=2, sort_keys=True)
    place = folder / checkpoint.fingerprint(torch.tensor(list(text.encode()), dtype=torch.uint8))
    path, sums_path, lock = place / "table.bin", place / "sums.pt", FileLock(place / ".lock")
    size = rows * dim * dtype.itemsize
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock.acquire()  # another process of the run, or of another one, may be making it
        if not path.exists() or path.stat().st_size != size:
            sums_path.unlink(missing_ok=True)
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now, not later
                else:
                    file.truncate(size)
        table = torch.from_file(str(path), shared=True, size=rows * dim, dtype=dtype)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"--views_dir {folder}: cannot make a table of target views of {size / 1e9:.2f} GB "
            f"there ({reason}); name another folder or use --target_views online"
        ) from None
    finally:
        lock.release()
    checkpoint.write_text(place / "about.json", text + "\n")
    table = table.view(rows, dim)

    def known_sums() -> Tensor:
        if not sums_path.exists():
            return torch.zeros(rows, dtype=torch.int32)
        sums = checkpoint.load_tensor(sums_path, what="checksums of target views")
        if sums.shape != (rows,) or sums.dtype != torch.int32:
            raise UserError(f"{sums_path} does not belong to {path}; delete {place}")
        return sums

    sums = known_sums()
    damaged = 0
    for index in sums.nonzero().flatten().split(_ROWS_AT_ONCE):
        wrong = index[row_sums(table[index]) != sums[index]]
        sums[wrong] = 0
        damaged += len(wrong)
    if damaged:
        print(f"warning: {path} is damaged: {damaged} target views are computed again")

    def flush(present: Tensor) -> None:
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # entries first: what is said to be there must be there
        for index in (present & (sums == 0)).nonzero().flatten().split(_ROWS_AT_ONCE):
            sums[index] = row_sums(table[index])
        with lock:  # the rows of other processes that fill it stay known
            theirs = known_sums()
            checkpoint.save(torch.where(sums == 0, theirs, sums), sums_path)

    return table, sums != 0, flush


def row_sums(rows: Tensor) -> Tensor:
    """The CRC-32 of each row (n, D), int32 on the CPU; 1 in place of 0, which says: no row."""
    lines = rows.contiguous().view(torch.uint8).numpy()
    sums = np.fromiter((zlib.crc32(line) or 1 for line in lines), dtype=np.uint32, count=len(lines))
    return torch.from_numpy(sums.view(np.int32))


def targets_for(problem: Problem, flags: TrainFlags) -> OnlineTargets:
    """A table of views, or the target model at every step; a UserError where no file can be made."""
    image_set, target, device = problem.image_set, problem.target, problem.device
    images, stats = image_set.train.images, image_set.stats
    pad, hflip = padding_and_flip(image_set, flags)
    views = count_views(pad, hflip)
    rows, dim, free = len(images) * views, target.dim, free_memory(device)
    draws = flags.outer_iteration * min(flags.outer_batch_size, len(images))
    dtype = DTYPES[flags.views_dtype or ("bf16" if flags.precision == "bf16" else "fp32")]
    load = dict(rows=rows, dim=dim, draws=draws, free=free, keep=flags.views_dir is not None)
    kind, why = plan_views(flags.target_views, dtype, **load)
    print(f"targets: {kind} ({why})")
    if kind == "online":
        return OnlineTargets(target, dtype)
    if kind == "memory":
        targets = TargetViews(target, torch.empty(rows, dim, dtype=dtype, device=device), views)
    else:
        about = {
            "target_model": flags.target_model,
            "target": checkpoint.fingerprint(target_sample(target, image_set, device)),
            "images": checkpoint.fingerprint(images),
            "stats": [stats.mean, stats.std],
            "pad": pad,
            "hflip": hflip,
            "precision": flags.precision,
        }
        if flags.target_ckpt is not None:
            about["checkpoint"] = hashlib.sha256(flags.target_ckpt.read_bytes()).hexdigest()[:16]
        folder = flags.views_dir or Path(flags.save_dir) / "target_views"
        table, known, flush = mapped_table(folder, rows, dim, dtype, about)
        targets = TargetViews(target, table, views, known, flush)
    # A GPU computes all at once, which keeps it busy; a CPU what is drawn.
    if device.type == "cuda" and draws >= rows and not targets.complete:
        targets.fill(images, stats, pad, device)
    if device.type == "cuda" and targets.complete and fits(targets.table, device):
        targets.table = targets.table.to(device)
    return targets
