"""The linear evaluation inside train.py."""

import math

import pytest
import torch
from conftest import CPU
from torch import nn

from data.loader import TensorLoader
from distillation.labels import linear_recipe
from evaluation.fit import Trainer
from krr_st.config import TrainFlags


def test_the_classifiers_rate_falls_to_zero_by_a_cosine_over_its_iterations():
    recipe = linear_recipe(TrainFlags(test_iteration=40, test_lr=0.2))
    loader = TensorLoader(
        torch.ones(2, 3), torch.tensor([0, 1]), batch_size=2, device=CPU, generator=torch.Generator()
    )
    rates = []
    Trainer(nn.Linear(3, 2), loader, recipe).run(on_step=lambda step, loss, rate: rates.append(rate))
    expected = [0.2 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert (recipe.optimizer, recipe.momentum, recipe.wd) == ("sgd", 0.9, 0)
