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


def _panels(count: int, width: float, height: float, below: float = 0.0) -> tuple[Any, list[Any]]:
    """A figure and its `count` axes, three per row; inches of each, and of the legend `below` them.

    The margins are fixed: matplotlib's layout engines draw everything twice more to measure it.
    """
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    rows, columns = math.ceil(count / 3), min(3, count)
    size = width * columns, height * rows + below
    figure = Figure(figsize=size, dpi=120)
    left, right, bottom, top = 1.0, 0.1, 0.5, 0.35  # of an axes, for numbers and titles
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left / size[0],
        right=1 - right / size[0],
        bottom=(bottom + below) / size[1],
        top=1 - top / size[1],
        wspace=(left + right) / (width - left - right),
        hspace=(bottom + top) / (height - bottom - top),
    )
    return figure, [figure.add_subplot(grid[number]) for number in range(count)]


def _save(figure: Any, path: Path | str) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _text(name: str) -> str:
    """A name from a file as plain text: matplotlib reads formulas between dollars."""
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def save_lines(
    panels: Mapping[str, Lines], path: Path | str, *, x_label: str, y_label: str = "", log_x: bool = False
) -> None:
    """Draw a panel per title, three per row; a line of a single point becomes a mark.

    A name keeps its colour and its mark in all panels. Losses that fall to a tenth are on a logarithmic axis.
    """
    from matplotlib.ticker import LogFormatterSciNotation

    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    single = len(panels) == 1
    columns = 1 if single else 3  # of the legend
    below = 0.2 * math.ceil(len(names) / columns) + 0.1 if any(names) else 0.0
    figure, grid = _panels(len(panels), *((7, 4.2) if single else (4, 2.9)), below)
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for name, (x, y) in lines.items():
            number = names.index(name)
            style = dict(linestyle=("-", "--", ":", "-.")[number // 10 % 4], marker="." * (len(x) < 30))
            if len(x) == 1:
                style = dict(linestyle="", marker="osD^v<>pPX*hd"[number % 13])
            (handles[name],) = axes.plot(x, y, color=f"C{number % 10}", linewidth=1.3, **style)
        values = [value for _, y in lines.values() for value in y]
        logarithmic = "loss" in title + y_label and 0 < 10 * min(values) <= max(values)
        axes.set_title(_text(title), fontsize="medium", y=1)  # a given y is not measured
        axes.set(xlabel=x_label, xscale="log" if log_x else "linear")
        axes.set(ylabel=y_label, yscale="log" if logarithmic else "linear")
        if logarithmic:  # less than two decades may have one number on their axis
            axes.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 0.5)))
        axes.grid(alpha=0.3)
    if any(names):
        shown = [handles[name] for name in names]
        style = dict(loc="lower center", ncols=columns, fontsize="small")
        figure.legend(shown, map(_text, names), **style)
    _save(figure, path)


def save_curves(runs: Mapping[str, Lines], path: Path | str) -> None:
    """Draw one panel per name of a series with all runs (one may be called "") on its axes."""
    names = dict.fromkeys(name for series in runs.values() for name in series)
    panels = {n: {run: series[n] for run, series in runs.items() if n in series} for n in names}
    save_lines(panels, path, x_label="step")


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
    figure, grid = _panels(len(panels), 4, 2.9, 0.3)
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
    figure.legend(handles=handles, loc="lower center", ncols=min(len(names), 9))
    _save(figure, path)
