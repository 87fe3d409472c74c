"""The published KRR-ST commands as processes: two runs with one seed give equal files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_set

from evaluation.target import Representation
from models import get_model
from utils import checkpoint

ROOT = Path(__file__).resolve().parents[1]
NET = "convnet_4_8_bn"
SHARED = "--source_data_name tiny --img_size 8 --num_test 1 --seed 3 --device cpu"
TEST = f"{SHARED} --test_model {NET} --pre_epoch 3 --synthetic_path results/run"


def start(folder, command):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    script, *flags = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def accuracies(folder):
    lines = (folder / "test_log" / "results.jsonl").read_text().splitlines()
    return [(c["method"], c["accuracy"]) for c in map(json.loads, lines)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    torch.manual_seed(0)
    target = Representation(NET, (3, 8, 8)).backbone.state_dict()

    teacher = get_model(NET, (3, 8, 8), 4).state_dict()
    for folder in folders:
        write_set(folder / "datasets", "tiny")
        checkpoint.save(target, folder / f"teacher_ckpt/barlow_twins_{NET}_tiny.pt")
        checkpoint.save(teacher, folder / "teacher_ckpt/teacher_tiny.pt")
        meta = {"sizes": {"8": {"mean": [0.4] * 3, "std": [0.3] * 3}}}
        (folder / "datasets/tiny/meta.json").write_text(json.dumps(meta))
    return folders


@pytest.mark.slow
def test_the_four_commands_repeat_bit_for_bit(inputs):
    commands = [
        f"train.py --exp_name run --data_name tiny --img_size 8 --seed 3 --device cpu "
        f"--target_model {NET} --train_model {NET} --num_images 6 --num_models 2 "
        "--online_iteration 3 --outer_iteration 5 --outer_batch_size 16 --pre_epoch 2 "
        "--test_iteration 3",
        f"test.py {TEST} --method krr_st --finetune_iteration 5",
        f"test_scratch.py {SHARED} --test_model {NET} --finetune_iteration 5",
        f"test_kd.py {TEST} --method krr_st --target_data_name tiny --teacher_arch {NET} --kd_epoch 3",
    ]
    for folder in inputs:
        for command in commands:
            start(folder, command)
    first, second = inputs
    for name in ("x_syn.pt", "y_syn.pt"):
        one, two = (torch.load(f / "results" / "run" / name) for f in inputs)
        assert torch.equal(one, two)
    assert accuracies(first) == accuracies(second)
    assert [m for m, _ in accuracies(first)] == ["krr_st", "scratch", "krr_st"]
