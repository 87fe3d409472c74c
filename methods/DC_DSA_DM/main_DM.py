"""Distil a labelled image set by DM (or --method DC, DSA), with the defaults of the released script.

python methods/DC_DSA_DM/main_DM.py --dataset CIFAR10 --model ConvNet --ipc 10
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # started from any folder
    sys.path.insert(0, ROOT)

from methods.command import distil  # noqa: E402
from utils.errors import entry_point  # noqa: E402


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags and distil."""
    return distil(
        argv,
        "dm",
        prog="python methods/DC_DSA_DM/main_DM.py",
        description=__doc__,
        among=("dc", "dsa", "dm"),
        defaults=dict(ipc=50, eval_mode="SS", eval_interval=2000, epoch_eval_train=1000),
    )


if __name__ == "__main__":
    sys.exit(main())
