"""A run's folder: what was asked, what it ran on, what happened, what came out."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import subprocess
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils import checkpoint
from utils.curves import draw_curves, numbers, read_series
from utils.errors import UserError
from utils.locks import Claims
from utils.resume import forget_run
from utils.seed import resolve_seed

# What `--tensorboard` of every command that has a run folder says.
TENSORBOARD = "also log for TensorBoard (package tensorboard), into {run folder}/tensorboard"


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinities become null (they are not JSON)."""
    checkpoint.write_text(path, json.dumps(_plain(value), indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, (Path, torch.device)) else value


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, git commit and device: what a reader needs to judge a number."""
    import torchvision

    root = Path(__file__).resolve().parents[1]
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "git_commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


# Flags that may differ between two starts of the same run; the seed is compared on its own, since
# one that was drawn may be given at the next start.
_NOT_IDENTITY = (
    "seed", "device", "gpu_id", "overwrite", "dry_run", "target_views", "views_dir",
    "save_every", "tensorboard",
)  # fmt: skip
_STALE = ("results.json", "state.pt", "state.prev.pt", "log.jsonl")
# Dropped by --overwrite: no set may lie beside the configuration of another run.
_ARTEFACTS = ("x_syn.pt", "y_syn.pt", "x_syn.png", "loss.png", "curves.png")


def _board_maker() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def run_claims(folder: Path) -> Claims:
    """The claims of the run folders in `folder`."""
    return Claims(folder / ".locks")


@contextlib.contextmanager
def claim_run(path: Path | str) -> Iterator[None]:
    """Keep a run folder to this process for the length of the block.

    A claim whose process is dead is taken over.

    Args:
        path: the run folder, which need not exist yet.

    Raises:
        UserError: another process works on it, or the folder above cannot be written.
    """
    path = Path(path)
    claims = run_claims(path.parent)
    with claims.claim(path.name) as ours:
        if not ours:
            raise UserError(
                f"{path} is in use by another process ({claims.owner(path.name)}); wait for it, "
                "or choose another name"
            )
        yield


class RunFolder:
    """`config.json`, `log.jsonl`, `results.json` and artefacts of one run.

    The same flags again mean the same run: it goes on from its last save, with its seed. Other
    flags in the same folder are refused unless `overwrite` is set, which starts from nothing.

    Args:
        path: the folder.
        flags: resolved flags as plain JSON values.
        seed: None means the earlier start's seed, or else a drawn one.
        device: recorded with the versions.
        extra: more facts for config.json (data name, statistics).
        overwrite: start again whatever is there.
        tensorboard: write the log's numbers for TensorBoard, too, into {path}/tensorboard.

    Attributes:
        seed: the seed to use.
        resumed: an earlier start of this run is there.
        finished: ... and it wrote its results.

    Raises:
        UserError: the folder holds a run with other flags, or cannot be written.
    """

    def __init__(
        self,
        path: Path | str,
        flags: dict[str, Any],
        *,
        seed: int | None,
        device: torch.device,
        extra: dict[str, Any] | None = None,
        overwrite: bool = False,
        tensorboard: bool = False,
    ) -> None:
        self.path = Path(path)
        self._new_board = _board_maker() if tensorboard else None
        self._board: Any = None
        identity = _plain({k: v for k, v in flags.items() if k not in _NOT_IDENTITY})
        old = None if overwrite else self._read_config()
        if old is not None:
            before = {**(old.get("flags") or {}), "seed": old.get("seed")}
            wanted = {**identity, "seed": before["seed"] if seed is None else seed}
            changed = [k for k in {**before, **wanted} if before.get(k) != wanted.get(k)]
            if changed:
                shown = ", ".join(f"{k} {before.get(k)} -> {wanted.get(k)}" for k in changed[:5])
                raise UserError(
                    f"{self.path} holds a run with other flags ({shown}); "
                    "choose another name or pass --overwrite"
                )
        self.resumed = old is not None
        self.finished = self.resumed and (self.path / "results.json").exists()
        if seed is None and old is not None:
            seed = old.get("seed")
        self.seed = resolve_seed(seed)
        if not self.resumed:
            for stale in _STALE + (_ARTEFACTS if overwrite else ()):
                (self.path / stale).unlink(missing_ok=True)
            record = {"seed": self.seed, **(extra or {}), "flags": identity}
            write_json(self.path / "config.json", {**record, "environment": environment(device)})
            checkpoint.write_text(self.path / "log.jsonl", "")

    def _read_config(self) -> dict[str, Any] | None:
        path = self.path / "config.json"
        try:
            old = json.loads(path.read_text()) if path.exists() else None
        except (OSError, ValueError, RecursionError):
            old = {}
        return old if old is None or isinstance(old, dict) else {}

    @property
    def state_path(self) -> Path:
        """Where the run's state is saved."""
        return self.path / "state.pt"

    def truncate_log(self, step: int) -> None:
        """Drop log entries after `step`: what a resumed run is about to write again."""
        kept = [e for e in self.read_log() if e.get("step", 0) <= step]
        checkpoint.write_text(self.path / "log.jsonl", "".join(json.dumps(e) + "\n" for e in kept))
        if self._new_board is not None:  # what is written again later replaces what is there
            self._board = self._new_board(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, **entry: Any) -> None:
        """Append one JSON object to log.jsonl.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            with (self.path / "log.jsonl").open("a") as file:
                file.write(json.dumps(_plain(entry)) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path / 'log.jsonl'}: {error.strerror}") from error
        if self._board is not None:
            for name, value in numbers(entry).items():
                self._board.add_scalar(name, value, entry["step"])
            self._board.flush()

    def read_log(self) -> list[dict[str, Any]]:
        """All whole entries so far (a torn last line is left out)."""
        entries, path = [], self.path / "log.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
        return entries

    def finish(self, results: dict[str, Any]) -> None:
        """Draw curves.png, unless the run drew its loss itself; then write results.json.

        results.json marks the run as finished; its state is dropped.
        """
        series = read_series(self.path / "log.jsonl")
        if series and not (self.path / "loss.png").exists():
            draw_curves(series, self.path / "curves.png")
        if self._board is not None:
            self._board.close()
        write_json(self.path / "results.json", results)
        forget_run(self.state_path)


class FollowedRun:
    """The folder of a run whose first process writes; this one reads the state and no more.

    Args:
        path: the folder.
        seed: of the run.
        finished: whether it has its results.
    """

    def __init__(self, path: Path | str, seed: int, finished: bool) -> None:
        self.path, self.seed, self.finished = Path(path), seed, finished

    @property
    def state_path(self) -> Path:
        """Where the run's state is saved."""
        return self.path / "state.pt"

    def truncate_log(self, step: int) -> None:
        """Left to the first process."""

    def log(self, **entry: Any) -> None:
        """Left to the first process."""

    def read_log(self) -> list[dict[str, Any]]:
        """Nothing: only what the first process writes depends on it."""
        return []

    def finish(self, results: dict[str, Any]) -> None:
        """Left to the first process."""


class LossWindow:
    """Mean of the last `size` losses, kept on the device: reading it is the only synchronisation.

    Args:
        size: number of steps averaged.
    """

    def __init__(self, size: int) -> None:
        self._losses: deque[torch.Tensor] = deque(maxlen=size)

    def add(self, loss: torch.Tensor) -> None:
        """Take a step's loss (detached scalar); no host synchronisation."""
        self._losses.append(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """The losses in the window, for a resumed run."""
        return {"losses": torch.stack(list(self._losses)).tolist() if self._losses else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._losses.clear()
        self._losses.extend(torch.tensor(loss) for loss in state["losses"])

    def mean(self) -> float:
        """Mean over the window as a Python float; NaN while it is empty."""
        if not self._losses:
            return math.nan
        device = self._losses[-1].device  # losses of an earlier start came back to the CPU
        return float(torch.stack([loss.to(device) for loss in self._losses]).mean())
