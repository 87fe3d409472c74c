"""Train networks on real images: the pre-trained models that CLoM asks.

python train_original_models.py --normalize_data --dataset CIFAR10 --model ConvNet --num 10
"""

from clom.config import OriginalFlags
from clom.pretrain import train_originals
from utils.cli import command


@command(OriginalFlags, prog="python train_original_models.py", description=__doc__)
def main(flags: OriginalFlags) -> int:
    """Train."""
    return train_originals(flags)


if __name__ == "__main__":
    raise SystemExit(main())
