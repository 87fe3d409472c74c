"""`python -m benchmarks`: every ratio in one run, printed and written as JSON.

    python -m benchmarks [--device cpu] [--out benchmarks/results/NAME.json] [--quick]

The sides of each ratio take turns. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from benchmarks import clom, krr_st, loader
from benchmarks.common import machine, report
from utils.device import resolve_device
from utils.table import markdown


def rows(results: dict[str, Any]) -> list[list[str]]:
    """What the table shows: each ratio to the plain form."""
    step = results["krr_st"]
    shares = step["share of matmul rate"]
    table = [
        [f"KRR-ST outer step, {name}", f"{ratio:.2f}", f"{100 * shares[name]:.0f} %"]
        for name, ratio in step["ratio to plain"].items()
        if name in shares
    ]
    table += [[name, f"{ratio:.2f}", ""] for name, ratio in results["clom"]["ratios"].items()]
    table.append(["batches of 1024 images", f"{results['loader']['ratio']:.2f}", ""])
    return table


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.json"))
    parser.add_argument("--quick", action="store_true", help="few timings, small sizes")
    args = parser.parse_args()
    device = resolve_device(args.device)
    step = functools.partial(krr_st.measure, device)
    if device.type == "cuda":
        step = functools.partial(step, m=1000, b=1024, count=4096, calls=5)
    if args.quick:
        step = functools.partial(step, m=8, b=16, count=32, grid=False)
    few = {"repeats": 3} if args.quick else {}
    results: dict[str, Any] = {"machine": machine(device)}
    print("KRR-ST ...", flush=True)
    results["krr_st"] = step(**few)
    print("DC, DSA, DM ...", flush=True)
    results["clom"] = clom.measure(device, quick=args.quick)
    print("loader ...", flush=True)
    results["loader"] = loader.measure(device, count=2048 if args.quick else 20000, **few)
    print(markdown(["what", "times the plain form", "of the matmul rate"], rows(results)))
    report(args.out, results)


if __name__ == "__main__":
    main()
