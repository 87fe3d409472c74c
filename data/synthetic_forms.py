"""The file forms of a synthetic set: how each is recognised, read and written.

The table of all forms is FORMS in `data.synthetic`.

pair         folder with `x_syn.pt` and `y_syn.pt`, two plain tensors (KRR-ST's published form)
res          `res_*.pt`: {"data": [[images, labels], ...], "accs_all_exps": {...}} (DC family)
safetensors  one file: `images`, `targets`, and JSON in the metadata
png          folder of 8-bit `00000.png`, ... and `labels.csv`, see `data.synthetic_png`

Readers return the keyword arguments of `data.synthetic.SyntheticSet`, which checks the tensors.
The two published forms hold no statistics: a small JSON file of the same name lies beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

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
    except (ValueError, RecursionError):
        raise UserError(f"{path} does not hold readable JSON") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a JSON {type(raw).__name__}, expected an object")
    found: dict[str, Any] = {}
    if raw.get("mean") is not None and raw.get("std") is not None:
        try:
            mean, std = (tuple(float(v) for v in raw[key]) for key in ("mean", "std"))
            usable = len(mean) == len(std) and min(std) > 0
            usable = usable and all(math.isfinite(value) for value in mean + std)
        except (TypeError, ValueError):
            usable = False
        if not usable:
            raise UserError(f"{path}: mean and std must be equally long lists, std above 0")
        found["stats"] = Stats(mean, std)
    if isinstance(raw.get("data_name"), str):
        found["data_name"] = raw["data_name"]
    if isinstance(raw.get("info"), dict):
        found["info"] = raw["info"]
    return found


def write_description(synthetic: SyntheticSet, path: Path) -> None:
    """Write `describe` as JSON, whole or not at all."""
    checkpoint.write_text(path, json.dumps(describe(synthetic), indent=2) + "\n")


def read_pair(path: Path, stats: Stats | None, experiment: int) -> dict[str, Any]:
    """Read a pair; its JSON file goes before the config.json of a run folder."""
    folder = path if path.is_dir() else path.parent
    content = {
        "images": checkpoint.load_tensor(folder / "x_syn.pt", what="synthetic images"),
        "targets": checkpoint.load_tensor(folder / "y_syn.pt", what="synthetic targets"),
    }
    run = read_description(folder / "config.json")  # a run folder; its other keys are not info
    run.pop("info", None)
    return content | run | read_description(folder / "x_syn.json")


def write_pair(synthetic: SyntheticSet, path: Path) -> None:
    """Write a pair; each file is whole or not at all, the three together are not."""
    folder = path.parent if path.name == "x_syn.pt" else path
    checkpoint.save(synthetic.images, folder / "x_syn.pt")
    checkpoint.save(synthetic.targets, folder / "y_syn.pt")
    write_description(synthetic, folder / "x_syn.json")


def read_res(path: Path, stats: Stats | None, experiment: int) -> dict[str, Any]:
    """Read one experiment of a `res_*.pt`; its accuracies become info."""
    raw = checkpoint.load(path, what="synthetic file")
    runs = raw.get("data") if isinstance(raw, dict) else None
    if not isinstance(runs, list | tuple) or not runs:
        held = sorted(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise UserError(
            f"{path} holds {held}, expected a dict whose 'data' lists [images, labels]; a pair is "
            "read from the folder that holds x_syn.pt and y_syn.pt"
        )
    if not 0 <= experiment < len(runs):
        raise UserError(f"{path} holds experiments 0 to {len(runs) - 1}, not {experiment}")
    run = runs[experiment]
    if not isinstance(run, list | tuple) or len(run) != 2:
        raise UserError(f"{path}: experiment {experiment} is not a pair [images, labels]")
    try:
        accuracies = {
            str(name): [float(a) for a in values]
            for name, values in (raw.get("accs_all_exps") or {}).items()
        }
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: accs_all_exps must map names to lists of numbers") from None
    content = {"images": run[0], "targets": run[1]} | read_description(path.with_suffix(".json"))
    facts = {"accs_all_exps": accuracies, "experiment": experiment, "num_experiments": len(runs)}
    return content | {"info": content.get("info", {}) | facts}


def save_experiments(
    path: Path | str,
    sets: Sequence[SyntheticSet],
    accuracies: dict[str, list[float]],
) -> None:
    """Write several experiments into one `res_*.pt`; the first one's facts go beside it as JSON.

    Args:
        path: the file, published as `res_{method}_{dataset}_{model}_{ipc}ipc.pt`.
        sets: one set of class indices an experiment.
        accuracies: evaluation network -> test accuracies in [0, 1]; stored as Python floats.

    Raises:
        UserError: float targets, no set at all, or `path` cannot be written.
    """
    path = Path(path)
    if not sets:
        raise UserError(f"cannot write {path}: no experiment is given")
    if path.suffix != ".pt" or path.name in ("x_syn.pt", "y_syn.pt"):
        raise UserError(f"cannot write {path}: a res file is named like res_DC_CIFAR10_10ipc.pt")
    if any(s.soft for s in sets):
        raise UserError(
            f"cannot write {path}: the res form holds class indices, these targets are float "
            "vectors; use --form pair or safetensors"
        )
    # Clones, because torch.save writes the whole storage behind a view.
    data = [[s.images.cpu().clone(), s.targets.cpu().clone()] for s in sets]
    scores = {name: [float(a) for a in values] for name, values in accuracies.items()}
    checkpoint.save({"data": data, "accs_all_exps": scores}, path)
    write_description(sets[0], path.with_suffix(".json"))


def write_res(synthetic: SyntheticSet, path: Path) -> None:
    """Write one experiment with the accuracies in info; see `save_experiments`."""
    save_experiments(path, [synthetic], synthetic.info.get("accs_all_exps", {}))


def read_safetensors(path: Path, stats: Stats | None, experiment: int) -> dict[str, Any]:
    """Read `images`, `targets` and the description in the metadata."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            content = {key: file.get_tensor(key) for key in names & {"images", "targets"}}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is truncated or not a safetensors file ({reason})") from None
    if len(content) != 2:
        raise UserError(f"{path} holds {sorted(names)}, expected images and targets")
    return content | parse_description(metadata.get("synthetic_set", "{}"), path)


def write_safetensors(synthetic: SyntheticSet, path: Path) -> None:
    """Write one safetensors file; metadata values must be strings, hence the JSON."""
    if path.suffix != ".safetensors":
        raise UserError(f"cannot write {path}: expected a name ending in .safetensors")
    tensors = {"images": synthetic.images, "targets": synthetic.targets}
    metadata = {"format": "pt", "synthetic_set": json.dumps(describe(synthetic))}
    payload = safetensors.torch.save(tensors, metadata)
    checkpoint.write_atomic(path, lambda file: file.write(payload))
