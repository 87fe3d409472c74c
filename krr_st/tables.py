"""`python -m krr_st.tables --table 1|2|3|4|fig3|probe_... [--run]`: the paper's tables from cells.

Collects finished cells of test.py, test_scratch.py and test_kd.py from {log_dir}/results.jsonl into
Markdown, CSV and LaTeX, ours beside the published numbers. Cells that were not run show as a dash;
with --run they are run first, cheapest first, and a restart skips finished ones. A synthetic set or
target model that a row lacks is made before it. `--workers` and `--slurm` run several at a time.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import krr_st.baselines
import krr_st.target
from data.prepared import file_name, prepare_command
from data.specs import DC_SPECS, KRR_SPECS
from data.synthetic import SyntheticSet
from data.synthetic.forms import find_set
from distillation.one_set import SetFlags
from distillation.run import Method, resolved, run_method
from evaluation.jobs import Job
from evaluation.kd import KD_BN, Distillation, KdFlags
from evaluation.measure import Cell, read_cells
from evaluation.presets import FULL_TARGETS, PRESETS
from evaluation.pretraining import set_place
from evaluation.recipes import (
    GAUSSIAN,
    KD,
    RANDOM_FEATURES,
    SCRATCH,
    Recipe,
    finetune_recipe,
    pretrain_recipe,
)
from evaluation.slurm import JobFlags
from evaluation.tables import NOTE, RESULTS, Entry, Place, make_table, with_published_file
from evaluation.target import resolve_checkpoint
from evaluation.transfer import ScratchFlags, TestFlags, Transfer
from krr_st.config import TargetFlags, TrainFlags, shared_flags
from krr_st.published import PROBE_CELLS, PROBE_TABLES, PROBE_TARGETS
from methods import METHODS
from models import get_model
from utils import cli
from utils.checkpoint import fingerprint
from utils.cli import SEED, DeviceFlags, flag
from utils.cost import forward_flops as count_flops
from utils.errors import UserError, pick
from utils.plots import save_bar_groups
from utils.table import mean_std


@dataclass(frozen=True)
class TablesFlags(JobFlags, DeviceFlags):
    """Flags of krr_st.tables."""

    data_dir: Path = flag(Path("./datasets"), "folder of the prepared tensors")
    table: str = flag("1", "1, 2, 3, 4, fig3, or probe_{source}_{percent of labels}")
    methods: tuple[str, ...] = flag((), "rows of the table, as it is shown and written; default: all")
    run: bool = flag(False, "first run what is missing, cheapest first")
    log_dir: Path = flag(Path("./test_log"), "folder of the cells; the table is written there")
    synthetic_data_dir: Path = flag(Path("./synthetic_data"), "where the synthetic sets are")
    kd_bn: str = flag("running", f"table 4: {KD_BN}", choices=("batch", "running"))
    published: Path | None = flag(
        None, "JSON file of published numbers to print beside ours: {table: {row: {column: [mean, std]}}}"
    )
    num_test: int = flag(3, "seeds per cell", minimum=1)
    seed: int = flag(0, "first seed", **SEED)
    steps_scale: float = flag(1.0, "factor on training lengths with --run; marked †", above=0)


_TABLE_1 = ("random", "kmeans", "dsa", "dm", "mtt", "kip", "frepo", "krr_st")
_TABLE_2 = tuple(m for m in _TABLE_1 if m != "kip")
_FIVE = ("base", "vgg", "alexnet", "mobilenet", "resnet10")
_FINE_GRAINED = ("aircraft", "cars", "cub2011", "dogs", "flowers")
_SOURCE_IMAGES = 50000  # of a training split, in estimates
_KRR_ST_RATES = {"tinyimagenet": 1e-5, "imagenet": 1e-5}  # elsewhere 1e-4
# Images per target that only pass through: a test split, or training images for their features, too.
_MEASURED = {"finetune": 10000, "kd": 20000, "probe": 60000}


@dataclass(frozen=True)
class Layout:
    """One table: its rows are methods (times models), its columns targets (or models)."""

    source: str
    methods: tuple[str, ...]
    models: tuple[str, ...]  # a single one is not named; `base` is the source's own network
    targets: tuple[str, ...]  # with a single one the columns are the models
    protocol: str = "finetune"  # or kd, probe
    fraction: float | None = None  # of the labels, in the probe tables
    pre_epoch: int | None = None  # where the table sets a length of pre-training
    pre_wd: float | None = None  # where it sets the weight decay of pre-training

    def network(self, model: str) -> str:
        """The name of a model in the zoo."""
        return PRESETS[self.source].network if model == "base" else model

    def triples(self) -> list[tuple[str, str, str]]:
        """(method, model, target) in reading order."""
        found = [(m, n, t) for n in self.models for m in self.methods for t in self.targets]
        return found if len(self.targets) > 1 else sorted(found, key=lambda f: self.methods.index(f[0]))

    def headings(self, method: str, model: str, target: str) -> tuple[str, str]:
        """Row and column of a triple."""
        if len(self.targets) == 1:
            return method, model
        return (f"{method} ({model})" if len(self.models) > 1 else method), target


# Every table has two rows beside the published ones: a gain is one over these.
_EXTRA = (SCRATCH, RANDOM_FEATURES)

LAYOUTS: dict[str, Layout] = {
    "1": Layout("cifar100", (*_EXTRA, *_TABLE_1), ("base",), FULL_TARGETS["cifar100"]),
    "2": Layout("tinyimagenet", (*_EXTRA, *_TABLE_2), ("base",), FULL_TARGETS["tinyimagenet"]),
    "3": Layout("imagenet", (*_EXTRA, "random", "frepo", "krr_st"), ("base",), FULL_TARGETS["imagenet"]),
    "4": Layout("tinyimagenet", (GAUSSIAN, *_EXTRA, *_TABLE_2), _FIVE, ("cifar10",), "kd"),
    "fig3": Layout("tinyimagenet", (*_EXTRA, *_TABLE_2), _FIVE[1:], _FINE_GRAINED),
}
for _name in PROBE_TABLES:
    _, _source, _percent = _name.split("_")
    _methods = (*_EXTRA, "high_loss_features", "krr_st", "mkdt")
    LAYOUTS[_name] = Layout(
        _source, _methods, ("base",), PROBE_TARGETS, "probe", int(_percent) / 100, 20, 1e-4
    )


class Sets:
    """The synthetic sets of a source and its target model: which are missing, and jobs that make them."""

    def __init__(self, flags: TablesFlags, source: str) -> None:
        self.flags, self.source, self.preset = flags, source, PRESETS[source]

    def path(self, method: str) -> Path:
        """Where test.py finds a method's set; a UserError where there are two."""
        return set_place(self.flags.synthetic_data_dir / self.source, method)

    def is_missing(self, method: str) -> bool:
        """No set is there, or one of a shortened distillation where longer ones are wanted."""
        try:
            path = self.path(method)
            if not path.is_file() and find_set(path) is None:
                return True
            return SyntheticSet.load(path).info.get("steps_scale", 1.0) < self.flags.steps_scale
        except UserError:  # damaged, or two: whoever measures it says so
            return False

    def job(self, method: str) -> Job | None:
        """What makes a missing set, or first the target model that it needs; None: it is there."""
        if not self.is_missing(method):
            return None
        row, network = METHODS.get(method), self.preset.network
        featured = row.labels == "features" if row else method not in ("random", "high_loss")
        model = self.preset.target_model
        path = resolve_checkpoint(model, None, self.source)
        if featured and path is not None and not path.exists():
            images = _SOURCE_IMAGES * TargetFlags.epochs * 6  # two views, a training step each
            epochs = self._scaled(TargetFlags.epochs)
            train = self._command(krr_st.target, target_model=model, epochs=epochs)
            cost = images * forward_flops(network, self.preset.size) * self.flags.steps_scale
            return Job(f"{self.source}: target model", cost, train)
        name = f"{self.source}: set of {method}"
        if row is None:
            place = self.flags.synthetic_data_dir
            make = self._command(krr_st.baselines, method=method, synthetic_data_dir=place)
            images = _SOURCE_IMAGES * (10 if "high_loss" in method else 1)  # three students, or one look
            cost = float(images * forward_flops(network, self.preset.size))
            return Job(name, cost, make)
        try:
            cost = self.cost(row)
        except UserError:  # the job will say it
            cost = 0.0
        return Job(name, cost, functools.partial(self.distil, row))

    def _scaled(self, length: int) -> int:
        return max(1, round(self.flags.steps_scale * length))

    def _command(self, module: ModuleType, **more: Any) -> Callable[[], int]:
        """A command for this source in this process; its errors are raised."""
        flags = self.flags
        given = dict(data_name=self.source, data_dir=flags.data_dir, img_size=self.preset.size, **more)
        argv = cli.as_words(**given, seed=flags.seed, gpu_id=flags.gpu_id, device=flags.device)
        return functools.partial(module.main.__wrapped__, argv)

    def folder(self, row: Method) -> Path:
        """The run folder of a distillation."""
        name = f"{self.source}_{row.name.lower()}_{self.flags.steps_scale:g}"
        return self.flags.log_dir / "sets" / name

    def run_flags(self, row: Method) -> Any:
        """Published flags of a method's run; evaluated once, at its end.

        Raises:
            UserError: missing data, or flags that do not fit.
        """
        flags, folder = self.flags, self.folder(row)
        given = dict(method=row.name, seed=flags.seed, device=flags.device, gpu_id=flags.gpu_id)
        given |= dict(img_size=self.preset.size, num_images=self.preset.num_images)
        if issubclass(row.flags, SetFlags):
            given |= dict(data_name=self.source, data_dir=flags.data_dir)
            given |= dict(save_dir=folder.parent, exp_name=folder.name)
            every = "eval_every"
        else:
            given |= dict(dataset=self.source, data_path=flags.data_dir, save_path=folder)
            given |= dict(export=str(folder / "pair"), num_eval=1, epoch_eval_train=0)
            ipc = self.preset.num_images // KRR_SPECS[self.source].num_classes
            given |= row.published(DC_SPECS.spelling(self.source), ipc)
            every = "eval_interval"
        if row.flags is TrainFlags:
            given["outer_lr"] = _KRR_ST_RATES.get(self.source, 1e-4)
        length = row.setup.length
        steps = self._scaled(getattr(resolved(row, row.flags(**given)), length))
        return row.flags(**given, **{length: steps, every: steps})

    def cost(self, row: Method) -> float:
        """Operations of a distillation."""
        flags = resolved(row, self.run_flags(row))
        steps, classes = getattr(flags, row.setup.length), KRR_SPECS[self.source].num_classes
        image = forward_flops(self.preset.network, self.preset.size)
        return steps * row.distiller.cost(flags, classes) * image

    def distil(self, row: Method) -> None:
        """Run the method, or resume it, and put its set where test.py looks for it."""
        run_method(row, self.run_flags(row))
        folder = self.folder(row)
        pair = folder if issubclass(row.flags, SetFlags) else folder / "pair"
        made, facts = SyntheticSet.load(pair), {"method": row.name, "steps_scale": self.flags.steps_scale}
        place = self.path(row.name.lower())
        form = "safetensors" if place.suffix == ".safetensors" else "pair"
        replace(made, info={**made.info, **facts}).save(place, form)


