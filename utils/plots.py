"""Pictures as PNGs, written whole or not at all: image grids, lines, bars, curves."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from utils.checkpoint import atomic_path
from utils.errors import UserError

Lines = dict[str, tuple[list[float], list[float]]]  # name -> (abscissae, ordinates)


def save_grid(
    images01: Tensor, path: Path | str, columns: int | None = None, scale: int | None = None
) -> None:
    """Write n×C×H×W float images, C 1 or 3, as one grid; pixels are clamped to [0, 1].

    `columns` None makes it about square; `scale` magnifies, None brings small images to 64 pixels.
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


def _panels(count: int, columns: int, width: float, height: float, dpi: int = 120) -> tuple[Any, Any]:
    """A figure and its `count` axes; width and height of each in inches."""
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=dpi, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _save(figure: Any, path: Path | str) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def save_lines(
    panels: Mapping[str, Lines],
    path: Path | str,
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draw a panel per title, three per row; a line of a single point becomes a mark.

    A name keeps its colour and its mark in all panels.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    single = len(panels) == 1
    figure, grid = _panels(len(panels), min(3, len(panels)), *((7, 4.2) if single else (4, 2.9)))
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for name, (x, y) in lines.items():
            number = names.index(name)
            style: dict[str, Any] = dict(linewidth=1.4, marker=".")
            if len(x) == 1:
                style = dict(linestyle="", marker="osD^v<>pPX*hd"[number % 13])
            (handles[name],) = axes.plot(x, y, color=f"C{number % 10}", **style)
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel=x_label, xscale="log" if log_x else "linear")
        axes.set(ylabel=y_label, yscale="log" if log_y else "linear")
        axes.grid(alpha=0.3)
    shown = [handles[name] for name in names]
    figure.legend(shown, names, loc="outside lower center", ncols=1 if single else 3, fontsize="small")
    _save(figure, path)


def save_bar_groups(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float] | None]]],
    path: Path | str,
    *,
    y_label: str,
) -> None:
    """Draw panels of grouped bars, three per row; a bar's name has one colour in all groups.

    `panels` are title -> group -> bar name -> (height, error), or None for a gap.
    """
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(n for groups in panels.values() for g in groups.values() for n in g))
    figure, grid = _panels(len(panels), 3, 4, 2.9)
    width = 0.85 / len(names)
    for axes, (title, groups) in zip(grid, panels.items(), strict=True):
        for number, name in enumerate(names):
            left = (number - (len(names) - 1) / 2) * width
            places = [at + left for at, g in enumerate(groups.values()) if g.get(name)]
            heights, errors = ([g[name][i] for g in groups.values() if g.get(name)] for i in (0, 1))
            style = dict(color=f"C{number}", error_kw={"elinewidth": 0.8})
            axes.bar(places, heights, width, yerr=errors, **style)
        axes.set(title=title, ylabel=y_label, xticks=range(len(groups)), xticklabels=list(groups))
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles = [Patch(color=f"C{number}", label=name) for number, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 9))
    _save(figure, path)


def _text(name: str) -> str:
    """A name from a file as plain text: matplotlib reads formulas between dollars."""
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def save_curves(series: Lines, path: Path | str) -> None:
    """Draw one panel per series; positive losses on a logarithmic axis."""
    save_shared_curves({"": series}, path)


def save_shared_curves(runs: Mapping[str, Lines], path: Path | str) -> None:
    """Draw one panel per name of a series with all runs, which keep their colours, on its axes."""
    names = list(dict.fromkeys(name for series in runs.values() for name in series))
    figure, grid = _panels(len(names), min(3, len(names)), 4.2, 2.8, dpi=100)
    handles: dict[str, Any] = {}
    for axes, name in zip(grid, names, strict=True):
        for number, (run, series) in enumerate(runs.items()):
            if name not in series:
                continue
            steps, values = series[name]
            style = dict(color=f"C{number % 10}", linestyle=("-", "--", ":", "-.")[number // 10 % 4])
            marker = "." if len(steps) < 30 else None
            (handles[run],) = axes.plot(steps, values, linewidth=1.2, marker=marker, **style)
        lowest = min(min(series[name][1]) for series in runs.values() if name in series)
        logarithmic = "loss" in name and lowest > 0
        axes.set(title=_text(name), xlabel="step", yscale="log" if logarithmic else "linear")
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        shown = {_text(run): handles[run] for run in runs if run in handles}
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(shown) / 3))
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(3, len(shown)))
    _save(figure, path)
