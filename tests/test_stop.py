"""SIGTERM and Ctrl-C: the run saves, says how to go on, and does."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import plain, write_set
from test_clom_cli import main as main_command

import train
import train_original_models
from clom.dm import DistributionMatching
from distillation.labels import FeatureLabels
from evaluation.target import Representation
from krr_st import kd_teacher, target
from krr_st.krr_st import KRRST
from utils import checkpoint
from utils.errors import entry_point
from utils.progress import LossWindow
from utils.run_folder import is_claimed
from utils.seed import local_seed
from utils.stop import HANG_UP, Stopped, StopRequest, terminable

NET = "convnet_4_bn"
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, HANG_UP: 128 + HANG_UP}
TINY = "--data_name tiny --img_size 8 --device cpu --seed 4"
DC = "--dataset CIFAR10 --img_size 8 --model ConvNetD1 --device cpu --seed 4"
# Command, its flags (saves are rarer than the run is long), what a step of it is, what it makes.
COMMANDS = {
    "train": (
        train,
        f"{TINY} --target_model {NET} --train_model {NET} --num_images 6 --num_models 2 "
        "--online_iteration 3 --outer_iteration 8 --outer_batch_size 16 --save_every 100 "
        "--eval_every 100 --pre_epoch 1 --test_iteration 1 --exp_name run",
        (KRRST, "step"),
        "results/run/x_syn.pt",
    ),
    "target": (
        target,
        f"{TINY} --target_model {NET} --epochs 4 --batch_size 10 --projector_dim 4 "
        "--save_every 100 --save_dir made",
        (LossWindow, "add"),
        f"made/barlow_twins_{NET}_tiny.pt",
    ),
    "kd_teacher": (
        kd_teacher,
        f"{TINY} --arch {NET} --epochs 4 --batch_size 10 --save_every 100 --save_dir made",
        (LossWindow, "add"),
        "made/teacher_tiny.pt",
    ),
    "main.py": (
        main_command,
        f"{DC} --method DM --ipc 1 --batch_real 2 --num_eval 1 --Iteration 8 "
        "--save_every 100 --epoch_eval_train 1 --save_path run",
        (DistributionMatching, "step"),
        "run/res_DM_CIFAR10_ConvNetD1_1ipc.pt",
    ),
    "originals": (
        train_original_models,
        f"--normalize_data {DC} --num 1 --epochs 4 --batch_size 10 "
        "--save_every 100 --lr_decay_step 2 --resume",
        (LossWindow, "add"),
        "pretrained_model/CIFAR10/original/ConvNetD1/index_0/CIFAR10_ConvNetD1_original_epoch4.pth",
    ),
}


def signal_at(patch, owner, name, number, call=5):
    """Send this process a signal in the given call of a method."""
    real, calls = getattr(owner, name), []

    def method(self, *args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(self, *args)

    patch.setattr(owner, name, method)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Two equal working folders."""
    with local_seed(0):
        state = Representation(NET, (3, 8, 8)).backbone.state_dict()
    for name in ("whole", "stopped"):
        write_set(tmp_path / name / "datasets", "tiny", train=30, test=8)
        write_set(tmp_path / name / "datasets", "cifar10", train=30, test=10, classes=10)
        checkpoint.save(state, tmp_path / name / f"teacher_ckpt/barlow_twins_{NET}_tiny.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "number"),
    [*((name, signal.SIGTERM) for name in COMMANDS), ("train", signal.SIGINT), ("train", HANG_UP)],
)
def test_a_stopped_run_saves_and_goes_on(inputs, monkeypatch, capsys, name, number):
    command, flags, step, made = COMMANDS[name]
    monkeypatch.chdir(inputs / "whole")
    assert command.main(flags.split()) == 0
    monkeypatch.chdir(inputs / "stopped")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, *step, number)
        assert command.main(flags.split()) == CODES[number]
    assert signal.getsignal(number) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert "everything is saved" in line and "the same command resumes" in line
    assert command.main(flags.split()) == 0
    assert "resuming after" in capsys.readouterr().out  # though --save_every was far away
    first, second = (plain(checkpoint.load(inputs / f / made)) for f in ("whole", "stopped"))
    assert first == second


