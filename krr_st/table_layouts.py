"""What each table of the paper looks like, and which finished cells belong where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from evaluation.recipes import GAUSSIAN, RANDOM_FEATURES, SCRATCH
from krr_st.presets import FULL_TARGETS, PRESETS

_TABLE_1 = ("random", "kmeans", "dsa", "dm", "mtt", "kip", "frepo", "krr_st")
_TABLE_2 = tuple(m for m in _TABLE_1 if m != "kip")
_FIVE = ("base", "vgg", "alexnet", "mobilenet", "resnet10")
_FINE_GRAINED = ("aircraft", "cars", "cub2011", "dogs", "flowers")
_PROBE_TARGETS = (
    "cifar10", "cifar100", "tinyimagenet", "aircraft", "cub2011", "dogs", "flowers",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One table: its rows are methods (times models), its columns targets (or models).

    Attributes:
        source: source data set.
        methods: rows.
        models: networks; with one model they are not shown.
        targets: columns (a single one in table 4, whose columns are the models).
        protocol: finetune, kd or probe.
        fraction: label fraction of the probe tables.
        pre_epoch: length of pre-training where the table sets one.
        kd_bn: BatchNorm mode of table 4.
    """

    source: str
    methods: tuple[str, ...]
    models: tuple[str, ...]
    targets: tuple[str, ...]
    protocol: str = "finetune"
    fraction: float | None = None
    pre_epoch: int | None = None
    kd_bn: str | None = None

    def set_folder(self, method: str) -> str:
        """Whose synthetic images a method trains on: without pre-training those of real images."""
        return RANDOM_FEATURES if method == SCRATCH and self.protocol == "kd" else method


# Every table has two rows more than the published ones: without them no gain can be read.
_EXTRA = (SCRATCH, RANDOM_FEATURES)


def _probe(source: str, percent: int) -> Layout:
    methods = (*_EXTRA, "krr_st", "mkdt")
    return Layout(source, methods, ("base",), _PROBE_TARGETS, "probe", percent / 100, 20)


LAYOUTS: dict[str, Layout] = {
    "1": Layout("cifar100", (*_EXTRA, *_TABLE_1), ("base",), FULL_TARGETS["cifar100"]),
    "2": Layout("tinyimagenet", (*_EXTRA, *_TABLE_2), ("base",), FULL_TARGETS["tinyimagenet"]),
    "3": Layout(
        "imagenet", (*_EXTRA, "random", "frepo", "krr_st"), ("base",), FULL_TARGETS["imagenet"]
    ),
    "4": Layout(
        "tinyimagenet", (GAUSSIAN, *_EXTRA, *_TABLE_2), _FIVE, ("cifar10",), "kd", kd_bn="running"
    ),
    "fig3": Layout("tinyimagenet", (*_EXTRA, *_TABLE_2), _FIVE[1:], _FINE_GRAINED),
    "probe_cifar10_1": _probe("cifar10", 1),
    "probe_cifar10_5": _probe("cifar10", 5),
    "probe_cifar100_1": _probe("cifar100", 1),
    "probe_cifar100_5": _probe("cifar100", 5),
    "probe_tinyimagenet_5": _probe("tinyimagenet", 5),
}


Cell = dict[str, Any]
Key = tuple[str, str, str]  # method, model, target


def network(layout: Layout, model: str) -> str:
    """`base` is the source's own network."""
    return PRESETS[layout.source].network if model == "base" else model


def collect(
    layout: Layout,
    cells: list[Cell],
    steps_scale: float | None = None,
    sets: Mapping[str, str] = MappingProxyType({}),
) -> dict[Key, list[Cell]]:
    """The cells that belong to each place of the table, one a seed (the latest).

    A place is matched by source, method, network, target, protocol, label budget and `kd_bn`.
    Cells of other synthetic sets, teachers or lengths are not mixed: those of the method's present
    set count, else of the latest cell, and of all lengths the one nearest to the published.

    Args:
        layout: of the table.
        cells: oldest first.
        steps_scale: take only this length.
        sets: method -> fingerprint of its present synthetic set, where there is one.
    """
    found: dict[Key, dict[tuple, dict[int, Cell]]] = {}
    for cell in cells:
        for model in layout.models:
            matches = (
                cell.get("source") == layout.source
                and cell.get("model") == network(layout, model)
                and cell.get("target") in layout.targets
                and cell.get("protocol") == layout.protocol
                and cell.get("label_fraction") == layout.fraction
                and cell.get("kd_bn") == layout.kd_bn
                and cell.get("shots", "all") == "all"
                and cell.get("probe_on", "body") == "body"
                and steps_scale in (None, cell.get("steps_scale", 1.0))
                and _fits_pretraining(layout, cell)
            )
            if matches:
                groups = found.setdefault((cell["method"], model, cell["target"]), {})
                group = groups.pop(_origin(cell), {})
                groups[_origin(cell)] = {**group, cell["seed"]: cell}  # the latest group is last
    chosen = {}
    for key, groups in found.items():
        present = sets.get(key[0])
        best = min(reversed(groups), key=lambda o: (o[1] != present, abs(o[0] - 1)))
        chosen[key] = [groups[best][seed] for seed in sorted(groups[best])]
    return chosen


def _origin(cell: Cell) -> tuple:
    """What the seeds of one mean must share."""
    return cell.get("steps_scale", 1.0), cell.get("synthetic_set"), cell.get("teacher")


def _fits_pretraining(layout: Layout, cell: Cell) -> bool:
    recipe = cell.get("pretraining")
    return layout.pre_epoch is None or not recipe or recipe["epochs"] == layout.pre_epoch


@dataclass(frozen=True)
class Place:
    """One cell of the printed table."""

    row: str
    column: str
    method: str
    model: str
    target: str

    @property
    def key(self) -> Key:
        """What `collect` files its cells under."""
        return self.method, self.model, self.target


def places(layout: Layout) -> list[Place]:
    """All cells in reading order. A single target: the columns are the networks."""
    if len(layout.targets) == 1:
        (target,) = layout.targets
        return [Place(m, n, m, n, target) for m in layout.methods for n in layout.models]
    several = len(layout.models) > 1
    return [
        Place(f"{m} ({n})" if several else m, t, m, n, t)
        for n in layout.models
        for m in layout.methods
        for t in layout.targets
    ]
