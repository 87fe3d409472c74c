"""What is done with a synthetic set: pre-training, fine-tuning, and probes of frozen features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.augment import default_padding
from data.dsa import diff_augment
from data.load import ImageSet, ImageSplit
from data.loader import ImagePipeline, TensorLoader
from data.synthetic import SyntheticSet
from evaluation.fit import accuracy, fit, predict, supervised
from evaluation.probe import knn_scores, linear_probe, standardize
from evaluation.recipes import LOSSES, Recipe
from utils.errors import pick
from utils.memory import SplitBatches
from utils.optim import make_optimizer, make_schedule

StepHook = Callable[[int, Tensor, float], None]
PROBE_BATCH = 512
_LARGE_BATCH = 64  # at 224 pixels one map of the zoo's residual networks takes 13 MB an image


def train_by_recipe(
    model: nn.Module,
    batches,
    recipe: Recipe,
    *,
    steps: int,
    what: str,
    on_step: StepHook | None = None,
) -> nn.Module:
    """Run `fit` with the loss, optimiser and schedule of `recipe`; terminals get a progress bar.

    A run shorter than the recipe's has a warm-up shortened alike, and no warm-up takes more than
    half of a run: one given in few epochs or steps would never reach its rate.
    """
    optimizer = make_optimizer(
        recipe.optimizer, model.parameters(), lr=recipe.lr, momentum=recipe.momentum, wd=recipe.wd
    )
    shortened = round(recipe.warmup * min(1.0, steps / (recipe.steps or steps)))
    warmup = min(shortened, steps // 2)
    schedule = make_schedule(recipe.schedule, optimizer, steps, warmup)
    loss_fn = supervised(pick(LOSSES, recipe.loss, "loss"))
    return fit(
        model, batches, loss_fn, optimizer, schedule, steps=steps, what=what, on_step=on_step,
        progress=True,
    )  # fmt: skip


def pretrain(
    model: nn.Module,
    synthetic: SyntheticSet,
    recipe: Recipe,
    *,
    device: torch.device,
    generator: torch.Generator,
    scale: float = 1.0,
    on_step: StepHook | None = None,
) -> nn.Module:
    """Train `model` on a synthetic set.

    Args:
        model: network on `device` whose head has as many outputs as the targets need.
        synthetic: images in normalised space, class indices or target vectors.
        recipe: loss, optimiser, length, augmentation.
        device: where to compute.
        generator: order and augmentation.
        scale: factor on the length.
        on_step: passed on to `fit`.

    Returns:
        `model` in eval mode.
    """

    def augment(x: Tensor, draw: torch.Generator) -> Tensor:
        # align_corners=True is this family's convention.
        return diff_augment(x, recipe.dsa, generator=draw, align_corners=True)

    loader = TensorLoader(
        synthetic.images, synthetic.targets, batch_size=recipe.batch_size, device=device,
        generator=generator, transform=None if recipe.dsa == "none" else augment,
    )  # fmt: skip
    steps = recipe.total_steps(len(synthetic), scale)
    return train_by_recipe(
        model, loader.forever(), recipe, steps=steps, what="pre-training", on_step=on_step
    )


def finetune(
    model: nn.Module,
    image_set: ImageSet,
    train: ImageSplit,
    recipe: Recipe,
    *,
    device: torch.device,
    generator: torch.Generator,
    scale: float = 1.0,
    on_step: StepHook | None = None,
) -> float:
    """Fine-tune all of `model` on labelled images with crop and flip; test accuracy in %.

    Args:
        model: network on `device` with the target's head.
        image_set: the target; its test split is read once, after the last step.
        train: the part of its training split to use.
        recipe: optimiser, schedule, length.
        device: where to compute.
        generator: order and augmentation.
        scale: factor on the length.
        on_step: passed on to `fit`.
    """
    pipeline = ImagePipeline(
        image_set.stats, pad=default_padding(image_set.size), hflip=image_set.hflip
    )
    loader = TensorLoader(
        train.images, train.labels, batch_size=recipe.batch_size, device=device,
        generator=generator, transform=pipeline,
    )  # fmt: skip
    steps = recipe.total_steps(len(train), scale)
    train_by_recipe(
        model, loader.forever(), recipe, steps=steps, what="fine-tuning", on_step=on_step
    )
    scores = outputs(model, image_set.test.images, image_set, device)
    return accuracy(scores, image_set.test.labels)


def outputs(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    image_set: ImageSet,
    device: torch.device,
    batch_size: int | None = None,
) -> Tensor:
    """`function` of normalised, unaugmented images in batches: (N, D) on the device.

    Where a batch does not fit the device's memory it is split, with the same result.
    """
    batch_size = batch_size or (PROBE_BATCH if image_set.size < 128 else _LARGE_BATCH)
    loader = TensorLoader(
        images, None, batch_size=batch_size, device=device,
        generator=torch.Generator(), transform=ImagePipeline(image_set.stats), shuffle=False,
    )  # fmt: skip
    return predict(SplitBatches(function), loader.epoch())


def _linear_scores(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    train, test = standardize(train, test)
    weight, bias = linear_probe(train, labels, num_classes)
    return nn.functional.linear(test, weight, bias)


def _knn_scores(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    return knn_scores(train, labels, test, num_classes)


# (train features, train labels, test features, classes) -> test scores
FROZEN: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "linear": _linear_scores,
    "probe": _linear_scores,
    "knn": _knn_scores,
}


def frozen_accuracy(
    protocol: str,
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
) -> float:
    """Test accuracy in % of a classifier on frozen features.

    Args:
        protocol: linear or probe (standardised features, L-BFGS logistic regression), or knn.
        train_features: (N, D).
        train_labels: (N,) int64.
        test_features: (M, D).
        test_labels: (M,) int64.
        num_classes: K.
    """
    score = pick(FROZEN, protocol, "protocol")
    return accuracy(score(train_features, train_labels, test_features, num_classes), test_labels)
