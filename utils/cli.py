"""Flags as frozen dataclasses: one field per flag, with its help text, range and choices."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

C = TypeVar("C")


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    also: tuple[str, ...] = (),
    identity: bool = True,
) -> Any:
    """Declare one flag of a config dataclass.

    Args:
        default: value when the flag is absent; None means "resolved later" (preset, autodetect).
        help: one line with unit and meaning, shown by --help.
        choices: the finite set of allowed strings.
        minimum: smallest allowed number (inclusive).
        above: exclusive lower bound.
        maximum: largest allowed number (inclusive).
        also: further names of the flag.
        identity: whether two runs that differ in it are different runs; False for what only says
            where, how fast or how verbosely the same thing is computed.
    """
    metadata = dict(
        help=help,
        choices=choices,
        minimum=minimum,
        above=above,
        maximum=maximum,
        also=also,
        identity=identity,
    )
    return dataclasses.field(default=default, metadata=metadata)


def same_flag(config_class: type, name: str, **changes: Any) -> Any:
    """Declare a flag that another config has: its default, range and help, but for `changes`."""
    original = config_class.__dataclass_fields__[name]
    return flag(**{"default": original.default, **original.metadata, **changes})


@dataclasses.dataclass(frozen=True)
class DeviceFlags:
    """Where a command computes."""

    device: str | None = flag(None, "cpu, cuda, cuda:N or mps; default: the best there is", identity=False)
    gpu_id: int = flag(0, "which GPU, where CUDA is present", minimum=0, also=("gpu",), identity=False)


class _Parser(argparse.ArgumentParser):
    """argparse whose error is one line; --help has the rest."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _base_type(annotation: Any) -> tuple[type, bool]:
    """`int | None` -> (int, False); `tuple[int, ...]` -> (int, True): one or more values."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _number(kind: type, metadata: Any) -> Any:
    low, above, high = metadata["minimum"], metadata["above"], metadata["maximum"]

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            if kind is int:  # published command lines write counts as 1e3 or 256.0
                try:
                    as_float = float(text)
                except ValueError:
                    as_float = 0.5
                if as_float.is_integer():
                    return convert(str(int(as_float)))
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, got {text!r}") from None
        if value != value or value in (float("inf"), float("-inf")):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"must be greater than {above}, got {text}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, got {text}")
        return value

    return convert


def _spelling(kind: type, allowed: tuple[str, ...] | None) -> Any:
    """Names are matched without case."""
    known = {name.lower(): name for name in allowed or ()}
    return kind if not known else lambda text: known.get(text.lower(), text)


def build_parser(
    config_class: type,
    *,
    prog: str,
    description: str,
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> argparse.ArgumentParser:
    """Make the parser of a config dataclass; every field is one `--flag`.

    Args:
        config_class: the flags.
        prog: the command, for --help.
        description: what it does, for --help.
        choices: allowed strings of flags whose declaration cannot know them.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, several = _base_type(hints[field.name])
        default = " ".join(map(str, field.default or ())) if several else field.default
        shown = "" if field.default is None or kind is bool else f" [{default}]"
        help_text = (field.metadata["help"] + shown).replace("%", "%%")
        names = [f"--{name}" for name in (field.name, *field.metadata["also"])]
        common = dict(dest=field.name, default=field.default, help=help_text)
        if kind is bool:
            parser.add_argument(*names, action="store_true", **common)
            continue
        allowed = choices.get(field.name, field.metadata["choices"])
        parser.add_argument(
            *names,
            **common,
            type=_number(kind, field.metadata) if kind in (int, float) else _spelling(kind, allowed),
            nargs="+" if several else None,
            choices=allowed,
            metavar=None if allowed else kind.__name__.upper(),
        )
    return parser


def parse(
    config_class: type[C],
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    no_effect: Mapping[str, str] = MappingProxyType({}),
) -> C:
    """Parse `argv` (default: the process's) into one frozen `config_class`.

    Args:
        config_class: the flags.
        argv: arguments after the command.
        prog: the command, for --help.
        description: what it does, for --help.
        recipes: what each value of `--recipe` puts in place of other flags' defaults; explicit
            flags take precedence.
        choices: as in `build_parser`.
        defaults: in place of the declared ones.
        no_effect: flags of published command lines that change nothing here, and why; one that is
            given is answered with one line.

    Raises:
        SystemExit: code 2 after one line for a bad flag, code 0 after --help.
    """
    parser = build_parser(config_class, prog=prog, description=description, choices=choices)
    parser.set_defaults(**defaults)
    for name, why in no_effect.items():
        parser.add_argument(f"--{name}", nargs="?", default=argparse.SUPPRESS, help=f"no effect: {why}")
    given = vars(parser.parse_args(argv))
    if recipes is not None:
        parser.set_defaults(**recipes[given["recipe"]])
        given = vars(parser.parse_args(argv))
    for name, why in no_effect.items():
        if name in given:
            print(f"--{name} has no effect: {why}")
            del given[name]
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def as_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values (paths become strings)."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def identity(config: Any) -> dict[str, Any]:
    """The flags that say which run this is, as plain JSON values."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    return {k: v for k, v in as_json(config).items() if fields[k].metadata["identity"]}
