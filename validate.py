"""Train networks on a synthetic set and test them on real images.

python validate.py --normalize_data --dataset CIFAR10 --model ConvNet --dsa --method DC --ipc 10
"""

from __future__ import annotations

import sys

from clom.config import ValidateFlags
from clom.validate import validate
from utils import cli
from utils.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags and validate."""
    return validate(cli.parse(ValidateFlags, argv, prog="python validate.py", description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
