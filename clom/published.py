"""Published numbers of the DC family that could be verified, for the tables to print beside ours.

ConvNet-3 at the data set's own size, test accuracy in % as mean and standard deviation over all
networks of all experiments. CLoM's own rows stay empty: `--published FILE` fills them.

Sources: the readme of the DC, DSA and DM authors; for random images and full data the table of PAD.
"""

from evaluation.tables import Number, Published

RANDOM = "random real images"

_IPCS = (1, 10, 50, 100, 200, 500, 1000)
# (data set, row) -> "mean std" for the first of _IPCS.
_NUMBERS: dict[tuple[str, str], str] = {
    ("MNIST", "DC"): "91.7 .5, 97.4 .2, 98.8 .1",
    ("MNIST", "DSA"): "88.7 .6, 97.8 .1, 99.2 .1",
    ("FashionMNIST", "DC"): "70.5 .6, 82.3 .4, 83.6 .4",
    ("FashionMNIST", "DSA"): "70.6 .6, 84.6 .3, 88.7 .2",
    ("SVHN", "DC"): "31.2 1.4, 76.1 .6, 82.3 .3",
    ("SVHN", "DSA"): "27.5 1.4, 79.2 .5, 84.4 .4",
    ("CIFAR10", RANDOM): "15.4 .3, 31.0 .5, 50.6 .3",
    ("CIFAR10", "DC"): "28.3 .5, 44.9 .5, 53.9 .5",
    ("CIFAR10", "DSA"): "28.8 .7, 52.1 .5, 60.6 .5",
    ("CIFAR10", "DM"): "26.0 .8, 48.9 .6, 63.0 .4, 67.0 .3, 71.2 .4, 76.1 .3, 79.8 .3",
    ("CIFAR100", RANDOM): "4.2 .3, 14.6 .5, 33.4 .4",
    ("CIFAR100", "DC"): "12.8 .3, 25.2 .3",
    ("CIFAR100", "DSA"): "13.9 .3, 32.3 .3, 42.8 .4",
    ("CIFAR100", "DM"): "11.4 .3, 29.7 .3, 43.6 .4",
    ("tinyimagenet", RANDOM): "1.4 .1, 5.0 .2, 15.0 .4",
    ("tinyimagenet", "DM"): "3.9 .2, 12.9 .4, 24.1 .3",
}

FULL_DATA: dict[str, Number] = {"CIFAR10": (84.8, 0.1), "CIFAR100": (56.2, 0.3), "tinyimagenet": (37.6, 0.4)}

PUBLISHED: Published = {
    (dataset, row, str(ipc)): tuple(map(float, text.split()))
    for (dataset, row), cells in _NUMBERS.items()
    for ipc, text in zip(_IPCS, cells.split(", "), strict=False)
}
