"""A run's folder: its flags, its environment, its log, its checkpoints, its results."""

import contextlib
import json
import math
import os
import platform
import socket
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock, Timeout

from utils import checkpoint
from utils.errors import UserError, first_line
from utils.plots import Lines, save_curves
from utils.seed import resolve_seed

# What `--tensorboard` of every command that has a run folder says.
TENSORBOARD = "also log for TensorBoard (package tensorboard), into {run folder}/tensorboard"

SET_FILE = "set.safetensors"  # the whole set, where x_syn.pt and y_syn.pt are a part of it
START_FILE = "x_start.pt"  # the set's images before the first step: m×C×H×W uint8 pixels

# Flags that say where: older config.json files count them among those that say which run it is.
_PLACES = ("data_dir", "save_dir", "exp_name", "target_ckpt")
_STALE = ("results.json", "state.pt", "state.prev.pt", "log.jsonl", START_FILE)
# Removed by --overwrite: no set may lie beside the configuration of another run.
_SET = ("x_syn.pt", "y_syn.pt", SET_FILE, "training.safetensors")
_ARTEFACTS = (*_SET, "x_syn.png", "loss.png", "curves.png")


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
    """Versions, git commit and device."""
    root = Path(__file__).resolve().parents[1]
    describe, commit = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"], None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.check_output(describe, text=True, timeout=10, stderr=subprocess.DEVNULL).strip()
    return {
        "git_commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),  # not imported: that takes a second
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def read_log(path: Path, errors: str = "replace") -> list[dict[str, Any]]:
    """The whole entries of a file of JSON lines, without torn ones; `errors` as for `bytes.decode`."""
    entries = []
    for line in path.read_text(errors=errors).splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of a log entry: nested names are joined, lists become their mean."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, bool) or name in ("step", "epoch", "iteration", "experiment"):
            continue
        if isinstance(value, (int, float)):
            found[name] = float(value)
        elif isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value):
            found[name] = statistics.fmean(value)
        elif isinstance(value, dict):
            found |= {f"{name} {k}": v for k, v in numbers(value).items()}
    return found


def read_series(path: Path) -> Lines:
    """Name -> (steps, values) from a log.jsonl."""
    series: Lines = {}
    for entry in read_log(path):
        if isinstance(entry.get("step"), int):
            for name, value in numbers(entry).items():
                steps, values = series.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return series


def changed_inputs(config: dict[str, Any], inputs: Mapping[str, str]) -> str:
    """Which inputs of the run with this config.json have changed, in words; else "".

    An input that the file does not mention, like those of older runs, passes.
    """
    before = config.get("inputs")
    before = before if isinstance(before, dict) else {}
    return " and ".join(f"another {k}" for k, now in inputs.items() if before.get(k, now) != now)


