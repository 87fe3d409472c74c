"""The DC family's names: any case, the published statistics, a list of what there is."""

from pathlib import Path

import pytest
import torch
from conftest import write_set
from test_cli import fails

import train_original_models
from clom.config import DistillFlags, OriginalFlags, default_run_folder
from data.augment.dc import dc_strategy
from data.load import load_set
from data.prepared import find_spec
from data.specs import DC_SPECS

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Name as the release spells it -> (channels, side, classes, mean, std), from its loader.
RELEASED = {
    "MNIST": (1, 28, 10, (0.1307,), (0.3081,)),
    "FashionMNIST": (1, 28, 10, (0.2861,), (0.3530,)),
    "SVHN": (3, 32, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CIFAR10": (3, 32, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR100": (3, 32, 100, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": (3, 64, 200, *IMAGENET),
    "ImageNet": (3, 32, 1000, *IMAGENET),
    "pathmnist": (3, 28, 9, (0.7406, 0.5330, 0.7059), (0.1237, 0.1767, 0.1244)),
    "ImageNette": (3, 224, 10, *IMAGENET),
    "ImageWoof": (3, 224, 10, *IMAGENET),
    "ImageFruit": (3, 224, 10, *IMAGENET),
    "ImageYellow": (3, 224, 10, *IMAGENET),
    "ImageMeow": (3, 224, 10, *IMAGENET),
    "ImageSquawk": (3, 224, 10, *IMAGENET),
}


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("spell", [str, str.lower, str.upper])
def test_published_facts_in_any_case(name, spell, tmp_path):
    spec = find_spec(spell(name), tmp_path, "dc")
    (size,) = spec.sizes
    stats = spec.stats[size]
    assert (spec.channels, size, spec.num_classes, stats.mean, stats.std) == RELEASED[name]
    assert DC_SPECS.spelling(spell(name)) == name
    assert DC_SPECS.get(spell(name)) is spec and spell(name) in DC_SPECS


def test_what_is_not_listed_is_left_as_it_is():
    assert DC_SPECS.spelling("my_Birds") == "my_Birds" and DC_SPECS.spelling(None) is None
    assert "my_Birds" not in DC_SPECS and DC_SPECS.get("my_Birds") is DC_SPECS.get(None) is None


@pytest.mark.parametrize("name", ["pathmnist", "PathMNIST"])
def test_prepared_images_are_read_with_published_statistics(name, tmp_path):
    write_set(tmp_path, "pathmnist", size=28, classes=9, train=18, test=9)
    image_set = load_set(name, 28, tmp_path, family="dc")
    assert image_set.stats.mean == (0.7406, 0.5330, 0.7059)
    measured = (image_set.train.images.double() / 255).mean((0, 2, 3))
    assert not torch.allclose(measured, torch.tensor(image_set.stats.mean).double(), atol=0.05)


def test_files_and_folders_carry_the_published_spelling():
    flags = DistillFlags(dataset="cifar10", source_dataset="TINYIMAGENET")
    assert (flags.dataset, flags.source_dataset) == ("CIFAR10", "tinyimagenet")
    assert default_run_folder(flags).parts[:2] == ("condensed", "CIFAR10")
    assert OriginalFlags(dataset="PathMNIST").dataset == "pathmnist"
    assert dc_strategy(DistillFlags(dataset="mnist").dataset, "ConvNet") == "crop_scale_rotate"


@pytest.mark.parametrize("more", [[], ["--img_size", "32"]])
def test_an_unknown_name_is_answered_with_the_list(workspace, capsys, more):
    write_set("datasets", "birds", size=8)
    fails(
        capsys,
        train_original_models,
        ["--dataset", "ImageFriut", "--device", "cpu", *more],
        "unknown data set 'ImageFriut'",
        *RELEASED,
        "prepared in datasets: birds",
    )
    assert not Path("pretrained_model").exists()
