"""What a labelled synthetic set is worth: random networks trained on it, tested on real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from data.load import ImageSet
from data.loader import TensorLoader
from data.synthetic import SyntheticSet
from evaluation.fit import Trainer, accuracy
from evaluation.protocols import PROBE_BATCH, outputs
from evaluation.recipes import Recipe
from models.layout import images_at_once
from utils.seed import derive_seed, make_generator


@dataclass(frozen=True)
class Score:
    """Test accuracies of one network, each in [0, 1].

    Attributes:
        final: after the last epoch: the result.
        best: the largest over the tested epochs; chosen on the test set, not a result.
        best_epoch: when that was.
        loss: mean training loss of the last epoch.
    """

    final: float
    best: float
    best_epoch: int
    loss: float


def score_network(
    new_network: Callable[[int], nn.Module],
    synthetic: SyntheticSet,
    image_set: ImageSet,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    test_every: int | None = None,
    at_test: Callable[[int, nn.Module, float], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Score:
    """Train one random network on a set and test it.

    Args:
        new_network: seed -> network on the device.
        synthetic: images in the space that `image_set.stats` leads to; class indices, or class
            probabilities (m, K).
        image_set: its test split is read (or its training split where there is none).
        recipe: how to train; its length is in epochs.
        seed: of initialisation, order and augmentation.
        device: where to compute.
        test_every: epochs between tests; None: only the last.
        at_test: called with (epoch, network, accuracy).
        check: called after each step; may raise to end the training.
    """
    network = new_network(derive_seed(seed, "network"))
    loader = TensorLoader(
        synthetic.images,
        synthetic.targets,
        batch_size=recipe.batch_size,
        device=device,
        generator=make_generator(seed, "training"),
        transform=recipe.augment(),
    )
    trainer = Trainer(network, loader, recipe)
    tests: list[tuple[float, int]] = []
    for epoch in [*range(test_every or recipe.epochs, recipe.epochs, test_every or 1), recipe.epochs]:
        trainer.run(epoch * trainer.per_epoch, what="evaluation", on_step=lambda *_: check())
        tests.append((share_correct(network, image_set, device), epoch))
        if at_test is not None:
            at_test(epoch, network, tests[-1][0])
    best, best_epoch = max(tests, key=lambda test: test[0])
    return Score(tests[-1][0], best, best_epoch, trainer.window.mean())


def share_correct(model: nn.Module, image_set: ImageSet, device: torch.device) -> float:
    """Test accuracy in [0, 1]; without a test split, accuracy on the training split."""
    split = image_set.test or image_set.train
    part = images_at_once(model, split.images.shape, device, PROBE_BATCH)
    return accuracy(outputs(model, split.images, image_set, device, part), split.labels) / 100