def changed_flags(before: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Which flags of a config.json differ from those wanted, in words (five at most); else ""."""
    wanted = _plain(wanted)
    changed = [k for k in {**before, **wanted} if k not in _PLACES and before.get(k) != wanted.get(k)]
    return ", ".join(f"{k} {before.get(k)} -> {wanted.get(k)}" for k in changed[:5])


class InUse(UserError):
    """Another process works in the run folder."""


def _lock_of(path: Path) -> Path:
    """What is locked while a process works in a run folder: a file beside it, for it need not exist yet."""
    return path.parent / ".locks" / f"{path.name}.lock"


@contextlib.contextmanager
def claim_run(path: Path | str, patience: float = 0.3) -> Iterator[None]:
    """Keep a run folder, which need not exist yet, to this process; a UserError if another has it.

    The lock is the operating system's: it ends with its process, and a process that is only suspended
    keeps its own. One that only asks for it (`is_claimed`) has it for an instant: hence `patience` seconds.
    """
    path = Path(path).resolve()  # one folder, whatever it is called
    file = _lock_of(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file).acquire(timeout=patience, poll_interval=0.05)
        with contextlib.suppress(OSError):  # for messages alone
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout:
        owner = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            owner = file.read_text()
        by = "by another process" + f" ({owner})" * bool(owner)
        raise InUse(f"{path} is in use {by}; wait for it, or choose another name") from None
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    with lock:
        yield


def is_claimed(path: Path) -> bool:
    """Whether another process works in a run folder at present."""
    if not _lock_of(path.resolve()).exists():
        return False
    try:
        with claim_run(path, patience=0):
            return False
    except InUse:
        return True


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


class RunFolder:
    """`config.json`, `log.jsonl`, `results.json` and artefacts of one run.

    The same flags and inputs again mean the same run: it resumes from its last checkpoint, with its
    seed. Others in the same folder are a UserError, unless `overwrite` starts from nothing.

    `flags` are those that say which run it is (utils.cli.identity), `inputs` name what it reads and
    give its fingerprint, `extra` are more facts for config.json, `command` is the one that repeats the
    run, apart from its seed. `seed` None means the earlier start's or a drawn one. `tensorboard` writes
    the log's numbers into {path}/tensorboard, too.
    """

    def __init__(
        self,
        path: Path | str,
        flags: dict[str, Any],
        *,
        seed: int | None,
        device: torch.device,
        command: str | None = None,
        extra: dict[str, Any] | None = None,
        inputs: Mapping[str, str] = MappingProxyType({}),
        overwrite: bool = False,
        tensorboard: bool = False,
    ) -> None:
        self.path = Path(path)
        self.state_path, self._log = self.path / "state.pt", self.path / "log.jsonl"
        self._new_board = _summary_writer() if tensorboard else None
        self._board: Any = None
        flags = _plain(flags)
        old = None if overwrite else self._read_config()
        self.resumed = old is not None
        sets = [name for name in _SET if (self.path / name).exists()]
        if sets and not self.resumed and not overwrite:
            raise UserError(
                f"{self.path} holds {' and '.join(sets)} without the run that made it; choose another "
                "name, or pass --overwrite to replace them"
            )
        if self.resumed:
            seed = old.get("seed") if seed is None else seed
            changed = changed_flags({**old["flags"], "seed": old.get("seed")}, {**flags, "seed": seed})
            why = f"with other flags ({changed})" if changed else ""
            if not why and (other := changed_inputs(old, inputs)):
                why = f"that began with {other}; put back what was there"
            if why:
                raise UserError(f"{self.path} holds a run {why}; choose another name or pass --overwrite")
        self.finished = self.resumed and (self.path / "results.json").exists()
        self.seed = resolve_seed(seed)
        if not self.resumed:
            for stale in _STALE + (_ARTEFACTS if overwrite else ()):
                (self.path / stale).unlink(missing_ok=True)
            repeat = {} if command is None else {"command": f"{command} --seed {self.seed}"}
            facts = {"seed": self.seed, **repeat, **(extra or {})}
            record = {**facts, "inputs": dict(inputs), "flags": flags}
            write_json(self.path / "config.json", {**record, "environment": environment(device)})
            checkpoint.write_text(self._log, "")

    def _read_config(self) -> dict[str, Any] | None:
        """None where there is no run."""
        path = self.path / "config.json"
        if not path.exists():
            return None
        try:
            old = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            old = None
        if not isinstance(old, dict) or not isinstance(old.get("flags"), dict):
            raise UserError(f"{path} is damaged; choose another name, or pass --overwrite to start again")
        return old

    def truncate_log(self, step: int) -> None:
        """Drop log entries after `step`, which a resumed run will write again."""
        kept = [e for e in self.read_log() if isinstance(e.get("step"), int) and e["step"] <= step]
        checkpoint.write_text(self._log, "".join(json.dumps(e) + "\n" for e in kept))
        if self._new_board is not None:  # what is written later replaces what is there
            self._board = self._new_board(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, **entry: Any) -> None:
        """Append one JSON object to log.jsonl, or raise a UserError."""
        try:
            with self._log.open("a") as file:
                file.write(json.dumps(_plain(entry)) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._log}: {error.strerror}") from error
        if self._board is not None:
            for name, value in numbers(entry).items():
                self._board.add_scalar(name, value, entry["step"])
            self._board.flush()

    def read_log(self) -> list[dict[str, Any]]:
        """All whole entries so far."""
        return read_log(self._log)

    def finish(self, results: dict[str, Any]) -> None:
        """Draw curves.png, unless the run drew loss.png; write results.json; drop the state."""
        series = read_series(self._log)
        if series and not (self.path / "loss.png").exists():
            save_curves({"": series}, self.path / "curves.png")
        if self._board is not None:
            self._board.close()
        write_json(self.path / "results.json", results)
        forget_run(self.state_path)


class FollowedRun:
    """The folder of a run whose first process writes; this one only reads the state."""

    def __init__(self, path: Path, seed: int, finished: bool) -> None:
        self.path, self.seed, self.finished = path, seed, finished
        self.state_path = path / "state.pt"

    def read_log(self) -> list[dict[str, Any]]:
        return []  # only what the first process writes depends on it

    def _leave(self, *args: Any, **named: Any) -> None:
        """Left to the first process."""

    truncate_log = log = finish = _leave


Run = RunFolder | FollowedRun


def previous_path(path: Path) -> Path:
    """Where the save before that at `path` is kept."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def save_run(path: Path, step: int, parts: Mapping[str, Any], **named: Any) -> None:
    """Write the state of every part after `step` steps to `path`, whole or not at all.

    A part has `state_dict` and `load_state_dict`; `named` are plain values that `load_run` compares.
    The save before it stays beside it, in case the disk loses this one.
    """
    states = {name: part.state_dict() for name, part in parts.items()}

    def keep_previous() -> None:
        if path.exists():
            path.replace(previous_path(path))

    checkpoint.save({"step": step, "parts": states, "named": named}, path, keep_previous)


def forget_run(path: Path) -> None:
    """Drop the saves of a run."""
    for place in (path, previous_path(path)):
        place.unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Any] | None:
    """The last whole save; None without any, a UserError if the one before it is damaged, too."""
    older = previous_path(path)
    if path.exists():
        try:
            return checkpoint.load(path, what="run state")
        except UserError as error:
            if not older.exists():
                raise UserError(f"{error}; delete it or pass --overwrite to start again") from None
            print(f"warning: {error}; resuming from the checkpoint before it, {older.name}")
    return checkpoint.load(older, what="run state") if older.exists() else None


def load_run(path: Path, parts: Mapping[str, Any], **expected: Any) -> int | None:
    """Restore every part in place; returns the step after which they were saved.

    None means that there is no save, or one with other `named` values; a UserError says that it is
    unreadable or not the state of such a run.
    """
    state = read_state(path)
    try:
        if state is None or any(state["named"][k] != value for k, value in expected.items()):
            return None
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        if not isinstance(state["step"], int) or state["step"] < 0:
            raise ValueError(f"step {state['step']!r}")
        return state["step"]
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(
            f"run state {path} does not fit this run ({first_line(error)}); "
            "delete it or pass --overwrite to start again"
        ) from None
