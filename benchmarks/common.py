"""What the benchmarks share: sides that take turns, medians, the machine and its peak."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.memory import keep_freed_memory
from utils.runlog import write_json


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(
    sides: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int, calls: int = 1
) -> dict[str, float]:
    """Median seconds a call of each side; they take turns of one untimed call and two timings.

    On a CPU every side but one named "plain" computes with freed memory kept, as the commands do.

    Args:
        sides: name -> one unit of work.
        device: synchronised around each timing.
        repeats: timings a side.
        calls: calls a timing.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    while any(len(found) < repeats for found in times.values()):
        for name, run in sides.items():
            if device.type == "cpu":
                keep_freed_memory(name != "plain")
            run()
            for _ in range(min(2, repeats - len(times[name]))):
                synchronize(device)
                began = time.perf_counter()
                for _ in range(calls):
                    run()
                synchronize(device)
                times[name].append((time.perf_counter() - began) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def medians_apart(
    make: Callable[[], Mapping[str, Callable[[], Any]]],
    device: torch.device,
    *,
    repeats: int,
) -> dict[str, float]:
    """As `medians`; on a CPU each side in a process of its own: neither finds the other's memory.

    Args:
        make: picklable; builds the sides, "plain" and "ours".
        device: synchronised around each timing.
        repeats: timings a side.

    Raises:
        RuntimeError: a side died.
    """
    if device.type != "cpu":
        return medians(make(), device, repeats=repeats)
    context = torch.multiprocessing.get_context("spawn")
    ends, processes = {}, {}
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    try:
        for name in times:
            ends[name], theirs = context.Pipe()
            processes[name] = context.Process(
                target=_take_turns, args=(make, name, device, theirs), daemon=True
            )
            processes[name].start()
            theirs.close()  # so that a dead process is an EOFError here
        for turn in range(1 + repeats):
            for name, end in ends.items():
                try:
                    end.send(turn)
                    seconds = end.recv()
                except (EOFError, OSError):
                    processes[name].join()
                    code = processes[name].exitcode
                    raise RuntimeError(f"the {name} side died with exit code {code}") from None
                if turn:  # the first one warms up
                    times[name].append(seconds)
    finally:
        for end in ends.values():
            end.close()
        for process in processes.values():
            process.join()
    return {name: statistics.median(t) for name, t in times.items()}


def _take_turns(
    make: Callable[[], Mapping[str, Callable[[], Any]]], name: str, device: torch.device, end: Any
) -> None:
    if device.type == "cpu" and name != "plain":
        keep_freed_memory()
    run = make()[name]
    while True:
        try:
            end.recv()
        except EOFError:
            return
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        end.send(time.perf_counter() - began)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measured floating-point operations a second of a square matrix product."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds = medians({"matmul": lambda: a @ b}, device, repeats=5, calls=3)["matmul"]
    return 2 * size**3 / seconds


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Largest memory during one call: allocated on CUDA, resident on Linux; None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if keep_freed_memory(False):  # what was freed before goes back first
        keep_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use
        run()
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def machine(device: torch.device) -> dict[str, Any]:
    """The machine in words and versions."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    described = {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def report(out: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON where wanted."""
    if out is not None:
        write_json(out, results)
        print(f"written: {out}")


def shown(values: Mapping[str, float], digits: int = 2) -> str:
    """`a 1.23, b 4.56`."""
    return ", ".join(f"{k} {v:.{digits}f}" for k, v in values.items())
