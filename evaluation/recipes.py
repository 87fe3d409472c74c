"""The published training recipes of the KRR-ST tables as data: what is optimised, how, how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from evaluation.fit import half_squared_error
from utils.errors import pick

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "half_squared_error": half_squared_error,
    "mse": F.mse_loss,
}

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"


@dataclass(frozen=True)
class Recipe:
    """One way to train a network.

    Attributes:
        loss: a name in LOSSES.
        optimizer: sgd or adam (AdamW).
        lr: learning rate.
        wd: weight decay.
        schedule: a name in utils.optim.SCHEDULES.
        batch_size: images a step.
        epochs: length in passes over the training images; 0 where `steps` says it.
        steps: length in optimiser steps; 0 where `epochs` says it.
        warmup: warm-up steps of the schedule.
        dsa: strategy of the differentiable augmentation, or "none".
        momentum: of sgd.
    """

    loss: str
    optimizer: str
    lr: float
    wd: float
    schedule: str
    batch_size: int
    epochs: int = 0
    steps: int = 0
    warmup: int = 0
    dsa: str = "none"
    momentum: float = 0.9

    def __str__(self) -> str:
        """What is set, in one line: `loss mse, optimizer sgd, lr 0.1, ...`."""
        return ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(self).items() if v)

    def epoch_steps(self, count: int) -> int:
        """Optimiser steps of one pass over `count` images."""
        return -(-count // self.batch_size)

    def total_steps(self, count: int, scale: float = 1.0) -> int:
        """Optimiser steps on `count` images, times `scale`, at least one."""
        return max(1, round(scale * (self.steps or self.epochs * self.epoch_steps(count))))

    def override(self, **values: object) -> Recipe:
        """A copy with every value that is not None put in; setting one length drops the other."""
        given = {k: v for k, v in values.items() if v is not None}
        if "epochs" in given and "steps" not in given:
            given["steps"] = 0
        elif "steps" in given and "epochs" not in given:
            given["epochs"] = 0
        return dataclasses.replace(self, **given)


_LABELS = Recipe(
    "cross_entropy", "sgd", 0.01, 5e-4, "tenth_at_half", 256, epochs=1000, dsa=DSA_STRATEGY
)
_VECTORS = Recipe(
    "half_squared_error", "adam", 3e-4, 0.0, "cosine", 500,
    steps=10000, warmup=500, dsa=DSA_STRATEGY,
)  # fmt: skip
_FEATURES = Recipe("mse", "sgd", 0.1, 1e-3, "constant", 256, epochs=1000)

SCRATCH = "scratch"  # no pre-training
RANDOM_FEATURES = "random_features"
GAUSSIAN = "gaussian"

PRETRAIN: dict[str, Recipe] = {
    **dict.fromkeys(("random", "kmeans", "dc", "dsa", "dm", "mtt"), _LABELS),
    **dict.fromkeys(("kip", "frepo"), _VECTORS),
    **dict.fromkeys(
        ("krr_st", "mkdt", RANDOM_FEATURES, "kmeans_features", GAUSSIAN), _FEATURES
    ),
}  # fmt: skip

# Distillation from a teacher (Table 4), on the synthetic images of a method or on plain noise; the
# cross-entropy is the one against the teacher's distribution, `evaluation.fit.kd_loss`, and its
# cosine moves once an epoch.
_KD = Recipe("cross_entropy", "adam", 1e-4, 0.0, "cosine", 512, epochs=1000, dsa=DSA_STRATEGY)
KD: dict[str, Recipe] = {
    **dict.fromkeys((SCRATCH, *PRETRAIN), _KD), GAUSSIAN: _KD.override(lr=1e-3, dsa="none"),
}  # fmt: skip

# Lengths of the vector recipe that the paper sets by source.
_VECTOR_STEPS = {"tinyimagenet": 40000, "imagenette": 1000}

_SHORT_FINETUNE = 5000
_LONG_FINETUNE = {"cifar10", "cifar100", "tinyimagenet"}


def pretrain_recipe(method: str, source: str, model: str, *, kd: bool = False) -> Recipe:
    """How `method`'s synthetic set of `source` trains the network `model`.

    Args:
        method: whose set it is.
        source: what it was distilled from.
        model: the network.
        kd: whether distillation from a teacher follows; one published batch differs.

    Raises:
        UserError: unknown method.
    """
    recipe = pick(PRETRAIN, method, "method")
    if recipe is _VECTORS:
        recipe = recipe.override(steps=_VECTOR_STEPS.get(source))
        if source == "imagenette":
            recipe = recipe.override(batch_size=10)
        elif source == "tinyimagenet" and model == "mobilenet":
            recipe = recipe.override(batch_size=128 if kd else 256)
    return recipe


def finetune_recipe(target: str, model: str, size: int) -> Recipe:
    """How a pre-trained `model` is fine-tuned on `target` at `size` pixels (crop and flip)."""
    return Recipe(
        "cross_entropy", "sgd", 0.01, 5e-4, "cosine",
        batch_size=64 if model == "resnet18" and size >= 224 else 256,
        steps=10000 if target in _LONG_FINETUNE else _SHORT_FINETUNE,
    )  # fmt: skip
