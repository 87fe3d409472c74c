"""A run's folder: what was asked, what it ran on, what happened, what came out."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections import deque
from pathlib import Path
from typing import Any

import torch

from utils import checkpoint
from utils.errors import UserError


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


class RunFolder:
    """`config.json`, `log.jsonl` and artefacts of one run.

    Args:
        path: the folder.
        config: resolved flags as plain JSON values; the run's identity.
        environment: recorded beside them, not part of the identity.
        extra: more facts recorded in config.json (statistics, seed).
        overwrite: start again in a folder that holds another configuration.

    Raises:
        UserError: the folder holds a run with another configuration and `overwrite` is not set.
    """

    def __init__(
        self,
        path: Path | str,
        config: dict[str, Any],
        *,
        environment: dict[str, Any],
        extra: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        config = _plain(config)
        old = self._read_config()
        if old is not None and old.get("flags") != config and not overwrite:
            before = old.get("flags", {})
            changed = [k for k in config if before.get(k) != config[k]]
            shown = ", ".join(f"{k} {before.get(k)} -> {config[k]}" for k in changed[:5])
            raise UserError(
                f"{self.path} holds a run with another configuration ({shown}); "
                "choose another --exp_name or pass --overwrite"
            )
        self.resumable = old is not None and not overwrite
        record = {**(extra or {}), "flags": config, "environment": environment}
        write_json(self.path / "config.json", record)
        if not self.resumable:
            checkpoint.write_text(self.path / "log.jsonl", "")

    def _read_config(self) -> dict[str, Any] | None:
        path = self.path / "config.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError:
            return {}

    def truncate_log(self, step: int) -> None:
        """Drop log entries after `step`: what a resumed run is about to write again."""
        kept = [e for e in self.read_log() if e.get("step", 0) <= step]
        checkpoint.write_text(self.path / "log.jsonl", "".join(json.dumps(e) + "\n" for e in kept))

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

    def read_log(self) -> list[dict[str, Any]]:
        """All whole entries so far (a torn last line is left out)."""
        entries = []
        for line in (self.path / "log.jsonl").read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries


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

    def mean(self) -> float:
        """Mean over the window as a Python float; NaN while it is empty."""
        return float(torch.stack(list(self._losses)).mean()) if self._losses else math.nan
