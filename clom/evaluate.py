"""What a synthetic set is worth: random networks trained on it, tested on real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clom.training import (
    Training,
    dc_evaluation,
    make_augment,
    no_augmentation,
    share_correct,
    train_on,
)
from data.dc_augment import dc_strategy
from data.load import ImageSet
from utils.seed import derive_seed, make_generator

EPOCHS, EPOCHS_AUGMENTED = 300, 1000


@dataclass(frozen=True)
class Augmentation:
    """Which augmentation feeds the training: kind dsa or dc, and its operations or "none"."""

    kind: str
    strategy: str
    align_corners: bool = False


def published_augmentation(
    method: str, dataset: str, network: str, strategy: str, align_corners: bool = False
) -> Augmentation:
    """DSA for sets of DSA and DM; the older one for DC on MNIST and on ConvNetBN.

    Args:
        method: DC, DSA or DM.
        dataset: name of the data set.
        network: which is trained.
        strategy: DSA's operations.
        align_corners: DSA's sampling convention.
    """
    if method == "DC":
        return Augmentation("dc", dc_strategy(dataset, network))
    return Augmentation("dsa", strategy, align_corners)


def published_training(
    augmentation: Augmentation, epochs: int | None, lr: float, batch_size: int
) -> Training:
    """The evaluation inside distillation: 300 epochs, 1000 with augmentation, or as given."""
    if epochs is None:
        plain = no_augmentation(augmentation.strategy)
        epochs = EPOCHS if plain else EPOCHS_AUGMENTED
    return dc_evaluation(epochs, lr, batch_size)


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
    images: Tensor,
    targets: Tensor,
    image_set: ImageSet,
    training: Training,
    augmentation: Augmentation,
    *,
    seed: int,
    device: torch.device,
    test_every: int | None = None,
    at_test: Callable[[int, nn.Module, float], None] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Score:
    """Train one random network on the set and test it.

    Args:
        new_network: seed -> network on the device.
        images: (m, C, H, W) in the space that `image_set.stats` leads to.
        targets: (m,) int64, or (m, K) class probabilities.
        image_set: its test split is read (or its training split where there is none).
        training: how.
        augmentation: of the synthetic images.
        seed: of initialisation, order and augmentation.
        device: where to compute.
        test_every: epochs between tests; None: only the last.
        at_test: called with (epoch, network, accuracy).
        on_step: called after each step.
    """
    tests: list[tuple[int, float, float]] = []

    def test(epoch: int, loss: float) -> None:
        tests.append((epoch, share_correct(network, image_set, device), loss))
        if at_test is not None:
            at_test(epoch, network, tests[-1][1])

    network = new_network(derive_seed(seed, "network"))
    trainer = train_on(
        network, images, targets, training,
        augment=make_augment(augmentation.kind, augmentation.strategy, augmentation.align_corners),
        device=device, generator=make_generator(seed, "training"),
    )  # fmt: skip
    stops = range(test_every, training.epochs, test_every) if test_every else ()
    trainer.run(stops, test, what="evaluation", on_step=on_step)
    best = max(tests, key=lambda entry: entry[1])
    _, final, loss = tests[-1]
    return Score(final, best[1], best[0], loss)