# Of a recipe, what the set itself may say.
_SET_DECIDES = ("lr", "momentum", "dsa", "target_scale", "mixup")


def _agrees(record: dict[str, Any], recipe: Recipe, but: tuple[str, ...]) -> bool:
    """Whether a cell's record of a recipe, which leaves out rare settings, is that of `recipe`."""
    return all(record.get(k, v) == v for k, v in asdict(recipe).items() if k not in but)


class KernelTable:
    """The layout that the flags ask for, its places and its jobs.

    Raises:
        UserError: an unknown table or row, or a bad file of published numbers.
    """

    def __init__(self, flags: TablesFlags) -> None:
        layout = pick(LAYOUTS, flags.table, "table")
        wanted = [pick({m: m for m in layout.methods}, m.lower(), "row in --methods") for m in flags.methods]
        methods = tuple(m for m in layout.methods if m in wanted or not wanted)
        self.flags, self.layout = flags, replace(layout, methods=methods)
        self.sets = Sets(flags, layout.source)
        self.published = with_published_file(PROBE_CELLS, flags.published)

    def owner(self, method: str) -> str | None:
        """Whose synthetic set a row is measured with, if any."""
        kd = self.layout.protocol == "kd"
        if method == SCRATCH:  # distillation without pre-training uses real images
            return RANDOM_FEATURES if kd else None
        return None if kd and method == GAUSSIAN else method

    def present_sets(self) -> dict[str, str]:
        """Method -> fingerprint of its synthetic set, which its cells carry, where there is one."""
        layout, found = self.layout, {}
        owners = {method: owner for method in layout.methods if (owner := self.owner(method))}
        for method, owner in owners.items():
            with contextlib.suppress(UserError):  # missing or damaged: its job will say so
                synthetic = SyntheticSet.load(self.sets.path(owner))
                found[method] = fingerprint(synthetic.images, synthetic.targets)
        return found

    def places(self) -> list[Place]:
        """All cells in reading order."""
        sets = self.present_sets()
        return [self.place(*triple, sets.get(triple[0])) for triple in self.layout.triples()]

    def place(self, method: str, model: str, target: str, present: str | None) -> Place:
        """One cell; `present` is the fingerprint of the method's synthetic set.

        Measurements on different synthetic sets, teachers, target data or lengths are not mixed: the
        present set counts, else that of the latest, and the length nearest to the published one. Those
        of another size, dropout or recipe do not count.
        """
        layout = self.layout
        row, column = layout.headings(method, model, target)
        kd_bn = self.flags.kd_bn if layout.protocol == "kd" else None
        wanted = dict(source=layout.source, method=method, model=layout.network(model), target=target)
        wanted |= dict(protocol=layout.protocol, label_fraction=layout.fraction, kd_bn=kd_bn)
        wanted |= dict(shots="all", probe_on="body")

        preset = PRESETS[layout.source]
        recipes = self.recipes(method, layout.network(model), target)

        def fits(cell: Cell) -> bool:
            if (cell.get("size", preset.size), cell.get("dropout", 0.0)) != (preset.size, 0.0):
                return False
            own = _SET_DECIDES if "training" in cell else ("dsa",)  # that of a source that is not mirrored
            for name, recipe in recipes.items():
                if name in cell:
                    as_steps = recipe.override(steps=recipe.steps_on(preset.num_images))  # of a set of views
                    if not any(_agrees(cell[name], wanted, own) for wanted in (recipe, as_steps)):
                        return False
            return True

        def rank(cell: Cell) -> tuple[bool, float]:
            return cell.get("synthetic_set") != present, abs(cell.get("steps_scale", 1.0) - 1)

        published = self.published.get((self.flags.table, row, column))
        origin = ("steps_scale", "synthetic_set", "teacher", "target_data")
        return Place(row, column, wanted, fits=fits, rank=rank, origin=origin, published=published)

    def recipes(self, method: str, arch: str, target: str) -> dict[str, Recipe]:
        """The trainings that a cell comes from, by its fields."""
        layout, found = self.layout, {}
        if method not in (SCRATCH, GAUSSIAN):
            recipe = pretrain_recipe(method, layout.source, arch, kd=layout.protocol == "kd")
            found["pretraining"] = recipe.override(epochs=layout.pre_epoch, wd=layout.pre_wd)
        if layout.protocol == "finetune":
            found["finetuning"] = finetune_recipe(target, arch, PRESETS[layout.source].size)
        elif layout.protocol == "kd":
            found["distillation"] = KD[method]
        return found

    def missing_jobs(self) -> list[Job]:
        """One job for each method and network whose targets lack some of `num_test` seeds.

        Where its synthetic set is missing, the job that makes it stands in its place. Cells of a set that
        was replaced do not count.
        """
        flags, layout, sets = self.flags, self.layout, self.present_sets()
        cells = [
            cell
            for cell in read_cells(flags.log_dir / RESULTS)
            if sets.get(cell.get("method")) in (None, cell.get("synthetic_set"))
            and cell.get("steps_scale", 1.0) == flags.steps_scale
        ]
        lacking: dict[tuple[str, str], list[str]] = {}
        for method, model, target in layout.triples():
            place = self.place(method, model, target, sets.get(method))
            if len(place.choose(cells)) < flags.num_test:
                lacking.setdefault((method, model), []).append(target)
        budget = "" if layout.fraction is None else f" {100 * layout.fraction:g} % of labels"
        jobs = [
            self.set_job(method)
            or Job(
                f"{layout.source} {layout.protocol}{budget}: {method}, {layout.network(model)}",
                self.cost(method, model, targets),
                functools.partial(self.run_job, method, model, targets),
            )
            for (method, model), targets in lacking.items()
        ]
        return list({job.name: job for job in jobs}.values())

    def set_job(self, method: str) -> Job | None:
        """What makes the synthetic set of a row; None: it is there, or none is needed."""
        owner = self.owner(method)
        return owner and self.sets.job(owner)

    def cost(self, method: str, model: str, targets: Sequence[str]) -> float:
        """Operations of a job: three forward passes for an image in training, one for a measured one."""
        layout, flags = self.layout, self.flags
        preset, arch = PRESETS[layout.source], layout.network(model)
        count, images = preset.num_images, _MEASURED[layout.protocol] * len(targets)
        recipes = {}
        for target in targets:  # one pre-training serves all
            for name, recipe in self.recipes(method, arch, target).items():
                recipes[name, "" if name == "pretraining" else target] = recipe
        for recipe in recipes.values():
            batch = recipe.batch_size if recipe.steps else min(recipe.batch_size, count)
            images += 3 * recipe.steps_on(count, flags.steps_scale) * batch
        return float(flags.num_test * images * forward_flops(arch, preset.size))

    def run_job(self, method: str, model: str, targets: Sequence[str]) -> None:
        """Measure one method and network on its targets; a UserError without data or synthetic set.

        Those that are prepared are measured first, where others are not.
        """
        layout, flags, size = self.layout, self.flags, PRESETS[self.layout.source].size
        there = [t for t in targets if (flags.data_dir / t / file_name("X", "train", size)).exists()]
        there = there or targets  # with none, the error of reading them says it
        what = dict(source_data_name=layout.source, target_data_name="_".join(there), test_model=model)
        command, measure = (KdFlags, Distillation) if layout.protocol == "kd" else (TestFlags, Transfer)
        if command is TestFlags:
            what |= dict(protocol=layout.protocol, label_fraction=layout.fraction)
            command = ScratchFlags if method == SCRATCH else TestFlags
        if command is not ScratchFlags:
            what |= dict(method=method, pre_epoch=layout.pre_epoch, pre_wd=layout.pre_wd)
        measure(command(**shared_flags(flags, command), **what)).run()
        if absent := [target for target in targets if target not in there]:
            how = prepare_command(absent[0], size, flags.data_dir)
            raise UserError(f"not prepared, not measured: {', '.join(absent)}; the first is made by: {how}")


