"""From a command line to a run: the method is named first, its flags follow."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from distillation.run import Method, run_method
from methods import METHODS, find_method
from utils import cli


def parse(
    argv: list[str] | None,
    default: str,
    *,
    description: str,
    among: Sequence[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> tuple[Method, Any]:
    """The method that `--method` names, and its flags.

    Without it that is `default`, or where `--recipe` names a recipe of other methods the first of these.
    `among` names the methods that the command offers, all of them when empty. The rest is as in
    `utils.cli.parse`.
    """
    argv = sys.argv[1:] if argv is None else argv
    offered = {name: row for name, row in METHODS.items() if not among or name in among}
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--method")
    peek.add_argument("--recipe")
    try:
        peeked = peek.parse_known_args(argv)[0]
    except argparse.ArgumentError:  # no value: the real parser says so
        peeked = argparse.Namespace(method=default, recipe=None)
    if peeked.method is None and (peeked.recipe or "").lower() not in METHODS[default].recipes:
        with_it = (known for known, r in offered.items() if (peeked.recipe or "").lower() in r.recipes)
        default = next(with_it, default)
    name = peeked.method or default
    row = offered.get(name.lower(), METHODS[default])
    if peeked.method is not None and name.lower() in offered:
        options["prog"] = f"{options['prog']} --method {name}"  # whose flags --help lists
    names = tuple(r.name for r in offered.values()) if among else tuple(offered)
    default = offered[default].name if among else default
    about = "\n".join(f"  {known:8} {r.about}" for known, r in offered.items())
    parsed = cli.parse(
        row.flags,
        argv,
        description=f"{description}\nmethods:\n{about}",
        recipes=row.recipes or None,
        choices={"method": names, "recipe": tuple(row.recipes) or ("published",)},
        defaults={**defaults, "method": default},
        torchrun=True,
        **options,
    )
    return find_method(parsed.method), dataclasses.replace(parsed, method=row.name)


def distil(argv: list[str] | None, default: str, **options: Any) -> int:
    """Run the method as the flags say, give the exit code; arguments as for `parse`."""
    return run_method(*parse(argv, default, **options))
