"""Write {folder}/report.html: one page of a run, or of all runs below a folder.

For example `python -m utils.report results/EXP`, or `python -m utils.report results`.
"""

from pathlib import Path

from evaluation.report import ReportFlags, report
from utils import cli
from utils.errors import entry_point

__all__ = ["ReportFlags", "report"]


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Write one page per folder that is given."""
    parser = cli.Parser(prog="python -m utils.report", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="a run such as results/EXP, or a folder of runs")
    cli.add_flags(parser, ReportFlags)
    args = vars(parser.parse_args(argv))
    folders = args.pop("folder")
    for folder in folders:
        print(report(folder, cli.take(ReportFlags, args)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
