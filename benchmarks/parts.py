"""What KRR-ST's outer step on a GPU is made of: ceilings, layers, the solve, kernels, the table of views.

    python -m benchmarks.parts [--m 1000] [--b 1024] [--device cuda] [--out FILE]

Each section is written to the file as soon as it is measured. On a CPU it runs, at sizes that are given.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import allocated, matmul_rates, measure_sections, medians, synchronize
from benchmarks.krr_st import make_parts, our_side
from krr_st.loss import kernel_weights, krr_loss
from krr_st.views import TargetViews
from utils.device import resolve_device
from utils.errors import entry_point
from utils.precision import float32_mode

REPEATS = 5
# (channels in, channels out, side) of the convolutions of convnet_128_256_512_bn at 32 pixels; the first
# also with its 3 channels padded to 8
LAYERS = ((3, 128, 32), (8, 128, 32), (128, 256, 16), (256, 512, 8))


def ceilings(device: torch.device, size: int) -> dict[str, Any]:
    """FLOP/s of a square matrix product by precision, and bytes/s, read and written, of a copy."""
    source = torch.empty(size**2 * 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = medians({"copy": lambda: target.copy_(source)}, device, repeats=REPEATS, calls=3)["copy"]
    return {"matmul FLOP/s": matmul_rates(device, size), "copy bytes/s": 2 * len(source) / taken}


def layers(device: torch.device, b: int) -> dict[str, Any]:
    """Seconds of each convolution of b images in bf16, forwards and backwards, with and without search."""
    found: dict[str, Any] = {}
    before = torch.backends.cudnn.benchmark
    try:
        for search in (False, True) if device.type == "cuda" else (False,):
            torch.backends.cudnn.benchmark = search
            sides = {}
            for c_in, c_out, side in LAYERS:
                conv = nn.Conv2d(c_in, c_out, 3, padding=1).to(device, torch.bfloat16)
                conv = conv.to(memory_format=torch.channels_last)
                x = torch.randn(b, c_in, side, side, device=device).to(torch.bfloat16)
                x = x.to(memory_format=torch.channels_last).requires_grad_()
                sides[f"{c_in}-{c_out} at {side}"] = functools.partial(forward_backward, conv, x)
            found[f"cudnn.benchmark {search}"] = medians(sides, device, repeats=REPEATS, calls=3)
    finally:
        torch.backends.cudnn.benchmark = before
    return found


def forward_backward(conv: nn.Module, x: Tensor) -> None:
    """One pass each way; the gradient is thrown away."""
    y = conv(x)
    torch.autograd.grad(y, [x, *conv.parameters()], y)


def kernel_of(m: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A kernel (m, m) of random features of length 8192, as the loss makes it, and targets (m, dim)."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(m, 8192, generator=generator).relu().to(device)
    return f @ f.mT + 1, torch.randn(m, dim, generator=generator).to(device)


def solve(device: torch.device, m: int, dim: int) -> dict[str, Any]:
    """Seconds of the pieces of the kernel solve, and of the whole, with its gradient; by precision."""
    k, y = kernel_of(m, dim, device)
    k = k + 1e-6 * k.trace() * torch.eye(m, device=device)
    found = {}
    for dtype in (torch.float32, torch.float64):
        a, b = k.to(dtype), y.to(dtype)
        factor = torch.linalg.cholesky_ex(a)[0]
        sides: dict[str, Callable[[], Any]] = {
            "cholesky_ex": functools.partial(torch.linalg.cholesky_ex, a),
            "cholesky_solve": functools.partial(torch.cholesky_solve, b, factor),
            "cholesky_inverse": functools.partial(torch.cholesky_inverse, factor),
            "matrix product": functools.partial(torch.matmul, a, b),
        }
        found[str(dtype)[6:]] = medians(sides, device, repeats=REPEATS, calls=3)
    ours = functools.partial(predict_and_back, k.requires_grad_(), y.requires_grad_())
    found["forwards and backwards"] = medians({"ours": ours}, device, repeats=REPEATS, calls=3)["ours"]
    return found


def predict_and_back(k: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Value and gradients of the sum of predictions on the set itself."""
    value = (k.detach() @ kernel_weights(k, y, 1e-6).to(k.dtype)).sum()
    return (value.detach(), *torch.autograd.grad(value, [k, y]))


