"""Distil a teacher into a student on synthetic images alone (target data-free, Table 4).

python test_kd.py --source_data_name tinyimagenet --method krr_st --test_model base
"""

from __future__ import annotations

import sys

from evaluation.kd import KdFlags, run_kd
from utils import cli
from utils.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags and measure."""
    return run_kd(cli.parse(KdFlags, argv, prog="python test_kd.py", description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
