"""Distil a teacher into a student on synthetic images alone (target data-free, Table 4).

python test_kd.py --source_data_name tinyimagenet --method krr_st --test_model base
"""

from evaluation.kd import Distillation, KdFlags
from utils.cli import command


@command(KdFlags, prog="python test_kd.py", description=__doc__)
def main(flags: KdFlags) -> int:
    """Measure."""
    return Distillation(flags).run()


if __name__ == "__main__":
    raise SystemExit(main())
