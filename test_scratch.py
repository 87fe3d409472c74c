"""Train target data sets from random initialisation: the row every method is compared with.

python test_scratch.py --source_data_name cifar100 --target_data_name full
"""

from __future__ import annotations

import sys

from evaluation.transfer import ScratchFlags, run_transfer
from utils import cli
from utils.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags and measure."""
    flags = cli.parse(
        ScratchFlags,
        argv,
        prog="python test_scratch.py",
        description=__doc__,
        no_effect={"synthetic_data_dir": "a network from scratch has seen no synthetic set"},
    )
    return run_transfer(flags)


if __name__ == "__main__":
    sys.exit(main())
