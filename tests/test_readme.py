"""Every command that the README and the guide print, run as printed with flags that make it small."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_set
from PIL import Image

from data.specs import Stats
from data.synthetic import SyntheticSet, save_compact
from data.synthetic.views import ViewFlags
from utils import checkpoint

ROOT = Path(__file__).resolve().parents[1]
TEXT = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/guide.md"))
START = ("python ", "make ", "torchrun ", ". .venv")

# What a placeholder stands for, by the module or script that is called.
PLACES = {
    "data.prepare": {"PATH": "pictures"},
    "distillation": {"PATH": "pictures"},
    "validate.py": {"PATH": "condensed"},
    "data.synthetic": {"PATH": "results/run"},
    "train.py": {"NAME": "run"},
    "utils.report": {"NAME": "run"},
}
TINY = "--device cpu"
PRE = f"{TINY} --num_test 1 --finetune_iteration 2"
SET = f"{TINY} --num_images 10 --outer_iteration 2 --pre_iteration 2"
STUDENT = "--num_experts 1 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2"
SMALLER = {
    "data.prepare": "",
    "data.synthetic": "",
    "utils.report": "",
    "krr_st.tables": "",
    "clom.tables": "",
    "distillation": f"{TINY} --num_images 10 --minutes 0.2",
    "krr_st.target": f"{TINY} --epochs 1 --batch_size 16",
    "krr_st.baselines": f"{TINY} --num_images 10",
    "trajectory.experts": f"{TINY} --num_experts 1 --train_epochs 1 --batch_train 8 "
    "--train_model convnet_4_in",
    "krr_st.kd_teacher": f"{TINY} --epochs 1",
    "train.py": f"{TINY} --num_images 10 --num_models 1 --outer_iteration 2 --outer_batch_size 8 "
    "--online_iteration 2 --pre_epoch 2 --test_iteration 2",
    "train.py best": f"{TINY} --num_images 10 --num_models 1 --outer_iteration 2 --outer_batch_size 8 "
    "--online_iteration 2 --view_batch 8 --pre_iteration 2 --test_iteration 2",
    "train.py frepo": f"{SET} --num_models 1 --outer_batch_size 8",
    "train.py kip": f"{SET} --num_models 1 --num_batches 1 --outer_batch_size 8 --no-zca --lr_transform 0",
    "train.py mtt": f"{SET} {STUDENT}",
    "train.py mkdt": f"{TINY} --num_images 10 --outer_iteration 2 {STUDENT} --pre_epoch 2 --test_iteration 2",
    **dict.fromkeys(
        ("train.py dc", "train.py dsa", "train.py dm"),
        f"{TINY} --outer_iteration 2 --batch_real 4 --num_eval 1 --epoch_eval_train 2 --outer_loop 2 "
        "--inner_loop 1",
    ),
    "evaluation.export": f"{TINY} --pre_epoch 2",
    "test_scratch.py": PRE,
    "test.py": f"{PRE} --pre_epoch 2",
    "test_kd.py": f"{TINY} --num_test 1 --pre_epoch 2 --kd_epoch 2",
    "train_original_models.py": f"{TINY} --num 1 --epochs 2",
    "methods/DC_DSA_DM/main.py": f"{TINY} --Iteration 2 --batch_real 4 --num_exp 1 --num_eval 1 "
    "--epoch_eval_train 2 --CLoM_batch_size 16 --epoch 2 --outer_loop 2 --inner_loop 1 "
    "--save_path condensed",
    "validate.py": f"{TINY} --epochs 2",
}
# What is not run here, and why.
ELSEWHERE = {
    "make ": "targets of the Makefile: CI and people run them",
    "torchrun ": "several processes: test_views.py and test_faults_processes.py",
    "--slurm": "needs a cluster: test_slurm.py",
    ". .venv": "this interpreter is used",
    "--download": "needs the network",
    "--raw PATH": "raw folders are drawn in test_raw_folder.py",
    "--check cifar10": "the check of a set written by data.prepare: test_prepare.py",
}
TARGETS = ("cifar10", "aircraft", "cars", "cub2011", "dogs", "flowers")


def commands():
    """The commands in their order: lines of code blocks, cells of tables, prose."""
    found = []
    for block, inline in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", TEXT, re.DOTALL):
        lines = [line.split("  #")[0].strip() for line in (block or inline).splitlines()]
        found += [line for line in lines if line.startswith(START)]
    return list(dict.fromkeys(found))


RUNS = ["train.py", "--method"], ["train.py", "--recipe"]


def program(command):
    """`krr_st.target` of `python -m krr_st.target`, `train.py dm` of `train.py --method dm` or --recipe."""
    words = command.split()
    name = words[2] if words[1] == "-m" else words[1]
    return f"{name} {words[3]}" if words[1:3] in RUNS else name


def is_elsewhere(command):
    return any(part in command for part in ELSEWHERE)


def test_every_command_is_known():
    found = commands()
    assert len(found) > 20
    for part in ELSEWHERE:
        assert any(part in command for command in found), f"{part} is not there any more"
    for command in found:
        assert is_elsewhere(command) or program(command) in SMALLER, command
    run = {program(command) for command in found if not is_elsewhere(command)}
    assert run == set(SMALLER)


def anchors(page):
    """Of a page's headings, as they are linked to: small letters and hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_picture_and_link_is_there():
    links = 0
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" not in link:
                path, _, anchor = link.partition("#")
                there = page.parent / path if path else page
                assert there.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(there), f"{page.name}: {link}"
                links += 1
    assert links > 30


def test_a_set_is_read_in_your_own_code_as_the_guide_says(workspace):
    stats = Stats((0.5,) * 3, (0.25,) * 3)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    views = ViewFlags(3, True).draw(4, 8, True, seed=0)
    whole = SyntheticSet(views.images(x, stats), torch.randn(12, 5), stats, views=views)
    save_compact(whole, Path("results/mine/set.safetensors"))
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "SyntheticSet" in b]
    exec(block, names := {})
    torch.testing.assert_close(names["images"], whole.images)
    assert torch.equal(names["targets"], whole.targets)
    wanted = (names["images"] * 0.25 + 0.5).clamp(0, 1)
    torch.testing.assert_close(names["pixels"], wanted)
    torch.testing.assert_close(names["found"].plain().images, x)


@pytest.mark.slow
def test_every_command_works(workspace):
    for name in ("cifar100", *TARGETS):
        write_set("datasets", name, size=32, classes=10, train=40, test=20)
    for name in ("cifar10", "tinyimagenet"):
        write_set("datasets", name, size=64, classes=10, train=40, test=20)
    draw = np.random.default_rng(0)
    for i in range(40):
        folder = Path("pictures", "cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    # The command that would make it is one of Tiny-ImageNet's size.
    made = Path("synthetic_data/tinyimagenet/krr_st")
    checkpoint.save(torch.randn(4, 3, 64, 64), made / "x_syn.pt")
    checkpoint.save(torch.randn(4, 8), made / "y_syn.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    order = sorted(commands(), key=lambda c: program(c) == "test_kd.py")  # its teacher comes first
    for command in order:
        if is_elsewhere(command):
            continue
        name = program(command)
        line = command.replace("[--run]", "")
        for placeholder, value in PLACES.get(name, {}).items():
            line = line.replace(placeholder, value)
        words = shlex.split(f"{line} {SMALLER[name]}")[1:]
        if words[0] != "-m":
            words[0] = str(ROOT / words[0])
        done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        if name == "train.py" and "cifar100" in command:  # test.py reads the published place
            shutil.copytree("results/run", "synthetic_data/cifar100/krr_st")
