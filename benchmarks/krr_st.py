"""The outer step of KRR-ST against a plain re-statement of the published loop.

    python -m benchmarks.krr_st [--m 100] [--b 128] [--repeats 7] [--out FILE]

Sides take turns, on a CPU each in a process of its own; ratios of medians are printed. The plain
form: NCHW, float32, torch's DataLoader with kornia, target forward at every step, BatchNorm on its
own, gradients of the pool network's parameters taken and thrown away. Before any timing both sides
are checked to compute the same loss and gradients.
"""

from __future__ import annotations

import argparse
import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    KEPT,
    allocated,
    contest,
    machine,
    matmul_rates,
    medians,
    report,
    seconds,
    shown,
    torch_pooling,
)
from benchmarks.loader import kornia_batches
from data.augment import normalize
from data.load import ImageSet, ImageSplit
from data.specs import KRR_SPECS
from distillation.problem import Problem
from evaluation.target import Representation, Target
from krr_st.config import TrainFlags
from krr_st.krr_st import KRRST
from krr_st.views import TargetViews
from models import get_model
from models.fold import fold_frozen
from utils.device import place, resolve_device
from utils.errors import entry_point
from utils.graph import WARM_UP
from utils.precision import float32_mode
from utils.seed import local_seed

ARCH, TARGET = "convnet_128_256_512_bn", "resnet18"
DEFAULTS = "plain, torch's defaults"  # on CUDA: TF32 in convolutions
Kind = dict[str, Any] | str | None  # arguments of `our_side`, or a plain form
REPLAYED = {"precision": "bf16", "table": True, "cuda_graph": True}
SHAPE = (3, 32, 32)


class PlainStep:
    """The published outer step, plainly written.

    Args:
        x_syn: (m, C, H, W).
        y_syn: (m, D).
        target: frozen, NCHW.
        network: a pool network, NCHW.
        batches: endless normalised real batches on the device.
    """

    def __init__(
        self, x_syn: Tensor, y_syn: Tensor, target: nn.Module, network: nn.Module, batches: Iterator[Tensor]
    ) -> None:
        self.x_syn, self.y_syn = (t.clone().requires_grad_() for t in (x_syn, y_syn))
        self.target, self.network, self.batches = target, network, batches
        self.optimizer = torch.optim.AdamW([self.x_syn, self.y_syn], lr=1e-4, weight_decay=0.0)
        self.inner = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    def features(self, x: Tensor) -> Tensor:
        """Features with a constant 1; the layers one by one."""
        f = self.network.layers(x).flatten(1)
        return torch.cat([f, torch.ones(len(f), 1, device=f.device)], 1)

    def loss(self, x_real: Tensor) -> Tensor:
        """The KRR loss of one batch."""
        self.network.eval()
        with torch.no_grad():
            y_real = self.target(x_real)
            f_real = self.features(x_real)
        f_syn = self.features(self.x_syn)
        k_rs, k_ss = f_real @ f_syn.T, f_syn @ f_syn.T
        ridge = 1e-6 * k_ss.detach().trace() * torch.eye(len(k_ss), device=k_ss.device)
        return F.mse_loss(k_rs @ torch.linalg.solve(k_ss + ridge, self.y_syn), y_real)

    def __call__(self) -> None:
        """One outer step."""
        loss = self.loss(next(self.batches))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()
        self.network.train()
        loss = F.mse_loss(self.network(self.x_syn.detach()), self.y_syn.detach())
        self.inner.zero_grad()
        loss.backward()
        self.inner.step()


