"""A folder of pictures and some minutes in; a set, a judgement and a report out."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krr_st.config import RECIPES, BaselineFlags
from methods.folder import RECIPE, FolderFlags, FolderRun, Plan, largest, main
from utils.cli import parse
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def draw(folder, count, classes=("cat", "dog"), side=12):
    """Pictures whose classes differ in colour."""
    generator = np.random.default_rng(0)
    for i in range(count):
        label = i % len(classes)
        pixels = generator.integers(0, 120, (side, side, 3), dtype=np.uint8)
        pixels[..., label] += 100
        place = Path(folder, classes[label])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i:03}.png")


def broken(folder):
    draw(folder, 40)
    Path(folder, "cat", "bad.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "not a folder"),
        (lambda folder: folder.mkdir(), "holds no pictures"),
        (lambda folder: draw(folder, 1), "holds 1 pictures"),
        (lambda folder: draw(folder, 10), "20% are kept for judging"),
        (broken, "--skip_broken"),
    ],
    ids=["missing", "empty", "one", "few", "broken"],
)
def test_a_folder_that_does_not_serve_is_one_line(workspace, capsys, make, said):
    make(Path("mine"))
    assert main(["mine", "--num_images", "10", "--img_size", "8", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
    assert not list(Path(".").rglob("*.pt*"))
    with pytest.raises(SystemExit):  # views are blended with another image
        main(["mine", "--num_images", "1"])
    assert "--num_images: must be at least 2" in capsys.readouterr().err


def test_results_do_not_go_among_the_pictures(workspace, capsys):
    draw("mine", 40)
    argv = ["mine", "--num_images", "10", "--img_size", "8", "--device", "cpu"]
    before = sorted(Path("mine").rglob("*"))
    assert main([*argv, "--out", "mine/out"]) == 2
    assert "--out mine/out lies inside the folder of pictures" in capsys.readouterr().err
    assert sorted(Path("mine").rglob("*")) == before


def test_the_largest_number_that_fits():
    for limit in (0, 1, 7, 99, 100, 200):
        naive = max([n for n in range(1, 101) if n <= limit], default=1)
        assert largest(lambda n, limit=limit: n <= limit, 100) == naive


def test_random_pictures_are_trained_on_as_the_distilled_ones_are(workspace):
    """Views, their blends, mixup and the scale of the targets are those of the recipe, whatever it says."""
    draw("mine", 60)
    run = FolderRun(Path("mine"), FolderFlags(num_images=6, img_size=8, device="cpu"))
    run.plan.chosen["networks"] = {"target": "convnet_4_bn", "network": "convnet_4_bn"}
    command, labels = run.draw()
    flags = parse(BaselineFlags, shlex.split(command)[2:], prog="", description="")
    wanted = RECIPES[RECIPE]
    assert flags.target_scale == wanted.get("target_scale", "none")
    assert flags.mixup is bool(wanted.get("pool_mixup"))
    assert (flags.views, flags.blend) == (wanted.get("views", 1), wanted.get("blend", False))
    assert flags.hybrid == wanted.get("hybrid")
    assert "--views" not in labels and "--method" not in labels  # random is the default


def test_the_present_folder_is_a_place_for_everything(workspace):
    """`--out .`: the set is made where it is looked for."""
    draw("mine", 60)
    run = FolderRun(Path("mine"), FolderFlags(num_images=6, img_size=8, device="cpu", out=Path(".")))
    run.plan.chosen["networks"] = {"target": "convnet_4_bn", "network": "convnet_4_bn"}
    flags = run.train_flags(5, "fp32", 10)
    assert (flags.save_dir / flags.exp_name).resolve() == workspace.resolve() == run.out


def test_a_plan_is_kept_and_belongs_to_what_was_asked(tmp_path):
    plan = Plan(tmp_path / "plan.json", {"minutes": 2.0})
    assert plan.choose("target", lambda: {"epochs": 3}) == {"epochs": 3}
    plan.done.append("prepare")
    plan._before = 30.0
    plan.save()
    again = Plan(tmp_path / "plan.json", {"minutes": 2.0})
    assert again.choose("target", lambda: {"epochs": 7}) == {"epochs": 3} and again.done == ["prepare"]
    assert again.spent >= 30.0
    with pytest.raises(UserError, match=r"begun with --minutes 2\.0, not 3\.0"):
        Plan(tmp_path / "plan.json", {"minutes": 3.0})
    unused = Plan(tmp_path / "unused.json", {"minutes": 2.0})
    unused.save()  # nothing was chosen or made for what was asked
    assert Plan(tmp_path / "unused.json", {"minutes": 3.0}).chosen == {}
    (tmp_path / "plan.json").write_text('{"seconds": "soon"}')
    with pytest.raises(UserError, match="damaged"):
        Plan(tmp_path / "plan.json", {"minutes": 2.0})


ARGV = ["mine", "--num_images", "6", "--img_size", "8", "--device", "cpu", "--minutes", "0.2"]


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_with_the_set_of_its_plan(workspace, capsys):
    """The commands that were chosen, run again from nothing, give the same set to the last bit."""
    draw("mine", 60)
    command = [sys.executable, "-m", "distillation", *ARGV]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first, log = subprocess.Popen(command, env=env, **pipes), Path("results/mine/log.jsonl")
    while not (log.exists() and '"loss"' in log.read_text()) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert "resumes from there" in first.communicate()[0] and first.returncode == 143
    assert main(ARGV) == 0
    shown = capsys.readouterr().out
    assert "resuming after step" in shown and "10 labels per class" in shown
    page = Path("results/mine/report.html").read_text()
    assert "no pre-training" in page and "6 images distilled by KRR_ST" in page
    found = torch.load("results/mine/x_syn.pt", weights_only=True)

    plan = json.loads(Path("results/mine/plan.json").read_text())
    shutil.rmtree("results")
    Path("results/mine").mkdir(parents=True)
    Path("results/mine/plan.json").write_text(json.dumps({**plan, "done": []}))
    assert main(ARGV) == 0
    assert torch.equal(torch.load("results/mine/x_syn.pt", weights_only=True), found)
    capsys.readouterr()
    assert main([*ARGV, "--seed", "1"]) == 2
    assert "begun with --seed 0, not 1" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_without_classes_are_judged_by_the_error_alone(workspace, capsys):
    draw("mine", 60)
    assert main([*ARGV, "--unlabelled"]) == 0
    shown = capsys.readouterr().out
    assert "| pre-training " in shown and "error of target features" in shown
    assert "labels per class" not in shown and "class labels |" not in shown


def test_a_run_that_is_there_already_is_left_alone(workspace):
    draw("mine", 60)
    Path("results/mine").mkdir(parents=True)
    Path("results/mine/config.json").write_text("{}")
    with pytest.raises(UserError, match="results/mine holds another run"):
        FolderRun(Path("mine"), FolderFlags(num_images=6, img_size=8, device="cpu"))
    assert [p.name for p in Path("results/mine").iterdir()] == ["config.json"]
    with pytest.raises((UserError, ValueError), match="unknown model 'resnet19'"):
        FolderRun(Path("mine"), FolderFlags(num_images=6, img_size=8, device="cpu", target="resnet19"))
