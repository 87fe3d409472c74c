"""`python -m clom.tables [--run]`: DC, DSA and DM with and without CLoM, ours beside published.

Rows are the methods without CLoM and with each of its forms, columns the data sets and images per
class. Finished cells are collected from {log_dir}/results.jsonl into Markdown, CSV and LaTeX; those
that were not run show as a dash. With --run they are run first, cheapest first: a restart skips
what is finished and resumes what was begun. `--workers` and `--slurm` run several at a time.

A cell is one experiment: one distilled set and the `num_eval` networks trained on it, identified by
main.py's flags, the data and the pre-trained models. ± is the population standard deviation over
all networks of all experiments together, as the published code prints it; n in the CSV file is
their number.
"""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clom.config import PREFIX, CellFlags, DistillFlags
from clom.pool import find_checkpoints
from clom.published import FULL_DATA, PUBLISHED, RANDOM
from clom.setup import evaluation_recipe
from clom.source import find_data_dir, load_data
from data.prepared import find_spec
from data.specs import DC_SPECS
from distillation.run import resolved, run_method
from evaluation.jobs import Job
from evaluation.measure import CellStore, read_cells
from evaluation.slurm import JobFlags
from evaluation.tables import NOTE, RESULTS, Place, Published, make_table, with_published_file
from methods import METHODS, find_method
from models import eval_pool, get_network
from utils import checkpoint, cli
from utils.cli import SEED, flag
from utils.cost import forward_flops
from utils.errors import UserError, entry_point, pick
from utils.run_folder import read_log


def labelled() -> tuple[str, ...]:
    """The names of the methods of this family."""
    return tuple(row.name for row in METHODS.values() if issubclass(row.flags, DistillFlags))


# Variant -> main.py's flags that it sets.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": dict(CLoM=False),
    "ce": dict(CLoM=True, CLoM_distance="ce"),
    "ce_classification": dict(CLoM=True, CLoM_distance="ce", CLoM_ce_form="classification"),
    "cos": dict(CLoM=True, CLoM_distance="cos"),
}
# Flags that `steps_scale` multiplies.
LENGTH = ("Iteration", "epoch_eval_train")
DEFAULT_ALPHA = DistillFlags().alphas[0]


@dataclass(frozen=True)
class TablesFlags(JobFlags, CellFlags):
    """Flags of clom.tables; those of main.py's names mean the same for every cell."""

    run: bool = flag(False, "first run what is missing, cheapest first")
    datasets: tuple[str, ...] = flag(("CIFAR10", "CIFAR100"), "data sets: columns, with ipcs")
    ipcs: tuple[int, ...] = flag((1, 10, 50), "images per class: columns, with datasets", minimum=1)
    methods: tuple[str, ...] = flag(labelled(), "distillers: rows, with variants")
    variants: tuple[str, ...] = flag(
        tuple(VARIANTS),
        "none (without CLoM), ce, ce_classification, cos; a weight other than 1000 follows a colon: cos:100",
    )
    num_exp: int = flag(3, "experiments per cell, each with a seed of its own", minimum=1)
    seed: int = flag(0, "seed of the first experiment; the next ones add 1", **SEED)
    steps_scale: float = flag(
        1.0, "factor on iterations and evaluation epochs; shortened cells are marked †", above=0
    )
    log_dir: Path = flag(Path("./test_log/clom"), "folder of the cells and runs; the table is written there")
    published: Path | None = flag(
        None, "JSON file of published numbers: {data set: {row: {ipc: [mean, std]}}}"
    )
    source_dataset: str | None = flag(
        None, "what the models of cos were trained on; default: the cell's data set"
    )

    def __post_init__(self) -> None:
        """Names of listed sets get their published spelling, as in main.py."""
        object.__setattr__(self, "datasets", tuple(map(DC_SPECS.spelling, self.datasets)))


