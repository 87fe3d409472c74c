"""`python -m clom.tables [--run]`: DC, DSA and DM with and without CLoM, ours beside published.

Rows are the methods without CLoM and with each of its forms, columns the data sets and images a
class. Finished cells are collected from {log_dir}/results.jsonl into Markdown, CSV and LaTeX; those
that were not run show as a dash. With --run they are run first, cheapest first: a restart skips
what is finished and goes on with what was begun. The same command in several shells or under
torchrun (`torchrun --nproc_per_node 4 -m -- clom.tables ...`), on one node or several, shares the
work.

± is the population standard deviation over all networks of all experiments together (num_exp x
num_eval), as the published code prints it; the CSV file's n is their number.
"""

from __future__ import annotations

import sys

from clom.published import FULL_DATA, published_numbers
from clom.table_cells import Cell, Place, as_published, collect, is_shortened, places
from clom.table_config import TablesFlags
from clom.table_runs import RESULTS, missing_jobs
from utils import cli
from utils.cells import read_cells
from utils.errors import entry_point
from utils.jobs import run_missing
from utils.locks import Claims
from utils.paper_table import NOTE, Entry, Number, Published, with_published_file, write_table


def entries(flags: TablesFlags, cells: list[Cell], published: Published) -> list[Entry]:
    """One entry a place, with the accuracies of all networks of its experiments."""
    return [
        Entry(
            place.row, place.column,
            tuple(value for cell in mine for value in cell[place.field]),
            bool(mine) and is_shortened(flags, place),
            published_number(flags, place, published),
        )
        for place, mine in collect(flags, cells).items()
    ]  # fmt: skip


def published_number(flags: TablesFlags, place: Place, published: Published) -> Number | None:
    """The number to print beside ours, if it was measured with these settings."""
    number = published.get((place.dataset, place.row, str(place.ipc)))
    return number if as_published(flags, place) else None


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Run what is missing if asked, then write and print the table."""
    flags = cli.parse(TablesFlags, argv, prog="python -m clom.tables", description=__doc__)
    published = with_published_file(published_numbers(), flags.published)
    if flags.run:
        run_missing(lambda: missing_jobs(flags), Claims(flags.log_dir / "claims"))
    stem = flags.log_dir / "table"
    write_table(entries(flags, read_cells(flags.log_dir / RESULTS), published), stem)
    print(caption(flags))
    print(f"written: {stem}.md, .csv, .tex")
    return 0


def caption(flags: TablesFlags) -> str:
    """What the numbers are."""
    text = f"test accuracy in % of {flags.model} after the last iteration and epoch; {NOTE}"
    full = [f"{name} {FULL_DATA[name][0]}" for name in flags.datasets if name in FULL_DATA]
    if not all(as_published(flags, place) for place in places(flags)):
        text += (
            "; no published number where it belongs to another network (it is ConvNet's), size, "
            "--init, --lr_img or --batch_real"
        )
    return f"{text}; published for the full data: {', '.join(full)}" if full else text


if __name__ == "__main__":
    sys.exit(main())
