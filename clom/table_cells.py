"""The places of clom.tables, the finished cells that belong there, and what a cell is.

A cell is one experiment: one distilled set and the `num_eval` networks trained on it. Its value
depends on all of main.py's flags, the data and the pre-trained models, which identify it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clom.config import DistillFlags, resolve
from clom.evaluate import published_augmentation, published_training
from clom.inputs import keeps_meaning_mirrored, load_data
from clom.published import RANDOM
from clom.run import FREE_FLAGS
from clom.table_config import TablesFlags, Variant, parse_variant
from clom.teachers import PREFIX, find_checkpoints
from data.specs import DC_SPECS
from utils import checkpoint, cli
from utils.cells import CellStore
from utils.distributed import local_gpu

Cell = dict[str, Any]

# Flags of main.py that do not decide a cell's value; seed, data and models are put in on their own.
_NOT_SETTINGS = (*FREE_FLAGS, "save_path", "pretrained_path", "eval_interval", "seed")


@dataclass(frozen=True)
class Place:
    """One cell of the printed table.

    Attributes:
        dataset: of its column.
        ipc: of its column.
        method: distiller of its row.
        variant: of its row.
        start: the value is that of the images before distillation.
    """

    dataset: str
    ipc: int
    method: str
    variant: Variant
    start: bool = False

    @property
    def row(self) -> str:
        """Heading of the row."""
        if self.start:
            return RANDOM
        heading = self.variant.heading
        return f"{self.method} + {heading}" if heading else self.method

    @property
    def column(self) -> str:
        """Heading of the column."""
        return f"{self.dataset}, {self.ipc} ipc"

    @property
    def field(self) -> str:
        """Where a finished cell holds this place's accuracies."""
        return "start_accuracies" if self.start else "accuracies"


def places(flags: TablesFlags) -> list[Place]:
    """All places in reading order. DM starts from random real images: they get a row.

    Raises:
        UserError: a bad variant.
    """
    variants = [parse_variant(text) for text in dict.fromkeys(flags.variants)]
    methods = list(dict.fromkeys(flags.methods))
    rows = [(method, variant, False) for method in methods for variant in variants]
    plain = Variant("none")
    if "DM" in methods and plain in variants and flags.init != "noise":
        rows.insert(0, ("DM", plain, True))
    return [
        Place(dataset, ipc, method, variant, start)
        for method, variant, start in rows
        for dataset in dict.fromkeys(flags.datasets)
        for ipc in dict.fromkeys(flags.ipcs)
    ]


def cell_flags(flags: TablesFlags, place: Place) -> DistillFlags:
    """main.py's flags of a place, resolved and shortened by `steps_scale`, without a seed.

    Raises:
        UserError: flags that do not fit together.
    """
    names = {f.name for f in dataclasses.fields(DistillFlags)}
    shared = {k: v for k, v in vars(flags).items() if k in names - {"num_exp", "seed"}}
    pool = ("models_pool", "model_num", "epoch", "CLoM_batch_size", "source_dataset",
            "CLoM_teacher_stats")  # fmt: skip
    if not place.variant.flags["CLoM"]:  # what is not used must not make another cell
        shared = {k: v for k, v in shared.items() if k not in pool}
    elif place.variant.flags["CLoM_distance"] == "ce":
        shared["source_dataset"] = place.dataset
    if shared.get("Iteration") is None:
        shared["Iteration"] = published_length(flags, place)[0]
    if shared.get("epoch_eval_train") is None:
        shared["epoch_eval_train"] = published_length(flags, place)[1]
    for name in ("Iteration", "epoch_eval_train"):
        shared[name] = max(1, round(flags.steps_scale * shared[name]))
    for name, value in published_settings(place).items():
        if shared[name] is None:
            shared[name] = value
    shared["gpu"] = local_gpu(flags.gpu)
    given = DistillFlags(
        **shared, **place.variant.flags, dataset=place.dataset, ipc=place.ipc,
        method=place.method, eval_interval=shared["Iteration"],
    )  # fmt: skip
    return resolve(given, hflip=keeps_meaning_mirrored(given))


def published_settings(place: Place) -> dict[str, Any]:
    """What the published cells set otherwise than main.py's defaults."""
    if place.method == "DSA":
        return {"init": "real"}
    if place.method == "DM" and place.dataset == "CIFAR10" and place.ipc >= 100:
        return {"lr_img": 10.0}
    return {}


