"""What the benchmarks share: sides that take turns, medians, the machine and its peak."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.errors import first_line
from utils.memory import keep_freed_memory
from utils.precision import DTYPES, float32_mode
from utils.run_folder import write_json


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def medians(
    sides: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int, calls: int = 1
) -> dict[str, float]:
    """Median seconds a call of each side; they take turns, after one call each to warm up.

    Args:
        sides: name -> one unit of work.
        device: synchronised around each timing.
        repeats: timings a side.
        calls: calls a timing.
    """
    for run in sides.values():
        run()
    times = [{n: seconds(run, device, calls) for n, run in sides.items()} for _ in range(repeats)]
    return {name: statistics.median(turn[name] for turn in times) for name in sides}


def seconds(run: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds a call."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / calls


class Side(NamedTuple):
    """A form to time.

    Attributes:
        make: builds it where it runs and gives one unit of work; picklable.
        keep_memory: whether freed memory is kept on a CPU, as the commands do.
    """

    make: Callable[[], Callable[[], Any]]
    keep_memory: bool = True


class Timing(NamedTuple):
    """What was seen of a side: the median of `times` (seconds a call), peak memory in bytes."""

    median: float
    times: list[float]
    peak: int | None


KEPT = "plain, memory kept"


def contest(
    plain: Callable[[], Callable[[], Any]],
    ours: Mapping[str, Callable[[], Callable[[], Any]]],
    device: torch.device,
    *,
    repeats: int,
    calls: int = 1,
    apart: bool = True,
) -> dict[str, Timing]:
    """Forms against the plain one, in turns, after a call each to warm up.

    On a CPU each has a process of its own, so that none finds memory that another has kept, and the
    plain form runs twice: as Python starts, and with freed memory kept (where that can be had). On a
    GPU one of ours that fails is said and left out.

    Args:
        plain: as in Side.
        ours: name -> the same.
        device: synchronised around each timing.
        repeats: timings a side.
        calls: calls a timing.
        apart: on a CPU; without, all share this process, as on a GPU.

    Raises:
        RuntimeError: a side died.
    """
    apart = apart and device.type == "cpu"
    sides = {"plain": Side(plain, keep_memory=False), KEPT: Side(plain)}
    sides |= {name: Side(make) for name, make in ours.items()}
    if not apart or not keep_freed_memory():  # glibc alone can
        del sides[KEPT]
    if not apart:
        runs, held = {}, {}
        for name, side in sides.items():
            before = allocated(device)
            try:
                run = side.make()
                run()
            except Exception as error:  # whatever a compiler or a graph raises
                if name == "plain":
                    raise
                print(f"{name} failed: {first_line(error)}", flush=True)
                continue
            runs[name], held[name] = run, allocated(device) - before
        turns = [{n: seconds(r, device, calls) for n, r in runs.items()} for _ in range(repeats)]
        peaks = {n: (taken := peak_of_call(r, device)) and taken + held[n] for n, r in runs.items()}
    else:
        with Players(sides, device, calls) as players:
            for name in sides:
                players.turn(name)
            played = [{name: players.turn(name) for name in sides} for _ in range(repeats)]
        turns = [{name: taken for name, (taken, _) in turn.items()} for turn in played]
        peaks = {name: peak for name, (_, peak) in played[-1].items()}
    times = {name: [turn[name] for turn in turns] for name in peaks}
    return {n: Timing(statistics.median(times[n]), times[n], peaks[n]) for n in peaks}


class Players:
    """Sides that wait in processes of their own for their turns; a context manager."""

    def __init__(self, sides: Mapping[str, Side], device: torch.device, calls: int) -> None:
        self._sides, self._rest = sides, (device, calls)
        self._ends: dict[str, Any] = {}
        self._processes: dict[str, Any] = {}

    def __enter__(self) -> Players:
        context = torch.multiprocessing.get_context("spawn")
        for name, side in self._sides.items():
            self._ends[name], theirs = context.Pipe()
            process = context.Process(target=_play, args=(side, *self._rest, theirs), daemon=True)
            process.start()
            self._processes[name] = process
            theirs.close()  # so that a dead process is an EOFError here
        return self

    def turn(self, name: str) -> tuple[float, int | None]:
        """Seconds a call of one timing, and the process's peak so far.

        Raises:
            RuntimeError: the side died.
        """
        try:
            self._ends[name].send(None)
            return self._ends[name].recv()
        except (EOFError, OSError):
            self._processes[name].join()
            code = self._processes[name].exitcode
            raise RuntimeError(f"the side {name!r} died with exit code {code}") from None

    def __exit__(self, *_: object) -> None:
        for end in self._ends.values():
            end.close()
        for process in self._processes.values():
            process.join()


def _play(side: Side, device: torch.device, calls: int, end: Any) -> None:
    if side.keep_memory:
        keep_freed_memory()
    run = side.make()
    while True:
        try:
            end.recv()
        except EOFError:
            return
        end.send((seconds(run, device, calls), peak_of_process()))


def torch_pooling(network: nn.Module) -> nn.Module:
    """The network with torch's average pooling in place of the zoo's."""
    for parent in network.modules():
        for name, module in parent.named_children():
            if isinstance(module, nn.AvgPool2d):
                setattr(parent, name, nn.AvgPool2d(module.kernel_size))
    return network


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measured floating-point operations a second of a square matrix product."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = medians({"matmul": lambda: a @ b}, device, repeats=5, calls=3)["matmul"]
    return 2 * size**3 / seconds


def matmul_rates(device: torch.device, size: int | None = None) -> dict[str, float]:
    """`matmul_rate` by precision; tf32 is on CUDA alone."""
    rates = {}
    for name in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"):
        with float32_mode("tf32" if name == "tf32" else "fp32"):
            rates[name] = matmul_rate(device, DTYPES.get(name, torch.float32), size)
    return rates


def allocated(device: torch.device) -> int:
    """Bytes in use on a CUDA device; 0 on others."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_of_call(run: Callable[[], Any], device: torch.device) -> int | None:
    """Largest memory on a CUDA device during one call, beyond what was in use before; None on others."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_of_process() -> int | None:
    """Largest resident memory of this process; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:")), None)


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
        described |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            described["driver"] = subprocess.check_output(asked, text=True, timeout=20).split()[0]
    return described


def measure_sections(
    sections: Mapping[str, Callable[[], Any]], device: torch.device, out: Path | None
) -> tuple[dict[str, Any], bool]:
    """Results of each section by name, written to `out` as soon as they are there, and the machine.

    One that fails is left out, and said; the others go on. Also returns whether all succeeded.
    """
    results: dict[str, Any] = {"machine": machine(device)}
    for name, measure in sections.items():
        print(f"{name} ...", flush=True)
        try:
            results[name] = measure()
        except Exception:  # shown, listed, and in the exit code: one section does not cost the others
            traceback.print_exc()
            results.setdefault("failed", []).append(name)
        report(out, results)
    return results, "failed" not in results


def report(out: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON where wanted."""
    if out is not None:
        write_json(out, results)
        print(f"written: {out}")


def shown(values: Mapping[str, float], digits: int = 2) -> str:
    """`a 1.23, b 4.56`."""
    return ", ".join(f"{k} {v:.{digits}f}" for k, v in values.items())
