"""`python -m benchmarks.summary DIR`: the short table of what benchmarks/gpu.sh wrote."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from utils.table import format_mean_std, markdown


def collect(folder: Path) -> list[list[str]]:
    """Rows of the table; what is not there is said."""
    log = folder / "correctness.log"
    last = log.read_text().strip().splitlines()[-1] if log.exists() else "not run"
    found = [["tests against float64", re.sub(r"[= ]*$|^[= ]*", "", last)]]
    path = folder / "gpu.json"
    if path.exists():
        results = json.loads(path.read_text())
        step = results["krr_st"]
        found.append(["machine", f"{results['machine'].get('gpu')}, {results['machine']['torch']}"])
        for name, seconds in step["seconds a step"].items():
            share = step["share of matmul rate"].get(name)
            ratio = step["ratio to plain"].get(name, 1.0)
            text = f"{1e3 * seconds:.1f} ms, {ratio:.1f} x plain"
            text += "" if share is None else f", {100 * share:.0f} % of matmul"
            found.append([f"outer step m=1000 b=1024, {name}", text])
            found.append([f"  160 000 of them, {name}", f"{160000 * seconds / 3600:.1f} h"])
        found += [[n, f"{r:.2f} x plain"] for n, r in results["clom"]["ratios"].items()]
    cells = folder / "results.jsonl"
    if cells.exists():
        values = [json.loads(line)["accuracy"] for line in cells.read_text().splitlines()]
        found.append(["short real distillation, probe on 5 %", format_mean_std(values)])
    return found


def main() -> None:
    """Print the table."""
    print(markdown(["what", "measured"], collect(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
