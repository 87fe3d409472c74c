"""`python -m benchmarks`: every ratio in one run, printed and written as JSON.

    python -m benchmarks [--repeats 5] [--out benchmarks/results/NAME.json] [--quick]

The sides of each ratio take turns, on a CPU each in a process of its own (seven at once, about
10 GB; the loader's two share one). Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from benchmarks import clom, krr_st, loader, trajectory
from benchmarks.common import measure_sections
from utils.device import resolve_device
from utils.errors import entry_point
from utils.table import markdown


def rows(results: dict[str, Any]) -> list[list[str]]:
    """What the table shows: each ratio to the plain form, of the sections that were measured."""
    table = []
    if step := results.get("krr_st"):
        shares, kept = step["share of matmul rate"], step["ratio to plain, memory kept"]
        table += [
            [f"KRR-ST outer step, {n}", f"{r:.2f}", number(kept.get(n)), f"{100 * shares[n]:.0f} %"]
            for n, r in step["ratio to plain"].items()
        ]
    if methods := results.get("clom"):
        kept = methods["ratios, memory kept"]
        table += [[n, f"{r:.2f}", number(kept.get(n)), ""] for n, r in methods["ratios"].items()]
    if "loader" in results:
        table.append(["batches of 1024 images", f"{results['loader']['ratio']:.2f}", "", ""])
    return table


def number(value: float | None) -> str:
    """With two digits; nothing for None."""
    return "" if value is None else f"{value:.2f}"


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.json"))
    parser.add_argument("--repeats", type=int, default=5, help="timings a side")
    parser.add_argument("--quick", action="store_true", help="few timings, small sizes")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    step = functools.partial(krr_st.measure, device)
    if device.type == "cuda":
        step = functools.partial(step, m=1000, b=1024, count=4096, calls=5)
    if args.quick:
        step = functools.partial(step, m=8, b=16, count=32, grid=False, apart=False, square=256)
    few = {"repeats": 3 if args.quick else args.repeats}
    small = dict(steps=(2,), m=8, model="convnet_8_in", size=16) if args.quick else {}
    sections = {
        "krr_st": functools.partial(step, **few),
        "clom": functools.partial(clom.measure, device, quick=args.quick, **few),
        "loader": functools.partial(loader.measure, device, count=2048 if args.quick else 20000, **few),
        "trajectory": functools.partial(trajectory.measure, device, **small),
    }
    run = dict(m=1000, b=1024)
    if args.quick:
        run = dict(m=8, b=16, count=32, steps=2, warm_up=2)
    if args.quick or device.type == "cuda":
        sections["krr_st run"] = functools.partial(krr_st.measure_run, device, **run)
    results, done = measure_sections(sections, device, args.out)
    head = ["what", "times the plain form", "that with memory kept", "of the matmul rate"]
    print(markdown(head, rows(results)))
    if "trajectory" in results:
        print(trajectory.table(results["trajectory"]))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
