"""Jobs for what a table or study lacks: they run cheapest first, and a restart skips what is there."""

import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.progress import duration


@dataclass(frozen=True)
class Job:
    """One piece of work."""

    name: str
    cost: float  # expected floating-point operations, for the order and the time left
    run: Callable[[], object]  # a UserError means that it cannot be done here


def file_name(name: str) -> str:
    """A job's name as a file name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)[:200]


def run_missing(missing: Callable[[], list[Job]]) -> list[str]:
    """Run every missing job, cheapest first; one that cannot run is skipped.

    `missing` reads the results and gives what they lack. It is asked again before each choice, since
    jobs may wait for others. Returns what could not be run, one line each.
    """
    tried: set[str] = set()
    skipped: list[str] = []
    done = spent = 0.0
    while jobs := sorted((j for j in missing() if j.name not in tried), key=lambda j: j.cost):
        job = jobs[0]
        tried.add(job.name)
        left = sum(j.cost for j in jobs) * spent / done if done else None
        shown = "" if left is None else f", about {duration(left)} left"
        size = f" ({job.cost:.1e} operations)" if job.cost else ""
        print(f"\n[{len(tried)}/{len(tried) + len(jobs) - 1}] {job.name}{size}{shown}", flush=True)
        began = time.perf_counter()
        try:
            job.run()
            done, spent = done + job.cost, spent + time.perf_counter() - began
        except UserError as error:
            skipped.append(f"{job.name}: {error}")
            print(f"skipped: {error}", flush=True)
    if skipped:  # their messages may lie far above by now
        print("\n".join(["could not be run:", *skipped, ""]))
    return skipped


_NOISE = ("srun: ", "submitit ")  # lines of a log that say nothing about the job


def last_line(*logs: Path, otherwise: str = "it wrote no log") -> str:
    """What a job, or the scheduler about it, wrote last, in the first of the logs that has any; and where."""
    for path in logs:
        text = path.read_text(errors="replace") if path.exists() else ""
        lines = [line.strip() for line in text.splitlines() if not line.startswith(_NOISE)]
        if lines := [line for line in lines if line]:
            return f"{lines[-1]} ({path})"
    return otherwise


def why_failed(exit_code: int, log: Path) -> str:
    """The signal that killed a process, or else what it wrote last."""
    if exit_code < 0:
        number = signal.Signals(-exit_code)
        return f"killed by {number.name}{', perhaps out of memory' * (number.name == 'SIGKILL')} ({log})"
    return last_line(log)
