"""The card of a set on the Hugging Face Hub: a README.md made from the set and the run it comes from."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.specs import KRR_SPECS
from data.synthetic.parquet import PARQUET
from data.untrusted import read_json
from utils import checkpoint
from utils.cli import flag
from utils.errors import UserError
from utils.run_folder import numbers

if TYPE_CHECKING:
    from data.synthetic.set import SyntheticSet

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_IN_WORDS = {"epoch": "epochs", "iteration": "steps", "opt": "optimizer"}  # of the flags
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K"}  # in the Hub's words


@dataclass(frozen=True)
class CardFlags:
    """What the card of a set says beside what is known from its run."""

    license: str = flag("unknown", "of --form hf: the set's licence, as the Hub calls it (cc-by-4.0, other)")
    results: tuple[Path, ...] = flag(
        (),
        "of --form hf: results.json files of validate.py, test.py and others, for this set or to compare it "
        "with: the card shows their tables",
    )


def read_results(path: Path, synthetic: SyntheticSet) -> tuple[str, str, dict[str, Any] | None]:
    """Of a results.json: a heading, its table, the recipe of networks that were trained on this very set.

    A UserError for a file that is none.
    """
    if not path.exists():
        raise UserError(f"--results {path} does not exist")
    raw = read_json(path)
    cells, flags, table = (raw.get(key) for key in ("cells", "flags", "table"))
    usable = isinstance(cells, list) and all(isinstance(cell, dict) for cell in cells)
    if not usable or not isinstance(flags, dict) or not isinstance(table, str):
        raise UserError(f"{path} holds no table of results; expected what validate.py or test.py writes")
    digests = [raw.get("fingerprint"), *(cell.get("synthetic_set") for cell in cells)]
    if checkpoint.fingerprint(synthetic.images, synthetic.targets) not in digests:
        return f"To compare, {flags.get('method') or 'without pre-training'}", table, None
    found = [cell.get(key) for cell in cells for key in ("pretraining", "training")]
    return "This set", table, next((record for record in found if isinstance(record, dict)), {})


def write_card(synthetic: SyntheticSet, source: Path | None = None, flags: CardFlags | None = None) -> str:
    """The text of README.md for a set that was read from `source`, a run's folder or a file in it."""
    import jinja2  # slow to import

    flags, folder, run, results = flags or CardFlags(), source, {}, {}
    if source is not None:
        folder = source if source.is_dir() else source.parent
        run, results = (read_json(folder / name) for name in ("config.json", "results.json"))
    settings = run.get("flags") if isinstance(run.get("flags"), dict) else {}
    facts = {
        "method": settings.get("method") or synthetic.info.get("method"),
        "source": synthetic.data_name,
        "target model": _shared(settings.get("target_model")),
        "seed": run.get("seed", synthetic.info.get("seed")),
        "images": len(synthetic.plain()),
        "views of each": None if synthetic.views is None else synthetic.views.each,
        "licence": flags.license,
    }
    facts = {name: _line(value) for name, value in facts.items() if value is not None}
    measured = [read_results(path, synthetic) for path in flags.results]
    try:
        found = list(_numbers(results))
    except (OverflowError, RecursionError):
        raise UserError(f"{folder / 'results.json'} holds numbers that no run writes") from None
    views = "" if synthetic.views is None else f" in {synthetic.views.each} views each"
    title = f"{len(synthetic.plain())} images{views} from {facts.get('source', 'an unknown source')}"
    title += f" by {facts['method']}" if "method" in facts else ""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["plain"] = _plain
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=_front_matter(synthetic, title, facts),
        title=title,
        facts=facts,
        shape=" x ".join(map(str, synthetic.images.shape[1:])),
        soft=synthetic.soft,
        width=synthetic.targets.shape[-1],
        label="target" if synthetic.soft else "label",
        mean=list(synthetic.stats.mean),
        std=list(synthetic.stats.std),
        how_to_train=_how_to_train(
            synthetic, settings, [recipe for *_, recipe in measured if recipe is not None]
        ),
        tensors=sorted(synthetic.training.pack()[0]),
        commands=_commands(synthetic, facts, settings),
        tables=[(heading, _spaced(table)) for heading, table, _ in measured],
        numbers=found,
        command=_shared(run.get("command")),
        settings={k: _shared(v) for k, v in settings.items() if v is not None},
    )


