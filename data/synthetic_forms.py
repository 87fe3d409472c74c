"""The file forms of a synthetic set: how each is recognised, read and written.

pair         folder with `x_syn.pt` and `y_syn.pt`, two plain tensors (KRR-ST's published form)
res          `res_*.pt`: {"data": [[images, labels], ...], "accs_all_exps": {...}} (DC family)
safetensors  one file: `images`, `targets`, and JSON in the metadata
png          folder of 8-bit `00000.png`, ... with `labels.csv` and `meta.json`, for people

Readers return the keyword arguments of `data.synthetic.SyntheticSet`, which checks the tensors.
The two published forms hold no statistics: a small JSON file of the same name lies beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.specs import Stats
from utils import checkpoint
from utils.errors import UserError

if TYPE_CHECKING:
    from data.synthetic import SyntheticSet


@dataclass(frozen=True)
class Form:
    """One way of storing a set: `read(path, stats, experiment)`, `write(set, path)`."""

    read: Callable[[Path, Stats | None, int], dict[str, Any]]
    write: Callable[[SyntheticSet, Path], None]


def detect_form(path: Path) -> str:
    """The form of an existing path, by its name and the files in it.

    Raises:
        UserError: nothing is there, or it is none of the forms.
    """
    if not path.exists():
        raise UserError(f"synthetic set {path} does not exist")
    if path.is_dir():
        for form, mark in (("pair", "x_syn.pt"), ("png", "labels.csv")):
            if (path / mark).exists():
                return form
        raise UserError(f"{path} holds neither x_syn.pt and y_syn.pt nor labels.csv with PNGs")
    if path.name in ("x_syn.pt", "y_syn.pt"):
        return "pair"
    return "safetensors" if path.suffix == ".safetensors" else "res"


def describe(synthetic: SyntheticSet) -> dict[str, Any]:
    """What lies beside the tensors, as plain JSON values."""
    stats = synthetic.stats
    return {
        "mean": list(stats.mean) if stats else None,
        "std": list(stats.std) if stats else None,
        "data_name": synthetic.data_name,
        "info": synthetic.info,
    }


def read_description(path: Path) -> dict[str, Any]:
    """Read what `describe` wrote (or a run's config.json); {} if there is no such file.

    Raises:
        UserError: the file is damaged or its values do not fit.
    """
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read as text") from None
    return parse_description(text, path)


def parse_description(text: str, path: Path) -> dict[str, Any]:
    """The keyword arguments in a JSON object; keys that are absent or null are left out."""
    try:
        raw = json.loads(text)
    except ValueError:
        raise UserError(f"{path} does not hold readable JSON") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a JSON {type(raw).__name__}, expected an object")
    found: dict[str, Any] = {}
    if raw.get("mean") is not None and raw.get("std") is not None:
        try:
            found["stats"] = Stats(*(tuple(float(v) for v in raw[k]) for k in ("mean", "std")))
        except (TypeError, ValueError):
            raise UserError(f"{path}: mean and std must be lists of numbers") from None
    if isinstance(raw.get("data_name"), str):
        found["data_name"] = raw["data_name"]
    if isinstance(raw.get("info"), dict):
        found["info"] = raw["info"]
    return found


def write_description(synthetic: SyntheticSet, path: Path) -> None:
    """Write `describe` as JSON, whole or not at all."""
    checkpoint.write_text(path, json.dumps(describe(synthetic), indent=2) + "\n")


def _read_pair(path: Path, stats: Stats | None, experiment: int) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    content = {
        "images": checkpoint.load_tensor(folder / "x_syn.pt", what="synthetic images"),
        "targets": checkpoint.load_tensor(folder / "y_syn.pt", what="synthetic targets"),
    }
    run = read_description(folder / "config.json")  # a run folder; its other keys are not info
    run.pop("info", None)
    return content | run | read_description(folder / "x_syn.json")


def _write_pair(synthetic: SyntheticSet, path: Path) -> None:
    checkpoint.save(synthetic.images, path / "x_syn.pt")
    checkpoint.save(synthetic.targets, path / "y_syn.pt")
    write_description(synthetic, path / "x_syn.json")


FORMS = {
    "pair": Form(_read_pair, _write_pair),
}
