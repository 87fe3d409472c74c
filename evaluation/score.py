"""What a labelled synthetic set is worth: random networks trained on it, tested on real images."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from data.load import ImageSet
from data.synthetic import SyntheticSet
from evaluation.fit import PROBE_BATCH, Trainer, held_out_accuracy, real_loader, set_loader
from evaluation.parallel import in_parallel
from evaluation.recipes import Recipe
from models.layout import images_at_once
from utils.seed import derive_seed, make_generator


@dataclass(frozen=True)
class Score:
    """Test accuracies of one network, each in [0, 1]."""

    final: float  # after the last epoch: the result
    best: float  # the largest over the tested epochs; chosen on the test set, not a result
    best_epoch: int
    loss: float  # mean training loss of the last epoch


def score_network(
    new_network: Callable[[int], nn.Module],
    synthetic: SyntheticSet | None,
    image_set: ImageSet,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    test_every: int | None = None,
    at_test: Callable[[int, nn.Module], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Score:
    """Train the network `new_network(seed)` on a set, or on all real images, and test it on real ones.

    The synthetic images are normalised as `image_set.stats` says, with class indices or vectors
    (m, K), the largest entry the class's; None: all training images with their labels. Every
    `test_every` epochs (None: only after the last) the network is tested and `at_test` called with
    (epoch, network); `check` may raise after each step.
    """
    network = new_network(derive_seed(seed, "network"))
    generator = make_generator(seed, "training")
    if synthetic is None:
        loader, whitening = real_loader(recipe, image_set, device, generator), None
    else:
        loader, whitening = set_loader(recipe, synthetic, device, generator), synthetic.training.whitening
        whitening = whitening and whitening.to(device)
    trainer = Trainer(network, loader, recipe)
    tests: list[tuple[float, int]] = []
    epochs = -(-trainer.steps // trainer.per_epoch)
    for epoch in [*range(test_every or epochs, epochs, test_every or 1), epochs]:
        trainer.run(epoch * trainer.per_epoch, what="evaluation", on_step=lambda *_: check())
        network.prepare = whitening  # of test images: the training's are whitened already
        tests.append((share_correct(network, image_set, device), epoch))
        network.prepare = None
        if at_test is not None:
            at_test(epoch, network)
    best, best_epoch = max(tests, key=lambda test: test[0])
    return Score(tests[-1][0], best, best_epoch, trainer.window.mean())


def score_networks(
    new_network: Callable[[int], nn.Module],
    synthetic: SyntheticSet,
    image_set: ImageSet,
    recipe: Recipe,
    seeds: Iterable[int],
    device: torch.device,
) -> list[float]:
    """What `score_network` gives after the last epoch for each of `seeds`, several at a time on a CPU."""
    given = (new_network, synthetic, image_set, recipe)
    score = functools.partial(score_network, *given, device=device)
    tasks = [lambda check, seed=seed: score(seed=seed, check=check) for seed in seeds]
    return [found.final for found in in_parallel(tasks, device)]


def share_correct(model: nn.Module, image_set: ImageSet, device: torch.device) -> float:
    """Test accuracy in [0, 1]; without a test split, accuracy on the training split."""
    shape = (image_set.test or image_set.train).images.shape
    part = images_at_once(model, shape, device, PROBE_BATCH)
    return held_out_accuracy(model, image_set, device, part) / 100
