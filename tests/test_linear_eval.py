"""The linear evaluation inside train.py."""

import math

import pytest
import torch
from torch import nn

from evaluation.protocols import train_by_recipe
from krr_st.config import TrainFlags
from krr_st.run import planned_evaluations


def test_the_classifiers_rate_falls_to_zero_by_a_cosine_over_its_iterations():
    flags = TrainFlags(test_iteration=40, test_lr=0.2)
    recipe = planned_evaluations(flags, None, torch.device("cpu")).classifier
    batch, rates = (torch.ones(2, 3), torch.tensor([0, 1])), []
    train_by_recipe(
        nn.Linear(3, 2), iter(lambda: batch, None), recipe, steps=recipe.steps, what="test",
        on_step=lambda step, loss, rate: rates.append(rate),
    )  # fmt: skip
    expected = [0.2 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert (recipe.optimizer, recipe.momentum, recipe.wd) == ("sgd", 0.9, 0)
