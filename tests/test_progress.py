"""How far a loop is: the lines, and a speed that leaves out what is not the loop."""

import argparse
import re

import pytest

from utils import progress
from utils.progress import Every, Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_tell_speed_and_time_left_without_pauses(clock, capsys):
    shown = Progress("work", "step", 10, 50, bar=False)
    clock[0] += 2
    assert shown.report(14, "loss 3") == 2  # 4 steps in 2 seconds, of those from 10 on
    with shown.paused():
        clock[0] += 1000
    clock[0] += 1
    with pytest.raises(KeyError), shown.paused():
        clock[0] += 1000
        raise KeyError
    clock[0] += 1
    assert shown.report(22, "loss 2") == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step 14/50: loss 3, 2 steps/s, 18 s left", "step 22/50: loss 2, 4 steps/s, 7 s left"]
    assert shown.report(50, "loss 1") > 1e6  # a clock that stands still divides nothing by zero


def test_a_bar_where_someone_watches(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown = Progress("work", "step", 1, 3)
    shown.advance()
    shown.report(2, "loss 7")
    shown.close()
    captured = capsys.readouterr()
    assert captured.out == ""  # the bar says it all
    assert re.search(r"work.* 2/3 .*loss 7", captured.err)


@pytest.mark.parametrize(
    "text, kept", [("500", "500"), ("1e3", "1000"), ("256.0", "256"), ("300s", "300s"), (7, "7")]
)
def test_steps_and_seconds_between_saves(text, kept):
    assert Every(text) == kept


@pytest.mark.parametrize("text", ["0", "0.5", "-1", "1e400", "nan", "s", "3m", "1e2s", ""])
def test_what_is_neither(text):
    with pytest.raises(argparse.ArgumentTypeError, match="300s"):
        Every(text)
