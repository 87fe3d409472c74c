"""benchmarks/gpu.sh runs whole on a CPU: what fails on a real GPU is no typo."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import write_set

from krr_st.study import LEVERS

ROOT = Path(__file__).resolve().parents[1]


def run_script(tmp_path, part):
    """Its output folder and its log, on a set of ten classes; neither kornia nor xdist need be there."""
    write_set(tmp_path / "data", "cifar10", size=32, train=160, test=40, classes=10)
    for missing in ("kornia", "xdist"):
        (tmp_path / "path" / missing).mkdir(parents=True)
        (tmp_path / "path" / missing / "__init__.py").write_text(f"raise ImportError({missing!r})\n")
    changed = {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "path")}
    command = [ROOT / "benchmarks/gpu.sh", tmp_path / "data", tmp_path / "out", "cpu", part]
    environment = {**os.environ, **changed, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    out = tmp_path / "out"
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"^== \w+ failed|Traceback", log, re.M), log
    return out, log


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_its_sets(tmp_path):
    out, _ = run_script(tmp_path, "sets")
    with tarfile.open(out / "sets.tar.gz") as packed:
        names = packed.getnames()
    assert {f"results/{name}/results.json" for name in ("dc_1", "dm_1", "dm_10")} <= set(names)
    assert any(name.startswith("study/") and name.endswith(".jsonl") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_its_run_alone(tmp_path):
    out, log = run_script(tmp_path, "run")
    assert len(list(out.iterdir())) <= 8 and "resuming after step" in log
    assert len((out / "best.jsonl").read_text().splitlines()) == 2
    assert "probe of best" in (out / "summary.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_script_runs_whole(tmp_path):
    out, log = run_script(tmp_path, "all")
    assert len(list(out.iterdir())) <= 8
    assert {"ceilings", "layers", "solve", "step", "fill"} <= json.loads(
        (out / "parts.json").read_text()
    ).keys()
    found = json.loads((out / "gpu.json").read_text())
    assert {"machine", "krr_st", "clom", "loader", "trajectory", "krr_st run"} == found.keys()
    assert json.loads((out / "results.json").read_text())["steps"] == 6
    assert len((out / "results.jsonl").read_text().splitlines()) == 4
    assert "resuming after step" in log
    rows = (out / "summary.md").read_text()
    assert "TFLOP/s" in rows and "DM iteration" in rows and "probe" in rows


def test_limits_leave_time():
    """The seconds of all steps are less than ten minutes; correctness runs beside the target model."""
    words = [line.split() for line in (ROOT / "benchmarks/gpu.sh").read_text().splitlines()]
    limits = {w[2]: int(w[1]) for w in words if w[:1] == ["step"]}
    limits["stopped"] = next(int(w[1]) for w in words if w[:1] == ["stop_after_a_save"] and w[1].isdigit())
    sets = {name: limits.pop(name) for name in ("dc_1", "dm_1", "dm_10", "strong", "study")}
    assert sets["strong"] + max(sets.values()) <= 600
    tests, timed, best = (
        {n: limits.pop(n) for n in names}
        for names in (("correctness",), ("parts", "timings"), ("best", "probe_of_best"))
    )
    assert tests["correctness"] <= limits["target"] and len(limits) == 6
    for alone in (timed, best):
        assert sum(limits.values()) + sum(alone.values()) <= 600, limits


def test_its_levers_are_those_of_the_study():
    """On a CPU it asks for none."""
    asked = re.findall(r"--levers (\S+)", (ROOT / "benchmarks/gpu.sh").read_text())
    assert set(asked) - {"none"} and set(asked) <= {"none", *LEVERS}


def test_wrong_usage(tmp_path):
    words = [[], ["out"], ["out", "tpu"], ["out", "cpu", "some"]]
    for arguments in ([tmp_path, *more] if more else more for more in words):
        done = subprocess.run([ROOT / "benchmarks/gpu.sh", *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("usage") and not done.stdout
    assert not (tmp_path / "out").exists()
