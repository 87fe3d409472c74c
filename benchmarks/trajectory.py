"""Memory and time of the three ways through an unrolled training, against the number of steps.

    python -m benchmarks.trajectory [--steps 5 10 20] [--m 50] [--model convnet_128_128_128_in] [--out FILE]

The memory is what one gradient takes beyond what was there before it; on a CPU each measurement has
a process of its own and tells its largest resident size. `full` keeps one graph of all steps,
`checkpoint` gives the same gradient with one step's graph at a time, `tesla` is TESLA's gradient; `plain` is
`full` with the second derivative of norms as PyTorch composes it.
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

from benchmarks.common import machine, peak_of_call, peak_of_process, report, seconds
from data.augment.dsa import diff_augment
from evaluation.recipes import DSA_STRATEGY
from models import get_model
from models.layout import arranged
from models.twice import twice_differentiable
from trajectory.match import UNROLLS, functional_loss, matching_distance
from utils.device import resolve_device
from utils.errors import entry_point
from utils.seed import local_seed
from utils.table import markdown

CLASSES = 10
PLAIN = "plain"


def gradient(mode: str, steps: int, m: int, model: str, size: int, device: torch.device) -> Callable[[], Any]:
    """One unit of work: MTT's gradient on m images, DSA in every step."""
    with local_seed(0):
        network = get_model(model, (3, size, size), CLASSES)
        network = arranged(network if mode == PLAIN else twice_differentiable(network), device)
        x = torch.randn(m, 3, size, size).to(device).requires_grad_()
        goal = [p.detach() + 0.01 * torch.randn_like(p) for p in network.parameters()]
    y = (torch.arange(m) % CLASSES).to(device)
    start = [p.detach() for p in network.parameters()]
    lr = torch.tensor(0.01, device=device, requires_grad=True)
    batches = [lambda s=s: (diff_augment(x, DSA_STRATEGY, seed=s), y) for s in range(steps)]
    return lambda: UNROLLS["full" if mode == PLAIN else mode](
        functional_loss(network, F.cross_entropy),
        start,
        batches,
        lambda end: matching_distance(end, start, goal),
        [x],
        lr,
    )


def _alone(make: Callable[[], Callable[[], Any]], device: torch.device) -> tuple[int | None, float]:
    run = make()
    if device.type == "cuda":
        run()
        return peak_of_call(run, device), seconds(run, device, 1)
    before = peak_of_process()
    taken = seconds(run, device, 1)
    after = peak_of_process()
    return None if after is None or before is None else after - before, taken


def measure(
    device: torch.device,
    steps: Sequence[int] = (5, 10, 20),
    m: int = 50,
    model: str = "convnet_128_128_128_in",
    size: int = 32,
) -> dict[str, Any]:
    """Bytes and seconds of one gradient: mode -> number of steps -> value."""
    found: dict[str, Any] = {"bytes": {}, "seconds": {}, "m": m, "size": size, "model": model}
    context = torch.multiprocessing.get_context("spawn")
    for mode in (PLAIN, *UNROLLS):
        for count in steps:
            make = functools.partial(gradient, mode, count, m, model, size, device)
            if device.type == "cpu":  # so that no process finds memory that an earlier one has kept
                with context.Pool(1) as pool:
                    taken_bytes, taken = pool.apply(_alone, (make, device))
            else:
                taken_bytes, taken = _alone(make, device)
            found["bytes"].setdefault(mode, {})[count] = taken_bytes
            found["seconds"].setdefault(mode, {})[count] = taken
    return found


def table(found: dict[str, Any]) -> str:
    """Megabytes and seconds by mode and steps."""
    steps = list(next(iter(found["seconds"].values())))
    rows = []
    for mode, taken in found["seconds"].items():
        cells = [
            f"{found['bytes'][mode][n] / 1e6:.0f} MB, {taken[n]:.2f} s" if found["bytes"][mode][n] else ""
            for n in steps
        ]
        rows.append([f"MTT's gradient, {mode}", *cells])
    return markdown(["what", *(f"{n} steps" for n in steps)], rows)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--m", type=int, default=50, help="synthetic images, all in every step")
    parser.add_argument("--model", default="convnet_128_128_128_in")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    found = measure(device, args.steps, args.m, args.model, args.size)
    print(table(found))
    report(args.out, {"machine": machine(device), "trajectory": found})


if __name__ == "__main__":
    sys.exit(main())
