"""Tables of a paper: places as data, ours beside the published numbers."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.measure import Cell, grouped, read_cells
from evaluation.slurm import Jobs, run_jobs
from utils import checkpoint
from utils.errors import UserError
from utils.table import format_mean_std, markdown, mean_std

# (table, row, column) -> (mean, std), accuracies in %; std is None where the source prints none.
Number = tuple[float, float | None]
Published = dict[tuple[str, str, str], Number]

RESULTS = "results.jsonl"  # the measurements, in the folder of a table
NOTE = "ours, mean ± std [published, difference, where the number is known]; – not run, † shortened"


@dataclass(frozen=True)
class Entry:
    """One place of a table, as it is printed."""

    row: str
    column: str
    values: tuple[float, ...]  # our accuracies in %; empty: not run
    scaled: bool = False  # ours come from shortened training
    published: Number | None = None

    def record(self) -> dict[str, Any]:
        """The line of the CSV file; None where there is no number."""
        mean, std = mean_std(self.values) if self.values else (None, None)
        theirs, their_std = self.published or (None, None)
        ours = dict(row=self.row, column=self.column, n=len(self.values), mean=mean, std=std)
        ours |= dict(scaled=self.scaled, published_mean=theirs, published_std=their_std)
        return ours | dict(difference=None if mean is None or theirs is None else mean - theirs)

    def shown(self) -> str:
        """`ours ± std† [published ± std, difference]`, a dash for what is not there."""
        text = format_mean_std(self.values) + "†" * self.scaled
        if self.published is None:
            return text
        theirs, their_std = self.published
        text += f" [{theirs:.2f}" + (f" ± {their_std:.2f}" if their_std is not None else "")
        return text + (f", {self.record()['difference']:+.2f}]" if self.values else "]")


def crossed(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the shown entries."""
    columns = list(dict.fromkeys(e.column for e in entries))
    rows = grouped(entries, lambda e: e.row)
    return ["method", *columns], [[row, *(e.shown() for e in mine)] for row, mine in rows.items()]


_TEX = {"±": "$\\pm$", "†": "$^\\dagger$", "–": "--", "×": "$\\times$", "α": "$\\alpha$"}


def _tex(text: str) -> str:
    escaped = re.sub(r"([_%&#$])", r"\\\1", text)
    escaped = re.sub(r"(?<=, )([+-])(?=\d)", r"$\1$", escaped)  # a sign, not a hyphen
    return re.sub("|".join(_TEX), lambda m: _TEX[m[0]], escaped)


def to_latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A LaTeX tabular."""
    first, *others = (" & ".join(map(_tex, row)) + " \\\\" for row in [header, *rows])
    begin = f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    return "\n".join([begin, first, "\\hline", *others, "\\end{tabular}"])


def to_csv(entries: Sequence[Entry]) -> str:
    """One line per entry, empty fields where there is no number."""
    records, buffer = [entry.record() for entry in entries], io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue().rstrip("\n")


def with_published_file(known: Published, path: Path | None) -> Published:
    """The verified numbers, with a user's file put on top; a UserError where it has another form.

    The file is JSON `{table: {row: {column: [mean, std]}}}`; std may be null or left out.
    """
    if path is None:
        return dict(known)
    try:
        given = {
            (str(table), row, column): _number(value)
            for table, rows in json.loads(path.read_text()).items()
            for row, columns in rows.items()
            for column, value in columns.items()
        }
    except OSError as error:
        raise UserError(f"--published {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        form = "{table: {row: {column: [mean, std]}}}"
        raise UserError(f"--published {path}: expected JSON {form}") from None
    return {**known, **given}


def _number(value: Any) -> Number:
    mean, std = [*(value if isinstance(value, list) else [value]), None][:2]
    if not math.isfinite(float(mean)) or not math.isfinite(float(std or 0)):
        raise ValueError(f"{value} is not finite")
    return float(mean), None if std is None else float(std)


# What cells of older versions and other protocols do not say.
_IMPLIED = {"shots": "all", "probe_on": "body", "steps_scale": 1.0}


@dataclass(frozen=True)
class Place:
    """One cell of a printed table, and which finished measurements belong there.

    Of several origins the one with the smallest rank counts, else the latest.
    """

    row: str
    column: str
    wanted: Mapping[str, Any]  # what a measurement must hold
    field: str = "accuracy"  # where it holds the value, or the values
    fits: Callable[[Cell], bool] = lambda cell: True  # what it must fulfil besides
    origin: tuple[str, ...] = ()  # fields that the seeds of one mean share
    rank: Callable[[Cell], Any] = lambda cell: 0  # of an origin, by one of its measurements
    shortened: Callable[[Cell], bool] = lambda cell: cell.get("steps_scale", 1.0) != 1.0
    published: Number | None = None

    def choose(self, cells: Sequence[Cell]) -> list[Cell]:
        """The measurements that count, one per seed (the latest), by seed; `cells` are oldest first."""
        held = [c for c in cells if all(c.get(k, _IMPLIED.get(k)) == v for k, v in self.wanted.items())]
        mine = reversed([cell for cell in held if self.fits(cell)])
        groups = grouped(mine, lambda cell: repr([cell.get(name) for name in self.origin]))
        best = min(groups.values(), key=lambda group: self.rank(group[0]), default=[])
        by_seed = {cell["seed"]: cell for cell in reversed(best)}
        return [by_seed[seed] for seed in sorted(by_seed)]

    def entry(self, cells: Sequence[Cell]) -> Entry:
        """What is printed."""
        mine, values = self.choose(cells), []
        for cell in mine:
            found = cell[self.field]
            values += found if isinstance(found, list) else [found]
        return Entry(self.row, self.column, tuple(values), any(map(self.shortened, mine)), self.published)


def make_table(
    places: Sequence[Place], name: str, note: str, jobs: Jobs, flags: Any
) -> tuple[list[Entry], int]:
    """Run what is missing, if asked, then write the table to {log_dir}/{name}.md, .csv, .tex, and print it.

    `flags` are JobFlags with `run` and `log_dir`, the folder of the measurements; `jobs` is as for
    `run_jobs`, `note` says what the numbers are. Returns the places and the command's exit code: 1 where
    something could not be run.
    """
    wanted = flags.run or flags.slurm or flags.detach
    skipped = run_jobs(jobs, flags, flags.log_dir) if wanted else []
    cells = read_cells(flags.log_dir / RESULTS)
    entries = [place.entry(cells) for place in places]
    shown = crossed(entries)
    print(text := markdown(*shown))
    for suffix, content in {".md": text, ".csv": to_csv(entries), ".tex": to_latex(*shown)}.items():
        checkpoint.write_text(flags.log_dir / (name + suffix), content + "\n")
    if skipped:
        print(f"{len(skipped)} of the missing jobs could not be run; the reasons are above the table")
    print(f"{note}\nwritten: {flags.log_dir / name}.md, .csv, .tex")
    return entries, 1 if skipped else 0
