"""The named levers of train.py: rates apart, k-means start, recipes."""

import gc
import weakref

import pytest
import torch
from conftest import write_set
from test_distill import CPU, make_distiller, make_target, tiny

import data
from krr_st.config import RECIPES, TrainFlags
from krr_st.distill import initial_set
from utils import cli

assert tiny  # a fixture, used by name


def test_rates_apart(tiny):
    together, apart = make_distiller(tiny), make_distiller(tiny, lr_y=1e-4)
    before = together.x_syn.detach().clone(), together.y_syn.detach().clone()
    moved = []
    for distiller in (together, apart):
        distiller.step()
        found = distiller.x_syn.detach(), distiller.y_syn.detach()
        moved.append([(a - b).abs().max() for a, b in zip(found, before, strict=True)])
    (x, y), (x_apart, y_apart) = moved
    assert x == x_apart  # Adam's first step is as long as its rate
    assert float(y) == pytest.approx(1e-2, rel=1e-3)
    assert float(y_apart) == pytest.approx(1e-4, rel=1e-2)
    for _ in range(39):
        apart.step()
    assert apart.schedule.get_last_lr() == pytest.approx([1e-5, 1e-7])


def test_k_means_start_takes_one_real_image_of_each_cluster(workspace):
    write_set("datasets", "tiny", train=40, test=8)
    image_set, target = data.load("tiny", 8, "datasets"), make_target()

    def brightness(x):
        """Clusters that can be told apart: the classes differ in brightness."""
        return x.mean((1, 2, 3))[:, None].expand(-1, 4) * 100

    def start(seed, function=brightness):
        return initial_set(
            image_set, 4, function, init="raw", device=CPU, images="kmeans",
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    x, y = start(0)
    pixels = image_set.train.images.float() / 255
    found = [int((pixels - image).abs().amax((1, 2, 3)).argmin()) for image in x]
    assert all(torch.equal(pixels[i], image) for i, image in zip(found, x, strict=True))
    assert sorted(image_set.train.labels[found].tolist()) == [0, 1, 2, 3]
    assert y.shape == (4, 4) and torch.equal(start(0)[0], x)
    assert start(0, target)[0].shape == (4, 3, 8, 8)


def test_a_recipe_replaces_defaults_and_flags_win():
    recipes = {"published": {}, "other": {"num_models": 3, "ridge": 1e-3}}

    def parse(*argv):
        return cli.parse(
            TrainFlags, list(argv), prog="train.py", description="", recipes=recipes
        )  # fmt: skip

    assert parse() == TrainFlags()
    recipes["published"]["num_models"] = 4
    assert parse().num_models == 4 and parse("--num_models", "10").num_models == 10


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_real_flags_and_parse(name):
    flags = cli.parse(
        TrainFlags, ["--recipe", name], prog="train.py", description="", recipes=RECIPES
    )
    for field, value in RECIPES[name].items():
        assert getattr(flags, field) == value
    assert RECIPES["published"] == {}


def test_a_distiller_goes_with_its_last_reference(tiny):
    """Its table of views is too large to wait for a garbage collection."""
    distiller = make_distiller(tiny)
    gone = weakref.ref(distiller)
    gc.disable()
    try:
        del distiller
        assert gone() is None
    finally:
        gc.enable()
