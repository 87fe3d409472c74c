"""DC, DSA, DM and the evaluation of a set against a plain re-statement of the published code.

    python -m benchmarks.clom [--batch_real 256] [--repeats 5] [--quick] [--out FILE]

The plain form: NCHW, float32 images, one class after another, torch's DataLoader for every training
and test. The sides take turns, each in a process of its own; ratios of medians are printed. Before
any timing both are checked to compute the same. Images are random: only their shape matters.

A published iteration of DC and DSA at 10 images a class has 10 updates of the images with 50 epochs
between them: `--outer 2 --inner 50` has nearly the same share of each.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import KEPT, Timing, contest, machine, report, shown, torch_pooling
from clom.base import MatchingDistiller
from clom.config import DistillFlags
from clom.source import network_factory
from data.augment import normalize
from data.augment.dsa import diff_augment
from data.load import ImageSet, ImageSplit
from data.real_data import RealImages
from data.specs import DC_SPECS
from data.synthetic import SyntheticSet
from distillation.problem import Problem
from evaluation.recipes import DSA_STRATEGY, dc_evaluation
from evaluation.score import score_networks
from methods import METHODS
from models import get_network
from utils.device import resolve_device
from utils.errors import entry_point
from utils.precision import float32_mode
from utils.seed import derive_seed, draw_seed, local_seed, make_generator

CLASSES = 10
BEFORE_REPLAYS = 8  # iterations, by which each operation of DSA has most likely come four times
STREAMS = ("networks", "real images", "augmentation", "inner loop")
STRATEGIES = {"DC": "none", "DSA": DSA_STRATEGY, "DM": DSA_STRATEGY}


def random_set(per_class: int, test: int, size: int) -> ImageSet:
    """Random uint8 images with CIFAR-10's shape and statistics."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> ImageSplit:
        images = torch.randint(256, (count, 3, size, size), generator=generator).to(torch.uint8)
        return ImageSplit(images, torch.arange(count) % CLASSES, Path("random"))

    stats = DC_SPECS["CIFAR10"].stats[32]
    return ImageSet("random", size, split(CLASSES * per_class), split(test), CLASSES, stats, True)


def plain_network(model: str, size: int, seed: int, device: torch.device) -> nn.Module:
    """The network that the toolkit builds from this seed; layout and pooling are torch's."""
    with local_seed(seed):
        network = torch_pooling(get_network(model, 3, CLASSES, (size, size)))
    return network.to(device).train()


