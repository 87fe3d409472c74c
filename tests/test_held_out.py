"""The loss under fixed networks: its value, that it disturbs nothing, what a run keeps of it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import CPU, NET, SHAPE, make_target
from test_distill import make_distiller, run, same, tiny

from data.load import load_set
from distillation.problem import Problem
from krr_st.config import TrainFlags
from krr_st.held_out import HeldOutLoss
from krr_st.krr_st import HeldOutLoss as used_by_runs
from models import get_model
from utils.seed import draw_seed, local_seed, make_generator

assert tiny  # a fixture, used by name


def make(image_set, pool, x, y):
    problem = Problem(image_set, CPU, 9, target=make_target())
    return HeldOutLoss(problem, TrainFlags(ridge=1e-3, outer_iteration=40), pool, x, y)


def by_hand(image_set, images, x, y, new_x, new_y, ages):
    """The same networks by a plain loop, the regression by its formula in float64."""
    generator = make_generator(9, "held-out loss")
    index = torch.randperm(len(images), generator=generator)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image_set.stats.mean, image_set.stats.std))
    real = (images[index].float() / 255 - mean) / std
    with local_seed(draw_seed(generator)):
        net, losses = get_model(NET, SHAPE, 4), []
    update = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for age in range(ages[-1] + 1):
        if age in ages:
            net.eval()
            with torch.no_grad():
                f_r, f_s = (
                    torch.cat([net.embed(v), torch.ones(len(v), 1)], 1).double() for v in (real, new_x)
                )
                kernel = f_s @ f_s.T
                kernel += 1e-3 * kernel.trace() * torch.eye(len(f_s), dtype=torch.float64)
                predicted = f_r @ f_s.T @ torch.linalg.inv(kernel) @ new_y.double()
                losses.append(float((predicted - make_target()(real).double()).pow(2).mean()))
            net.train()
        update.zero_grad()
        (net(x) - y).pow(2).mean().backward()
        update.step()
    return losses


@pytest.mark.parametrize("split", ["test", "train"])
def test_its_value(tiny, split):
    image_set = load_set("tiny", 8, "datasets")
    if split == "train":
        image_set = dataclasses.replace(image_set, test=None)
    distiller = make_distiller(online_iteration=8)
    x, y = distiller.x_syn.detach().clone(), distiller.y_syn.detach().clone()
    before = distiller.pool.generator.get_state()
    measured = make(image_set, distiller.pool, x, y)
    assert torch.equal(distiller.pool.generator.get_state(), before)
    assert measured.ages == [0, 2, 4, 8]
    words = {"test": "8 held-out images", "train": "30 training images"}[split]
    assert str(measured) == f"{words}, fixed networks of ages 0, 2, 4, 8"
    new_x, new_y = x + 0.1 * torch.randn(x.shape), y - 0.1
    images = getattr(image_set, split).images
    for arguments in ((x, y), (new_x, new_y)):  # the networks have stayed those of the initial set
        expected = by_hand(image_set, images, x, y, *arguments, measured.ages)
        assert measured(*arguments) == pytest.approx(expected, rel=1e-3)


def entries(name):
    lines = Path(f"results/{name}/log.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if "held_out_loss" in e]


@pytest.mark.usefixtures("figures")
def test_a_run_logs_it_and_is_not_disturbed(tiny, monkeypatch, capsys):
    assert run("a", "--outer_iteration", "20") == 0
    assert "held-out loss: 8 held-out images, fixed networks of ages 0, 1, 3" in capsys.readouterr().out
    found = entries("a")
    assert [e["step"] for e in found] == [0, 2, 5, 8, 10, 12, 15, 18, 20]
    kept = json.loads(Path("results/a/results.json").read_text())["held_out_loss"]
    assert kept["start"] == found[0]["held_out_loss"] and len(kept["start"]) == 3
    assert kept["end"] == found[-1]["held_out_loss"]
    assert Path("results/a/loss.png").stat().st_size > 0
    monkeypatch.setattr(used_by_runs, "__init__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(used_by_runs, "__call__", lambda self, x, y: [1.0])
    monkeypatch.setattr(used_by_runs, "__str__", lambda self: "nothing")
    monkeypatch.setattr(used_by_runs, "due", lambda self, step: step == 0)
    assert run("without", "--outer_iteration", "20") == 0
    assert [e["step"] for e in entries("without")] == [0]
    assert same("a", "without")