@functools.lru_cache(maxsize=2)
def make_parts(m: int, count: int, device: torch.device) -> dict[str, Any]:
    """Random images, a random target with BatchNorm statistics; whoever changes them copies them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *SHAPE), generator=generator).to(torch.uint8)
    stats = KRR_SPECS["cifar10"].stats[32]
    image_set = ImageSet("bench", 32, ImageSplit(images, None, Path("-")), None, None, stats, True)
    with local_seed(0):
        target = Representation(TARGET, SHAPE).train()
    with torch.no_grad():
        target(normalize(images[:64], stats))  # moves the statistics away from the identity
    target.eval().requires_grad_(False)
    x_syn = normalize(images[:m], stats).to(device)
    return {
        "image_set": image_set,
        "target": target,
        "x_syn": x_syn,
        "y_syn": torch.randn(m, target.dim, generator=generator).to(device),
    }


def our_side(
    parts: dict[str, Any],
    batch: int,
    device: torch.device,
    *,
    precision: str,
    table: bool,
    fused: bool = True,
    **more: Any,
) -> KRRST:
    """KRR-ST, by fused kernels if wanted; with `table` all its targets are known. `more` are its flags.

    Without them it has one network, which is never replaced, and no graphs.
    """
    image_set, model = parts["image_set"], copy.deepcopy(parts["target"])
    model.backbone = fold_frozen(model.backbone, torch.randn(2, *SHAPE))
    target = Target(place(model, device), precision)
    usual = dict(
        train_model=ARCH,
        num_images=len(parts["x_syn"]),
        num_models=1,
        online_iteration=10**9,
        outer_iteration=10**6,
        outer_lr=1e-4,
        outer_batch_size=batch,
        precision=precision,
        cuda_graph=False,
        target_views="online",
    )
    distiller = KRRST(Problem(image_set, device, 0, target=target), TrainFlags(**{**usual, **more}))
    distiller.pool.slots[0].model.first_order = fused
    with torch.no_grad():
        distiller.x_syn.copy_(parts["x_syn"])
        distiller.y_syn.copy_(parts["y_syn"])
    if table:
        rows = len(image_set.train) * 162
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        entries = torch.zeros(rows, target.dim, dtype=dtype, device=device)
        known = torch.ones(rows, dtype=torch.bool)
        distiller.targets = TargetViews(target, entries, 162, known)
    return distiller


def plain_side(parts: dict[str, Any], batch: int, device: torch.device) -> PlainStep:
    """The plain form on the same tensors."""
    with local_seed(0):
        network = get_model(ARCH, SHAPE, parts["target"].dim)
    images, stats = parts["image_set"].train.images, parts["image_set"].stats
    return PlainStep(
        parts["x_syn"],
        parts["y_syn"],
        copy.deepcopy(parts["target"]).to(device),
        torch_pooling(network).to(device),
        (x for x, _ in kornia_batches(images, torch.zeros(len(images)), batch, stats, device)),
    )


def differences(parts: dict[str, Any], batch: int, device: torch.device) -> dict[str, float]:
    """Largest relative difference of loss and gradients between the two forms on one batch."""
    ours = our_side(parts, batch, device, precision="fp32", table=False)
    plain = plain_side(parts, batch, device)
    plain.network.load_state_dict(ours.pool.slots[0].model.state_dict())
    (x, view), index = next(ours.loader.forever())
    theirs = plain.loss(x)
    theirs.backward()
    ours._batches = iter([((x, view), index)])
    loss = ours.step()["loss"]
    found = {"loss": float((loss - theirs.detach()).abs() / theirs.detach())}
    for name in ("x_syn", "y_syn"):
        a, b = getattr(ours, name).grad, getattr(plain, name).grad
        found[name] = float((a - b).norm() / b.norm())
    return found


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of the matrix products and convolutions of one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure(
    device: torch.device,
    *,
    m: int = 100,
    b: int = 128,
    count: int = 1024,
    repeats: int = 7,
    calls: int = 1,
    compile: bool = False,
    grid: bool = True,
    apart: bool = True,
    square: int | None = None,
) -> dict[str, Any]:
    """Times, ratios, rates and peak memory of one outer step.

    Args:
        device: where.
        m: synthetic images.
        b: real images.
        count: images in the random data set.
        repeats: timings a side.
        calls: steps a timing.
        compile: measure the compiled form, too.
        grid: also measure how the step grows with m and b.
        apart: see `contest`.
        square: see `matmul_rate`.
    """
    parts = make_parts(m, max(count, b), device)
    with float32_mode("fp32"):
        gap = differences(parts, b, device)
    assert max(gap.values()) < 2e-2, f"the two forms differ: {gap}"
    precisions = ("fp32", "bf16", "tf32") if device.type == "cuda" else ("fp32", "bf16")
    kinds: dict[str, Kind] = {
        f"{where} {precision}": {"precision": precision, "table": where == "table"}
        for where in ("online", "table")
        for precision in precisions
    }
    if compile:
        for precision in precisions:
            kinds[f"table {precision} compiled"] = kinds[f"table {precision}"] | {"compile": True}
    if device.type == "cuda":
        kinds["table bf16 replayed"] = REPLAYED
        kinds["table bf16, torch's layers"] = kinds["table bf16"] | {"fused": False}
        kinds["table bf16 replayed, torch's layers"] = REPLAYED | {"fused": False}
        kinds[DEFAULTS] = DEFAULTS
    build = functools.partial(make_step, m, b, max(count, b), device)
    makers = {name: functools.partial(build, kind) for name, kind in kinds.items()}
    plain = functools.partial(build, None)
    counted = {"plain": plain} | {
        name: functools.partial(build, {"precision": "fp32", "table": name == "table", "fused": False})
        for name in ("online", "table")
    }
    counted = {name: count_flops(make()) for name, make in counted.items()}  # of any precision
    flops = {name: counted[re.split("[ ,]", name)[0]] for name in ("plain", *makers)}
    found = contest(plain, makers, device, repeats=repeats, calls=calls, apart=apart)
    times = {name: timing.median for name, timing in found.items()}
    rates = matmul_rates(device, square)
    results: dict[str, Any] = {
        "setting": {"m": m, "b": b, "network": ARCH, "target": TARGET, "pixels": 32},
        "agreement with the plain form (relative)": gap,
        "seconds a step": times,
        "timings": {name: timing.times for name, timing in found.items()},
        "ratio to plain": {name: times["plain"] / times[name] for name in makers if name in times},
        "ratio to plain, memory kept": {name: times[KEPT] / times[name] for name in makers if KEPT in times},
        "matmul FLOP/s": rates,
        "FLOP a step": flops,
        "share of matmul rate": {
            name: flops[name] / times[name] / rates[rate_of(name)]
            for name in ("plain", *makers)
            if name in times
        },
        "peak bytes": {name: timing.peak for name, timing in found.items()},
    }
    if grid:
        results["table fp32, seconds by (m, b)"] = growth(device, m, b, repeats)
    return results


def measure_run(
    device: torch.device, *, m: int, b: int, count: int = 50_000, steps: int = 2000, warm_up: int = 100
) -> dict[str, Any]:
    """Seconds a step of a run as published: ten networks, replaced after 1000 steps, targets looked up."""
    kind = REPLAYED if device.type == "cuda" else REPLAYED | {"cuda_graph": False}
    parts = make_parts(m, count, device)
    distiller = our_side(parts, b, device, **kind, num_models=10, online_iteration=1000)
    with float32_mode("bf16"):
        seconds(distiller.step, device, warm_up)
        taken = seconds(distiller.step, device, steps)
    return {"steps": steps, "seconds a step": taken, "memory": allocated(device)}


def rate_of(name: str) -> str:
    """The matrix products that a form is compared with; those of torch's own default are TF32 at most."""
    return next((p for p in ("bf16", "tf32") if p in name), "tf32" if name == DEFAULTS else "fp32")


