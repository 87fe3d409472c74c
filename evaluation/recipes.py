"""Training recipes as data: what is optimised, how, how long; the published ones of both papers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from data.augment.dc import dc_augment
from data.augment.dsa import diff_augment, no_augmentation, without_flip
from data.loader import TensorLoader, Transform
from data.synthetic import SyntheticSet, TrainingSettings
from utils.cli import flag
from utils.errors import UserError, pick
from utils.optim import make_schedule


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of ½·Σ(f(x) - y)² (the loss of KIP and FRePo); both (B, K)."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


def kd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over the batch of -Σ_k p_k log q_k: student q under teacher p; (B, K) logits both.

    The teacher gets no gradient. Source: Lee et al., arXiv 2310.06511, Table 4.
    """
    p = teacher_logits.detach().softmax(1)
    return -(p * student_logits.log_softmax(1)).sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "half_squared_error": half_squared_error,
    "mse": F.mse_loss,
}

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"


def of_recipe(what: str, whose: str = "method", **limits: Any) -> Any:
    """A flag for a value whose default is the published one of the method; see `Recipe.with_flags`."""
    return flag(None, f"{what}; default: as published for the {whose}", **limits)


@dataclass(frozen=True)
class PreFlags:
    """Flags for how a network is trained on a synthetic set."""

    pre_epoch: int | None = of_recipe("pre-training epochs", minimum=1)
    pre_iteration: int | None = of_recipe("pre-training steps, not epochs", minimum=1, instead_of="pre_epoch")
    pre_opt: str | None = of_recipe("pre-training optimiser", choices=("sgd", "adam"))
    pre_lr: float | None = of_recipe("pre-training learning rate", above=0)
    pre_wd: float | None = of_recipe("pre-training weight decay", minimum=0)
    pre_batch_size: int | None = of_recipe("pre-training batch", minimum=1)
    pre_dsa: str | None = of_recipe("pre-training DSA strategy or none")
    pre_mixup: bool | None = flag(
        None, "mixup of images and targets (shares ~ U(0, 1)) in pre-training; default: where the set says so"
    )


# Usually defaults.
_RARE = ("decay_epochs", "fresh_momentum", "dc", "align_corners", "rate_by_epoch", "target_scale", "mixup")
_FLAGS = {"epoch": "epochs", "iteration": "steps", "opt": "optimizer"}  # names that differ from the field's


