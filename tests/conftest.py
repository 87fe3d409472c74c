"""Small data that the tests make themselves."""

import os
from pathlib import Path

# One thread: the tests' tensors are tiny, and two cores that wait for each other only lose time.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from utils import checkpoint

torch.set_num_threads(1)


def write_set(
    data_dir, name, *, size=8, train=48, test=24, classes=4, channels=3, labelled=True, seed=0
):
    """A prepared set whose classes differ in brightness and in a bright corner."""
    generator = torch.Generator().manual_seed(seed)
    folder = Path(data_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("tr", train), ("te", test)):
        if not count:
            continue
        y = torch.arange(count) % classes
        x = torch.randint(0, 80, (count, channels, size, size), generator=generator)
        x += (y * (160 // classes))[:, None, None, None]
        for i, label in enumerate(y.tolist()):
            x[i, :, label % size, :] = 250
        checkpoint.save(x.to(torch.uint8), folder / f"X_{split}_{size}.pth")
        if labelled:
            checkpoint.save(y, folder / f"Y_{split}_{size}.pth")
    return folder


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty working folder; commands write their relative paths into it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_make_parametrize_id(config, val):
    """Functions by their name: an address would differ between the worker processes."""
    return getattr(val, "__name__", None) if callable(val) else None
