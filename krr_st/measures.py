"""What test.py and test_scratch.py measure: columns, finished cells in words, the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from krr_st.config import ScratchFlags
from utils.errors import UserError
from utils.table import format_mean_std, markdown, mean_std

TARGET_ERROR = "target_error"


@dataclass(frozen=True)
class Measure:
    """What is measured of a pre-trained network: one column of the table.

    Attributes:
        protocol: how: one of --protocol, or TARGET_ERROR.
        shots: labelled images a class, or "all".
        on: what frozen protocols read: "body" or "outputs".
    """

    protocol: str
    shots: str = "all"
    on: str = "body"

    @classmethod
    def of(cls, cell: dict[str, Any]) -> Measure:
        """The measure whose cell it is."""
        return cls(cell["protocol"], cell["shots"], cell.get("probe_on", "body"))

    def heading(self, fraction: float | None) -> str:
        """The head of the column; `fraction`: share of the labels, where shots do not say it."""
        if self.protocol == TARGET_ERROR:
            return "error of target features"
        budget = "all labels" if self.shots == "all" else f"{self.shots} labels a class"
        if fraction is not None:
            budget = f"{100 * fraction:g} % of labels"
        return budget if self.on == "body" else f"outputs, {budget}"


def parse_shots(joined: str) -> tuple[str, ...]:
    """`10_all` -> ("10", "all").

    Raises:
        UserError: an entry that is neither a positive number nor all.
    """
    parts = tuple(joined.split("_"))
    for part in parts:
        if part != "all" and not (part.isdecimal() and int(part) > 0):
            raise UserError(f"--shots {joined}: {part!r} is neither a positive number nor 'all'")
    return tuple(dict.fromkeys(parts))


def wanted_measures(flags: ScratchFlags) -> list[Measure]:
    """The measures that the flags ask for, in the table's order.

    Raises:
        UserError: shots that are none, or outputs where fine-tuning replaces them.
    """
    shots = ("all",) if flags.label_fraction is not None else parse_shots(flags.shots)
    if flags.protocol == "finetune" and flags.probe_on != "body":
        raise UserError(
            f"--probe_on {flags.probe_on}: fine-tuning replaces the outputs; use --protocol "
            "linear, probe or knn"
        )
    read = ("body", "outputs") if flags.probe_on == "both" else (flags.probe_on,)
    found = [Measure(flags.protocol, count, on) for on in read for count in shots]
    return found + [Measure(TARGET_ERROR, on="outputs")] * flags.target_error


def describe(cell: dict[str, Any]) -> str:
    """A finished cell in one line."""
    measure = Measure.of(cell)
    where = f"{cell['target']}, seed {cell['seed']}"
    if measure.protocol == TARGET_ERROR:
        return f"{where}: error of target features {cell['error']:.4f}"
    on = "" if measure.on == "body" else " on outputs"
    return f"{where}, {measure.shots} shots{on}: {cell['accuracy']:.2f} %"


def summarize(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and population std over seeds for each target and measure."""
    groups: dict[tuple[str, Measure], list[float]] = {}
    for cell in cells:
        values = groups.setdefault((cell["target"], Measure.of(cell)), [])
        values.append(cell["error"] if "error" in cell else cell["accuracy"])
    return [
        {"target": target, **asdict(measure), "n": len(values),
         **dict(zip(("mean", "std"), mean_std(values), strict=True))}
        for (target, measure), values in groups.items()
    ]  # fmt: skip


def table(cells: list[dict[str, Any]], flags: ScratchFlags) -> str:
    """Targets as rows, measures as columns: test accuracy in %, or the error."""
    measures = list(dict.fromkeys(map(Measure.of, cells)))
    rows = []
    for name in dict.fromkeys(cell["target"] for cell in cells):
        stand_in = {c.get("tested_on") for c in cells if c["target"] == name} - {None}
        row = [" on ".join([name, *stand_in])]
        for measure in measures:
            mine = [c for c in cells if (c["target"], Measure.of(c)) == (name, measure)]
            if measure.protocol == TARGET_ERROR:
                row.append(format_mean_std([c["error"] for c in mine], 3))
            else:
                row.append(format_mean_std([c["accuracy"] for c in mine]))
        rows.append(row)
    text = markdown(["target", *(m.heading(flags.label_fraction) for m in measures)], rows)
    note = f"test accuracy in %, {flags.protocol}, mean ± std over {flags.num_test} seeds"
    if flags.target_error:
        note += "; error of the outputs in variances of the target's features: 1 predicts the mean"
    if flags.steps_scale != 1:
        note += f"; lengths scaled by {flags.steps_scale}, not the table's"
    return f"{text}\n{note}"