def _front_matter(synthetic: SyntheticSet, title: str, facts: dict[str, str]) -> str:
    """The YAML that the Hub reads."""
    import yaml  # comes with datasets, as what reads the rest of the form does

    method = [facts["method"].lower()] if "method" in facts else []
    size = next((words for limit, words in _SIZES.items() if len(synthetic) < limit), "100K<n<1M")
    files = [{"split": "train", "path": PARQUET.as_posix()}]
    pixels = {"array3_d": {"shape": list(synthetic.images.shape[1:]), "dtype": "float32"}}
    label = {"name": "label", "dtype": "int64"}
    if synthetic.soft:
        label = {"name": "target", "sequence": "float32", "length": synthetic.targets.shape[1]}
    columns = [{"name": "image", "dtype": "image"}, {"name": "pixels", "dtype": pixels}, label]
    said = {
        "license": facts["licence"],
        "pretty_name": title,
        "task_categories": ["image-feature-extraction" if synthetic.soft else "image-classification"],
        "tags": ["dataset-distillation", "synthetic", *method],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"features": columns},
    }
    return yaml.safe_dump(said, sort_keys=False)


def _how_to_train(
    synthetic: SyntheticSet, settings: dict[str, Any], recipes: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the set says itself, over the recipe it was measured with, or else that of its run."""
    loss = "mean squared error to the targets" if synthetic.soft else "cross-entropy with the labels"
    of_run = {_IN_WORDS.get(k, k): v for k, v in _of_pretraining(settings).items()}
    found = recipes[0] if recipes else {"loss": loss, **of_run}
    training = synthetic.training
    found = {k: v for k, v in found.items() if v not in (None, 0, [], "none")} | training.record()
    if training.whitening is not None:
        found["whitening"] = "of all images, those of tests included: (x - mean) @ matrix, x flattened"
    if training.targets is not None:
        found["targets"] = "are learned as (y - mean) / std, and the network's outputs brought back"
    return found


def _of_pretraining(settings: dict[str, Any]) -> dict[str, Any]:
    """What the flags of a run say of training on its set, without their prefix."""
    return {k[4:]: v for k, v in settings.items() if re.fullmatch(r"pre_\w+", k) and v is not None}


def _commands(synthetic: SyntheticSet, facts: dict[str, str], settings: dict[str, Any]) -> list[str]:
    """What judges the set, and what pre-trains a network on it."""
    source, method = (facts.get(name, name.upper()) for name in ("source", "method"))
    height, width = synthetic.images.shape[2:]
    size = ["--img_size", str(height)] if height == width else []
    known = {
        k: [f"--{k}", settings[k]] if isinstance(settings.get(k), str) else []
        for k in ("model", "test_model")
    }
    listed = source.lower() if source.lower() in KRR_SPECS else source  # the other family writes CIFAR10
    use = ["--source_data_name", listed, "--synthetic_path", "FOLDER", *size]
    use += [*known["test_model"], "--method", method.lower() if "method" in facts else method]
    for name, value in _of_pretraining(settings).items():
        if isinstance(value, bool):
            use.append(f"--pre_{name}" if value else f"--no-pre_{name}")
        elif isinstance(value, (str, int, float)):
            use += [f"--pre_{name}", _line(value)]
    commands = [["test.py", *use], ["-m", "evaluation.export", *use, "--out", "ENCODER"]]
    if not synthetic.soft:
        flags = ["--normalize_data", "--dsa", "--dataset", source, *size, *known["model"], "--method", method]
        commands.insert(0, ["validate.py", *flags, "--synthesis_data_path", "FOLDER"])
    return [shlex.join(["python", *command]) for command in commands]


def _numbers(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The numbers in a run's results, also those of objects in lists."""
    for name, value in numbers(results).items():
        yield name, f"{value:.6g}"
    for name, value in results.items():
        for item in value if isinstance(value, list) else ():
            for key, number in numbers(item).items() if isinstance(item, dict) else ():
                which = item.get("network") or f"step {item.get('step')}"
                yield f"{name}, {which}: {key}", f"{number:.6g}"


def _spaced(table: str) -> str:
    """A table and the lines below it, each of these as a paragraph."""
    lines = table.splitlines()
    return "\n".join(line if line.startswith("|") else f"\n{line}" for line in lines)


def _shared(value: Any) -> Any:
    """A setting or a command as the public sees it: of places on the machine of the run, their last names."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError):  # quotes that do not match: it is no command
        return shlex.join(Path(w).name if Path(w).is_absolute() else w for w in shlex.split(_line(value)))
    return _line(value)


def _line(value: Any) -> str:
    """A value in one line."""
    return " ".join(str(value).split())


def _plain(value: Any) -> str:
    """A value in one cell of a table."""
    return _line(value).replace("|", "\\|")
