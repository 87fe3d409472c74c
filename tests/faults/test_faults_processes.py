"""One run in two processes, one of which is killed: the other says so, the run resumes to the bit."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fault_commands import ROOT, write_tiny

from utils.distributed import Group
from utils.errors import entry_point

NET = "convnet_4_bn"
FLAGS = (
    f"--data_name tiny --img_size 8 --target_model {NET} --train_model {NET} --num_images 6 --num_models 2 "
    "--online_iteration 20 --outer_iteration 300 --outer_batch_size 16 --pre_epoch 1 --test_iteration 1 "
    "--eval_every 999 --print_every 50 --save_every 20 --seed 4 --device cpu"
)


def launch(name):
    """Both processes as torchrun starts them, but with nobody who ends the other one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *FLAGS.split(), "--exp_name", name],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def finish(processes):
    for process in processes:
        _, error = process.communicate(timeout=100)
        assert process.returncode == 0, error


def synthetic(name):
    return [torch.load(f"results/{name}/{kind}_syn.pt", weights_only=True) for kind in "xy"]


@pytest.mark.slow
def test_one_of_two_processes_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    finish(launch("whole"))
    for killed in (1, 0):
        name = f"killed{killed}"
        processes = launch(name)
        began = time.monotonic()
        while not Path(f"results/{name}/state.prev.pt").exists():
            assert time.monotonic() - began < 60 and processes[0].poll() is None
            time.sleep(0.01)
        processes[killed].kill()
        left = processes[1 - killed]
        _, error = left.communicate(timeout=60)
        lines = [line for line in error.splitlines() if line.startswith("error:")]
        assert left.returncode == 2 and "Traceback" not in error, error
        assert len(lines) == 1 and "another process of this run has ended" in lines[0], error
        processes[killed].communicate()
        assert not Path(f"results/{name}/results.json").exists()
        finish(launch(name))
        for whole, again in zip(synthetic("whole"), synthetic(name), strict=True):
            assert torch.equal(whole, again)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_lost_process_is_said_by_each_that_is_left(monkeypatch, capsys, rank):
    def gone(*args):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234\n\nstack")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(dist, "all_reduce", gone)
    monkeypatch.setattr(dist, "all_gather_object", gone)
    group = Group(int(rank), 2)
    for ask in (lambda: group.average_([torch.ones(2)]), lambda: group.gathered(1)):
        assert entry_point(lambda argv, ask=ask: ask())([]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "another process of this run has ended" in line and "resumes" in line


def test_memory_that_runs_out_while_gradients_are_sent_is_another_matter(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(dist, "all_reduce", full)
    with pytest.raises(torch.OutOfMemoryError):
        Group(0, 2).average_([torch.ones(2)])
