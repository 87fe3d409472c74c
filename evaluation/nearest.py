"""The real image nearest to each synthetic one: whether a set shows pictures that it was made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.augment import to_float
from data.meta import keeps_meaning_mirrored, read_meta
from data.prepared import read_split, spaced

HELD_OUT = 256  # pictures that say how near an unseen one lies
SAME = 0.5 / 255  # a smaller distance is lost in 8 bits


@dataclass(frozen=True)
class Nearest:
    """For each query image its nearest picture: the smallest root mean square difference of pixels."""

    index: Tensor  # (q,) int64, of the picture
    mirrored: Tensor  # (q,) bool: the picture's mirror image is the nearest
    distance: Tensor  # (q,) float32; pixels are in [0, 1]


@torch.no_grad()
def find_nearest(
    queries: Tensor, images: Tensor, *, mirror: bool = False, other_than: Tensor | None = None
) -> Nearest:
    """Search all pictures for the nearest to each query.

    Args:
        queries: (q, C, H, W) float in [0, 1].
        images: (N, C, H, W) uint8, or float in [0, 1]; on the CPU, perhaps mapped.
        mirror: compare with each picture's mirror image, too.
        other_than: (q,) the picture that each query is itself, which does not count.

    Raises:
        ValueError: queries and pictures of another shape.
    """
    if queries.shape[1:] != images.shape[1:]:
        raise ValueError(f"queries of {tuple(queries.shape[1:])}, pictures of {tuple(images.shape[1:])}")
    count = len(queries)
    # A mirrored query is as far from a picture as the query from the mirrored picture.
    both = torch.cat([queries, queries.flip(-1)]) if mirror else queries
    flat = both.float().flatten(1)
    best, index = torch.full((len(flat),), torch.inf), torch.zeros(len(flat), dtype=torch.int64)
    step = max(1, (1 << 24) // flat.shape[1])
    for first in range(0, len(images), step):
        part = to_float(images[first : first + step]).flatten(1)
        # |q - p|² less |q|², which is the same for all pictures.
        distances = torch.addmm(part.square().sum(1), flat, part.T, alpha=-2)
        if other_than is not None:
            own = (other_than - first).repeat(len(flat) // count)
            rows = ((own >= 0) & (own < len(part))).nonzero().flatten()
            distances[rows, own[rows]] = torch.inf
        values, places = distances.min(1)
        nearer = values < best
        best, index = torch.where(nearer, values, best), torch.where(nearer, places + first, index)
    # Anew from the difference: the expanded square has lost the digits of a small one.
    exact = torch.cat([_rms(a, images[i]) for a, i in zip(both.split(256), index.split(256), strict=True)])
    distance, side = exact.view(-1, count).min(0)
    return Nearest(index.view(-1, count).gather(0, side[None])[0], side.bool(), distance)


def _rms(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - to_float(b)).flatten(1).square().mean(1).sqrt()


def unseen_distances(train: Tensor, test: Tensor | None, *, mirror: bool = False) -> Tensor:
    """How far pictures that were not trained on are from the nearest training picture: (n,) float32.

    They are HELD_OUT test pictures, evenly spaced; without any, training pictures against all others.
    """
    own, pictures = test is None, train if test is None else test
    chosen = spaced(len(pictures), HELD_OUT)
    queries = to_float(pictures[chosen])
    return find_nearest(queries, train, mirror=mirror, other_than=chosen if own else None).distance


@dataclass(frozen=True)
class Pictures:
    """The training pictures of a prepared set, to search in."""

    train: Tensor  # (N, C, H, W), uint8 or float in [0, 1]
    labels: Tensor | None  # (N,) int64
    mirror: bool  # mirrored ones mean the same
    class_names: list[Any]  # as far as they are known
    unseen: Tensor  # (n,) how far pictures that were not trained on are from the nearest of these


def read_pictures(folder: Path, size: int) -> Pictures:
    """Read a prepared set that has training pictures; a UserError where it is damaged."""
    train, test = (read_split(folder, split, size, None) for split in ("train", "test"))
    mirror = keeps_meaning_mirrored(folder)
    held_out = None if test is None or test.images.shape[1:] != train.images.shape[1:] else test.images
    unseen = unseen_distances(train.images, held_out, mirror=mirror)
    return Pictures(train.images, train.labels, mirror, read_meta(folder).get("class_names") or [], unseen)


EXPLAINED = (
    "The distance of two pictures is the root mean square difference of their pixels, which lie in [0, 1]; "
    "each synthetic image is compared with every training picture and, where mirroring keeps the meaning, "
    f"with its mirror image. Unseen pictures say what is near: up to {HELD_OUT} of the test split, or "
    "without one training pictures against all others. Smooth and pale pictures are near to many: look at "
    "the pairs."
)


def near_training(nearest: Nearest, pictures: Pictures) -> int:
    """How many images are nearer to a training picture than 95 % of unseen pictures."""
    return int((nearest.distance < float(pictures.unseen.quantile(0.05))).sum())


def describe(nearest: Nearest, pictures: Pictures, start: Tensor | None, *, of: int) -> str:
    """What the nearest pictures of a set say, in words.

    `start` are the images before the first step, uint8 and one per query; `of` is the size of the whole set.
    """
    distance, unseen = nearest.distance, pictures.unseen
    images = f"{len(distance)} images" + f" (the set has {of})" * (len(distance) != of)
    words = (
        f"{near_training(nearest, pictures)} of {images} are nearer to a training picture than 95 % of "
        f"unseen pictures ({float(unseen.quantile(0.05)):.3f}); {int((distance < SAME).sum())} equal one to "
        f"8 bits. The median distance is {float(distance.median()):.3f}, the smallest "
        f"{float(distance.min()):.3f}; the median of unseen pictures is {float(unseen.median()):.3f}."
    )
    if start is not None:
        kept = int((_rms(to_float(start), pictures.train[nearest.index]) < SAME).sum())
        words += f" {kept} are nearest to the very training picture that they started from."
    return words