def plain_training(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    strategy: str,
    generator: torch.Generator,
) -> None:
    """Epochs of cross-entropy over a DataLoader, with the published counting of hits."""
    for _ in range(epochs):
        for x_batch, y_batch in DataLoader(TensorDataset(x, y), 256, shuffle=True):
            x_batch = diff_augment(x_batch, strategy, generator=generator)
            output = network(x_batch)
            loss = F.cross_entropy(output, y_batch)
            int((output.argmax(1) == y_batch).sum()) + float(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Plain:
    """The published loops; draws come from the same streams as the toolkit's."""

    def __init__(self, ours: MatchingDistiller) -> None:
        """Start where `ours` starts."""
        flags, image_set = ours.flags, ours.problem.image_set
        self.device, self.ipc, self.batch_real = ours.x_syn.device, ours.ipc, flags.batch_real
        self.images = normalize(image_set.train.images, image_set.stats).to(self.device)
        labels = image_set.train.labels
        self.rows = [(labels == c).nonzero()[:, 0] for c in range(CLASSES)]
        self.x_syn, self.y_syn = ours.x_syn.detach().clone().requires_grad_(), ours.y_syn
        lr = ours.optimizer.param_groups[0]["lr"]
        self.optimizer = torch.optim.SGD([self.x_syn], lr=lr, momentum=0.5)
        self.strategy, self.model, self.size = flags.dsa_strategy, flags.model, image_set.size
        self.outer, self.inner = flags.outer_loop, flags.inner_loop
        self.draws = {name: make_generator(0, name) for name in STREAMS}
        self.step = self.match_features if flags.method == "DM" else self.match_gradients

    def network(self) -> nn.Module:
        """A new random network."""
        return plain_network(self.model, self.size, draw_seed(self.draws["networks"]), self.device)

    def pair(self, c: int) -> list[Tensor]:
        """Real and synthetic images of a class, augmented alike."""
        order = torch.randperm(len(self.rows[c]), generator=self.draws["real images"])
        real = self.images[self.rows[c][order[: self.batch_real]].to(self.device)]
        batches = [real, self.x_syn[c * self.ipc : (c + 1) * self.ipc]]
        if self.strategy == "none":
            return batches
        seed = draw_seed(self.draws["augmentation"])
        return [diff_augment(x, self.strategy, seed=seed, siamese=True) for x in batches]

    def update(self, loss: Tensor) -> None:
        """One step on the images."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def match_features(self) -> None:
        """One iteration of DM."""
        network, loss = self.network().requires_grad_(False), 0.0
        for c in range(CLASSES):
            real, syn = self.pair(c)
            difference = network.embed(real).detach().mean(0) - network.embed(syn).mean(0)
            loss = loss + difference.square().sum()
        self.update(loss)

    def match_gradients(self) -> None:
        """One iteration of DC or DSA."""
        network = self.network()
        parameters = list(network.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        for outer in range(self.outer):
            loss = 0.0
            for c in range(CLASSES):
                real, syn = (F.cross_entropy(network(x), self.label(c, x)) for x in self.pair(c))
                g_real = torch.autograd.grad(real, parameters)
                g_syn = torch.autograd.grad(syn, parameters, create_graph=True)
                for a, b in zip(g_real, g_syn, strict=True):
                    if a.dim() > 1:  # biases and affine norms count 0
                        a, b = a.flatten(1), b.flatten(1)
                        norms = a.norm(dim=1) * b.norm(dim=1) + 1e-6
                        loss = loss + (1 - (a * b).sum(1) / norms).sum()
            self.update(loss)
            if outer < self.outer - 1:
                x, draws = self.x_syn.detach().clone(), self.draws["inner loop"]
                plain_training(network, x, self.y_syn, self.inner, optimizer, self.strategy, draws)

    def label(self, c: int, x: Tensor) -> Tensor:
        """The label of every image of a class."""
        return torch.full((len(x),), c, device=self.device)


def sides(
    method: str,
    ipc: int,
    image_set: ImageSet,
    device: torch.device,
    *,
    model: str = "ConvNet",
    batch_real: int = 256,
    outer: int = 2,
    inner: int = 50,
) -> tuple[Plain, MatchingDistiller]:
    """Both forms of a distiller, at the same start; one image a class means one update."""
    outer, inner = (1, 1) if ipc == 1 else (outer, inner)
    given = dict(method=method, model=model, ipc=ipc, init="noise", lr_img=0.1, batch_real=batch_real)
    loops = dict(outer_loop=outer, inner_loop=inner)
    flags = DistillFlags(**given, **loops, dsa_strategy=STRATEGIES[method])
    problem = Problem(image_set, device, 0, real=RealImages.from_set(image_set, device))
    ours = METHODS[method.lower()].distiller(problem, flags)
    return Plain(ours), ours


def evaluation(
    image_set: ImageSet, device: torch.device, *, epochs: int, model: str = "ConvNet", networks: int = 2
) -> tuple[Callable[[], list[float]], Callable[[], list[float]]]:
    """Both forms of some networks' trainings on 100 images and their tests: the accuracies."""
    x = normalize(image_set.train.images[: 10 * CLASSES], image_set.stats).to(device)
    y = image_set.train.labels[: 10 * CLASSES].to(device)
    recipe = dc_evaluation(epochs, 0.01, 256)

    def ours() -> list[float]:
        new_network, synthetic = network_factory(model, image_set, device), SyntheticSet(x, y)
        return score_networks(new_network, synthetic, image_set, recipe, range(networks), device)

    def plain_one(seed: int) -> float:
        network = plain_network(model, image_set.size, derive_seed(seed, "network"), device)
        rate, done = recipe.lr, 0
        for stop in (*recipe.decay_epochs, recipe.epochs):
            optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=recipe.wd)
            plain_training(network, x, y, stop - done, optimizer, "none", torch.Generator())
            rate, done = rate * 0.1, stop
        network.eval()
        images = normalize(image_set.test.images, image_set.stats)
        hits = 0
        with torch.no_grad():
            for x_batch, y_batch in DataLoader(TensorDataset(images, image_set.test.labels), 256):
                hits += int((network(x_batch.to(device)).argmax(1).cpu() == y_batch).sum())
        return hits / len(images)

    def plain() -> list[float]:
        return [plain_one(seed) for seed in range(networks)]

    return plain, ours


def differences(
    image_set: ImageSet, device: torch.device, *, model: str = "ConvNet", batch_real: int = 32
) -> dict[str, float]:
    """Largest relative difference of the updates of the images after one iteration of each method.

    The training between two updates is part of DC's; DSA's draws depend on the order of images.
    """
    found = {}
    for method in STRATEGIES:
        plain, ours = sides(
            method, 2, image_set, device, model=model, batch_real=batch_real, inner=3 if method == "DC" else 0
        )
        start = ours.x_syn.detach().clone()
        plain.step()
        ours.step()
        moved, apart = (plain.x_syn.detach() - x.detach() for x in (start, ours.x_syn))
        found[method] = float(apart.abs().max() / moved.abs().max())
    accuracies = [run() for run in evaluation(image_set, device, epochs=3, model=model)]
    found["evaluation"] = max(abs(a - b) for a, b in zip(*accuracies, strict=True))
    return found