def capture(device: torch.device, m: int, dim: int) -> dict[str, Any]:
    """Whether the solve can be part of a CUDA graph, and what its replay differs by and takes."""
    k, y = (t.requires_grad_() for t in kernel_of(m, dim, device))
    wanted = predict_and_back(k, y)
    if device.type != "cuda":
        return {"captured": None}
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            predict_and_back(k, y)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = predict_and_back(k, y)
    taken = medians({"replay": graph.replay}, device, repeats=REPEATS, calls=3)["replay"]
    gap = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    return {"captured": True, "relative difference": gap, "seconds": taken}


def step(device: torch.device, m: int, b: int) -> dict[str, Any]:
    """The bf16 step with looked-up targets: seconds, those of its kernels, how many, and the longest."""
    ours = our_side(make_parts(m, max(b, 64), device), b, device, precision="bf16", table=True)
    with float32_mode("bf16"):
        wall = medians({"step": ours.step}, device, repeats=REPEATS, calls=10 if device.type == "cuda" else 1)
        began = time.perf_counter()
        ours.step()
        host = time.perf_counter() - began
        synchronize(device)
        on = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[on]) as seen:
            ours.step()
            synchronize(device)

    def own(event: Any) -> float:
        return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total

    events = sorted(seen.key_averages(), key=own, reverse=True)
    return {
        "seconds": wall["step"],
        "seconds of the host": host,
        "seconds of kernels": sum(map(own, events)) / 1e6,
        "kernels": sum(e.count for e in events if own(e) > 0),  # not the host's calls
        "longest": {e.key[:100]: {"seconds": own(e) / 1e6, "calls": e.count} for e in events[:25]},
    }


def conditioning(device: torch.device, m: int) -> dict[str, float]:
    """Smallest and largest eigenvalue of the set's kernel under a random network, over its trace."""
    parts = make_parts(m, max(m, 64), device)
    ours = our_side(parts, 16, device, precision="fp32", table=True)
    model = ours.pool.draw().model
    with torch.no_grad(), float32_mode("fp32"):
        f = torch.cat([model.embed(x) for x in ours.x_syn.split(256)]).double()
        values = torch.linalg.eigvalsh((f @ f.mT + 1).cpu())
        y = ours.y_syn.detach()
        f32 = krr_loss(f[:8].float(), y[:8] + 1, f.float(), y)
        f64 = krr_loss(f[:8], y[:8].double() + 1, f, y.double())
    smallest, largest = (float(values[i] / values.sum()) for i in (0, -1))
    return {
        "smallest": smallest,
        "largest": largest,
        "loss, relative difference to float64": float((f32 - f64).abs() / f64),
    }


def fill(device: torch.device, images: int) -> dict[str, Any]:
    """Views per second with which the table of targets is filled, in bf16, and its bytes."""
    parts = make_parts(8, max(images, 64), device)
    target = our_side(parts, 16, device, precision="bf16", table=False).problem.target
    split, stats, before = (
        parts["image_set"].train.images[:images],
        parts["image_set"].stats,
        allocated(device),
    )
    table = torch.empty(images * 162, target.dim, dtype=torch.bfloat16, device=device)
    views = TargetViews(target, table, 162)
    with float32_mode("bf16"):
        target(torch.randn(8, *split.shape[1:], device=device))
        synchronize(device)
        began = time.perf_counter()
        views.fill(split, stats, 4, device)
        synchronize(device)
        taken = time.perf_counter() - began
    held = {"bytes on the device": allocated(device) - before} if device.type == "cuda" else {}
    return {
        "views": len(table),
        "seconds": taken,
        "views/s": len(table) / taken,
        "bytes": table.nbytes,
        **held,
    }


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, default=1000)
    parser.add_argument("--b", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512, help="length of the targets")
    parser.add_argument("--size", type=int, default=8192, help="side of the matrix product")
    parser.add_argument("--images", type=int, default=2000, help="images whose views are filled in")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    sections = {
        "ceilings": functools.partial(ceilings, device, args.size),
        "layers": functools.partial(layers, device, args.b),
        "solve": functools.partial(solve, device, args.m, args.dim),
        "step": functools.partial(step, device, args.m, args.b),
        "eigenvalues": functools.partial(conditioning, device, args.m),
        "fill": functools.partial(fill, device, args.images),
        "capture": functools.partial(capture, device, args.m, args.dim),  # last: it may leave CUDA broken
    }
    results, done = measure_sections(sections, device, args.out)
    for name, found in results.items():
        print(f"{name}: {found}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
