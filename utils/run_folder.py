"""A run's folder: what was asked, what it ran on, what happened, its saved state, what came out."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from utils import checkpoint
from utils.errors import UserError
from utils.locks import Claims
from utils.plots import draw_curves, numbers, read_series
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
    """Keep a run folder to this process for the length of the block, or until it dies.

    Args:
        path: the run folder, which need not exist yet.

    Raises:
        UserError: another process works on it, or the folder above cannot be written.
    """
    path = Path(path).resolve()  # one folder, however it is called
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

    The same flags again mean the same run: it resumes from its last checkpoint, with its seed. Other
    flags in the same folder are refused unless `overwrite` is set, which starts from nothing.

    Args:
        path: the folder.
        flags: what says which run it is, as plain JSON values (utils.cli.identity).
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
        identity = _plain(flags)
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


class Stateful(Protocol):
    """Anything with a state: networks, optimisers, schedules, loaders, pools."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Put a state back."""


def previous_path(path: Path) -> Path:
    """Where the save before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def save_run(path: Path, step: int, parts: Mapping[str, Stateful], **named: Any) -> None:
    """Write the state of every part after `step` steps, whole or not at all.

    The save before it stays beside it, for the case that the disk loses this one.

    Args:
        path: the state.
        step: steps taken.
        parts: what is restored in place.
        named: plain values by which `load_run` knows whose state it is.

    Raises:
        UserError: the file cannot be written; the last save is as it was.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    with checkpoint.atomic_path(path) as temporary:
        checkpoint.save({"step": step, "parts": states, "named": named}, temporary)
        if path.exists():
            path.replace(previous_path(path))


def forget_run(path: Path) -> None:
    """Drop the saves of a run."""
    path.unlink(missing_ok=True)
    previous_path(path).unlink(missing_ok=True)


def has_state(path: Path) -> bool:
    """Whether there is a checkpoint to resume from."""
    return path.exists() or previous_path(path).exists()


def read_state(path: Path) -> dict[str, Any]:
    """The last whole save; a damaged one is said and the one before it taken.

    Raises:
        UserError: neither is whole.
    """
    older = previous_path(path)
    if older.exists() and not path.exists():  # killed between two renames
        return checkpoint.load(older, what="run state")
    try:
        return checkpoint.load(path, what="run state")
    except UserError as error:
        if not older.exists():
            raise UserError(f"{error}; delete it or pass --overwrite to start again") from None
        print(f"warning: {error}; resuming from the checkpoint before it, {older.name}", flush=True)
    return checkpoint.load(older, what="run state")


def load_run(path: Path, parts: Mapping[str, Stateful], **expected: Any) -> int | None:
    """Restore every part in place.

    Args:
        path: the state.
        parts: as they were saved.
        expected: values that the state was saved with; a state of others is left alone.

    Returns:
        The step after which the state was saved; None where there is nothing to resume from.

    Raises:
        UserError: unreadable, or not the state of such a run.
    """
    if not has_state(path):
        return None
    state = read_state(path)
    try:
        if any(state["named"][name] != value for name, value in expected.items()):
            return None
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        return int(state["step"])
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(
            f"run state {path} does not fit this run ({str(error).splitlines()[0]}); "
            "delete it or pass --overwrite to start again"
        ) from None