def method_side(
    which: int, method: str, ipc: int, size: int, device: torch.device, settings: dict[str, Any]
) -> Callable[[], object]:
    """An iteration on random images: 0 the plain form, 1 ours, on CUDA when all it replays is recorded."""
    side = sides(method, ipc, random_set(500, 100, size), device, **settings)[which]
    for _ in range(BEFORE_REPLAYS if which and device.type == "cuda" else 0):
        side.step()
    return side.step


def evaluation_side(which: int, device: torch.device, epochs: int) -> Callable[[], object]:
    """An evaluation with the share of testing that 300 epochs have: 0 the plain form, 1 ours."""
    return evaluation(random_set(10, 10_000 * epochs // 300, 32), device, epochs=epochs)[which]


def measure(
    device: torch.device,
    *,
    quick: bool = False,
    repeats: int = 5,
    batch_real: int = 256,
    outer: int = 2,
    inner: int = 50,
    epochs: int = 20,
    ipc: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Seconds and ratios of every method at some numbers of images a class, and of an evaluation.

    Args:
        device: where to compute.
        quick: small sizes, few timings.
        repeats: timings a side.
        batch_real: real images of a class an update.
        outer: updates of the images an iteration at 10 images a class.
        inner: epochs between them.
        epochs: of the evaluation, with the published share of testing for 300 epochs.
        ipc: images a class; default: 1 and 10, on CUDA 50 as well.

    Raises:
        AssertionError: the two sides do not compute the same.
    """
    model, size = "ConvNet", 32
    if quick:
        repeats, batch_real, outer, inner, epochs, model, size = 2, 8, 1, 2, 2, "ConvNetW32", 8
    with float32_mode("fp32"):  # the timings below are with torch's own TF32 in convolutions
        agreement = differences(random_set(32, 100, size), device, model=model)
    # DC's has a training in between, which amplifies rounding; of 100 test images one may tip over.
    limits = {"DC": 2e-2, "DSA": 1e-3, "DM": 1e-3, "evaluation": 0.011}
    assert all(agreement[name] <= limit for name, limit in limits.items()), agreement
    lengths = {"batch_real": batch_real, "outer": outer, "inner": inner}
    given = dict(size=size, device=device, settings={**lengths, "model": model})
    makers = {
        f"{method} iteration, ipc {count}": functools.partial(method_side, method=method, ipc=count, **given)
        for method in STRATEGIES
        for count in ipc or ((1, 10, 50) if device.type == "cuda" and not quick else (1, 10))
    }
    makers["evaluation of 100 images"] = functools.partial(evaluation_side, device=device, epochs=epochs)
    found = {}
    for name, make in makers.items():
        plain, ours = functools.partial(make, 0), functools.partial(make, 1)
        found[name] = contest(plain, {"ours": ours}, device, repeats=repeats, apart=not quick)
        taken = shown({side: timing.median for side, timing in found[name].items()}, 4)
        print(f"{name}, seconds: {taken}; times as fast as {shown(ratios(found[name]))}", flush=True)
    return {
        "settings": {**lengths, "epochs": epochs},
        "agreement": agreement,
        "seconds": {n: {side: t.median for side, t in sides.items()} for n, sides in found.items()},
        "timings": {n: {side: t.times for side, t in sides.items()} for n, sides in found.items()},
        "peak bytes": {n: {side: t.peak for side, t in sides.items()} for n, sides in found.items()},
        "ratios": {name: ratios(sides).get("plain") for name, sides in found.items()},
        "ratios, memory kept": {n: ratios(s)[KEPT] for n, s in found.items() if KEPT in s},
    }


def ratios(sides: dict[str, Timing]) -> dict[str, float]:
    """How many times as fast ours is as each plain form; nothing where a side could not be measured."""
    if "ours" not in sides:
        return {}
    return {n: t.median / sides["ours"].median for n, t in sides.items() if n != "ours"}


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_real", type=int, default=256)
    parser.add_argument("--outer", type=int, default=2)
    parser.add_argument("--inner", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--ipc", type=int, nargs="+", help="images a class; default: 1 10, on CUDA 50, too")
    parser.add_argument("--quick", action="store_true", help="small sizes, few timings")
    parser.add_argument("--out", type=Path, help="JSON")
    given = vars(parser.parse_args(argv))
    device, out = resolve_device(given.pop("device")), given.pop("out")
    results = measure(device, **given)
    report(out, {"machine": machine(device), "clom": results})


if __name__ == "__main__":
    sys.exit(main())
