"""Result tables: mean ± population standard deviation over seeds, in Markdown."""

import statistics
from collections.abc import Sequence


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation (the papers' convention)."""
    return statistics.fmean(values), statistics.pstdev(values)


def format_mean_std(values: Sequence[float], digits: int = 2) -> str:
    """`95.20 ± 0.31` for several seeds, `95.20` for one, `–` for none."""
    if not values:
        return "–"
    mean, std = mean_std(values)
    return f"{mean:.{digits}f} ± {std:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column is left-, the others right-aligned."""
    lines = [list(map(str, row)) for row in (header, *rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    shown = [
        f"| {name.ljust(first)} |"
        + "".join(f" {cell.rjust(width)} |" for cell, width in zip(cells, others, strict=True))
        for name, *cells in lines
    ]
    rule = f"|{'-' * (first + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in others)
    return "\n".join([shown[0], rule, *shown[1:]])
