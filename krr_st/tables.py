"""`python -m krr_st.tables --table 1|2|3|4|fig3|probe_... [--run]`: the paper's tables from cells.

Collects finished cells of test.py, test_scratch.py and test_kd.py from {log_dir}/results.jsonl into
Markdown, CSV and LaTeX, ours beside the published numbers. Cells that were not run show as a dash;
with --run they are run first, cheapest first, and a restart skips what is finished.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from krr_st.config import TablesFlags
from krr_st.published import Published, load_published
from krr_st.table_layouts import LAYOUTS, Cell, Layout, collect, places, read_cells
from krr_st.table_runs import run_missing
from utils import checkpoint, cli
from utils.errors import entry_point, pick
from utils.images import save_bars
from utils.table import format_mean_std, markdown, mean_std


def entries(
    name: str, layout: Layout, cells: list[Cell], published: Published
) -> list[dict[str, Any]]:
    """One record a place: our mean, std, n and scale, the published mean and std, difference."""
    found = collect(layout, cells)
    records = []
    for place in places(layout):
        mine = found.get(place.key, [])
        values = [cell["accuracy"] for cell in mine]
        mean, std = mean_std(values) if values else (None, None)
        theirs = published.get((name, place.row, place.column), (None, None))
        both = mean is not None and theirs[0] is not None
        records.append({
            "row": place.row, "column": place.column, "n": len(values), "mean": mean, "std": std,
            "scaled": any(cell.get("steps_scale", 1.0) != 1.0 for cell in mine),
            "published_mean": theirs[0], "published_std": theirs[1],
            "difference": mean - theirs[0] if both else None,
            "values": values,
        })  # fmt: skip
    return records


def _shown(record: dict[str, Any]) -> str:
    text = format_mean_std(record["values"]) + ("†" if record["scaled"] else "")
    if record["published_mean"] is not None:
        text += f" [{record['published_mean']:.2f} ± {record['published_std']:.2f}"
        text += f", {record['difference']:+.2f}]" if record["difference"] is not None else "]"
    return text


def _cross(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of shown cells."""
    columns = list(dict.fromkeys(r["column"] for r in records))
    rows: dict[str, list[str]] = {}
    for record in records:
        rows.setdefault(record["row"], []).append(_shown(record))
    return ["method", *columns], [[row, *shown] for row, shown in rows.items()]


def to_markdown(records: list[dict[str, Any]]) -> str:
    """`ours ± std [published ± std, difference]`; a dash: not run; †: shortened training."""
    return markdown(*_cross(records))


def to_latex(records: list[dict[str, Any]]) -> str:
    """The same cells as a LaTeX tabular."""
    header, rows = _cross(records)
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"]
    for row in [header, *rows]:
        escaped = [c.replace("_", "\\_").replace("±", "$\\pm$").replace("–", "--") for c in row]
        lines.append(" & ".join(escaped).replace("†", "$^\\dagger$") + " \\\\")
    return "\n".join([*lines, "\\end{tabular}"])


def to_csv(records: list[dict[str, Any]]) -> str:
    """One line a cell, empty fields where there is no number."""
    fields = [k for k in records[0] if k != "values"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "md": to_markdown,
    "csv": to_csv,
    "tex": to_latex,
}


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Run what is missing if asked, then write and print the table."""
    flags = cli.parse(TablesFlags, argv, prog="python -m krr_st.tables", description=__doc__)
    layout = pick(LAYOUTS, flags.table, "table")
    published = load_published(flags.published)
    if flags.run:
        run_missing(layout, flags)
    records = entries(flags.table, layout, read_cells(flags.log_dir), published)
    stem = flags.log_dir / f"table_{flags.table}"
    for suffix, write in WRITERS.items():
        checkpoint.write_text(stem.with_suffix(f".{suffix}"), write(records) + "\n")
    print(to_markdown(records))
    print(
        f"test accuracy in %, source {layout.source}, {layout.protocol}; ours, mean ± std "
        "[published, difference]; – not run, † shortened training"
    )
    if flags.table == "fig3":
        draw_bars(records, stem.with_suffix(".png"))
        print(f"picture: {stem.with_suffix('.png')}")
    print(f"written: {stem}.md, .csv, .tex")
    return 0


def draw_bars(records: list[dict[str, Any]], path: Path) -> None:
    """Figure 3: one panel a target, one group of bars a network, one bar a method."""
    columns = list(dict.fromkeys(r["column"] for r in records))
    bars = {
        column: {r["row"]: (r["mean"], r["std"]) for r in records if r["column"] == column}
        for column in columns
    }
    save_bars(bars, path, y_label="test accuracy in %")


if __name__ == "__main__":
    sys.exit(main())
