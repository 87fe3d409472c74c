"""Pictures for people: image grids, lines, bars, the curves of a run."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from utils.checkpoint import atomic_path
from utils.errors import UserError


def save_grid(
    images01: Tensor, path: Path | str, columns: int | None = None, scale: int | None = None
) -> None:
    """Write images as one PNG grid.

    Args:
        images01: n×C×H×W float, C 1 or 3, pixels in [0, 1]; values outside are clamped.
        path: the PNG to write, whole or not at all.
        columns: images a row; None makes the grid about square.
        scale: integer magnification without smoothing; None brings small images to 64 pixels.

    Raises:
        UserError: a shape that cannot be drawn, or `path` cannot be written.
    """
    from torchvision.utils import make_grid, save_image  # slow to import, and only drawing needs it

    if images01.dim() != 4 or images01.shape[1] not in (1, 3) or 0 in images01.shape:
        raise UserError(f"cannot draw images of shape {tuple(images01.shape)} into {path}")
    columns = columns or math.ceil(math.sqrt(len(images01)))
    scale = scale or math.ceil(64 / max(images01.shape[2:]))
    big = F.interpolate(images01.detach().float().cpu(), scale_factor=scale, mode="nearest")
    grid = make_grid(big.clamp(0, 1), nrow=columns, padding=2)
    with atomic_path(path) as temporary:
        save_image(grid, temporary, format="PNG")


def save_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path | str,
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    title: str = "",
    legend: str = "outside right upper",
) -> None:
    """Draw several lines as a PNG; a line of one point is drawn as a mark.

    Args:
        lines: name -> (abscissae, ordinates).
        path: the PNG to write, whole or not at all.
        x_label: name and unit of the abscissa.
        y_label: name and unit of the ordinate.
        log_x: logarithmic abscissa.
        log_y: logarithmic ordinate.
        title: one line above.
        legend: where the names go, as matplotlib says it.

    Raises:
        UserError: `path` cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    marks = iter("osD^v<>pPX*hd" * 9)
    for name, (x, y) in lines.items():
        if len(x) > 1:
            axes.plot(x, y, linewidth=1.4, marker=".", label=name)
        else:
            axes.plot(x, y, linestyle="", marker=next(marks), label=name)
    axes.set_title(title, fontsize="medium")
    axes.set(
        xlabel=x_label, ylabel=y_label,
        xscale="log" if log_x else "linear", yscale="log" if log_y else "linear",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    figure.legend(loc=legend, fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def save_bar_groups(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float] | None]]],
    path: Path | str,
    *,
    y_label: str,
    columns: int = 3,
) -> None:
    """Draw panels of grouped bars as a PNG; a bar's name has one colour in all groups.

    Args:
        panels: title -> group -> bar name -> (height, error), or None for a gap.
        path: the PNG to write, whole or not at all.
        y_label: name and unit of the heights.
        columns: panels in a row of the picture.

    Raises:
        UserError: `path` cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(n for groups in panels.values() for g in groups.values() for n in g))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows + 0.6), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    width = 0.85 / len(names)
    for axes, (title, groups) in zip(grid, panels.items(), strict=False):
        for number, name in enumerate(names):
            found = [(at, g[name]) for at, g in enumerate(groups.values()) if g.get(name)]
            axes.bar(
                [at + (number - (len(names) - 1) / 2) * width for at, _ in found],
                [height for _, (height, _) in found], width,
                yerr=[error for _, (_, error) in found],
                color=f"C{number}", error_kw={"elinewidth": 0.8},
            )  # fmt: skip
        axes.set(title=title, ylabel=y_label, xticks=range(len(groups)), xticklabels=list(groups))
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = [Patch(color=f"C{number}", label=name) for number, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 9))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


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
