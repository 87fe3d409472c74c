"""Choices of real images against plain loops."""

import pytest
import torch
from conftest import CPU, NET, write_set

from data.augment import normalize
from data.load import load_set
from distillation.selection import early_losses, herding_indices, per_class
from evaluation.recipes import Recipe
from models import get_model
from utils.seed import derive_seed, local_seed


def points(n=30, seed=0):
    return torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(seed))


def test_herding_against_a_loop():
    x = points().flatten(1).double()
    mean, chosen = x.mean(0), []
    for _ in range(12):
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float((mean - x[[*chosen, i]].mean(0)).norm())))
    assert herding_indices(points(), 12).tolist() == chosen


def test_herded_images_have_the_mean_of_all():
    x = points(400).flatten(1)
    gap = lambda rows: float((x[rows].mean(0) - x.mean(0)).norm())  # noqa: E731
    drawn = [torch.randperm(400, generator=torch.Generator().manual_seed(n))[:20] for n in range(50)]
    assert gap(herding_indices(x, 20)) < 0.2 * min(map(gap, drawn))
    assert sorted(herding_indices(x[:8], 8).tolist()) == list(range(8))


def test_per_class_shares_the_count_and_keeps_to_what_is_there():
    labels = torch.tensor([2, 0, 1, 1, 2, 1, 2, 2])
    first = lambda mine, count: torch.arange(count)  # noqa: E731
    assert per_class(labels, 3, first).tolist() == [1, 2, 0]
    assert per_class(labels, 7, first).tolist() == [1, 2, 3, 5, 0, 4, 6]  # class 0 has one
    assert sorted(per_class(labels, 8, first).tolist()) == list(range(8))


@pytest.mark.parametrize("kind", ["classes", "vectors"])
def test_early_losses_are_each_images_own(workspace, kind):
    write_set("datasets", "tiny", train=40)
    image_set = load_set("tiny", 8, "datasets")
    targets = image_set.train.labels
    if kind == "vectors":
        targets = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    networks = []

    def network(seed):
        with local_seed(seed):
            networks.append(get_model(NET, (3, 8, 8), 5))
        return networks[-1]

    loss = "mse" if kind == "vectors" else "cross_entropy"
    recipe = Recipe(loss, "sgd", 0.05, 0.0, "constant", 16, epochs=1)
    found = early_losses(network, image_set, targets, recipe, [7, 8], CPU)
    x, wanted = normalize(image_set.train.images, image_set.stats), torch.zeros(40)
    for net in networks:  # as they were left by one epoch
        with torch.no_grad():
            for i in range(40):
                y = net.eval()(x[i : i + 1])[0]
                if kind == "vectors":
                    wanted[i] += (y - targets[i]).square().mean() / 2
                else:
                    wanted[i] -= y.log_softmax(0)[targets[i]] / 2
    torch.testing.assert_close(found, wanted)
    with local_seed(derive_seed(7, "network")):
        fresh = get_model(NET, (3, 8, 8), 5)
    assert not torch.equal(fresh.fc.weight, networks[0].fc.weight)
