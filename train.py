"""Distil an unlabelled image set into synthetic images and target features (KRR-ST).

python train.py --exp_name NAME --data_name cifar100 --outer_lr 1e-4
"""

from __future__ import annotations

import sys

from krr_st.config import RECIPES, TrainFlags
from krr_st.run import run_distillation
from utils import cli
from utils.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags and distil."""
    flags = cli.parse(
        TrainFlags, argv, prog="python train.py", description=__doc__, recipes=RECIPES,
        no_effect={"num_workers": "images stay in memory, no processes load them"},
    )  # fmt: skip
    return run_distillation(flags)


if __name__ == "__main__":
    sys.exit(main())