@dataclass(frozen=True)
class Variant:
    """One of VARIANTS with the weight of CLoM."""

    name: str
    alpha: float = DEFAULT_ALPHA

    @property
    def heading(self) -> str:
        """Empty without CLoM; the weight is named where it is not the default."""
        text = "" if self.name == "none" else f"CLoM {self.name.replace('_', ', ')}"
        return text if self.alpha == DEFAULT_ALPHA else f"{text}, α {self.alpha:g}"


def parse_variant(text: str) -> Variant:
    """`cos:100` -> cos with weight 100; a UserError for an unknown name or a bad weight."""
    name, colon, weight = text.partition(":")
    pick(VARIANTS, name, "--variants")
    try:
        alpha = float(weight) if colon else DEFAULT_ALPHA
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha < float("inf") or (colon and name == "none"):
        raise UserError(f"--variants {text}: expected NAME or, with CLoM, NAME:WEIGHT (cos:100)")
    return Variant(name, alpha)


@dataclass(frozen=True)
class Spot:
    """One cell of the printed table."""

    flags: TablesFlags
    dataset: str
    ipc: int
    method: str
    variant: Variant
    start: bool = False  # whether its value is that of the images before distillation

    @property
    def row(self) -> str:
        return RANDOM if self.start else " + ".join(filter(None, (self.method, self.variant.heading)))

    @property
    def column(self) -> str:
        return f"{self.dataset}, {self.ipc} ipc"

    def shown(self, seed: int) -> str:
        """The name of one experiment."""
        return f"{self.column}: {self.row}, seed {seed}"

    @functools.cached_property
    def run(self) -> DistillFlags:
        """main.py's flags, resolved and shortened by `steps_scale`, without a seed.

        A UserError for flags that do not fit together.
        """
        method, variant = find_method(self.method), VARIANTS[self.variant.name]
        # What is not used must not make another cell.
        used = [f for f in dataclasses.fields(CellFlags) if variant["CLoM"] or f.metadata["needs"] != "CLoM"]
        shared = {f.name: getattr(self.flags, f.name) for f in used}
        if variant.get("CLoM_distance") == "ce":
            shared["source_dataset"] = self.dataset
        shared |= {k: v for k, v in self.published.items() if shared.get(k) is None}
        for name in LENGTH:
            shared[name] = shared[name] and max(1, round(self.flags.steps_scale * shared[name]))
        shared |= dict(dataset=self.dataset, ipc=self.ipc, method=method.name)
        shared |= dict(alphas=(self.variant.alpha,), eval_interval=max(1, shared["Iteration"]))
        return resolved(method, method.flags(**shared, **variant))

    @functools.cached_property
    def published(self) -> dict[str, Any]:
        """The published settings of the cell: length, evaluation, and what the method's row says."""
        method = find_method(self.method)
        default = resolved(method, method.flags(method=method.name, dataset=self.dataset))
        epochs = evaluation_recipe(method, default, default.model).epochs - 1  # epochs 0 to E
        length = zip(LENGTH, (default.Iteration, epochs), strict=True)
        return {**dict(length), **method.published(self.dataset, self.ipc)}

    @property
    def is_published(self) -> bool:
        """Whether all but the length is as in the published cell; shortened cells are marked."""
        sizes = DC_SPECS[self.dataset].sizes if self.dataset in DC_SPECS else ()
        names = ("model", "init") if self.start else ("model", "init", "lr_img", "batch_real")
        mine, theirs = self.run, dataclasses.replace(self, flags=TablesFlags()).run
        own_size = self.flags.img_size in (None, *sizes)
        return own_size and all(getattr(mine, name) == getattr(theirs, name) for name in names)

    def place(self, known: Published) -> Place:
        """Its cells are known by their flags; of other data or models the latest count."""
        shortened = any(getattr(self.run, name) < self.published[name] for name in LENGTH)
        return Place(
            self.row,
            self.column,
            settings(self.run),
            field="start_accuracies" if self.start else "accuracies",
            origin=("data", "teachers"),
            shortened=lambda cell: shortened,
            published=known.get((self.dataset, self.row, str(self.ipc))) if self.is_published else None,
        )


