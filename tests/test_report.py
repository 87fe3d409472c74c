"""Curves, TensorBoard scalars and the HTML page of a run."""

import base64
import json
import re
from pathlib import Path

import pytest
import torch

from utils import report
from utils.run_folder import RunFolder, numbers, read_series


def make_run(path="run", steps=5, **options):
    run = RunFolder(path, {"lr": 0.1, "name": "<b>"}, seed=3, device=torch.device("cpu"), **options)
    run.truncate_log(0)
    for step in range(1, steps + 1):
        run.log(step=step, loss=1.0 / step, lr=0.1, test={"ConvNet": [0.1 * step, 0.3 * step]})
    return run


def test_numbers_of_an_entry():
    entry = {"step": 3, "loss": 0.5, "ok": True, "note": "x", "test": {"A": [0.2, 0.4], "B": 1}}
    assert numbers(entry) == {"loss": 0.5, "test A": pytest.approx(0.3), "test B": 1.0}


def test_series_leave_torn_lines_out(workspace):
    make_run()
    path = Path("run/log.jsonl")
    path.write_text(path.read_text() + '{"step": 6, "lo')
    series = read_series(path)
    assert series["loss"] == ([1, 2, 3, 4, 5], [1.0, 0.5, pytest.approx(1 / 3), 0.25, 0.2])
    assert series["test ConvNet"][1] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_finished_run_has_its_curves_and_a_page(workspace, capsys):
    run = make_run()
    run.finish({"accuracy": 12.345678})
    assert Path("run/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert report.main(["run"]) == 0
    assert capsys.readouterr().out.strip() == "run/report.html"
    page = Path("run/report.html").read_text()
    assert "12.3457" in page and "finished" in page and "&lt;b&gt;" in page and "<b>" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(p) for p in pictures] == [Path("run/curves.png").read_bytes()]
    assert "http" not in page  # nothing is fetched


def test_an_unfinished_run(workspace):
    make_run()
    page = report.report(Path("run")).read_text()
    assert "not finished" in page and "curves.png" in page


def test_no_run(workspace, capsys):
    assert report.main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        report.main([])
    assert capsys.readouterr().err.startswith("error: ")


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_log_and_a_resumed_run_once(workspace):
    make_run(tensorboard=True)
    run = RunFolder("run", {"lr": 0.1, "name": "<b>"}, seed=3, device=torch.device("cpu"), tensorboard=True)
    run.truncate_log(3)
    run.log(step=4, loss=0.9)
    run.finish({})
    found = scalars("run/tensorboard")
    losses = [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, pytest.approx(0.9))]
    assert found["loss"] == losses
    logged = [json.loads(s)["step"] for s in Path("run/log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4]
