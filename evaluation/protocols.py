"""What is done with a synthetic set: pre-training, fine-tuning, and probes of frozen features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.augment import default_padding
from data.load import ImageSet, ImageSplit
from data.loader import ImagePipeline, TensorLoader
from data.synthetic import SyntheticSet
from evaluation.fit import StepHook, Trainer, accuracy, predict
from evaluation.probe import knn_scores, linear_probe, standardize
from evaluation.recipes import Recipe
from utils.errors import pick
from utils.memory import SplitBatches

PROBE_BATCH = 512
_LARGE_BATCH = 64  # at 224 pixels one map of the zoo's residual networks takes 13 MB an image


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
        on_step: called after each step.

    Returns:
        `model` in eval mode.
    """
    loader = TensorLoader(
        synthetic.images,
        synthetic.targets,
        batch_size=recipe.batch_size,
        device=device,
        generator=generator,
        transform=recipe.augment(),
    )
    trainer = Trainer(model, loader, recipe, scale=scale)
    return trainer.run(what="pre-training", on_step=on_step, progress=True)


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
        on_step: called after each step.
    """
    pipeline = ImagePipeline(image_set.stats, pad=default_padding(image_set.size), hflip=image_set.hflip)
    loader = TensorLoader(
        train.images,
        train.labels,
        batch_size=recipe.batch_size,
        device=device,
        generator=generator,
        transform=pipeline,
    )
    Trainer(model, loader, recipe, scale=scale).run(what="fine-tuning", on_step=on_step, progress=True)
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
        images,
        None,
        batch_size=batch_size,
        device=device,
        generator=torch.Generator(),
        transform=ImagePipeline(image_set.stats),
        shuffle=False,
    )
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
