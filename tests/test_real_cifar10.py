"""The real CIFAR-10 through the whole path: statistics of the table, loader, one distillation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data.load import load_set
from data.meta import measure_statistics
from data.prepare.check import check_prepared
from data.specs import find_row
from krr_st import baselines, target

ROOT = Path(__file__).resolve().parents[1]
UNPACK = ROOT.parent / "shared" / "data" / "unpack_cifar10.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not UNPACK.exists(), reason=f"no real CIFAR-10: {UNPACK} is not there"),
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar10") / "datasets"
    subprocess.run([sys.executable, str(UNPACK), str(folder)], check=True)
    return folder


def test_statistics_are_the_tables(datasets):
    image_set = load_set("cifar10", 32, datasets)
    assert image_set.train.images.shape == (50000, 3, 32, 32)
    assert image_set.test.labels.bincount().tolist() == [1000] * 10
    measured = measure_statistics(image_set.train.images)
    # The pictures are re-encoded as JPEG: close to the table, not equal.
    assert measured.mean == pytest.approx(image_set.stats.mean, abs=0.003)
    assert measured.std == pytest.approx(image_set.stats.std, abs=0.003)


def test_check_accepts_it(datasets):
    check_prepared(datasets, "cifar10", find_row("cifar10"), 32)


def test_distillation_of_real_pictures_lowers_the_loss(datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = "convnet_16_32_64_bn"
    common = ["--data_dir", str(datasets), "--data_name", "cifar10", "--target_model", net, "--seed", "0"]
    assert target.main([*common, "--epochs", "1", "--projector_dim", "64"]) == 0
    assert baselines.main([*common, "--method", "random_features", "--num_images", "20"]) == 0
    argv = [
        *common,
        "--train_model",
        net,
        "--num_images",
        "20",
        "--num_models",
        "2",
        "--online_iteration",
        "20",
        "--outer_iteration",
        "60",
        "--outer_batch_size",
        "128",
        "--outer_lr",
        "1e-2",
        "--print_every",
        "10",
        "--pre_epoch",
        "20",
        "--test_iteration",
        "50",
    ]
    assert train.main(argv) == 0
    lines = Path("results/cifar10/log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    assert torch.load("results/cifar10/x_syn.pt").shape == (20, 3, 32, 32)
