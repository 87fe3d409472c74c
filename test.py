"""Pre-train on a synthetic set and transfer to target data sets.

python test.py --source_data_name cifar100 --target_data_name full --method krr_st --test_model base
"""

from __future__ import annotations

import sys

from evaluation.transfer import TestFlags, run_transfer
from utils import cli
from utils.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags and measure."""
    return run_transfer(cli.parse(TestFlags, argv, prog="python test.py", description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
