"""Distil a labelled image set by DC, DSA or DM, with CLoM if wanted.

python methods/DC_DSA_DM/main.py --method DC --dataset CIFAR10 --model ConvNet --ipc 10
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # started from any folder
    sys.path.insert(0, ROOT)

from methods.command import distil  # noqa: E402
from utils.errors import entry_point  # noqa: E402


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags and distil."""
    return distil(
        argv, "dc", prog="python methods/DC_DSA_DM/main.py", description=__doc__, among=("dc", "dsa", "dm")
    )


if __name__ == "__main__":
    sys.exit(main())
