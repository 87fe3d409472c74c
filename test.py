"""Pre-train on a synthetic set and transfer to target data sets.

python test.py --source_data_name cifar100 --target_data_name full --method krr_st --test_model base
"""

from evaluation.transfer import TestFlags, Transfer
from utils.cli import command


@command(TestFlags, prog="python test.py", description=__doc__)
def main(flags: TestFlags) -> int:
    """Measure."""
    return Transfer(flags).run()


if __name__ == "__main__":
    raise SystemExit(main())
