"""Saving and restoring a whole run, so that going on equals never having stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from utils import checkpoint
from utils.errors import UserError


class Stateful(Protocol):
    """Anything with a state: networks, optimisers, schedules, loaders, pools."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Put a state back."""


def previous_path(path: Path) -> Path:
    """Where the save before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def save_run(path: Path, step: int, parts: Mapping[str, Stateful], **tensors: Any) -> None:
    """Write the state of every part and tensor after `step` steps, whole or not at all.

    The save before it stays beside it, for the case that the disk loses this one.

    Raises:
        UserError: the file cannot be written; the last save is as it was.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    with checkpoint.atomic_path(path) as temporary:
        checkpoint.save({"step": step, "parts": states, "tensors": tensors}, temporary)
        if path.exists():
            path.replace(previous_path(path))


def forget_run(path: Path) -> None:
    """Drop the saves of a run."""
    path.unlink(missing_ok=True)
    previous_path(path).unlink(missing_ok=True)


def has_state(path: Path) -> bool:
    """Whether there is a save to go on from."""
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
        print(f"warning: {error}; going on from the save before it, {older.name}", flush=True)
    return checkpoint.load(older, what="run state")


def load_run(path: Path, parts: Mapping[str, Stateful]) -> tuple[int, dict[str, Any]]:
    """Restore every part in place.

    Returns:
        The step after which the state was saved, and the saved tensors by name.

    Raises:
        UserError: unreadable, or not the state of such a run.
    """
    state = read_state(path)
    try:
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        return int(state["step"]), state["tensors"]
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(
            f"run state {path} does not fit this run ({str(error).splitlines()[0]}); "
            "delete it or pass --overwrite to start again"
        ) from None