def check_datasets(flags: TablesFlags) -> None:
    """Raise a UserError for a data set that is not listed, prepared or in a finished cell."""
    measured = {cell.get("dataset") for cell in read_cells(flags.log_dir / RESULTS)}
    for dataset in set(flags.datasets) - measured:
        find_spec(dataset, find_data_dir(DistillFlags(dataset=dataset, data_path=flags.data_path)), "dc")


def spots(flags: TablesFlags) -> list[Spot]:
    """All cells in reading order, random real images first where a method starts from them.

    A UserError for a bad variant, or one that the pool of models does not fit.
    """
    variants = [parse_variant(text) for text in dict.fromkeys(flags.variants)]
    without_classes = [name for name in flags.models_pool if name.startswith(PREFIX)]
    if without_classes and any(VARIANTS[v.name].get("CLoM_distance") == "ce" for v in variants):
        raise UserError(f"{without_classes[0]} has no class labels: use --variants none cos")
    methods, plain = list(dict.fromkeys(flags.methods)), Variant("none")
    rows = [(method, variant, False) for method in methods for variant in variants]
    real = [m for m in methods if (flags.init or find_method(m).defaults["init"]) == "real"]
    if real and plain in variants:
        rows.insert(0, (real[0], plain, True))
    return [
        Spot(flags, dataset, ipc, method, variant, start)
        for method, variant, start in rows
        for dataset in dict.fromkeys(flags.datasets)
        for ipc in dict.fromkeys(flags.ipcs)
    ]


def settings(run: DistillFlags) -> dict[str, Any]:
    """What identifies a cell, except seed, data and pre-trained models; plain JSON values."""
    values = cli.identity(run)
    del values["pretrained_path"], values["eval_interval"]
    return json.loads(json.dumps(values))


def cell_key(run: DistillFlags, seed: int) -> dict[str, Any]:
    """All that identifies a cell; a UserError where data or pre-trained models cannot be read."""
    data, _, _ = data_facts(run.dataset, run.data_path, run.img_size)
    teachers = teacher_fingerprints(run) if run.CLoM else []
    return {**settings(run), "seed": seed, "data": data, "teachers": teachers}


@functools.cache
def data_facts(dataset: str, data_path: Path | None, img_size: int | None) -> tuple[str, tuple, int]:
    """Fingerprint, (C, H, W) and number of classes; a set is read once."""
    image_set = load_data(DistillFlags(dataset=dataset, data_path=data_path, img_size=img_size))
    digest = image_set.fingerprint
    if dataset in DC_SPECS and image_set.size in DC_SPECS[dataset].stats:  # its row says the rest
        splits = [s for s in (image_set.train, image_set.test) if s is not None]
        digest = checkpoint.fingerprint(*(t for s in splits for t in (s.images, s.labels)))
    return digest, image_set.img_shape, image_set.num_classes


def teacher_fingerprints(run: DistillFlags) -> list[str]:
    """One digest per pre-trained model; those of transformers are known by their name."""
    found = []
    for name in run.models_pool:
        if name.startswith(PREFIX):
            found.append(name)
        else:
            found += [_digest(path, _version(path)) for path in find_checkpoints(run, name)]
    return found