@dataclass(frozen=True)
class Recipe:
    """One way to train a network, for passes over the images (`epochs`) or for `steps`; the other is 0."""

    loss: str  # a name in LOSSES
    optimizer: str  # a name in utils.optim.OPTIMIZERS; adam is AdamW
    lr: float
    wd: float
    schedule: str  # a name in utils.optim.SCHEDULES; not used with `decay_epochs`
    batch_size: int
    epochs: int = 0
    steps: int = 0
    warmup: int = 0  # steps
    dsa: str = "none"  # strategy of the differentiable augmentation
    momentum: float = 0.9  # of sgd and lars
    decay_epochs: tuple[int, ...] = ()  # after which the learning rate falls to a tenth
    fresh_momentum: bool = False  # forget the momentum at each decay, as DC's evaluation does
    dc: str = "none"  # strategy of the older DC augmentation
    align_corners: bool = True  # in DSA's scale and rotate, as in the KRR-ST scripts
    rate_by_epoch: bool = False  # the schedule moves once per epoch, not once per step
    target_scale: str = "none"  # "std": target vectors are learned standardised, by the set's statistics
    mixup: bool = False  # of images and target vectors

    def __str__(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.record().items() if v)

    def record(self) -> dict[str, object]:
        """What identifies the recipe, as plain values; rare settings only where they are set."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in _RARE or v != getattr(Recipe, k)}

    def total_steps(self, per_epoch: int, scale: float = 1.0) -> int:
        """Optimiser steps where a pass takes `per_epoch` steps, times `scale`, at least one."""
        return max(1, round(scale * (self.steps or self.epochs * per_epoch)))

    def steps_on(self, count: int, scale: float = 1.0) -> int:
        """Optimiser steps on `count` images, incomplete batches included."""
        return self.total_steps(-(-count // min(self.batch_size, count)), scale)

    def work_on(self, count: int, scale: float = 1.0) -> float:
        """Images through a network that is trained on `count` images, each counted three times."""
        return 3.0 * self.steps_on(count, scale) * min(self.batch_size, count)

    def override(self, **values: object) -> Recipe:
        """A copy with every value that is not None put in; setting one length drops the other."""
        given = {k: v for k, v in values.items() if v is not None}
        if given.keys() & {"epochs", "steps"}:
            given = {"epochs": 0, "steps": 0, **given}
        return dataclasses.replace(self, **given)

    def fitted(self, training: TrainingSettings) -> Recipe:
        """A copy with what a synthetic set says about training on it."""
        scale = None if training.targets is None else "std"
        return self.override(
            lr=training.lr,
            momentum=training.momentum,
            dsa=training.dsa,
            target_scale=scale,
            mixup=training.mixup,
        )

    def for_set(self, training: TrainingSettings, images: int | None, flags: PreFlags, hflip: bool) -> Recipe:
        """`fitted`, with the flags put in; without `hflip` DSA does not mirror, unless a flag says so.

        `images` is the number of images that the set shows in several views each; None: each is shown once.
        """
        recipe = self.fitted(training).with_flags(flags, "pre_")
        if images:
            recipe = recipe.in_steps(images)
        if flags.pre_dsa is None and not hflip:
            recipe = recipe.override(dsa=without_flip(recipe.dsa))
        return recipe

    def in_steps(self, images: int) -> Recipe:
        """A copy for as many steps as its passes over `images` take, however many views there are of each.

        Its rate moves with the steps: one pass over all views may be longer than the run.
        """
        return self.override(steps=self.steps_on(images), rate_by_epoch=False) if self.epochs else self

    def check_targets(self, synthetic: SyntheticSet) -> None:
        """Raise a UserError where mixup or the scale of targets is not to be had with a set."""
        if self.mixup and not synthetic.soft:
            raise UserError("mixup needs target vectors; the synthetic set has class labels")
        if self.target_scale == "std" and synthetic.training.targets is None:
            raise UserError(
                "target scale std: the synthetic set brings no statistics of its targets; make it with "
                "--target_scale std"
            )

    def with_flags(self, flags: Any, prefix: str) -> Recipe:
        """A copy with the flags put in whose names begin with `prefix`, such as --pre_lr."""
        given = {k.removeprefix(prefix): v for k, v in vars(flags).items() if k.startswith(prefix)}
        return self.override(**{_FLAGS.get(name, name): value for name, value in given.items()})

    def make_schedule(self, optimizer: torch.optim.Optimizer, steps: int, per_epoch: int) -> LambdaLR:
        """The learning-rate schedule of a run of `steps` steps.

        The warm-up is shortened like the run and takes at most half of it, so that the rate is reached.
        """
        if self.decay_epochs:
            ends = [epoch * per_epoch for epoch in self.decay_epochs]
            return LambdaLR(optimizer, lambda step: math.prod(0.1 for end in ends if step >= end))
        shortened = round(self.warmup * min(1.0, steps / (self.steps or steps)))
        every = per_epoch if self.rate_by_epoch else 1
        return make_schedule(self.schedule, optimizer, steps, min(shortened, steps // 2), every)

    def augment(self) -> Transform | None:
        """A loader's transform of normalised images; None without augmentation."""
        if not no_augmentation(self.dsa):
            given = dict(strategy=self.dsa, align_corners=self.align_corners)
            return lambda x, generator: diff_augment(x, generator=generator, **given)
        if not no_augmentation(self.dc):
            return lambda x, generator: dc_augment(x, self.dc, generator)
        return None

    def loader(
        self,
        images: Tensor,
        targets: Tensor | None,
        device: torch.device,
        generator: torch.Generator,
        transform: Transform | None = None,
        drop_last: bool = False,
    ) -> TensorLoader:
        """The recipe's batches; with its own augmentation (normalised images) without a `transform`."""
        given = dict(batch_size=self.batch_size, device=device, generator=generator, drop_last=drop_last)
        return TensorLoader(images, targets, transform=transform or self.augment(), mix=self.mixup, **given)


_LABELS = Recipe("cross_entropy", "sgd", 0.01, 5e-4, "tenth_at_half", 256, epochs=1000, dsa=DSA_STRATEGY)
_VECTORS = Recipe(
    "half_squared_error", "adam", 3e-4, 0.0, "cosine", 500, steps=10000, warmup=500, dsa=DSA_STRATEGY
)
_FEATURES = Recipe("mse", "sgd", 0.1, 1e-3, "constant", 256, epochs=1000)

SCRATCH = "scratch"  # no pre-training
RANDOM_FEATURES = "random_features"
GAUSSIAN = "gaussian"
SELECTIONS = ("kmeans", "herding", "high_loss")  # of real images; each with labels or with features

