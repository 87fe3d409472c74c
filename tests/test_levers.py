"""The named levers of train.py: rates apart, k-means start, recipes."""

import gc
import weakref

import pytest
import torch
from conftest import CPU, make_krrst, make_target, write_set

from data.load import load_set
from distillation.problem import Problem
from krr_st.config import RECIPES, TrainFlags
from utils import cli


@pytest.fixture
def image_set(workspace):
    write_set("datasets", "tiny", train=30, test=8)
    return load_set("tiny", 8, "datasets")


def test_rates_apart(image_set):
    together, apart = make_krrst(image_set), make_krrst(image_set, outer_lr_y=1e-4)
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
    image_set, target = load_set("tiny", 8, "datasets"), make_target()

    def brightness(x):
        """Clusters that can be told apart: the classes differ in brightness."""
        return x.mean((1, 2, 3))[:, None].expand(-1, 4) * 100

    def start(seed, function=brightness):
        problem = Problem(image_set, CPU, seed, target=function)
        return problem.start_with_features(4, "raw", "kmeans")

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
        return cli.parse(TrainFlags, list(argv), prog="train.py", description="", recipes=recipes)

    assert parse() == TrainFlags()
    recipes["published"]["num_models"] = 4
    assert parse().num_models == 4 and parse("--num_models", "10").num_models == 10


def test_a_typed_length_takes_the_place_of_the_recipe_s():
    recipes = {"published": {"pre_iteration": 9}}

    def parse(*argv):
        flags = cli.parse(TrainFlags, list(argv), prog="train.py", description="", recipes=recipes)
        return flags.pre_epoch, flags.pre_iteration

    assert parse() == (None, 9) and parse("--pre_iteration", "7") == (None, 7)
    assert parse("--pre_epoch", "2") == (2, None)


@pytest.mark.parametrize("typed", ["", "--pre_epoch 1000", "--pre_epoch 7", "--pre_iteration 7"])
def test_the_command_that_repeats_a_run_of_a_recipe(typed):
    recipe = {"pre_iteration": 9}

    def parse(argv):
        recipes = {"published": recipe}
        return cli.parse(TrainFlags, argv, prog="train.py", description="", recipes=recipes)

    flags = parse(typed.split())
    repeated = cli.command_line("train.py", flags, recipe).split()[1:]
    assert parse(repeated) == flags


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_real_flags_and_parse(name):
    flags = cli.parse(TrainFlags, ["--recipe", name], prog="train.py", description="", recipes=RECIPES)
    for field, value in RECIPES[name].items():
        assert getattr(flags, field) == value
    assert RECIPES["published"] == {}


def test_a_distiller_goes_with_its_last_reference(image_set):
    """Its table of views is too large to wait for a garbage collection."""
    distiller = make_krrst(image_set, target_views="exact")
    gone = weakref.ref(distiller)
    gc.disable()
    try:
        del distiller
        assert gone() is None
    finally:
        gc.enable()
