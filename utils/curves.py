"""Curves of a run from its log: every number over the steps."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from utils.checkpoint import atomic_path

Series = dict[str, tuple[list[float], list[float]]]


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of a log entry: nested names are joined, lists become their mean.

    Args:
        entry: one object of log.jsonl.
    """
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


def read_series(path: Path) -> Series:
    """Name -> (steps, values) from a log.jsonl; torn lines are left out."""
    series: Series = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            continue
        for name, value in numbers(entry).items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(entry["step"])
            values.append(value)
    return series


def draw_curves(series: Series, path: Path) -> None:
    """One panel a series as a PNG; losses on a logarithmic axis where they are positive.

    Args:
        series: from `read_series`, at least one.
        path: the PNG, whole or not at all.

    Raises:
        UserError: `path` cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, (steps, values)) in zip(grid, series.items(), strict=False):
        few = len(steps) < 30
        axes.plot(steps, values, linewidth=1.2, marker="." if few else None)
        logarithmic = "loss" in name and min(values) > 0
        axes.set(title=name, xlabel="step", yscale="log" if logarithmic else "linear")
        axes.grid(alpha=0.3)
    for axes in grid[len(series) :]:
        axes.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
