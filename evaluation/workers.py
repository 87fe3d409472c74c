"""Missing jobs in several processes of this machine, each on a GPU of its own where there are several."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch

from evaluation.jobs import Job, file_name, why_failed
from utils.stop import stop_with_parent

PROCESSES = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process


def run_in_workers(
    missing: Callable[[], list[Job]],
    call: Callable[[str], Callable[[], None]],
    workers: int,
    folder: Path,
    spread: bool = True,
) -> list[str]:
    """Run the missing jobs, at most `workers` at a time, cheapest first; what each prints goes to {folder}.

    `call` gives for a job's name what its process runs, and can be pickled; a process that exits with
    another code than 0 has failed. `missing` is asked again whenever a job has ended, so that what was
    waiting for it is run, too. With `spread` each process has one of the GPUs. Returns what failed, one
    line each. Leaving early stops the processes, which save first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gpus, tried, failed = _gpus() if spread else [], set(), []
    running: dict[int, tuple[str, multiprocessing.Process]] = {}  # by the worker's number
    try:
        while True:
            jobs = sorted((job for job in missing() if job.name not in tried), key=lambda job: job.cost)
            free = [number for number in range(workers) if number not in running]
            for number, job in zip(free, jobs, strict=False):
                gpu = gpus[number % len(gpus)] if gpus else None
                log, threads = _log(folder, job.name), max(1, torch.get_num_threads() // workers)
                process = PROCESSES.Process(target=run_logged, args=(call(job.name), log, gpu, threads))
                process.start()
                running[number] = job.name, process
                tried.add(job.name)
                print(f"started: {job.name}; log: {log}", flush=True)
            if not running:
                return failed
            ended = wait([process.sentinel for _, process in running.values()])
            for number, (name, process) in list(running.items()):
                if process.sentinel in ended:
                    del running[number]
                    process.join()
                    if process.exitcode:
                        failed.append(f"{name}: {why_failed(process.exitcode, _log(folder, name))}")
                    print(f"failed: {failed[-1]}" if process.exitcode else f"done: {name}", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _log(folder: Path, name: str) -> Path:
    return folder / f"{file_name(name)}.log"


def _gpus() -> list[str]:
    """Those that this process may use, where they are several."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",")[:count] if named else [str(n) for n in range(count)]) if count > 1 else []


def run_logged(job: Callable[[], None], log: Path, gpu: str | None, threads: int) -> None:
    """In its own process: the job, with its output in a file."""
    stop_with_parent()
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    job()
