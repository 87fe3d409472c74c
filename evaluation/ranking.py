"""DD-Ranking's scores: what a set is worth apart from its soft labels and its augmentation.

Accuracies are shares in [0, 1]; so are the scores, where a set no better than random images under the same
training, and with no other loss or gain, has (1 - 1/e) / (e - 1/e) = 0.27.

Source: https://github.com/NUS-HPC-AI-Lab/DD-Ranking, whose package puts percentages into the same formulas.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from statistics import fmean, pstdev

WEIGHT = 0.5  # of a score's second difference in the label-robust one, of the first in the other


def bounded(gain: float) -> float:
    """A weighted gain in accuracy from -1 to 1 as a score from 0 to 1."""
    return (math.exp(gain) - math.exp(-1)) / (math.e - math.exp(-1))


def label_robust_score(all_real: float, hard_labels: float, own_labels: float, random: float) -> float:
    """How much of a set's accuracy does not come from soft labels and training alone.

    Args:
        all_real: of networks trained on all real images.
        hard_labels: on the set with classes as labels; the difference to `all_real` counts against it.
        own_labels: on the set with its own labels.
        random: on random real images instead; the difference to `own_labels` counts for the set.
    """
    return bounded(WEIGHT * (own_labels - random) - (1 - WEIGHT) * (all_real - hard_labels))


def augmentation_robust_score(
    set_augmented: float, random_augmented: float, set_plain: float, random_plain: float
) -> float:
    """What a set is ahead of random real images with augmentation and without."""
    augmented, plain = set_augmented - random_augmented, set_plain - random_plain
    return bounded(WEIGHT * augmented + (1 - WEIGHT) * plain)


# Score -> its formula, and the accuracies it takes.
SCORES: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {
    formula.__name__: (formula, tuple(signature(formula).parameters))
    for formula in (label_robust_score, augmentation_robust_score)
}


def titled(score: str) -> str:
    """The name of a score in words: label-robust score."""
    return score.replace("_", "-", 1).replace("_", " ")


def scores(accuracies: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Each score whose accuracies are there, with the means over seeds it was computed from.

    `accuracies` are one value a seed, in the order of the seeds; `std` is the population standard
    deviation of the scores of the seeds.
    """
    found = {}
    for name, (formula, needed) in SCORES.items():
        if accuracies.keys() >= set(needed):
            means = {key: fmean(accuracies[key]) for key in needed}
            each = [formula(*values) for values in zip(*(accuracies[key] for key in needed), strict=True)]
            found[name] = {"score": formula(**means), "std": pstdev(each), "weight": WEIGHT, **means}
    return found
