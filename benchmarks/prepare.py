"""How fast and how lean data.prepare is against a plain PIL loop on one core.

    python -m benchmarks.prepare [--pictures 3000] [--size 64] [--repeats 3]

Draws JPEG and PNG pictures of 200 to 500 pixels, then times both, in turn, `repeats` times. The
promise: pictures per second at least 0.8 × cores × those of the loop, and peak memory above the
start of the process (torch imported, nothing read) under 1.5 × the uint8 result. Peak memory is
the high-water mark of the resident set of the main process or of its largest worker; mapped
files count, although the system may drop their pages.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.prepare.write import default_workers
from data.untrusted import open_picture
from utils.cli import flag, parse


@dataclass(frozen=True)
class BenchmarkConfig:
    pictures: int = flag(3000, "number of pictures to draw", minimum=10)
    size: int = flag(64, "height = width of the tensors", minimum=1)
    repeats: int = flag(3, "runs of either side; medians are shown", minimum=1)


def draw_pictures(folder: Path, count: int) -> list[Path]:
    """Smooth noise in ten class folders, every third picture as PNG."""
    generator = np.random.default_rng(0)
    paths = []
    for i in range(count):
        width, height = generator.integers(200, 501, 2)
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        path = folder / f"class_{i % 10}" / f"{i:06d}.{'png' if i % 3 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90, compress_level=3)
        paths.append(path)
    return paths


def plain_loop(paths: list[Path], size: int) -> tuple[float, float]:
    """Wall and CPU seconds of the obvious loop into one array, without writing it."""
    started, cpu = time.perf_counter(), time.process_time()
    rows = np.empty((len(paths), size, size, 3), np.uint8)
    for row, path in zip(rows, paths, strict=True):
        with open_picture(path) as picture:
            row[:] = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return time.perf_counter() - started, time.process_time() - cpu


_CHILD = """
import json, resource, sys, time
from data.prepare.__main__ import main
import sklearn.datasets, torchvision
def peak():
    own, workers = (resource.getrusage(w).ru_maxrss for w in
                    (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(own, workers) * 1024
def cpu():
    return sum(sum(resource.getrusage(w)[:2])
               for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
before, used, started = peak(), cpu(), time.perf_counter()
assert main(sys.argv[1:]) == 0
print(json.dumps([time.perf_counter() - started, cpu() - used, peak() - before]))
"""


def prepare_once(pictures: Path, out: Path, size: int) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and extra peak bytes of a run in a process of its own."""
    flags = ["--from_folder", pictures, "--data_name", "b", "--size", size, "--data_dir", out]
    command = [sys.executable, "-c", _CHILD, *map(str, flags), "--overwrite"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    config = parse(BenchmarkConfig, None, prog="python -m benchmarks.prepare", description=__doc__ or "")
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Path(scratch) / "pictures"
        paths = draw_pictures(pictures, config.pictures)
        loops, runs = [], []
        for _ in range(config.repeats):
            loops.append(plain_loop(paths, config.size))
            runs.append(prepare_once(pictures, Path(scratch) / "out", config.size))
    loop, loop_cpu = map(statistics.median, zip(*loops, strict=True))
    run, run_cpu, peak = map(statistics.median, zip(*runs, strict=True))
    cores, result = default_workers(), config.pictures * 3 * config.size**2
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{config.pictures} pictures to {config.size} px, {cores} cores, load {load:.1f}")
    print(f"plain loop  {loop:6.2f} s  (all: {' '.join(f'{t:.2f}' for t, _ in loops)})")
    print(f"prepare     {run:6.2f} s  (all: {' '.join(f'{t:.2f}' for t, *_ in runs)})")
    print(f"speed-up    {loop / run:6.2f}    (promised {0.8 * cores:.2f})")
    print(f"CPU time    {run_cpu / loop_cpu:6.2f} x the loop's (what a busy machine cannot blur)")
    print(f"peak memory {peak / result:6.2f} x the result of {result / 2**20:.0f} MiB (promised 1.50)")


if __name__ == "__main__":
    main()
