"""Running what is missing: cheapest first, resumable, shared by any number of processes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from utils.errors import UserError
from utils.locks import Claims


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: what it computes; jobs of equal names are never run at the same time.
        cost: expected work in any unit, for the order and the time left.
        run: does it; a UserError means that it cannot be done here.
    """

    name: str
    cost: float
    run: Callable[[], object]


def run_missing(missing: Callable[[], list[Job]], claims: Claims) -> list[str]:
    """Run every missing job that no other process works on; one that cannot run is skipped.

    Any number of processes may do so at the same time: `missing` is asked again before each choice
    and once more after a job was claimed, so that none is run twice.

    Args:
        missing: reads the results and gives what they lack.
        claims: of the shared folder.

    Returns:
        What could not be run, one line each.
    """
    tried: set[str] = set()
    skipped: list[str] = []
    done = spent = 0.0
    while True:
        jobs = sorted((j for j in missing() if j.name not in tried), key=lambda j: j.cost)
        elsewhere = {j.name for j in jobs if claims.held_elsewhere(claim_name(j.name))}
        free = [j for j in jobs if j.name not in elsewhere]
        if not free:
            if elsewhere:
                print(f"jobs running in other processes: {len(elsewhere)}; nothing else is left")
            if skipped:  # their messages may lie far above by now
                print("\n".join(["could not be run:", *skipped, ""]))
            return skipped
        name = free[0].name
        with claims.claim(claim_name(name)) as ours:
            job = next((j for j in missing() if ours and j.name == name), None)
            if job is None:  # another process was faster
                continue
            tried.add(name)
            left = sum(j.cost for j in free) * spent / done / (1 + len(elsewhere)) if done else None
            shown = "" if left is None else f", about {duration(left)} left"
            print(f"\n[{len(tried)}/{len(tried) + len(jobs) - 1}] {name}{shown}", flush=True)
            began = time.perf_counter()
            try:
                job.run()
            except UserError as error:
                skipped.append(f"{name}: {error}")
                print(f"skipped: {error}", flush=True)
                continue
            done += job.cost
            spent += time.perf_counter() - began


def claim_name(name: str) -> str:
    """A job's name as a file name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)[:200]


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
