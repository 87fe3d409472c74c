"""What is known about each data set: classes, channels, sizes, published statistics.

Two families publish different statistics of the same pictures (CIFAR-10's std is 0.247 in one and
0.2023 in the other), which belong to their checkpoints and synthetic files: each family reads its
own row. The prepared tensors on disk are shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError


@dataclass(frozen=True)
class Stats:
    """Per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def parse(cls, facts: Mapping[str, Any], path: Path) -> Stats | None:
        """The "mean" and "std" of the JSON object in `path` (UserError: unusable); None if one is absent."""
        given = facts.get("mean"), facts.get("std")
        if given[0] is None or given[1] is None:
            return None
        try:
            mean, std = (tuple(map(float, values)) for values in given)
            usable = not any(isinstance(values, str) for values in given)
            usable = usable and len(mean) == len(std) and min(std) > 0 and all(map(math.isfinite, mean + std))
        except (TypeError, ValueError, OverflowError):
            usable = False
        if not usable:
            raise UserError(f"{path}: mean and std must be equally long lists of finite numbers, std above 0")
        return cls(mean, std)

    def check_channels(self, channels: int, what: Path | str) -> None:
        """Raise a UserError about `what` if these are statistics of other images."""
        if not len(self.mean) == len(self.std) == channels or min(self.std) <= 0:
            raise UserError(
                f"{what}: mean {self.mean} and std {self.std} do not fit images of {channels} channels"
            )


def pixel_stats(channels: int) -> Stats:
    """Statistics that change nothing."""
    return Stats((0.0,) * channels, (1.0,) * channels)


@dataclass(frozen=True)
class DatasetSpec:
    """One row of a family's table."""

    folder: str  # of the prepared tensors, in the data folder
    num_classes: int
    channels: int = 3  # or 1
    sizes: tuple[int, ...] = (32, 64)  # published image sizes in pixels; the first is the default
    stats: dict[int, Stats] = field(default_factory=dict)  # published, by size; others are measured
    hflip: bool = True  # False where a mirrored picture is another symbol (digits)
    has_test: bool = True  # False where no test split exists and the training split stands in