PRETRAIN: dict[str, Recipe] = {
    **dict.fromkeys(("random", *SELECTIONS, "dc", "dsa", "dm", "mtt"), _LABELS),
    **dict.fromkeys(("kip", "frepo"), _VECTORS),
    **dict.fromkeys(("krr_st", RANDOM_FEATURES, GAUSSIAN), _FEATURES),
    "mkdt": Recipe("mse", "sgd", 0.1, 1e-4, "constant", 256, epochs=20),
    **dict.fromkeys((f"{name}_features" for name in SELECTIONS), _FEATURES),
}

# Of these, sets of chosen or drawn images: `python -m krr_st.baselines` makes them.
BASELINES = ("random", *SELECTIONS, RANDOM_FEATURES, *(f"{name}_features" for name in SELECTIONS), GAUSSIAN)
MATCHING = ("dc", "dsa", "dm")  # sets of several experiments, of which `--export` writes the first

# Distillation from a teacher (Table 4), on the synthetic images of a method or on plain noise; the
# cross-entropy is the one against the teacher's distribution, `kd_loss`.
_KD = Recipe(
    "cross_entropy", "adam", 1e-4, 0.0, "cosine", 512, epochs=1000, dsa=DSA_STRATEGY, rate_by_epoch=True
)
KD: dict[str, Recipe] = {
    **dict.fromkeys((SCRATCH, *PRETRAIN), _KD),
    GAUSSIAN: _KD.override(lr=1e-3, dsa="none"),
}

# Lengths of the vector recipe: by source in the KRR-ST paper, by set size in FRePo's evaluation; the
# two agree at the paper's sizes.
_VECTOR_STEPS = {"cifar100": 10000, "tinyimagenet": 40000, "imagenet": 10000, "imagenette": 1000}
_VECTOR_STEPS_BY_SIZE = {1: 1000, 100: 2000, 200: 20000, 400: 5000, 1000: 10000, 2000: 40000}


def pretrain_recipe(
    method: str, source: str, model: str, *, kd: bool = False, count: int | None = None
) -> Recipe:
    """How `method`'s set of `source` trains the network `model`, also ahead of distillation (`kd`).

    `count` is the number of its images, where the source is none of the papers'.
    """
    recipe = pick(PRETRAIN, method, "method")
    if recipe is _VECTORS:
        steps = _VECTOR_STEPS.get(source)
        if steps is None and count is not None:
            steps = _VECTOR_STEPS_BY_SIZE[max(n for n in _VECTOR_STEPS_BY_SIZE if n <= count)]
        recipe = recipe.override(steps=steps)
        if source == "imagenette":
            recipe = recipe.override(batch_size=10)
        elif source == "tinyimagenet" and model == "mobilenet":
            recipe = recipe.override(batch_size=128 if kd else 256)
    return recipe


def finetune_recipe(target: str, model: str, size: int) -> Recipe:
    """How a pre-trained `model` is fine-tuned on `target` at `size` pixels (crop and flip)."""
    batch_size = 64 if model == "resnet18" and size >= 224 else 256
    steps = 10000 if target in ("cifar10", "cifar100", "tinyimagenet") else 5000
    return Recipe("cross_entropy", "sgd", 0.01, 5e-4, "cosine", batch_size, steps=steps)


def sgd_by_epochs(
    epochs: int, lr: float, momentum: float, wd: float, batch_size: int, decay: tuple[int, ...] = ()
) -> Recipe:
    """Cross-entropy by SGD whose rate falls to a tenth after the epochs in `decay`."""
    more = dict(momentum=momentum, decay_epochs=decay, align_corners=False)
    return Recipe("cross_entropy", "sgd", lr, wd, "constant", batch_size, epochs, **more)


def dc_evaluation(
    epochs: int | None, lr: float, batch_size: int, *, dsa: str = "none", dc: str = "none"
) -> Recipe:
    """How DC, DSA and DM train a network to judge a set: epochs 0 to E, the rate falls after E//2+1.

    `epochs` is E, their `epoch_eval_train`; None: 300, or 1000 with augmentation.
    """
    if epochs is None:
        epochs = 300 if no_augmentation(dsa) and no_augmentation(dc) else 1000
    recipe = sgd_by_epochs(epochs + 1, lr, 0.9, 5e-4, batch_size, (epochs // 2 + 2,))
    return recipe.override(fresh_momentum=True, dsa=dsa, dc=dc)
