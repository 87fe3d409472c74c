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


def save_run(path: Path, step: int, parts: Mapping[str, Stateful], **tensors: Any) -> None:
    """Write the state of every part and tensor after `step` steps, whole or not at all."""
    states = {name: part.state_dict() for name, part in parts.items()}
    checkpoint.save({"step": step, "parts": states, "tensors": tensors}, path)


def load_run(path: Path, parts: Mapping[str, Stateful]) -> tuple[int, dict[str, Any]]:
    """Restore every part in place.

    Returns:
        The step after which the state was saved, and the saved tensors by name.

    Raises:
        UserError: unreadable, or not the state of such a run.
    """
    state = checkpoint.load(path, what="run state")
    try:
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        return int(state["step"]), state["tensors"]
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"run state {path} does not fit this run ({str(error).splitlines()[0]}); "
            "delete it or pass --overwrite to start again"
        ) from None
