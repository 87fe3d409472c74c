"""Every row of the published tables of training recipes, written out again by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from data.synthetic import TrainingSettings
from distillation.labels import Labels
from evaluation.recipes import LOSSES, Recipe, finetune_recipe, pretrain_recipe
from krr_st.config import TrainFlags
from methods import METHODS
from utils.errors import UserError

DSA = "color_crop_cutout_flip_scale_rotate"
LABELS = ("cross_entropy", "sgd", 0.01, 5e-4, "tenth_at_half", 0, DSA)
VECTORS = ("half_squared_error", "adam", 3e-4, 0.0, "cosine", 500, DSA)
FEATURES = ("mse", "sgd", 0.1, 1e-3, "constant", 0, "none")


def described(recipe):
    return (recipe.loss, recipe.optimizer, recipe.lr, recipe.wd, recipe.schedule, recipe.warmup, recipe.dsa)


# (method, source, network), images -> what, batch, steps. 1000 epochs are steps by the ceiling.
ROWS = [
    *((m, "cifar100", "vgg", 1000, LABELS, 256, 4000) for m in ("random", "kmeans", "dsa", "dm")),
    ("mtt", "cifar100", "convnet_128_256_512_bn", 1000, LABELS, 256, 4000),
    ("mtt", "tinyimagenet", "mobilenet", 2000, LABELS, 256, 8000),
    ("dm", "imagenette", "resnet18", 10, LABELS, 256, 1000),
    ("random", "imagenet", "alexnet", 1024, LABELS, 256, 4000),
    *((m, "cifar100", "vgg", 1000, VECTORS, 500, 10000) for m in ("kip", "frepo")),
    *((m, "imagenet", "vgg", 1000, VECTORS, 500, 10000) for m in ("kip", "frepo")),
    *((m, "tinyimagenet", "vgg", 2000, VECTORS, 500, 40000) for m in ("kip", "frepo")),
    *((m, "tinyimagenet", "mobilenet", 2000, VECTORS, 256, 40000) for m in ("kip", "frepo")),
    ("frepo", "cifar100", "mobilenet", 1000, VECTORS, 500, 10000),
    *((m, "imagenette", "vgg", 10, VECTORS, 10, 1000) for m in ("kip", "frepo")),
    ("frepo", "imagenette", "mobilenet", 10, VECTORS, 10, 1000),
    ("krr_st", "cifar100", "vgg", 1000, FEATURES, 256, 4000),
    ("krr_st", "tinyimagenet", "mobilenet", 2000, FEATURES, 256, 8000),
    ("krr_st", "imagenette", "resnet18", 10, FEATURES, 256, 1000),
    ("random_features", "digits", "base", 20, FEATURES, 256, 1000),
    ("kmeans_features", "cifar10", "base", 257, FEATURES, 256, 2000),
]


@pytest.mark.parametrize(("method", "source", "model", "m", "what", "batch", "steps"), ROWS)
def test_pretraining(method, source, model, m, what, batch, steps):
    recipe = pretrain_recipe(method, source, model)
    assert described(recipe) == what
    assert recipe.batch_size == batch
    assert recipe.steps_on(m) == steps
    if source != "digits":  # the papers' lengths belong to the source, whatever the set's size
        assert pretrain_recipe(method, source, model, count=7) == recipe


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("cifar10", 10000),
        ("cifar100", 10000),
        ("tinyimagenet", 10000),
        ("aircraft", 5000),
        ("cars", 5000),
        ("cub2011", 5000),
        ("dogs", 5000),
        ("flowers", 5000),
        ("imagenette", 5000),
        ("svhn", 5000),
        ("own", 5000),
    ],
)
def test_finetuning_lengths(target, steps):
    recipe = finetune_recipe(target, "vgg", 32)
    assert recipe.steps_on(50000) == recipe.steps_on(7) == steps
    assert described(recipe) == ("cross_entropy", "sgd", 0.01, 5e-4, "cosine", 0, "none")


@pytest.mark.parametrize(
    ("model", "size", "batch"),
    [
        ("resnet18", 224, 64),
        ("resnet18", 64, 256),
        ("resnet18", 32, 256),
        ("resnet10", 224, 256),
        ("vgg", 224, 256),
        ("convnet_32_64_128_256_512_bn", 224, 256),
    ],
)
def test_finetuning_batches(model, size, batch):
    assert finetune_recipe("flowers", model, size).batch_size == batch


def test_overrides_replace_what_is_given():
    recipe = pretrain_recipe("krr_st", "cifar100", "vgg")
    assert recipe.override(lr=None, wd=None, epochs=None) == recipe
    changed = recipe.override(lr=0.3, wd=0.0, batch_size=100, optimizer="adam", dsa=DSA)
    assert described(changed) == ("mse", "adam", 0.3, 0.0, "constant", 0, DSA)
    assert changed.steps_on(1000) == 10000
    assert recipe.lr == 0.1  # the table's row is untouched


def test_one_length_drops_the_other():
    by_epochs = pretrain_recipe("krr_st", "cifar100", "vgg")
    assert by_epochs.override(steps=77).steps_on(1000) == 77
    assert by_epochs.override(epochs=20).steps_on(1000) == 80
    by_steps = pretrain_recipe("frepo", "cifar100", "vgg")
    assert by_steps.override(epochs=20).steps_on(1000) == 40


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "scale", "steps"),
    [
        (1000, 256, 1000, 0.01, 40),
        (10, 256, 10, 1.0, 10),
        (257, 256, 1, 1.0, 2),
        (10, 256, 10, 1e-9, 1),
        (10, 4, 1, 2.0, 6),
    ],
)
def test_scaled_lengths(count, batch, epochs, scale, steps):
    recipe = Recipe("mse", "sgd", 0.1, 0.0, "constant", batch, epochs=epochs)
    assert recipe.steps_on(count, scale) == steps


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown method 'krrst'; valid: dc, dm, dsa, frepo, .*krr_st"):
        pretrain_recipe("krrst", "cifar100", "vgg")


def test_every_recipe_names_a_loss():
    assert {row[4][0] for row in ROWS} == set(LOSSES)


def test_a_set_of_views_is_trained_on_as_long_by_train_py_as_by_test_py(tmp_path):
    """As many steps as its images alone: not as many passes over fifty times their number."""
    flags = replace(
        TrainFlags(data_name="cifar10", views=50, num_images=100), test_model="convnet_128_256_512_bn"
    )
    image_set = SimpleNamespace(hflip=True)
    found = Labels(METHODS["krr_st"], flags, image_set, None).recipe(TrainingSettings())
    alone = pretrain_recipe("krr_st", "cifar10", flags.test_model, count=100)
    assert found.steps_on(5000) == alone.steps_on(100) == 1000
    flags = replace(flags, pre_epoch=20)  # passes over the images, not over their views
    found = Labels(METHODS["krr_st"], flags, image_set, None).recipe(TrainingSettings())
    assert found.steps_on(5000) == 20
