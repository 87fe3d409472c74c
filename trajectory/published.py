"""Published settings of trajectory matching, by data set and number of images."""

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]


def _rows(names: str, classes: Mapping[str, int], table: str) -> dict[str, dict[int, Settings]]:
    """A table of lines `data ipc values...` -> data set -> number of images -> settings; - is unset."""
    found: dict[str, dict[int, Settings]] = {}
    for line in table.strip().splitlines():
        data, ipc, *values = line.split()
        row = {n: _value(v) for n, v in zip(names.split(), values, strict=True) if v != "-"}
        found.setdefault(data, {})[int(ipc) * classes[data]] = row
    return found


def _value(text: str) -> Any:
    if text in ("yes", "no"):
        return text == "yes"
    number = float(text)
    return int(number) if number.is_integer() and "e" not in text and "." not in text else number


_CLASSES = {"cifar10": 10, "cifar100": 100, "tinyimagenet": 200}

# MTT's commands as DC-BENCH has them from the author (methods/tm/readme.md @2a57711).
_MTT = _rows(
    "syn_steps expert_epochs max_start_epoch lr_img lr_lr lr_teacher batch_syn zca",
    _CLASSES,
    """
cifar10       1  50 2  2  100. 1e-7 0.01    -  yes
cifar10      10  30 2 20  100. 1e-5 0.001   -  yes
cifar10      50  30 2 40 1000. 1e-5 0.001   -  no
cifar100      1  20 3 20 1000. 1e-5 0.01    -  yes
cifar100     10  20 2 20 1000. 1e-5 0.01    -  no
cifar100     50  80 2 40 1000. 1e-5 0.01  125  yes
tinyimagenet  1  10 2 10   1e4 1e-4 0.01    -  no
tinyimagenet 10  20 2 40   1e4 1e-4 0.01  200  no
tinyimagenet 50  20 2 40   1e4 1e-4 0.01  300  no
""",
)

# DATM's configs @97ae510. A range without expansion has no current_max_start_epoch.
_DATM = _rows(
    "syn_steps expert_epochs lr_img batch_syn lr_y min_start_epoch current_max_start_epoch max_start_epoch "
    "expansion_end_epoch threshold lr_lr ema_decay",
    _CLASSES,
    """
cifar10         1   80 2  100.   10  5.   0  -  4    -  1.1 1e-7 0.995
cifar10        10   80 2  100.  100  2.   0 10 20 1000  1.  1e-5 0.9995
cifar10        50   80 2 1000.  500  2.   0 20 40 2000  1.  1e-5 0.995
cifar10       500   40 2   50. 1000 10.  40  - 60    -  1.  1e-5 0.995
cifar10      1000  100 2   50. 1000 10.  40  - 60    -  1.  1e-5 0.995
cifar100        1   40 3 1000. 1000 10.   0 10 20 1000  1.  1e-5 0.9995
cifar100       10   80 2 1000. 1000 10.   0 30 50 2000  1.  1e-5 0.9995
cifar100       50   80 2 1000. 1000 10.  20  - 70    -  1.  1e-5 0.9995
cifar100      100   80 2   50. 1000 10.  30  - 70    -  1.  1e-5 0.9995
tinyimagenet    1   40 2   1e4 1000 10.   0 15 20 2000  1.  1e-4 0.9995
tinyimagenet   10   40 2  100.  500 10.  10  - 50    -  1.  1e-4 0.9995
tinyimagenet   50   20 2  100. 1000 10.  40  - 70    -  1.  1e-4 0.995
""",
)

# MKDT's scripts @eaf200e: sets of 2 and 5 % of the images.
_MKDT = _rows(
    "outer_iteration expert_epochs syn_steps lr_img max_start_epoch",
    dict.fromkeys(_CLASSES, 1),
    """
cifar10      1000  5000 2 40 1000. 2
cifar10      2500  5000 2 40   1e4 5
cifar100     1000  5000 2 40 1000. 2
cifar100     2500  5000 2 40   1e4 5
tinyimagenet 2000 10000 2 10   1e5 2
""",
)

# recipe -> (what its code has where no command says more, its table)
_MTT_DEFAULTS = dict(
    outer_iteration=5000,
    expert_epochs=3,
    syn_steps=20,
    max_start_epoch=25,
    lr_img=1000.0,
    lr_lr=1e-5,
    lr_teacher=0.01,
    lr_y=0.0,
)
RECIPES: dict[str, tuple[Settings, dict[str, dict[int, Settings]]]] = {
    "mtt": (_MTT_DEFAULTS, _MTT),
    "datm": (dict(_MTT_DEFAULTS, outer_iteration=10000, threshold=1.0, lr_y=2.0, zca=True), _DATM),
    "mkdt": (
        dict(
            outer_iteration=5000,
            expert_epochs=5,
            syn_steps=40,
            max_start_epoch=5,
            lr_img=1000.0,
            lr_lr=1e-4,
            lr_teacher=0.1,
            lr_y=1.0,
            batch_syn=256,
        ),
        _MKDT,
    ),
}


def published(recipe: str, data_name: str, count: int) -> tuple[Settings, str]:
    """The settings of a recipe for a set of `count` images, and in words where they are from.

    For a data set of the table the row of the largest set that is not larger than `count`, or else
    the smallest one; for any other the defaults of the code.
    """
    defaults, table = RECIPES[recipe]
    rows = table.get(data_name)
    if rows is None:
        return defaults, f"the defaults of {recipe}'s code"
    size = max((n for n in rows if n <= count), default=min(rows))
    return {**defaults, **rows[size]}, f"those of {recipe} for {size} images of {data_name}"
