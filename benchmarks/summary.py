"""`python -m benchmarks.summary DIR`: the short table of what benchmarks/gpu.sh wrote."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from utils.table import format_mean_std, markdown

PUBLISHED_STEPS = 160_000


def collect(folder: Path) -> list[list[str]]:
    """Rows of the table; what is not there is said."""
    log = folder / "log.txt"
    text = log.read_text(errors="replace") if log.exists() else ""
    tests = re.findall(r"^=* ?((?:\d+ \w+,? ?)+) in [\d.]+ ?s", text, re.M)
    found = [["tests against float64", tests[-1] if tests else "not run"]]
    found += [["failed", name] for name in re.findall(r"^== (\w+) failed", text, re.M)]
    parts, results = read(folder / "parts.json"), read(folder / "gpu.json")
    found += parts_rows(parts)
    if machine := results.get("machine"):
        name = machine.get("gpu", machine["processor"])
        found.append(["machine", f"{name}, driver {machine.get('driver')}, torch {machine['torch']}"])
    if step := results.get("krr_st"):
        for name, seconds in step["seconds a step"].items():
            share, ratio = step["share of matmul rate"].get(name), step["ratio to plain"].get(name, 1.0)
            shown = f"{1e3 * seconds:.1f} ms, {ratio:.1f} x plain"
            shown += "" if share is None else f", {100 * share:.0f} % of matmul"
            setting = "m={m} b={b}".format(**step["setting"])
            found.append([f"outer step {setting}, {name}", shown])
            found.append([f"  {PUBLISHED_STEPS} of them", f"{PUBLISHED_STEPS * seconds / 60:.0f} min"])
    if run := results.get("krr_st run"):
        each = run["seconds a step"]
        shown = f"{1e3 * each:.1f} ms, {PUBLISHED_STEPS} in {PUBLISHED_STEPS * each / 60:.0f} min"
        found.append([f"step of a run of {run['steps']} steps", shown])
    found += [[n, f"{r:.2f} x plain"] for n, r in results.get("clom", {}).get("ratios", {}).items() if r]
    run = read(folder / "results.json")
    if run:
        rate = run["steps_in_this_start"] / run["seconds"]
        found.append(
            ["short real distillation, after its restart", f"{rate:.3g} steps/s, loss {run['loss']:.4g}"]
        )
    values = defaultdict(list)
    for cells, name in (("results.jsonl", None), ("best.jsonl", "best")):
        for line in (folder / cells).read_text().splitlines() if (folder / cells).exists() else ():
            cell = json.loads(line)
            values[name or cell["method"]].append(cell["accuracy"])
    found += [[f"  probe of {name}", format_mean_std(seen)] for name, seen in values.items()]
    return found


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or only half of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def parts_rows(parts: dict[str, Any]) -> list[list[str]]:
    """Rows of what benchmarks.parts measured."""
    found = []
    if top := parts.get("ceilings"):
        rates = ", ".join(f"{k} {v / 1e12:.3g}" for k, v in top["matmul FLOP/s"].items())
        found.append(["matrix products, TFLOP/s; copy, TB/s", f"{rates}; {top['copy bytes/s'] / 1e12:.2f}"])
    if solve := parts.get("solve"):
        found.append(["kernel solve both ways", f"{1e3 * solve['forwards and backwards']:.2f} ms"])
    if step := parts.get("step"):
        kernels, wall = step["seconds of kernels"], step["seconds"]
        shown = f"{1e3 * wall:.1f} ms, its {step['kernels']} kernels {1e3 * kernels:.1f} ms"
        found.append(["bf16 step from the table", shown])
    if fill := parts.get("fill"):
        found.append(["table of views", f"{fill['views/s']:.3g} views/s"])
    if capture := parts.get("capture"):
        found.append(["solve in a CUDA graph", str(capture)])
    return found


def main() -> None:
    """Print the table."""
    print(markdown(["what", "measured"], collect(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
