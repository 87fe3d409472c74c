"""Commands of the project that run in this process, as a user would type them."""

import importlib
import importlib.util
import os
import runpy
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_command(command: str, folder: Path = Path(".")) -> int:
    """Print what follows `python` in a command line, and run it in `folder`; returns its exit code.

    It has said itself what went wrong. In this process: a dozen starts of PyTorch would take half a
    minute.
    """
    print(f"$ python {command}", flush=True)
    argv, before, places = shlex.split(command), Path.cwd(), list(sys.path)
    try:
        os.chdir(folder)
        sys.path.insert(0, str(ROOT))  # whatever folder the command runs in
        if argv[0] != "-m":
            return runpy.run_path(str(ROOT / argv[0]))["main"](argv[1:])
        package = importlib.util.find_spec(argv[1]).submodule_search_locations is not None
        module = importlib.import_module(f"{argv[1]}.__main__" if package else argv[1])
        return module.main(argv[2:])
    except SystemExit as ended:  # of argparse
        return ended.code
    finally:
        os.chdir(before)
        sys.path[:] = places
