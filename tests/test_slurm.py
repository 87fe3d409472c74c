"""Jobs in workers and on a SLURM cluster: stand-ins for its programs, and a real node that stops jobs."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import write_set
from slurm_node import PARTITION, absent, slurm_node
from submitit.core.submission import process_job

from evaluation import slurm, workers
from evaluation.jobs import Job
from evaluation.measure import CellStore, read_cells
from evaluation.slurm import JobFlags, run_jobs
from krr_st import study
from krr_st import tables as krr_tables
from utils.cli import flag
from utils.errors import UserError
from utils.stop import StopRequest

ROOT = Path(__file__).resolve().parents[1]
LOG = Path("test_log/clom")
TABLE = "--datasets CIFAR10 --ipcs 1 --model ConvNetD1 --methods DM --variants none --num_exp 2 --device cpu"
TINY = "--Iteration 200 --batch_real 2 --num_eval 2 --epoch_eval_train 1 --save_every 20"
NODE = f"--slurm {PARTITION} --slurm_gpus 0 --slurm_cpus 1 --slurm_hours 0.5"


# Stand-ins, with files of the working folder as their memory; each logs its calls.
PROGRAMS = {
    "sbatch": """
        grep -q partition=nowhere "$1" && { echo "sbatch: error: Invalid partition name" >&2; exit 1; }
        echo >> submitted; echo "Submitted batch job $(wc -l < submitted)" """,
    "squeue": "cat queue",
    "sinfo": "echo day; echo night",
    "scontrol": """echo "$@" > requeued""",
    "srun": "",
}


@pytest.fixture
def cluster(workspace, monkeypatch):
    """A cluster that queues jobs but never runs one; returns what sets its queue."""
    folder = workspace / "bin"
    folder.mkdir()
    for name, lines in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)

    def queue(text=""):
        Path("queue").write_text(text)

    queue()
    return queue


@dataclass(frozen=True)
class Flags(JobFlags):
    count: int = flag(3, "jobs")


def work(number):
    if number == 1 and not Path("data").exists():
        raise UserError("no data")
    if number == 2:  # a loop that saves when it is asked to stop
        with StopRequest() as stop:
            if not Path("saved").exists():
                signal.raise_signal(signal.SIGUSR2)
                assert stop
                Path("saved").touch()
                stop.leave("after step 1 of 2")
    CellStore("results.jsonl").add({"number": number})


def jobs(flags):
    def missing():
        done = {cell["number"] for cell in read_cells("results.jsonl")}
        numbers = [n for n in range(flags.count) if n not in done]
        return [Job(f"job {n}", float(n), functools.partial(work, n)) for n in numbers]

    return missing


@pytest.fixture
def on_node(monkeypatch):
    """Runs a submitted job as a node does; returns its exit code."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)}

    def run(job, task):
        names = ("SUBMITIT_EXECUTOR", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
        for name, value in zip(names, ("slurm", job, job, task), strict=True):
            monkeypatch.setenv(name, value)
        try:
            process_job("slurm")
        except SystemExit as ended:
            return ended.code
        return 0

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_workers_run_what_becomes_possible_and_name_what_fails(workspace, monkeypatch, capfd):
    def chain(flags):  # job 0 first, then the others
        missing = jobs(flags)
        return lambda: missing()[:1] if len(missing()) == flags.count else missing()

    monkeypatch.setattr(workers, "PROCESSES", multiprocessing.get_context("fork"))
    Path("saved").touch()
    assert run_jobs(chain, Flags(workers=2), Path()) == ["job 1: no data (workers/job-1.log)"]
    assert {cell["number"] for cell in read_cells("results.jsonl")} == {0, 2}
    said = [line.split(";")[0] for line in capfd.readouterr().out.splitlines()]
    assert said[:2] == ["started: job 0", "done: job 0"]
    assert sorted(said[2:]) == [
        "done: job 2",
        "failed: job 1: no data (workers/job-1.log)",
        "started: job 1",
        "started: job 2",
    ]


def test_workers_are_stopped_with_their_command(workspace, monkeypatch):
    """They save: one waits in a loop until it is asked to stop."""

    def loop():
        with StopRequest() as stop:
            Path("began").touch()
            while not stop:
                time.sleep(0.01)
            Path("saved").touch()
            stop.leave("after step 1 of 2")

    def interrupted(sentinels):
        while not Path("began").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "PROCESSES", multiprocessing.get_context("fork"))
    monkeypatch.setattr(workers, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(lambda flags: lambda: [Job("loop", 0.0, loop)], Flags(workers=2), Path())
    assert Path("saved").exists()
    assert Path("workers/loop.log").read_text().endswith("the same command resumes from there\n")


@pytest.mark.slow
def test_a_table_in_workers(workspace):
    write_set("datasets", "cifar10", size=32, train=30, test=20, classes=10)
    argv = f"{sys.executable} -m clom.tables {TABLE} {TINY} --Iteration 4 --run".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for more in (["--log_dir", "here"], ["--workers", "2"]):
        done = subprocess.run([*argv, *more], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert "started: CIFAR10, 1 ipc: DM, seed 1; log: " in done.stdout
    assert values(LOG) == values(Path("here")) and len(values(LOG)) == 2


def test_jobs_are_submitted_followed_stopped_and_repeated(cluster, on_node, capsys):
    def look():
        capsys.readouterr()
        failed = run_jobs(jobs, Flags(slurm="day", detach=True), Path())
        return failed, capsys.readouterr().out.splitlines()

    failed, lines = look()
    assert failed == [] and lines[:2] == [
        "submitted to day: job 0; job 1; job 2",
        "3 queued, 0 running, 0 done, 0 failed",
    ]
    script = Path("slurm/1_submission.sh").read_text()
    for wanted in ("partition=day", "gpus-per-node=1", "time=1440", "array=0-2%3", "signal=USR2@120"):
        assert f"#SBATCH --{wanted}\n" in script, wanted
    assert on_node("1", "0") == 0
    assert on_node("1", "1") == 2
    assert capsys.readouterr().err.endswith("no data\n")
    assert on_node("1", "2") != 0  # at its time limit: saved, then queued again
    assert Path("requeued").read_text() == "requeue 1_2\n" and Path("saved").exists()
    Path("slurm/1_1_0_log.err").write_text("no data\nsrun: error: node7: task 0: Exited with exit code 2\n")
    Path("slurm/1_2_0_log.out").write_text("step 1/2: loss 3\nsubmitit INFO Exiting\n")
    cluster("1_2 RUNNING None\n")
    failed, lines = look()
    log = Path("slurm").resolve()
    assert failed == [f"job 1: no data ({log}/1_1_0_log.err)"]
    assert lines[:3] == [
        "0 queued, 1 running, 1 done, 1 failed",
        f"running: job 2: step 1/2: loss 3 ({log}/1_2_0_log.out)",
        f"failed: {failed[0]}",
    ]
    Path("data").touch()
    failed, lines = look()  # what failed was shown and is submitted again; what is queued is not
    assert failed == [] and lines[:2] == ["submitted to day: job 1", "1 queued, 1 running, 1 done, 0 failed"]
    cluster("1_2 PENDING BeginTime\n2 PENDING Nodes are DOWN\n")
    assert look()[1][0] == "2 queued (BeginTime, Nodes are DOWN), 0 running, 1 done, 0 failed"
    assert on_node("1", "2") == 0
    record = json.loads(Path("slurm/jobs.json").read_text())
    assert record["job 1"][0] == "2" and record["job 0"][0] is None
    cluster("2 RUNNING None\n")
    assert look()[1][0] == "0 queued, 1 running, 2 done, 0 failed"


def test_waiting_submits_what_becomes_possible(cluster, monkeypatch, capsys):
    """Here the queue runs each job between two looks; job 1 is missing only once job 0 is done."""

    def chain(flags):
        return lambda: jobs(flags)()[:1]

    def run_queued(seconds):
        number = len(read_cells("results.jsonl"))
        CellStore("results.jsonl").add({"number": number})
        cluster(f"{number + 2} PENDING None\n" if number < 2 else "")

    monkeypatch.setattr(slurm.time, "sleep", run_queued)
    cluster("1 PENDING None\n")
    assert run_jobs(chain, Flags(slurm="day"), Path()) == []
    submitted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("submitted")]
    assert submitted == [f"submitted to day: job {n}" for n in range(3)]


def test_a_refusal_leaves_nothing_behind(cluster):
    with pytest.raises(UserError, match=r"^--slurm nowhere: Invalid partition name; there are: day, night$"):
        run_jobs(jobs, Flags(slurm="nowhere"), Path())
    assert not list(Path("slurm").glob("[!.]*"))


def test_what_is_needed_is_named(cluster, monkeypatch, capsys):
    with monkeypatch.context() as torchrun:
        torchrun.setenv("RANK", "0")
        torchrun.setenv("WORLD_SIZE", "2")
        assert krr_tables.main(["--run"]) == 2
    said = "error: python -m krr_st.tables runs in one process; start it without torchrun\n"
    assert capsys.readouterr().err == said
    assert krr_tables.main(["--detach"]) == 2
    assert capsys.readouterr().err == "error: --detach needs --slurm PARTITION\n"
    argv = ["--table", "1", "--slurm", "day"]
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert krr_tables.main(argv) == 2
    said = "error: --slurm needs a package: pip install submitit (the extra slurm)\n"
    assert capsys.readouterr().err == said
    monkeypatch.setenv("PATH", "/nowhere")
    assert krr_tables.main(argv) == 2
    assert capsys.readouterr().err.startswith("error: --slurm day: there is no sbatch on the PATH; ")


def test_a_study_submits_its_target_model_first(cluster, capsys):
    write_set("datasets", "tiny")
    argv = ["--data_name=tiny", "--img_size=8", "--network=convnet_4_bn", "--slurm=day", "--detach"]
    assert study.main(argv) == 2  # of sets that the images cannot give nothing is submitted
    assert "--num_images 100 is more than the 48 images" in capsys.readouterr().err
    argv += ["--num_images=4", "--shots=1"]
    assert study.main(argv) == 0
    out = capsys.readouterr().out
    assert "submitted to day: tiny: target model\n" in out and "jobs left: 1; " in out


def values(log_dir):
    """Seed -> what a table measured."""
    found = read_cells(log_dir / "results.jsonl")
    return {cell["seed"]: (cell["accuracies"], cell["start_accuracies"]) for cell in found}


@pytest.mark.slow
@pytest.mark.skipif(bool(absent()), reason=f"slurm-wlm and munge: not installed: {', '.join(absent())}")
def test_a_table_on_a_real_node(tmp_path, workspace):
    """A preempted job and one at its time limit save, wait, resume; the values are those of a run here."""
    write_set("datasets", "cifar10", size=32, train=30, test=20, classes=10)
    with slurm_node(tmp_path / "node") as variables:
        environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}

        def run(*command):
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

        def table(*flags):
            command = f"{sys.executable} -m clom.tables {TABLE} {TINY} {' '.join(flags)}"
            return run(*command.split())

        refused = table(NODE, "--slurm nowhere")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert f"Invalid partition name specified; there are: {PARTITION}" in refused.stderr
        assert not list((LOG / "slurm").glob("[!.]*"))

        submitted = table(NODE, "--detach")
        assert submitted.returncode == 0, submitted.stderr
        assert "2 queued, 0 running, 0 done, 0 failed" in submitted.stdout
        (array,) = {path.name.split("_")[0] for path in (LOG / "slurm").glob("*_submitted.pkl")}
        stops = ["scontrol", "requeue"], ["scancel", "--signal=USR2"]
        for seed, stop in enumerate(stops):
            while not list(LOG.glob(f"runs/*seed{seed}*/state.pt")):
                time.sleep(0.2)
            assert run(*stop, f"{array}_{seed}").returncode == 0

        looked = table(NODE, "--detach")
        assert "submitted" not in looked.stdout and "0 done, 0 failed" in looked.stdout
        waited = table(NODE)
        assert waited.returncode == 0 and "0 queued, 0 running, 2 done, 0 failed" in waited.stdout, waited
        for seed in range(2):
            log = (LOG / f"slurm/{array}_{seed}_0_log.out").read_text()
            assert log.count("resuming after iteration") == 1, log
    assert table("--log_dir here", "--run").returncode == 0
    assert values(LOG) == values(Path("here")) and len(values(LOG)) == 2
