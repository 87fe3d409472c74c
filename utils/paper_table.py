"""Tables of a paper: ours beside the published numbers, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import checkpoint
from utils.errors import UserError
from utils.table import format_mean_std, markdown, mean_std

# (table, row, column) -> (mean, std), accuracies in %; std is None where the source prints none.
Number = tuple[float, float | None]
Published = dict[tuple[str, str, str], Number]

NOTE = "ours, mean ± std [published, difference]; – not run, † shortened"


@dataclass(frozen=True)
class Entry:
    """One place of a table.

    Attributes:
        row: its row's heading.
        column: its column's heading.
        values: our accuracies in %, empty: not run.
        scaled: ours come from shortened training.
        published: the published mean and std, or None.
    """

    row: str
    column: str
    values: tuple[float, ...]
    scaled: bool = False
    published: Number | None = None

    def record(self) -> dict[str, Any]:
        """The line of the CSV file; None where there is no number."""
        mean, std = mean_std(self.values) if self.values else (None, None)
        theirs, their_std = self.published or (None, None)
        both = mean is not None and theirs is not None
        return {
            "row": self.row, "column": self.column, "n": len(self.values), "mean": mean,
            "std": std, "scaled": self.scaled, "published_mean": theirs,
            "published_std": their_std, "difference": mean - theirs if both else None,
        }  # fmt: skip

    def shown(self) -> str:
        """`ours ± std† [published ± std, difference]`, a dash for what is not there."""
        text = format_mean_std(self.values) + ("†" if self.scaled else "")
        if self.published is None:
            return text
        theirs, their_std = self.published
        text += f" [{theirs:.2f}" + (f" ± {their_std:.2f}" if their_std is not None else "")
        difference = self.record()["difference"]
        return text + (f", {difference:+.2f}]" if difference is not None else "]")


def _cross(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of shown cells."""
    columns = list(dict.fromkeys(e.column for e in entries))
    rows: dict[str, list[str]] = {}
    for entry in entries:
        rows.setdefault(entry.row, []).append(entry.shown())
    return ["method", *columns], [[row, *shown] for row, shown in rows.items()]


def to_markdown(entries: Sequence[Entry]) -> str:
    """An aligned Markdown table."""
    return markdown(*_cross(entries))


_TEX = {"±": "$\\pm$", "†": "$^\\dagger$", "–": "--", "×": "$\\times$"}


def _tex(text: str) -> str:
    escaped = re.sub(r"([_%&#$])", r"\\\1", text)
    escaped = re.sub(r"(?<=, )([+-])(?=\d)", r"$\1$", escaped)  # a sign, not a hyphen
    return re.sub("|".join(_TEX), lambda m: _TEX[m[0]], escaped)


def to_latex(entries: Sequence[Entry]) -> str:
    """The same cells as a LaTeX tabular."""
    header, rows = _cross(entries)
    lines = [" & ".join(map(_tex, row)) + " \\\\" for row in [header, *rows]]
    spec = "l" + "r" * (len(header) - 1)
    body = [lines[0], "\\hline", *lines[1:]]
    return "\n".join([f"\\begin{{tabular}}{{{spec}}}", *body, "\\end{tabular}"])


def to_csv(entries: Sequence[Entry]) -> str:
    """One line an entry, empty fields where there is no number."""
    records = [entry.record() for entry in entries]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue().rstrip("\n")


WRITERS: dict[str, Callable[[Sequence[Entry]], str]] = {
    ".md": to_markdown,
    ".csv": to_csv,
    ".tex": to_latex,
}


def write_table(entries: Sequence[Entry], stem: Path) -> None:
    """Write `{stem}.md`, `.csv` and `.tex`, and print the first.

    Raises:
        UserError: a file cannot be written.
    """
    for suffix, write in WRITERS.items():
        checkpoint.write_text(stem.parent / (stem.name + suffix), write(entries) + "\n")
    print(to_markdown(entries))


def with_published_file(known: Published, path: Path | None) -> Published:
    """The verified numbers, with a user's file put on top.

    Args:
        known: numbers of the project.
        path: JSON `{table: {row: {column: [mean, std]}}}`; std may be null or left out.

    Raises:
        UserError: the file is missing or has another form.
    """
    if path is None:
        return dict(known)
    try:
        content = json.loads(path.read_text())
        given = {
            (str(table), row, column): _number(value)
            for table, rows in content.items()
            for row, columns in rows.items()
            for column, value in columns.items()
        }
    except OSError as error:
        raise UserError(f"--published {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"--published {path}: expected JSON {{table: {{row: {{column: [mean, std]}}}}}}"
        ) from None
    return {**known, **given}


def _number(value: Any) -> Number:
    mean, std = [*(value if isinstance(value, list) else [value]), None][:2]
    if not math.isfinite(float(mean)) or not math.isfinite(float(std or 0)):
        raise ValueError(f"{value} is not finite")
    return float(mean), None if std is None else float(std)
