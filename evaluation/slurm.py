"""Missing jobs on a SLURM cluster: one array, through submitit, of the jobs that also run here.

A job that the scheduler stops saves first. At its time limit it asks to be queued again, after a
preemption the scheduler does; either way it resumes from its last save, as the same command would.
"""

import contextlib
import functools
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from evaluation.jobs import Job, last_line, run_missing
from evaluation.measure import CellStore
from evaluation.workers import run_in_workers
from utils import checkpoint, cli
from utils.cli import how
from utils.errors import UserError
from utils.stop import TIME_LIMIT, Stopped, terminable


@dataclass(frozen=True)
class JobFlags:
    """Where the missing jobs of a command run.

    Account, QoS and what else a cluster wants are read by sbatch itself from its SBATCH_* variables.
    """

    workers: int = how(
        1,
        "missing jobs that run at the same time, each in a process and, of several GPUs, on one of its own",
        minimum=1,
    )
    slurm: str | None = how(None, "run what is missing on a SLURM cluster, as one array on this partition")
    slurm_gpus: int = how(1, "GPUs of each job, which computes on the first", minimum=0)
    slurm_cpus: int = how(4, "CPU cores of each job", minimum=1)
    slurm_hours: float = how(
        24.0, "time limit of each job in hours; one that reaches it is queued again and goes on", minimum=0.1
    )
    slurm_array: int = how(64, "jobs that run at the same time, at most", minimum=1)
    detach: bool = how(False, "with --slurm: submit and come back; called again, show how far the jobs are")


# Of a command: its flags -> what gives the jobs that are missing at the time.
Jobs = Callable[[Any], Callable[[], list[Job]]]
_SAVE_SECONDS = 120  # between the signal and the time limit
_REQUEUES = 50  # at a time limit; against a job that never gets any further
_RUNS = "runs"
_LONGEST_PAUSE = 30.0  # seconds between two looks at the queue


def run_jobs(jobs: Jobs, flags: JobFlags, folder: Path) -> list[str]:
    """Run the missing jobs of a command with these flags: here, in workers, or on the cluster they name.

    `jobs` is a function of a module, so that another process finds it. What workers and the
    cluster write goes to `folder`. Returns what could not be run, one line each.

    Raises:
        UserError: flags that do not fit, no cluster here, or it refuses the jobs.
    """
    if flags.slurm is None:
        if flags.detach:
            raise UserError("--detach needs --slurm PARTITION")
        if flags.workers == 1:
            return run_missing(jobs(flags))
        call = _calls(jobs, flags)
        named = getattr(flags, "gpu_id", 0), getattr(flags, "device", None)
        spread = named in ((0, None), (0, "cuda"))  # a GPU that is named is everyone's
        return run_in_workers(jobs(flags), call, flags.workers, folder / "workers", spread=spread)
    return Cluster(jobs, flags, folder).run()


def _importable(thing: Any) -> Any:
    """A function or class of the module that `python -m` runs, as other processes import it."""
    main = sys.modules["__main__"]
    if thing.__module__ != "__main__" or main.__spec__ is None:
        return thing
    return getattr(importlib.import_module(main.__spec__.name), thing.__qualname__)


def _submitit() -> ModuleType:
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs a package: pip install submitit (the extra slurm)") from None
    return submitit


@dataclass(frozen=True)
class ClusterJob:
    """What a node or worker runs: the job of this name, where it is still missing."""

    jobs: Jobs
    flags: JobFlags
    name: str

    def __call__(self) -> None:
        """Run it; a job that could not be run, or was stopped, exits with a code other than 0.

        At the time limit submitit's handler of the signal takes over once everything is saved: it
        calls `checkpoint`, queues the job again and exits.
        """
        queue_again = signal.getsignal(TIME_LIMIT)
        try:
            with terminable():
                missing = self.jobs(self.flags)

                def mine() -> list[Job]:
                    return [job for job in missing() if job.name == self.name]

                skipped = run_missing(mine)
                if not skipped and mine():
                    skipped = [f"{self.name}: ended without a result"]
        except UserError as error:
            skipped = [f"{self.name}: {error}"]
        except Stopped as stopped:
            print(stopped, file=sys.stderr, flush=True)
            if stopped.number == TIME_LIMIT and callable(queue_again):
                queue_again(TIME_LIMIT, None)
            sys.exit(stopped.exit_code)
        if skipped:
            print(skipped[0].removeprefix(f"{self.name}: "), file=sys.stderr)
            sys.exit(2)

    def checkpoint(self) -> Any:
        """What runs when the job starts again: the same, which resumes."""
        return _submitit().helpers.DelayedSubmission(self)


