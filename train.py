"""Distil a set of images into a few synthetic ones: KRR-ST, or another method by --method.

python train.py --exp_name NAME --data_name cifar100 --outer_lr 1e-4
python train.py --method dm --data_name cifar10 --num_images 10
"""

from methods.command import distil
from utils.errors import entry_point

UNUSED = {"num_workers": "images stay in memory, no processes load them"}


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags and distil."""
    return distil(argv, "krr_st", prog="python train.py", description=__doc__, no_effect=UNUSED)


if __name__ == "__main__":
    raise SystemExit(main())
