"""Train target data sets from random initialisation: the row every method is compared with.

python test_scratch.py --source_data_name cifar100 --target_data_name full
"""

from evaluation.transfer import ScratchFlags, Transfer
from utils.cli import command

UNUSED = {"synthetic_data_dir": "a network from scratch has seen no synthetic set"}


@command(ScratchFlags, prog="python test_scratch.py", description=__doc__, no_effect=UNUSED)
def main(flags: ScratchFlags) -> int:
    """Measure."""
    return Transfer(flags).run()


if __name__ == "__main__":
    raise SystemExit(main())
