"""`python -m krr_st.tables --table 1|2|3|4|fig3|probe_... [--run]`: the paper's tables from cells.

Collects finished cells of test.py, test_scratch.py and test_kd.py from {log_dir}/results.jsonl into
Markdown, CSV and LaTeX, ours beside the published numbers. Cells that were not run show as a dash;
with --run they are run first, cheapest first, and a restart skips what is finished. The same
command in several shells or under torchrun (`torchrun --nproc_per_node 4 -m -- krr_st.tables ...`),
on one node or several, shares the work.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from krr_st.config import TablesFlags
from krr_st.published import load_published
from krr_st.table_layouts import LAYOUTS, Cell, Layout, collect, places
from krr_st.table_runs import missing_jobs, present_sets
from utils import cli
from utils.cells import read_cells
from utils.errors import entry_point, pick
from utils.images import save_bar_groups
from utils.jobs import run_missing
from utils.locks import Claims
from utils.paper_table import NOTE, Entry, Published, write_table
from utils.table import mean_std


def entries(
    name: str,
    layout: Layout,
    cells: list[Cell],
    published: Published,
    sets: Mapping[str, str] = MappingProxyType({}),
) -> list[Entry]:
    """One entry a place, with the accuracies of its seeds; `sets` as in `collect`."""
    found = collect(layout, cells, sets=sets)
    made = []
    for place in places(layout):
        mine = found.get(place.key, [])
        made.append(
            Entry(
                place.row, place.column, tuple(cell["accuracy"] for cell in mine),
                any(cell.get("steps_scale", 1.0) != 1.0 for cell in mine),
                published.get((name, place.row, place.column)),
            )
        )  # fmt: skip
    return made


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Run what is missing if asked, then write and print the table."""
    flags = cli.parse(TablesFlags, argv, prog="python -m krr_st.tables", description=__doc__)
    layout = pick(LAYOUTS, flags.table, "table")
    if layout.protocol == "kd":
        layout = replace(layout, kd_bn=flags.kd_bn)
    published = load_published(flags.published)
    if flags.run:
        run_missing(lambda: missing_jobs(layout, flags), Claims(flags.log_dir / "claims"))
    cells = read_cells(flags.log_dir / "results.jsonl")
    sets = present_sets(layout, flags.synthetic_data_dir)
    table = entries(flags.table, layout, cells, published, sets)
    stem = flags.log_dir / f"table_{flags.table}"
    write_table(table, stem)
    mode = f" (BatchNorm: {layout.kd_bn} statistics)" if layout.kd_bn else ""
    print(f"test accuracy in %, source {layout.source}, {layout.protocol}{mode}; {NOTE}")
    if flags.table == "fig3":
        draw_bars(layout, table, stem.with_suffix(".png"))
        print(f"picture: {stem.with_suffix('.png')}")
    print(f"written: {stem}.md, .csv, .tex")
    return 0


def draw_bars(layout: Layout, table: Sequence[Entry], path: Path) -> None:
    """Figure 3: one panel a target, one group of bars a network, one bar a method."""
    panels: dict[str, dict[str, dict[str, tuple[float, float] | None]]] = {}
    for place, entry in zip(places(layout), table, strict=True):
        bar = mean_std(entry.values) if entry.values else None
        panels.setdefault(place.target, {}).setdefault(place.model, {})[place.method] = bar
    shortened = ", shortened" if any(entry.scaled for entry in table) else ""
    save_bar_groups(panels, path, y_label=f"test accuracy in %{shortened}")


if __name__ == "__main__":
    sys.exit(main())
