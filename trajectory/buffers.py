"""Expert buffers: the files that hold trajectories, read snapshot by snapshot.

A trajectory is a list of snapshots, the first one before training; a snapshot is a list of the
network's parameters. `replay_buffer_{n}.pt` holds a list of trajectories: one each where they are made
here, any number in those of the released codes of MTT and MKDT, which read ours as well (float32, the
same network).
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import checkpoint
from utils.device import upload
from utils.errors import UserError
from utils.run_folder import is_claimed

Snapshot = list[Tensor]
Trajectory = list[Snapshot]

_FILE = re.compile(r"replay_buffer_(\d+)\.pt")


def expert_path(folder: Path, number: int) -> Path:
    """The published name of a file of trajectories."""
    return folder / f"replay_buffer_{number}.pt"


def expert_files(folder: Path | str) -> list[Path]:
    """The files of a buffer folder in the order of their numbers."""
    found = {int(m[1]): p for p in Path(folder).glob("replay_buffer_*.pt") if (m := _FILE.fullmatch(p.name))}
    return [found[n] for n in sorted(found)]


class Experts:
    """The trajectories of a folder, mapped into memory: only snapshots that are asked for are read.

    Args:
        folder: holds replay_buffer_0.pt, ... of any origin.
        shapes: of the network's parameters, in order.
        device: where snapshots are wanted, in float32.
        count: trajectories to use, the first ones; None: all. See `use`.

    Raises:
        UserError: what is no list of trajectories of this network; one line that names the file.
    """

    def __init__(
        self,
        folder: Path | str,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device,
        count: int | None = None,
    ) -> None:
        self.folder, self.device = Path(folder), device
        self._shapes = [tuple(shape) for shape in shapes]
        self._known: list[tuple[Path, Trajectory]] = []
        self._files = 0
        self.use(count)

    def __len__(self) -> int:
        return self._count

    def use(self, count: int | None, wait: bool = False) -> None:
        """Take the first `count` trajectories, None: all; with `wait` also those that a process is training.

        Raises:
            UserError: no files, or fewer trajectories than `count` and nobody who trains more.
        """
        while wait and not self.holds(count) and is_claimed(self.folder):
            time.sleep(0.1)
        enough = self.holds(count)  # with what came between the last look and the end of that process
        if not self._known:
            raise UserError(
                f"{self.folder} holds no replay_buffer_0.pt; make it with python -m trajectory.experts, or "
                "leave --buffer_dir out: then experts are made first"
            )
        if not enough:
            held = f"{self.folder} holds {len(self._known)} trajectories"
            raise UserError(f"{held}, {count} are needed; see --num_experts")
        self._count = len(self._known) if count is None else count

    def holds(self, count: int | None) -> bool:
        """Whether there are `count` trajectories; files that have come are read. None: whatever there is."""
        if count is not None and len(self._known) >= count:
            return True
        for path in expert_files(self.folder)[self._files :]:
            if count is None or len(self._known) < count:
                self._known += [(path, trajectory) for trajectory in self._read(path)]
                self._files += 1
        return count is None or len(self._known) >= count

    @property
    def last(self) -> int:
        """The number of the last snapshot that all trajectories have."""
        return min(len(trajectory) for _, trajectory in self._used) - 1

    @property
    def _used(self) -> list[tuple[Path, Trajectory]]:
        return self._known[: self._count]

    def _read(self, path: Path) -> list[Trajectory]:
        content = checkpoint.load(path, what="expert buffer", mmap=True)
        if not isinstance(content, list | tuple) or not content:
            raise UserError(f"expert buffer {path} holds {_kind(content)}, expected a list of trajectories")
        for n, trajectory in enumerate(content):
            if not isinstance(trajectory, list | tuple) or len(trajectory) < 2:
                raise UserError(
                    f"expert buffer {path}: trajectory {n} is {_kind(trajectory)}, expected a list of two or "
                    "more snapshots"
                )
            for t, snapshot in enumerate(trajectory):
                self._check(snapshot, f"expert buffer {path}: trajectory {n}, snapshot {t}")
        return list(content)

    def _check(self, snapshot: Any, where: str) -> None:
        if not isinstance(snapshot, list | tuple) or not all(isinstance(p, Tensor) for p in snapshot):
            raise UserError(f"{where} is {_kind(snapshot)}, expected a list of parameter tensors")
        if len(snapshot) != len(self._shapes):
            raise UserError(
                f"{where} holds {len(snapshot)} tensors, the network has {len(self._shapes)} parameters"
            )
        for number, (p, shape) in enumerate(zip(snapshot, self._shapes, strict=True)):
            if tuple(p.shape) != shape or not p.is_floating_point():
                raise UserError(
                    f"{where}, parameter {number} is {tuple(p.shape)} {p.dtype}, expected {shape} of floats; "
                    "was it made with another network, image size or number of outputs?"
                )

    def snapshot(self, expert: int, t: int) -> Snapshot:
        """The parameters of an expert after t snapshots, float32 on the device.

        Raises:
            UserError: NaN or infinity in them.
        """
        return [upload(p, self.device) for p in self._host(expert, t)]

    def _host(self, expert: int, t: int) -> Snapshot:
        """A snapshot in CPU memory: checks there make no device wait."""
        path, trajectory = self._known[expert]
        found = [p.detach().to("cpu", torch.float32, copy=True) for p in trajectory[t]]
        if not all(p.isfinite().all() for p in found):
            raise UserError(f"expert buffer {path}: snapshot {t} holds NaN or infinity; the expert diverged")
        return found

    def pair(self, expert: int, t: int, ahead: int, radius: int = 0) -> tuple[Snapshot, Snapshot]:
        """Snapshot t and the goal t + ahead, the mean over the snapshots within `radius` of it.

        Raises:
            UserError: they are the same, or not finite.
        """
        start, centre = self._host(expert, t), t + ahead
        near = range(max(0, centre - radius), min(centre + radius, self.last) + 1)
        goals = [self._host(expert, n) for n in near]
        goal = [torch.stack(parts).mean(0) for parts in zip(*goals, strict=True)]
        if all(torch.equal(a, b) for a, b in zip(start, goal, strict=True)):
            raise UserError(
                f"expert buffer {self._known[expert][0]}: snapshots {t} and {centre} are the same: the "
                "expert learned nothing, or they were saved without copying the weights"
            )
        start, goal = ([upload(p, self.device) for p in side] for side in (start, goal))
        return start, goal

    def state_dict(self) -> dict[str, Any]:
        """The number of experts in use, and a mark by which a saved run knows them."""
        return {"count": len(self), "mark": self._mark()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Use as many as before, and compare; a ValueError where a run was saved with other experts."""
        self.use(state.get("count", len(self)))
        if state["mark"] != self._mark():
            raise ValueError(f"the experts in {self.folder} are not those of before")

    def _mark(self) -> str:
        ends = [trajectory[-1][-1] for _, trajectory in self._used]
        return checkpoint.fingerprint(torch.stack([p.detach().float() for p in ends]))


def _kind(value: Any) -> str:
    return (
        f"{type(value).__name__} of {len(value)}" if isinstance(value, list | tuple) else type(value).__name__
    )
