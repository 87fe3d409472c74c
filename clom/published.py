"""Published numbers of the DC family that could be verified, for the tables to print beside ours.

ConvNet-3 at the data set's own size, test accuracy in % as mean and standard deviation over all
networks of all experiments. CLoM's own tables were not readable: its rows stay empty and can be
filled from a file of the user's (`--published FILE`).

Sources: the readme of the DC, DSA and DM authors; for random images and full data the table of PAD.
"""

from __future__ import annotations

from evaluation.tables import Number, Published

RANDOM = "random real images"

# (data set, row) -> ipc -> "mean std"
_NUMBERS: dict[tuple[str, str], dict[int, str]] = {
    ("MNIST", "DC"): {1: "91.7 .5", 10: "97.4 .2", 50: "98.8 .1"},
    ("MNIST", "DSA"): {1: "88.7 .6", 10: "97.8 .1", 50: "99.2 .1"},
    ("FashionMNIST", "DC"): {1: "70.5 .6", 10: "82.3 .4", 50: "83.6 .4"},
    ("FashionMNIST", "DSA"): {1: "70.6 .6", 10: "84.6 .3", 50: "88.7 .2"},
    ("SVHN", "DC"): {1: "31.2 1.4", 10: "76.1 .6", 50: "82.3 .3"},
    ("SVHN", "DSA"): {1: "27.5 1.4", 10: "79.2 .5", 50: "84.4 .4"},
    ("CIFAR10", RANDOM): {1: "15.4 .3", 10: "31.0 .5", 50: "50.6 .3"},
    ("CIFAR10", "DC"): {1: "28.3 .5", 10: "44.9 .5", 50: "53.9 .5"},
    ("CIFAR10", "DSA"): {1: "28.8 .7", 10: "52.1 .5", 50: "60.6 .5"},
    ("CIFAR10", "DM"): {
        1: "26.0 .8",
        10: "48.9 .6",
        50: "63.0 .4",
        100: "67.0 .3",
        200: "71.2 .4",
        500: "76.1 .3",
        1000: "79.8 .3",
    },
    ("CIFAR100", RANDOM): {1: "4.2 .3", 10: "14.6 .5", 50: "33.4 .4"},
    ("CIFAR100", "DC"): {1: "12.8 .3", 10: "25.2 .3"},
    ("CIFAR100", "DSA"): {1: "13.9 .3", 10: "32.3 .3", 50: "42.8 .4"},
    ("CIFAR100", "DM"): {1: "11.4 .3", 10: "29.7 .3", 50: "43.6 .4"},
    ("tinyimagenet", RANDOM): {1: "1.4 .1", 10: "5.0 .2", 50: "15.0 .4"},
    ("tinyimagenet", "DM"): {1: "3.9 .2", 10: "12.9 .4", 50: "24.1 .3"},
}

FULL_DATA: dict[str, Number] = {"CIFAR10": (84.8, 0.1), "CIFAR100": (56.2, 0.3), "tinyimagenet": (37.6, 0.4)}


def published_numbers() -> Published:
    """All of them, by (data set, row, ipc)."""
    return {
        (dataset, row, str(ipc)): tuple(map(float, text.split()))
        for (dataset, row), cells in _NUMBERS.items()
        for ipc, text in cells.items()
    }
