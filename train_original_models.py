"""Train networks on real images: the pre-trained models that CLoM asks.

python train_original_models.py --normalize_data --dataset CIFAR10 --model ConvNet --num 10
"""

from __future__ import annotations

import sys

from clom.config import OriginalFlags
from clom.pretrain import train_originals
from utils import cli
from utils.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags and train."""
    return train_originals(
        cli.parse(OriginalFlags, argv, prog="python train_original_models.py", description=__doc__)
    )


if __name__ == "__main__":
    sys.exit(main())