# Name, classes, size, mean and std of each channel; the first size of a name is its default.
# `flowers` at 32: the release has 0.3030 for the green mean, a typo against 0.3830 at 64 and 224.
_KRR_TABLE = """
svhn           10   32  .4377 .4438 .4728  .1980 .2010 .1970
svhn           10   64  .4377 .4438 .4728  .1981 .2011 .1971
cifar10        10   32  .4914 .4822 .4465  .2470 .2435 .2616
cifar10        10   64  .4914 .4821 .4465  .2469 .2433 .2614
cifar100      100   32  .5071 .4866 .4409  .2673 .2564 .2762
cifar100      100   64  .5070 .4865 .4409  .2671 .2562 .2760
aircraft      100   32  .4804 .5116 .5349  .2021 .1953 .2297
aircraft      100   64  .4797 .5108 .5341  .2117 .2049 .2380
aircraft      100  224  .4797 .5109 .5342  .2204 .2135 .2451
cars          196   32  .4706 .4600 .4548  .2746 .2740 .2831
cars          196   64  .4707 .4601 .4549  .2836 .2826 .2914
cars          196  224  .4707 .4601 .4549  .2927 .2917 .3001
cub2011       200   32  .4857 .4995 .4324  .2145 .2098 .2496
cub2011       200   64  .4856 .4995 .4324  .2218 .2170 .2564
cub2011       200  224  .4856 .4994 .4324  .2295 .2250 .2635
dogs          120   32  .4765 .4516 .3911  .2490 .2435 .2479
dogs          120   64  .4765 .4517 .3911  .2551 .2495 .2539
dogs          120  224  .4765 .4517 .3912  .2617 .2564 .2607
flowers       102   32  .4344 .3830 .2955  .2811 .2318 .2607
flowers       102   64  .4344 .3830 .2955  .2878 .2390 .2674
flowers       102  224  .4344 .3830 .2955  .2928 .2449 .2726
tinyimagenet  200   64  .4802 .4481 .3975  .2770 .2691 .2821
tinyimagenet  200   32  .4802 .4481 .3975  .2770 .2691 .2821
imagenet     1000   64  .4810 .4574 .4078  .2633 .2560 .2708
imagenet     1000   32  .4810 .4574 .4078  .2633 .2560 .2708
imagenette     10  224  .4655 .4546 .4250  .2804 .2754 .2965
"""
# ImageNet is down-sampled, and has a test split if the raw set had val_data.
_DC_TABLE = """
MNIST          10   28  .1307  .3081
FashionMNIST   10   28  .2861  .3530
SVHN           10   32  .4377 .4438 .4728  .1980 .2010 .1970
CIFAR10        10   32  .4914 .4822 .4465  .2023 .1994 .2010
CIFAR100      100   32  .5071 .4866 .4409  .2673 .2564 .2762
tinyimagenet  200   64  .485 .456 .406  .229 .224 .225
ImageNet     1000   32  .485 .456 .406  .229 .224 .225
ImageNet-32  1000   32  .485 .456 .406  .229 .224 .225
pathmnist       9   28  .7406 .5330 .7059  .1237 .1767 .1244
ImageNette     10  224  .485 .456 .406  .229 .224 .225
ImageWoof      10  224  .485 .456 .406  .229 .224 .225
ImageFruit     10  224  .485 .456 .406  .229 .224 .225
ImageYellow    10  224  .485 .456 .406  .229 .224 .225
ImageMeow      10  224  .485 .456 .406  .229 .224 .225
ImageSquawk    10  224  .485 .456 .406  .229 .224 .225
"""


def _specs(table: str) -> dict[str, DatasetSpec]:
    stats: dict[tuple[str, int], dict[int, Stats]] = {}
    for row in table.strip().splitlines():
        name, classes, size, *values = row.split()
        channels, values = len(values) // 2, tuple(map(float, values))
        stats.setdefault((name, int(classes)), {})[int(size)] = Stats(values[:channels], values[channels:])
    specs = {}
    for (name, classes), by_size in stats.items():
        folder, channels = name.lower().removesuffix("-32"), len(next(iter(by_size.values())).mean)
        flags = {"hflip": folder not in ("mnist", "svhn"), "has_test": folder != "imagenet"}
        specs[name] = DatasetSpec(folder, classes, channels, tuple(by_size), by_size, **flags)
    return specs


class SpecTable(dict[str, DatasetSpec]):
    """Rows by published name, found in any case (the release mixes spellings)."""

    def spelling(self, name: str) -> str:
        """The published spelling of `name`; `name` itself if no row has it."""
        return next((known for known in self if known.lower() == str(name).lower()), name)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self.spelling(name))

    def __getitem__(self, name: str) -> DatasetSpec:
        return super().__getitem__(self.spelling(name))

    def get(self, name: str, default: DatasetSpec | None = None) -> DatasetSpec | None:
        """The row, or `default`."""
        return super().get(self.spelling(name), default)


# KRR-ST family (`--data_name`), and scikit-learn's handwritten digits with three equal channels.
KRR_SPECS = _specs(_KRR_TABLE) | {"digits": DatasetSpec("digits", 10, sizes=(16,), hflip=False)}
# DC family (`--dataset`): the same prepared tensors, read with this family's statistics.
DC_SPECS = SpecTable(_specs(_DC_TABLE))


def find_row(name: str | None) -> DatasetSpec | None:
    """The row of a data set name: either family's spelling, or the prepared folder's."""
    for table in (KRR_SPECS, DC_SPECS):
        if name in table:
            return table[name]
    return next((row for row in DC_SPECS.values() if row.folder == name), None)
