"""Flags as frozen dataclasses: one field per flag, with its help text, range and choices."""

import argparse
import dataclasses
import functools
import math
import operator
import shlex
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from utils.distributed import launched
from utils.errors import UserError, entry_point

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
    instead_of: str | None = None,
    needs: str | None = None,
) -> Any:
    """Declare one flag of a config dataclass; `help` says meaning and unit, `also` are further names.

    A default of None means "resolved later" (preset, autodetect). `identity` is False for what only
    says where, how fast or how verbosely the same thing is computed: runs that differ in it are one.
    `instead_of` names the flag whose place this one takes: both together are refused. `needs` names the
    one without which this one is not used, as a line then says.
    """
    metadata = dict(help=help, choices=choices, also=also, identity=identity, instead_of=instead_of)
    metadata |= dict(needs=needs, minimum=minimum, above=above, maximum=maximum)
    return dataclasses.field(default=default, metadata=metadata)


# A flag of where, how fast or how verbosely: runs that differ in it are the same run.
how = functools.partial(flag, identity=False)


def same_flag(config_class: type, name: str, **changes: Any) -> Any:
    """Declare a flag that another config has, with `changes`."""
    original = config_class.__dataclass_fields__[name]
    return flag(**{"default": original.default, **original.metadata, **changes})


@dataclasses.dataclass(frozen=True)
class DeviceFlags:
    """Where a command computes."""

    device: str | None = how(None, "cpu, cuda, cuda:N or mps; default: the best there is")
    gpu_id: int = how(0, "which GPU, where CUDA is present", minimum=0, also=("gpu",))


class Parser(argparse.ArgumentParser):
    """argparse whose error is one line; --help has the rest."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _whole(text: str) -> int:
    """Published command lines write counts as 1e3 or 256.0, too."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


LARGEST = 2**31 - 1  # of a whole number without a maximum of its own
SEED = dict(minimum=0, maximum=2**63 - 1)
_LIMITS = {
    "minimum": ("at least", operator.ge),
    "above": ("greater than", operator.gt),
    "maximum": ("at most", operator.le),
}


def _number(kind: type, metadata: Mapping[str, Any]) -> Callable[[str], float]:
    """Text to an int or a float within the limits of a flag."""
    limits = {name: metadata[name] for name in _LIMITS}
    if kind is int and limits["maximum"] is None:
        limits["maximum"] = LARGEST

    def convert(text: str) -> float:
        try:
            value = _whole(text) if kind is int else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, got {text!r}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
        for name, (words, holds) in _LIMITS.items():
            if limits[name] is not None and not holds(value, limits[name]):
                raise argparse.ArgumentTypeError(f"must be {words} {limits[name]}, got {text}")
        return value

    return convert


def _spelling(kind: type, allowed: tuple[str, ...] | None) -> Callable[[str], Any]:
    """Text to a name, matched without case, or to a path, where ~ is the home folder."""
    if kind is Path:
        return lambda text: Path(text).expanduser()
    known = {name.lower(): name for name in allowed or ()}
    return lambda text: known.get(text.lower()) or kind(text)


# What --help shows first.
_FIRST = ("method", "recipe", "data_name", "dataset", "num_images", "ipc")


def _place(field: dataclasses.Field) -> tuple[bool, bool]:
    """Where a flag stands in --help: what is made from what, all that decides the result, then the rest."""
    named = field.metadata["instead_of"] or field.name
    return named not in _FIRST, not field.metadata["identity"]