def _calls(jobs: Jobs, flags: JobFlags) -> Callable[[str], ClusterJob]:
    """What other processes run, by the job's name."""
    values = {f.name: getattr(flags, f.name) for f in fields(flags)}
    return functools.partial(ClusterJob, _importable(jobs), _importable(type(flags))(**values))


class Cluster:
    """The jobs of one command in the queue of a SLURM cluster.

    {folder}/slurm holds the logs, and jobs.json what was submitted: the job's name -> its id in the
    queue (None: it was seen to be done) and whose flags it was for. Commands share both.
    """

    def __init__(self, jobs: Jobs, flags: JobFlags, folder: Path) -> None:
        self.flags, self.folder = flags, (folder / "slurm").resolve()
        self.owner = CellStore.identity(cli.identity(flags))
        self._missing, self._call = jobs(flags), _calls(jobs, flags)
        for program in ("sbatch", "squeue", "srun"):
            if shutil.which(program) is None:
                where = "give the command on a machine of the cluster that submits jobs"
                raise UserError(f"--slurm {flags.slurm}: there is no {program} on the PATH; {where}")
        _submitit()
        self.failed: dict[str, str] = {}  # name -> the last line of its log

    def run(self) -> list[str]:
        """Submit what is missing and wait, or come back; returns what failed, one line each.

        What a job was waiting for is submitted when it can run. A job that failed is named, and
        submitted again by the next command.
        """
        before, pause, shown = None, 1.0, ""
        while True:
            if (states := self.states(patient=before is not None)) != before:
                text, busy = self.step(patient=before is not None)
                if text != shown:
                    print(text, flush=True)
                if busy and before is None and not self.flags.detach:
                    print("Ctrl-C leaves them in the queue; the same command waits again", flush=True)
                before, pause, shown = states, 1.0, text
            if self.flags.detach or not busy:
                break
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        if busy:
            print("the same command shows how far they are; without --detach it waits for them")
        return [f"{name}: {line}" for name, line in self.failed.items()]

    def step(self, patient: bool) -> tuple[str, bool]:
        """Submit what is missing and not in the queue.

        Returns how far the jobs are, in words, and whether any is in the queue.
        """
        with self._record() as record:
            states = self.states(patient)  # before the results: what ends in between is done
            lacking = self._lacking()
            mine = {name for name, (_, owner) in record.items() if owner == self.owner}
            queued = {n: record[n][0] for n in lacking if n in record and record[n][0] in states}
            ended = [n for n in mine if record[n][0] is not None and record[n][0] not in states]
            if not lacking.keys().isdisjoint(ended):
                time.sleep(2)  # a network file system may show their results late
                lacking = self._lacking()
            for name in ended:
                if name in lacking:
                    logs, otherwise = self._logs(record.pop(name)[0]), "was it cancelled in the queue?"
                    self.failed[name] = last_line(*logs, otherwise=f"it wrote no log: {otherwise}")
                else:
                    record[name] = [None, self.owner]
            new = [n for n in lacking if n not in queued and n not in self.failed]
            record |= {n: [i, self.owner] for n, i in zip(new, self.submit(new), strict=True)}
            done = sum(record[n][0] is None for n in mine if n in record)
        running = {n: i for n, i in queued.items() if states[i] == _RUNS}
        waiting = len(queued) - len(running) + len(new)
        reasons = ", ".join(sorted({states[i] for i in queued.values()} - {_RUNS, "None"}))
        text = f"{waiting} queued{f' ({reasons})' * bool(reasons)}, {len(running)} running, {done} done"
        lines = [f"{text}, {len(self.failed)} failed"]
        if self.flags.detach:
            lines += [f"running: {name}: {last_line(self._logs(i)[1])}" for name, i in running.items()]
        lines += [f"failed: {name}: {line}" for name, line in self.failed.items()]
        return "\n".join(lines), bool(queued or new)

    def _lacking(self) -> dict[str, Job]:
        """Name -> missing job, cheapest first."""
        return {job.name: job for job in sorted(self._missing(), key=lambda job: job.cost)}

    def _logs(self, job: str) -> list[Path]:
        """Errors, and the other output."""
        return [self.folder / f"{job}_0_log.{kind}" for kind in ("err", "out")]

    @contextlib.contextmanager
    def _record(self) -> Iterator[dict[str, list]]:
        """What was submitted, for this process alone; written at the end, whatever happens."""
        path = self.folder / "jobs.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".jobs.lock")):
            text = path.read_text() if path.exists() else "{}"
            try:
                before, record = json.loads(text), json.loads(text)
            except ValueError:
                raise UserError(f"{path} is damaged; delete it once none of its jobs is queued") from None
            try:
                yield record
            finally:
                if record != before:
                    checkpoint.write_text(path, json.dumps(record, indent=2) + "\n")

    def states(self, patient: bool) -> dict[str, str]:
        """Of each job of this user that is in the queue, by its id: why it waits, or that it runs.

        Raises:
            UserError: the scheduler does not answer; with `patient` it is asked again instead.
        """
        asked = ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i %T %r"]
        while True:
            found = subprocess.run(asked, capture_output=True, text=True)
            if found.returncode == 0:
                jobs = [line.split(None, 2) for line in found.stdout.splitlines()]
                return {job: reason if state == "PENDING" else _RUNS for job, state, reason in jobs}
            why = f"squeue: {_reason(found.stderr)}"
            if not patient:
                raise UserError(f"--slurm {self.flags.slurm}: {why}")
            print(f"{why}; asking again", file=sys.stderr, flush=True)
            time.sleep(_LONGEST_PAUSE)

    def submit(self, names: Sequence[str]) -> list[str]:
        """Queue the jobs of these names as one array; returns their ids.

        Raises:
            UserError: sbatch refuses them, in its own words.
        """
        if not names:
            return []
        flags, submitit = self.flags, _submitit()
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=_REQUEUES)
        executor.update_parameters(
            job_name=self._call(names[0]).jobs.__module__,
            partition=flags.slurm,
            gpus_per_node=flags.slurm_gpus or None,
            cpus_per_task=flags.slurm_cpus,
            srun_args=[f"--cpus-per-task={flags.slurm_cpus}"],  # not sbatch's, since SLURM 22.05
            time=math.ceil(60 * flags.slurm_hours),
            signal_delay_s=_SAVE_SECONDS,
            array_parallelism=flags.slurm_array,
        )
        there = set(self.folder.iterdir())
        try:
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # its error has the text
                jobs = [executor.submit(self._call(name)) for name in names]
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedSubmissionError) as error:
            for path in set(self.folder.iterdir()) - there:
                path.unlink()
            raise UserError(f"--slurm {flags.slurm}: {_reason(str(error))}") from None
        print(f"submitted to {flags.slurm}: {'; '.join(names)}", flush=True)
        return [job.job_id for job in jobs]


def _reason(errors: str) -> str:
    """The last line that a program of SLURM wrote, and what helps against it, where that is known."""
    *_, line = errors.strip().splitlines() or ["no answer"]
    line = re.sub(r"^\w+: error: ", "", line)
    if "partition" in line.lower():
        found = subprocess.run(["sinfo", "--noheader", "--format", "%R"], capture_output=True, text=True)
        return f"{line}; there are: {', '.join(found.stdout.split())}"
    return f"{line}; for jobs without a GPU: --slurm_gpus 0" if "generic resource" in line else line
