"""Pictures for people: image grids and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid, save_image

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
    if images01.dim() != 4 or images01.shape[1] not in (1, 3) or 0 in images01.shape:
        raise UserError(f"cannot draw images of shape {tuple(images01.shape)} into {path}")
    columns = columns or math.ceil(math.sqrt(len(images01)))
    scale = scale or math.ceil(64 / max(images01.shape[2:]))
    big = F.interpolate(images01.detach().float().cpu(), scale_factor=scale, mode="nearest")
    grid = make_grid(big.clamp(0, 1), nrow=columns, padding=2)
    with atomic_path(path) as temporary:
        save_image(grid, temporary, format="PNG")


def save_curve(
    steps: Sequence[float],
    values: Sequence[float],
    path: Path | str,
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> None:
    """Draw one curve as a PNG.

    Args:
        steps: abscissae.
        values: ordinates, as many.
        path: the PNG to write, whole or not at all.
        x_label: name and unit of the abscissa.
        y_label: name and unit of the ordinate.
        log_y: logarithmic ordinate.

    Raises:
        UserError: `path` cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, linewidth=1.2)
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log_y else "linear")
    axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def save_bars(
    panels: Mapping[str, Mapping[str, tuple[float | None, float | None]]],
    path: Path | str,
    *,
    y_label: str,
) -> None:
    """Draw one panel of named bars for each entry of `panels` as a PNG.

    Args:
        panels: title -> bar name -> (height, error); a height of None leaves the bar out.
        path: the PNG to write, whole or not at all.
        y_label: name and unit of the heights.

    Raises:
        UserError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    most = max(len(bars) for bars in panels.values())
    size = (2.4 * len(panels) + 1, 1.5 + 0.22 * most)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, bars) in zip(all_axes, panels.items(), strict=True):
        for row, (value, error) in enumerate(bars.values()):
            if value is not None:
                axes.barh(row, value, xerr=error, height=0.7)
        axes.set(title=title, xlabel=y_label, yticks=range(len(bars)), yticklabels=list(bars))
        axes.grid(axis="x", alpha=0.3)
    all_axes[0].invert_yaxis()  # shared: the first bar on top
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