def add_flags(
    parser: argparse.ArgumentParser,
    config_class: type,
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    negatable: Collection[str] = (),
) -> None:
    """Give a parser the flags of `config_class`; `choices` and `defaults` as for `parse`.

    A switch whose default is None, or that is one of `negatable`, has a --no-... beside it.
    """
    hints, groups = typing.get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        if other := field.metadata["instead_of"]:
            groups[field.name] = groups.setdefault(other, parser.add_mutually_exclusive_group())
    for field in sorted(dataclasses.fields(config_class), key=_place):
        hint, default = hints[field.name], defaults.get(field.name, field.default)
        kind, *_ = typing.get_args(hint) or [hint]  # of `int | None`, of `tuple[int, ...]`
        several = typing.get_origin(hint) is tuple
        allowed = choices.get(field.name, field.metadata["choices"])
        either = default is None or field.name in negatable
        switch = argparse.BooleanOptionalAction if either else "store_true"
        options: dict[str, Any] = dict(action=switch)
        if kind is not bool:
            number, metavar = kind in (int, float), None if allowed else kind.__name__.upper()
            convert = _number(kind, field.metadata) if number else _spelling(kind, allowed)
            options = dict(type=convert, nargs="+" if several else None, choices=allowed, metavar=metavar)
        plain = " ".join(map(str, default or ())) if several else default
        shown = "" if default in (None, ()) or kind is bool else f" [{plain}]"
        help_text = (field.metadata["help"] + shown).replace("%", "%%")
        names = [f"--{name}" for name in (field.name, *field.metadata["also"])]
        owner = groups.get(field.name, parser)
        if owner is not parser and kind in (int, float) and default is not None:
            default = str(default)  # argparse tells a typed 1 from the default 1 by identity alone
        owner.add_argument(*names, dest=field.name, default=default, help=help_text, **options)


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
    torchrun: bool = False,
) -> C:
    """Parse `argv` (default: the process's) into one frozen `config_class`.

    `prog` and `description` are for --help. `recipes` are what each value of `--recipe` puts in place
    of other flags' defaults; `choices` and `defaults` belong to flags whose declaration cannot know
    them; `no_effect` are flags of published command lines that change nothing here, and why. `torchrun`
    says that the command may run in several processes; a UserError where it does, and may not.
    """
    if launched() and not torchrun:
        raise UserError(f"{prog} runs in one process; start it without torchrun")
    plain_help = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=plain_help)
    turned_on = {k for recipe in (recipes or {}).values() for k, v in recipe.items() if v is True}
    add_flags(parser, config_class, choices, defaults, turned_on)
    for name, why in no_effect.items():
        parser.add_argument(f"--{name}", nargs="?", default=argparse.SUPPRESS, help=f"no effect: {why}")
    given, fields = vars(parser.parse_args(argv)), config_class.__dataclass_fields__
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(fields))))
    if recipes is not None:
        # A flag of the recipe that takes another's place yields where the other was typed.
        places = {name: field.metadata["instead_of"] for name, field in fields.items()}
        recipe = recipes[given["recipe"]].items()
        recipe = {k: v for k, v in recipe if places[k] is None or typed[places[k]] is None}
        parser.set_defaults(**recipe)
        given = vars(parser.parse_args(argv))
    for name, why in no_effect.items():
        if name in given:
            print(f"--{name} has no effect: {why}")
            del given[name]
    idle: dict[str, list[str]] = {}
    for name, other in ((name, field.metadata["needs"]) for name, field in fields.items()):
        if typed[name] is not None and other in fields and given[other] == fields[other].default:
            idle.setdefault(other, []).append(f"--{name}")
    for other, names in idle.items():
        print(f"not used without --{other}: {', '.join(names)}")
    return take(config_class, given)


def take(config_class: type[C], given: Mapping[str, Any]) -> C:
    """The flags of one class out of all that were parsed, by name."""
    values = {name: given[name] for name in config_class.__dataclass_fields__}
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def command(config_class: type, **options: Any) -> Callable[[Callable[[Any], int]], Callable[..., int]]:
    """Decorate a `main(flags)`: it becomes `main(argv)` of a command; `options` as for `parse`."""

    def decorate(main: Callable[[Any], int]) -> Callable[..., int]:
        @entry_point
        @functools.wraps(main)
        def parsed(argv: list[str] | None = None) -> int:
            return main(parse(config_class, argv, **options))

        return parsed

    return decorate


# Flags that no command needs that repeats a run.
_ONCE = ("dry_run", "cost", "overwrite", "resume")


def command_line(
    program: str, config: Any, defaults: Mapping[str, Any] = MappingProxyType({}), **given: Any
) -> str:
    """The command that gives `config`, in shell syntax; flags at their defaults are left out.

    `program` is as one types it (`python train.py`), `defaults` are as for `parse`, and `given` takes the
    place of values of `config`, None that of no value. A flag that has taken another's place stands alone.
    """
    values = {**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, **given}
    words = shlex.split(program)
    replaced = {
        other
        for field in dataclasses.fields(config)
        if (other := field.metadata["instead_of"]) and values[field.name]
    }
    for field in dataclasses.fields(config):
        name, value, default = field.name, values[field.name], defaults.get(field.name, field.default)
        if value is None or value == default or name in replaced or name in _ONCE:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def as_words(**flags: Any) -> list[str]:
    """Flags as words of a command: True stands for a switch, None is left out."""
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def typed(program: str, **flags: Any) -> str:
    """A command as one types it, in shell syntax: `program` (`python -m krr_st.target`) with these flags."""
    return shlex.join([*shlex.split(program), *as_words(**flags)])


def as_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values (paths become strings)."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def identity(config: Any) -> dict[str, Any]:
    """The flags that say which run this is, as plain JSON values."""
    fields = config.__dataclass_fields__
    return {k: v for k, v in as_json(config).items() if fields[k].metadata["identity"]}