def jobs(flags: TablesFlags) -> Callable[[], list[Job]]:
    """What gives the jobs that the table lacks."""
    return KernelTable(flags).missing_jobs


@functools.cache
def forward_flops(arch: str, size: int) -> int:
    """Floating-point operations of one image's forward pass."""
    shape = (3, size, size)
    return count_flops(lambda: get_model(arch, shape), shape)


@cli.command(TablesFlags, prog="python -m krr_st.tables", description=__doc__)
def main(flags: TablesFlags) -> int:
    """Run what is missing if asked, then write and print the table."""
    table = KernelTable(flags)
    layout, name = table.layout, f"table_{flags.table}"
    norms = f" (BatchNorm: {flags.kd_bn} statistics)" if layout.protocol == "kd" else ""
    note = f"test accuracy in %, source {layout.source}, {layout.protocol}{norms}; {NOTE}"
    entries, code = make_table(table.places(), name, note, jobs, flags)
    if flags.table == "fig3":
        picture = flags.log_dir / f"{name}.png"
        draw_bars(layout, entries, picture)
        print(f"picture: {picture}")
    return code


def draw_bars(layout: Layout, entries: Sequence[Entry], path: Path) -> None:
    """Figure 3: one panel per target, one group of bars per network, one bar per method."""
    panels: dict[str, dict[str, dict[str, tuple[float, float] | None]]] = {}
    for (method, model, target), entry in zip(layout.triples(), entries, strict=True):
        bar = mean_std(entry.values) if entry.values else None
        panels.setdefault(target, {}).setdefault(model, {})[method] = bar
    shortened = ", shortened" if any(entry.scaled for entry in entries) else ""
    save_bar_groups(panels, path, y_label=f"test accuracy in %{shortened}")


if __name__ == "__main__":
    sys.exit(main())