def test_nohup_is_respected():
    before = signal.signal(HANG_UP, signal.SIG_IGN)
    try:
        for block in (terminable(), StopRequest()):
            with block:
                assert signal.getsignal(HANG_UP) is signal.SIG_IGN
                assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(HANG_UP, before)


@pytest.mark.parametrize("call", [1, 2])  # after 4 steps, after the last one
def test_a_linear_evaluation_is_not_waited_for(inputs, monkeypatch, capsys, call):
    """The signal leaves at once; the next start makes the evaluation that is missing."""
    flags = [*COMMANDS["train"][1].split(), "--eval_every", "4"]
    ended = []

    def evaluation(self, *args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(1)
        return linear_evaluation(self, *args)

    calls, linear_evaluation = [], FeatureLabels.evaluate
    monkeypatch.chdir(inputs / "whole")
    assert train.main(flags) == 0
    monkeypatch.chdir(inputs / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureLabels, "evaluate", evaluation)
        assert train.main(flags) == CODES[signal.SIGTERM]
    assert not ended
    line = f"stopped in the evaluation after step {4 * call} of 8 by SIGTERM"
    assert line in capsys.readouterr().err
    assert train.main(flags) == 0
    results = [
        json.loads((inputs / f / "results/run/results.json").read_text()) for f in ("whole", "stopped")
    ]
    whole, stopped = (found["linear_evaluations"] for found in results)
    assert whole == stopped and [e["step"] for e in whole] == [4, 8]
    assert results[0]["loss"] == results[1]["loss"]


def test_nothing_to_evaluate_is_no_reason_to_leave(inputs, monkeypatch):
    """A signal in the last step of a run on unlabelled images: the run is finished."""
    monkeypatch.chdir(inputs / "stopped")
    for path in Path("datasets/tiny").glob("Y_*"):
        path.unlink()
    signal_at(monkeypatch, KRRST, "step", signal.SIGTERM, call=8)
    assert train.main(COMMANDS["train"][1].split()) == 0
    assert json.loads(Path("results/run/results.json").read_text())["steps"] == 8


def test_a_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGINT)  # ignored in a shell's background jobs
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop and stop.number == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)  # only Ctrl-C is pressed twice by someone who waits
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_asked_for_nothing_done():
    with StopRequest() as stop:
        assert not stop
    threads = []
    thread = threading.Thread(target=lambda: threads.append(bool(StopRequest().__enter__())))
    thread.start()
    thread.join()
    assert threads == [False]  # outside the main thread Python allows no handlers


def test_nested_requests_hand_the_signals_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as outer:
        with StopRequest() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner and not outer
        signal.raise_signal(signal.SIGTERM)
        assert outer.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [*CODES, signal.SIGUSR2])
def test_the_line_and_the_code(capsys, number):
    def main(argv=None):
        with StopRequest() as stop:
            signal.raise_signal(number)
            stop.leave("after step 3 of 9")

    assert entry_point(main)([]) == 128 + number
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped after step 3 of 9") and signal.Signals(number).name in line


def test_terminated_where_nothing_can_be_saved():
    """Blocks are left in order, so that claims and temporary files go."""
    left = []
    with pytest.raises(Stopped) as caught, terminable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            left.append(1)
    assert left == [1] and caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stopped_command_gives_its_folder_back(inputs, monkeypatch, capsys):
    command, flags, step, _ = COMMANDS["train"]
    monkeypatch.chdir(inputs / "stopped")
    with monkeypatch.context() as patch:
        signal_at(patch, *step, signal.SIGTERM, call=2)
        assert command.main(flags.split()) == 143
    assert not is_claimed(Path("results/run"))
    assert checkpoint.load("results/run/state.pt")["step"] == 2


PARENT = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from utils.stop import StopRequest, stop_with_parent

def work():
    stop_with_parent()
    with StopRequest() as stop:
        Path("begun").write_text("")
        while not stop:
            time.sleep(0.01)
        Path("saved").write_text(str(stop.number))

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    while not Path("begun").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_saves_when_its_parent_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.run([sys.executable, "parent.py"], cwd=tmp_path, env=environment)
    assert parent.returncode == -signal.SIGKILL
    ends = time.monotonic() + 60
    while not (tmp_path / "saved").exists() and time.monotonic() < ends:
        time.sleep(0.05)
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
