"""Train networks on a synthetic set and test them on real images.

python validate.py --normalize_data --dataset CIFAR10 --model ConvNet --dsa --method DC --ipc 10
"""

from clom.config import ValidateFlags
from clom.validate import validate
from utils.cli import command


@command(ValidateFlags, prog="python validate.py", description=__doc__)
def main(flags: ValidateFlags) -> int:
    """Validate."""
    return validate(flags)


if __name__ == "__main__":
    raise SystemExit(main())
