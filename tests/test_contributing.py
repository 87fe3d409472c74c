"""The worked examples of CONTRIBUTING.md, executed."""

import re
from pathlib import Path

import pytest
import torch
from conftest import write_set

import data
from data.specs import KRR_SPECS
from evaluation import recipes
from krr_st import baselines
from krr_st.target_model import Representation
from models import get_model, registry
from utils import checkpoint
from utils.seed import local_seed

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def examples(workspace, monkeypatch):
    """Run every example; the tables they add to are put back afterwards."""
    for module, name in (
        (registry, "MODELS"), (baselines, "BASELINES"), (recipes, "PRETRAIN"),
    ):  # fmt: skip
        table = getattr(module, name)
        for key in ("patchify", "brightest"):
            monkeypatch.delitem(table, key, raising=False)
    before = [dict(t) for t in (KRR_SPECS, registry.MODELS, baselines.BASELINES, recipes.PRETRAIN)]
    space = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(compile(block, "CONTRIBUTING.md", "exec"), space)
    yield workspace
    tables = (KRR_SPECS, registry.MODELS, baselines.BASELINES, recipes.PRETRAIN)
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def test_examples(examples):
    write_set("datasets", "leaves", size=32, train=20, test=4)
    image_set = data.load("leaves", 32, "datasets")
    assert image_set.stats.mean == (0.42, 0.47, 0.33) and image_set.num_classes == 4

    model = get_model("patchify", (3, 32, 32), 5, 0.1)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 5) and model.embed(x).shape == (2, model.num_features)

    with local_seed(0):
        backbone = Representation("patchify", (3, 32, 32)).backbone
    checkpoint.save(backbone.state_dict(), "teacher_ckpt/barlow_twins_patchify_leaves.pt")
    assert baselines.main([
        "--method", "brightest", "--data_name", "leaves", "--img_size", "32",
        "--num_images", "3", "--target_model", "patchify", "--device", "cpu",
    ]) == 0  # fmt: skip
    made = torch.load("synthetic_data/leaves/brightest/x_syn.pt", weights_only=True)
    light = image_set.train.images.float().mean((1, 2, 3))
    assert made.shape == (3, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in
                 (image_set.stats.mean, image_set.stats.std))  # fmt: skip
    shown = ((made * std + mean) * 255).mean((1, 2, 3))
    torch.testing.assert_close(shown, light.topk(3).values, rtol=1e-3, atol=0.5)
    assert recipes.pretrain_recipe("brightest", "leaves", "patchify").loss == "mse"
