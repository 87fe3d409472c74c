"""Choosing real images: at random, in equal numbers per class, by k-means, by herding, by loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.load import ImageSet
from data.loader import ImagePipeline
from evaluation.fit import Trainer, outputs
from evaluation.parallel import in_parallel
from evaluation.probe import shuffled_classes
from evaluation.recipes import Recipe
from utils.seed import derive_seed, make_generator


def random_indices(image_set: ImageSet, count: int, generator: torch.Generator) -> Tensor:
    """`count` images drawn uniformly without replacement, labels unseen."""
    return torch.randperm(len(image_set.train), generator=generator)[:count]


def balanced_indices(image_set: ImageSet, count: int, generator: torch.Generator) -> Tensor:
    """`count` images in class order, class counts as equal as `count` and the classes allow."""
    labels = image_set.train.labels
    classes = shuffled_classes(labels, generator)
    # Rank of each image within its class; the lowest ranks of all classes are taken first.
    rank = torch.cat([torch.arange(len(mine)) for mine in classes])
    chosen = torch.cat(classes)[rank.argsort(stable=True)[:count]]
    return chosen[labels[chosen].argsort(stable=True)]


def kmeans_indices(points: Tensor, count: int, seed: int) -> Tensor:
    """The image nearest to each of `count` k-means centres of the points (N, ...), no image twice."""
    from sklearn.cluster import MiniBatchKMeans

    points = points.flatten(1).float().cpu()
    model = MiniBatchKMeans(count, random_state=seed % 2**32, n_init=3, batch_size=4096)
    centres = torch.from_numpy(model.fit(points.numpy()).cluster_centers_).float()
    chosen: list[int] = []
    taken = torch.zeros(len(points), dtype=torch.bool)
    for centre in centres:
        distance = (points - centre).square().sum(1).masked_fill(taken, torch.inf)
        chosen.append(int(distance.argmin()))
        taken[chosen[-1]] = True
    return torch.tensor(chosen)


def per_class(labels: Tensor, count: int, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`count` images in class order, as many of each class as it has and as `count` allows.

    `choose` gets the indices of a class's images and how many of them are wanted, and returns
    positions among those indices. `labels` (N,) on the CPU; `count` is at most N.
    """
    classes = [(labels == c).nonzero().flatten() for c in range(int(labels.max()) + 1)]
    wanted = [0] * len(classes)
    while count:  # one of each class in turn, as long as there are any
        for c, mine in enumerate(classes):
            if count and wanted[c] < len(mine):
                wanted[c], count = wanted[c] + 1, count - 1
    return torch.cat([mine[choose(mine, n).cpu()] for mine, n in zip(classes, wanted, strict=True) if n])


def herding_indices(points: Tensor, count: int) -> Tensor:
    """`count` of the points (N, ...), each one bringing the mean of those chosen nearest to the mean of all.

    In the order of their choice, (count,) int64 on the CPU; no point twice.

    Source: Rebuffi et al., "iCaRL", arXiv 1611.07725, alg. 4.
    """
    points = points.flatten(1).float()
    mean, chosen = points.mean(0), []
    total, squares = torch.zeros_like(mean), points.square().sum(1)
    for k in range(1, count + 1):
        # ‖mean - (total + x)/k‖² but for what is the same for all x, times k²
        distance = squares - 2 * points @ (k * mean - total)
        chosen.append(int(distance.argmin()))
        total += points[chosen[-1]]
        squares[chosen[-1]] = torch.inf
    return torch.tensor(chosen)


@torch.no_grad()
def image_losses(
    predict: Callable[[Tensor], Tensor], image_set: ImageSet, targets: Tensor, device: torch.device
) -> Tensor:
    """Each training image's own loss: (N,) on the device.

    Cross-entropy of `predict`'s outputs against class indices (N,), or the mean squared error of
    vectors (N, D); targets on the device.
    """
    predicted = outputs(predict, image_set.train.images, image_set, device)
    if targets.is_floating_point():
        return (predicted - targets).square().mean(1)
    return nn.functional.cross_entropy(predicted, targets, reduction="none")


def early_losses(
    new_network: Callable[[int], nn.Module],
    image_set: ImageSet,
    targets: Tensor,
    recipe: Recipe,
    seeds: list[int],
    device: torch.device,
) -> Tensor:
    """How hard each training image is for networks early in training: (N,) on the CPU.

    For each seed a network is trained by the recipe (MKDT: one epoch) on all training images and
    their targets, class indices (N,) or vectors (N, D), without augmentation. The value is the mean
    over networks of its loss.

    Source: Joshi et al., "Dataset Distillation via Knowledge Distillation", ICLR 2025, sec. 4 (the
    images of high loss that MKDT starts from).
    """
    images, goals = image_set.train.images, targets.to(device)

    def losses(seed: int, check: Callable[[], None]) -> Tensor:
        network = new_network(derive_seed(seed, "network"))
        pipeline, generator = ImagePipeline(image_set.stats), make_generator(seed, "training")
        trainer = Trainer(network, recipe.loader(images, goals, device, generator, pipeline), recipe)
        trainer.run(what="student", on_step=lambda *_: check())
        return image_losses(network, image_set, goals, device).cpu()

    tasks = [lambda check, own=own: losses(own, check) for own in seeds]
    return torch.stack(list(in_parallel(tasks, device))).mean(0)
