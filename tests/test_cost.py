"""What runs are expected to take: time, memory and disk."""

import time
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU
from test_cli import NET, TEST, TRAIN, listing, tiny  # noqa: F401

import test_scratch
import train
import train_original_models
from data.load import load_set
from distillation.one_set import SetSetup
from krr_st import target
from trajectory import experts
from utils.cost import LONG, Forecast, round_down, tensor_bytes


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `time.perf_counter` shows."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def run_steps(forecast, clock, seconds, work=1.0):
    for taken in seconds:
        clock[0] += taken
        forecast.tick(work)


def test_the_forecast_is_the_rate_times_what_is_left(clock, capsys):
    """The first step, slow as always, does not count; the line comes once."""
    forecast = Forecast(100, CPU, disk=lambda: 3_000_000)
    run_steps(forecast, clock, [9.0, 1.0, 1.0])
    assert capsys.readouterr().out == ""
    run_steps(forecast, clock, [1.0] * 50)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("expected: about 96 s, ") and line.endswith("3.0 MB on disk")


def test_other_work_is_left_out_of_the_rate(clock, capsys):
    forecast = Forecast(100, CPU)
    forecast.skip(50)  # of an earlier start
    run_steps(forecast, clock, [1.0, 1.0])
    with forecast.paused(6):
        clock[0] += 1000.0
    run_steps(forecast, clock, [1.0, 1.0])
    assert "about 40 s" in capsys.readouterr().out


def test_bf16_is_no_advice_where_it_is_slower():
    """As on most CPUs, or where it is on already."""
    setup = object.__new__(SetSetup)
    for device, precision, told in (("cpu", "fp32", False), ("cuda", "fp32", True), ("cuda", "bf16", False)):
        setup.device, setup.flags = torch.device(device), SimpleNamespace(precision=precision)
        assert ("--precision bf16" in setup.shorter) is told


def test_a_long_run_is_told_how_to_be_shorter(clock, capsys):
    given = dict(length=("--steps", 20000), shorter="fewer --seeds")
    run_steps(Forecast(20000, CPU, **given), clock, [2.0] * 5)
    advice = capsys.readouterr().out.split("; ")[1].strip()
    assert advice == "to shorten it: --steps 3600 (two hours), fewer --seeds"
    run_steps(Forecast(20000, CPU, fixed=2000, **given), clock, [2.0] * 5)
    assert "--steps 1700 (two hours)" in capsys.readouterr().out  # 3600 steps of time, less the fixed 2000
    run_steps(Forecast(20000, CPU, fixed=5000, **given), clock, [2.0] * 5)
    assert "--steps" not in capsys.readouterr().out
    run_steps(Forecast(LONG / 2, CPU, **given), clock, [2.0] * 5)
    assert "shorten" not in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "steps"), [(0.25, 4), (2.0, 2)])
def test_a_trial_leaves_as_soon_as_it_can(clock, seconds, steps):
    """The first step warms up; one more of a second is enough."""
    forecast, taken = Forecast(40, CPU), []

    def run(count):
        for _ in range(count):
            taken.append(1)
            clock[0] += seconds
            forecast.tick(4.0)

    cost = forecast.trial(lambda: run(1000))
    assert (cost.seconds, cost.work, len(taken)) == (10 * seconds, 40, steps)
    forecast = Forecast(40, CPU)
    assert forecast.trial(lambda: run(1)).seconds == 10 * seconds  # over before anything was known
    assert Forecast(0, CPU).told  # nothing ahead, nothing said


def test_numbers():
    assert [round_down(v) for v in (0.3, 7, 99, 1234, 56789.9)] == [1, 7, 99, 1200, 56000]
    nested = {"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.float64), None, "xy", 3]}
    assert tensor_bytes(nested) == 28


MATCH = "--dataset tiny --data_path datasets --img_size 8 --model ConvNetD1 --device cpu"
TINY = "--data_name tiny --img_size 8 --device cpu"
COMMANDS = {
    "train.py": (train, TRAIN),
    "dc": (train, f"--method dc {MATCH} --ipc 2 --outer_loop 2 --num_eval 1".split()),
    "target": (target, f"{TINY} --target_model {NET}".split()),
    "experts": (experts, f"{TINY} --train_model convnet_4_in".split()),
    "originals": (train_original_models, f"{MATCH} --normalize_data".split()),
    "test_scratch.py": (test_scratch, [*TEST, "--protocol", "finetune"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_cost_is_printed_and_nothing_written(tiny, capsys, name):  # noqa: F811
    command, argv = COMMANDS[name]
    load_set("tiny", 8)  # stores its statistics
    before = listing(tiny)
    assert command.main([*argv, "--dry_run", "--cost"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("expected: about ") and last.count(" on disk") == 1
    assert listing(tiny) == before