def as_published(flags: TablesFlags, place: Place) -> bool:
    """Whether a place's network, size, start, rate and real batch are those of the published cell.

    Its length is not asked about: shortened cells are marked.
    """
    spec = DC_SPECS.get(place.dataset)
    own_size = flags.img_size is None or (spec is not None and flags.img_size in spec.sizes)
    names = ("model", "init") if place.start else ("model", "init", "lr_img", "batch_real")
    mine, theirs = cell_flags(flags, place), cell_flags(TablesFlags(), place)
    return own_size and all(getattr(mine, name) == getattr(theirs, name) for name in names)


def published_length(flags: TablesFlags, place: Place) -> tuple[int, int]:
    """The published iterations and evaluation epochs of a place."""
    default = resolve(DistillFlags(method=place.method, model=flags.model))
    augmentation = published_augmentation(
        place.method, place.dataset, flags.model, default.dsa_strategy
    )
    training = published_training(augmentation, None, default.lr_net, default.batch_train)
    return default.Iteration, training.epochs - 1  # epochs 0 to E


def is_shortened(flags: TablesFlags, place: Place) -> bool:
    """Whether cells of a place take less than the published iterations or evaluation epochs."""
    mine = cell_flags(flags, place)
    iterations, epochs = published_length(flags, place)
    return mine.Iteration < iterations or mine.epoch_eval_train < epochs


def settings(run: DistillFlags) -> dict[str, Any]:
    """What identifies a cell, except seed, data and pre-trained models; plain JSON values."""
    values = {k: v for k, v in cli.as_json(run).items() if k not in _NOT_SETTINGS}
    return json.loads(json.dumps(values))


def cell_key(run: DistillFlags, seed: int) -> dict[str, Any]:
    """All that identifies a cell.

    Raises:
        UserError: missing or unreadable data or pre-trained models.
    """
    facts = data_facts(run.dataset, run.data_path, run.img_size)
    return {
        **settings(run), "seed": seed, "data": facts.fingerprint,
        "teachers": teacher_fingerprints(run) if run.CLoM else [],
    }  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """A prepared set: digest of all images and labels, (C, H, W), number of classes."""

    fingerprint: str
    img_shape: tuple[int, int, int]
    num_classes: int


@functools.cache
def data_facts(dataset: str, data_path: Path | None, img_size: int | None) -> Facts:
    """Read a set once.

    Raises:
        UserError: as `load_data`.
    """
    image_set = load_data(DistillFlags(dataset=dataset, data_path=data_path, img_size=img_size))
    splits = [s for s in (image_set.train, image_set.test) if s is not None]
    digest = checkpoint.fingerprint(*(t for s in splits for t in (s.images, s.labels)))
    return Facts(digest, tuple(image_set.img_shape), image_set.num_classes)


def teacher_fingerprints(run: DistillFlags) -> list[str]:
    """One digest a pre-trained model; those of transformers are known by their name."""
    found = []
    for name in run.models_pool:
        if name.startswith(PREFIX):
            found.append(name)
            continue
        paths = find_checkpoints(
            run.pretrained_path, run.source_dataset, name, run.epoch, run.model_num
        )
        found += [_digest(path, path.stat().st_mtime) for path in paths]
    return found


@functools.cache
def _digest(path: Path, changed: float) -> str:
    state = checkpoint.load_state(path, what="pre-trained model")
    return checkpoint.fingerprint(*(state[key] for key in sorted(state)))


def collect(flags: TablesFlags, cells: list[Cell]) -> dict[Place, list[Cell]]:
    """The cells of each place, by seed.

    Cells of other data or pre-trained models are not averaged: those of the latest cell count.

    Args:
        flags: of the table.
        cells: oldest first.
    """
    found = {}
    for place in places(flags):
        wanted = settings(cell_flags(flags, place))
        mine = [c for c in cells if all(c.get(k) == v for k, v in wanted.items())]
        origin = {name: mine[-1].get(name) for name in ("data", "teachers")} if mine else {}
        by_seed = {
            c["seed"]: c for c in mine if all(c.get(k) == v for k, v in origin.items())
        }  # fmt: skip
        found[place] = [by_seed[seed] for seed in sorted(by_seed)]
    return found


def run_folder(flags: TablesFlags, place: Place, key: dict[str, Any]) -> Path:
    """Where a cell's run lies: what it is, then its digest."""
    name = f"{place.dataset}_{place.method}_ipc{place.ipc}_{place.variant.name}_seed{key['seed']}"
    return flags.log_dir / "runs" / f"{name}_{CellStore.identity(key)[:8]}"