def make_step(m: int, b: int, count: int, device: torch.device, kind: Kind) -> Callable[[], None]:
    """One outer step: ours of a kind, or a plain form.

    The plain form computes in exact float32 (None), or as torch does by itself on CUDA (DEFAULTS).
    """
    parts = make_parts(m, count, device)
    ours = isinstance(kind, dict)
    precision = kind["precision"] if ours else "fp32"
    step: Callable[[], Any] = (
        our_side(parts, b, device, **kind).step if ours else plain_side(parts, b, device)
    )

    def run() -> None:
        with nullcontext() if kind == DEFAULTS else float32_mode(precision):
            step()

    for _ in range(2 * WARM_UP + 2 if ours and kind.get("cuda_graph") else 0):  # recording is no step
        run()
    return run


def growth(device: torch.device, m: int, b: int, repeats: int) -> dict[str, float]:
    """How the step's time grows when m or b doubles."""
    sides = {}
    for size, batch in ((m // 2, b), (m, b), (2 * m, b), (m, b // 2), (m, 2 * b)):
        parts = make_parts(size, max(512, 2 * b), device)
        sides[f"m={size} b={batch}"] = our_side(parts, batch, device, precision="fp32", table=True).step
    with float32_mode("fp32"):
        return medians(sides, device, repeats=max(3, repeats // 2))


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, default=100)
    parser.add_argument("--b", type=int, default=128)
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    results = measure(
        device, m=args.m, b=args.b, count=args.count, repeats=args.repeats, compile=args.compile
    )
    print("seconds a step:", shown(results["seconds a step"], 4))
    for name in ("ratio to plain", "ratio to plain, memory kept"):
        if results[name]:
            print(f"{name}:", shown(results[name]))
    print("share of the matmul rate:", shown(results["share of matmul rate"]))
    report(args.out, {"machine": machine(device), "krr_st": results})


if __name__ == "__main__":
    sys.exit(main())
