"""Choosing real images: at random, in equal numbers per class, by k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from data.load import ImageSet
from evaluation.probe import shuffled_classes


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
