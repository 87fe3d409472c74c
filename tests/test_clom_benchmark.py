"""DC, DSA, DM and the evaluation against the plain re-statement of the published loops."""

import torch

from benchmarks import clom as benchmark
from clom import layout

CPU = torch.device("cpu")


def test_both_sides_compute_the_same(monkeypatch):
    monkeypatch.setattr(layout, "CPU_PIXELS", 3 * 64)  # batches of 4 real images come in two parts
    image_set = benchmark.random_set(8, 50, 8)
    found = benchmark.differences(image_set, CPU, model="ConvNetW32", batch_real=4)
    assert found["DC"] < 1e-2 and found["DSA"] < 1e-3 and found["DM"] < 1e-3
    assert found["evaluation"] <= 0.021  # one of 50 test images
