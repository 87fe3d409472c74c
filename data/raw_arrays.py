"""Raw sets that come as arrays: the embedded digits, PathMNIST, down-sampled ImageNet batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.raw import Source, one_part, stratified_split


def read_digits(raw: Path, download: bool) -> Source:
    """scikit-learn's 1797 handwritten digits (8×8 scans, values 0..16), nothing to fetch.

    Test: 50 pictures a class drawn with seed 0; train: the other 1297.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = stratified_split(digits.target, lambda count: 50)
    return Source(
        "scikit-learn load_digits (UCI optical recognition of handwritten digits)",
        tuple(map(str, digits.target_names)),
        {
            "train": one_part(images[train], digits.target[train]),
            "test": one_part(images[test], digits.target[test]),
        },
        {"train": len(train), "test": len(test)},
    )
