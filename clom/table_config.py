"""Flags of clom.tables and the variants that its rows name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clom.config import METHODS, DistillFlags
from data.specs import DC_SPECS
from utils.cli import flag, same_flag
from utils.errors import UserError, pick

# Variant -> what it sets of main.py's flags, and its heading.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"CLoM": False}, ""),
    "ce": ({"CLoM": True, "CLoM_distance": "ce"}, "CLoM ce"),
    "ce_classification": (
        {"CLoM": True, "CLoM_distance": "ce", "CLoM_ce_form": "classification"},
        "CLoM ce, classification",
    ),
    "cos": ({"CLoM": True, "CLoM_distance": "cos"}, "CLoM cos"),
}
DEFAULT_ALPHA = DistillFlags().alphas[0]


@dataclass(frozen=True)
class Variant:
    """No CLoM, or one form of it with its weight.

    Attributes:
        name: a key of VARIANTS.
        alpha: weight of the term.
    """

    name: str
    alpha: float = DEFAULT_ALPHA

    @property
    def heading(self) -> str:
        """Empty without CLoM; the weight is named where it is not the default."""
        text = VARIANTS[self.name][1]
        return text if self.alpha == DEFAULT_ALPHA else f"{text}, α {self.alpha:g}"

    @property
    def flags(self) -> dict[str, Any]:
        """What it sets of main.py's flags."""
        values = VARIANTS[self.name][0]
        return {**values, "alphas": (self.alpha,)} if values["CLoM"] else values


def parse_variant(text: str) -> Variant:
    """`cos:100` -> cos with weight 100.

    Raises:
        UserError: an unknown name, or a weight that is none.
    """
    name, colon, weight = text.partition(":")
    pick(VARIANTS, name, "--variants")
    try:
        alpha = float(weight) if colon else DEFAULT_ALPHA
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha < float("inf") or (colon and name == "none"):
        raise UserError(f"--variants {text}: expected NAME or, with CLoM, NAME:WEIGHT (cos:100)")
    return Variant(name, alpha)


# A flag of main.py: one default, one range, one help text.
_as_distilled = functools.partial(same_flag, DistillFlags)


@dataclass(frozen=True)
class TablesFlags:
    """Flags of clom.tables; those of main.py's names mean the same for every cell."""

    run: bool = flag(False, "first run what is missing, cheapest first")
    datasets: tuple[str, ...] = flag(("CIFAR10", "CIFAR100"), "data sets: columns, with ipcs")
    ipcs: tuple[int, ...] = flag((1, 10, 50), "images a class: columns, with datasets", minimum=1)
    methods: tuple[str, ...] = flag(METHODS, "distillers: rows, with variants", choices=METHODS)
    variants: tuple[str, ...] = flag(
        ("none", "ce", "ce_classification", "cos"),
        "none (without CLoM), ce, ce_classification, cos, each with its weight after a colon if "
        "it is not 1000: cos:100",
    )
    num_exp: int = flag(3, "experiments a cell, each with a seed of its own", minimum=1)
    seed: int = flag(0, "seed of the first experiment; the next ones add 1", minimum=0)
    steps_scale: float = flag(
        1.0, "factor on iterations and evaluation epochs; shortened cells are marked †", above=0
    )
    log_dir: Path = flag(
        Path("./test_log/clom"), "folder of the cells and runs; the table is written there"
    )
    published: Path | None = flag(
        None, "JSON file of published numbers: {data set: {row: {ipc: [mean, std]}}}"
    )

    model: str = _as_distilled("model")
    img_size: int | None = _as_distilled("img_size")
    Iteration: int | None = _as_distilled("Iteration")
    num_eval: int = _as_distilled("num_eval")
    epoch_eval_train: int | None = _as_distilled("epoch_eval_train")
    lr_img: float | None = _as_distilled("lr_img")
    batch_real: int = _as_distilled("batch_real")
    init: str | None = _as_distilled("init")
    models_pool: tuple[str, ...] = _as_distilled("models_pool")
    model_num: int = _as_distilled("model_num")
    epoch: int = _as_distilled("epoch")
    CLoM_batch_size: int = _as_distilled("CLoM_batch_size")
    source_dataset: str | None = flag(
        None, "what the models of cos were trained on; default: the cell's data set"
    )
    pretrained_path: Path = _as_distilled("pretrained_path")
    CLoM_teacher_stats: str = _as_distilled("CLoM_teacher_stats")
    data_path: Path | None = _as_distilled("data_path")
    device: str | None = _as_distilled("device")
    gpu: int = _as_distilled("gpu")
    save_every: int = _as_distilled("save_every")

    def __post_init__(self) -> None:
        """Names of listed sets get their published spelling, as in main.py."""
        object.__setattr__(self, "datasets", tuple(map(DC_SPECS.spelling, self.datasets)))