def _version(path: Path) -> tuple[int, ...]:
    """What tells a file from the one that it replaced, though a clock was set back in between."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


@functools.cache
def _digest(path: Path, version: tuple[int, ...]) -> str:
    return checkpoint.state_fingerprint(checkpoint.load_state(path, what="pre-trained model"))


def missing_jobs(flags: TablesFlags) -> list[Job]:
    """One job for every cell and seed that is not measured: one run in a folder of its own."""
    store, jobs = CellStore(flags.log_dir / RESULTS), []
    seeds = range(flags.seed, flags.seed + flags.num_exp)
    distilled = [spot for spot in spots(flags) if not spot.start]  # a start comes with its cell
    for spot, seed in itertools.product(distilled, seeds):
        try:
            missing, cost = store.get(cell_key(spot.run, seed)) is None, estimate(spot.run)
        except UserError:  # raised again when the job runs
            missing, cost = True, 0.0
        if missing:
            jobs.append(Job(spot.shown(seed), cost, functools.partial(run_cell, spot, seed)))
    return jobs


def jobs(flags: TablesFlags) -> Callable[[], list[Job]]:
    """What gives the jobs that the table lacks."""
    return functools.partial(missing_jobs, flags)


def run_cell(spot: Spot, seed: int) -> None:
    """Distil, evaluate, append the cell; a run that was stopped is resumed."""
    key, log_dir = cell_key(spot.run, seed), spot.flags.log_dir
    name = f"{spot.dataset}_{spot.method}_ipc{spot.ipc}_{spot.variant.name}_seed{seed}"
    folder = log_dir / "runs" / f"{name}_{CellStore.identity(key)[:8]}"

    def compute() -> dict[str, Any]:
        run_method(find_method(spot.method), dataclasses.replace(spot.run, seed=seed, save_path=folder))
        (network,) = json.loads((folder / "results.json").read_text())["networks"]
        percent = [100 * a for a in network["accuracies"]]
        start = next((e["test"] for e in read_log(folder / "log.jsonl") if "test" in e), {})
        return {
            "accuracy": sum(percent) / len(percent),
            "accuracies": percent,
            "start_accuracies": [100 * a for a in start.get(network["network"], [])],
            "variant": spot.variant.name,
            "steps_scale": spot.flags.steps_scale,
            "folder": folder.name,
        }

    store = CellStore(log_dir / RESULTS)
    store.measure(key, compute, lambda cell: f"{spot.shown(seed)}: {cell['accuracy']:.2f} %")


def estimate(run: DistillFlags) -> float:
    """Operations of one cell: outer steps and two evaluations; training is three forward passes."""
    _, img_shape, classes = data_facts(run.dataset, run.data_path, run.img_size)
    images = run.Iteration * find_method(run.method).distiller.cost(run, classes)
    images += 2 * run.num_eval * 3 * run.epoch_eval_train * run.ipc * classes
    return float(images) * _network_flops(run.model, img_shape, classes)


@functools.cache
def _network_flops(model: str, img_shape: tuple[int, int, int], num_classes: int) -> int:
    channels, *size = img_shape
    return forward_flops(lambda: get_network(model, channels, num_classes, tuple(size)), img_shape)


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Run what is missing if asked, then write and print the table."""
    flags = cli.parse(
        TablesFlags, argv, prog="python -m clom.tables", description=__doc__, choices={"methods": labelled()}
    )
    check_datasets(flags)
    published, cells = with_published_file(PUBLISHED, flags.published), spots(flags)
    note = caption(flags, all(spot.is_published for spot in cells))
    return make_table([spot.place(published) for spot in cells], "table", note, jobs, flags)[1]


def caption(flags: TablesFlags, published: bool) -> str:
    """What the numbers are; `published` says whether all have a place beside the published ones."""
    (network,) = eval_pool("S", flags.model)
    text = f"test accuracy in % of {network} after the last iteration and epoch; {NOTE}"
    if network != flags.model:
        text += f"; distilled with {flags.model}"
    full = [f"{name} {FULL_DATA[name][0]}" for name in flags.datasets if name in FULL_DATA]
    if not published:
        text += (
            "; published numbers are left out where network (theirs is ConvNet), size, --init, --lr_img "
            "or --batch_real differ"
        )
    return f"{text}; published for the full data: {', '.join(full)}" if full else text


if __name__ == "__main__":
    sys.exit(main())
