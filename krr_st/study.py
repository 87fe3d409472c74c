"""`python -m krr_st.study` (`make study`): what distilled images are worth, on a prepared set.

Sets of `num_images` images are compared by the same probes of freshly pre-trained networks: KRR-ST
with each lever alone; real images with target features, chosen at random, by k-means, herding or a high
loss; random ones with class labels; nothing. The target model's own features are probed, too: what they
reach is about what pre-training on them can. The accuracy of random images by their number turns an accuracy
into an equivalence ratio, and so does their error of the target's features (--target_error). With
--validation the probes see a held-out part of the training images instead of the test split: choose levers
there. Finished work is kept, and the same command resumes.
"""

import contextlib
import functools
import gc
import io
import itertools
import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import torch

from data.load import load_set
from data.meta import read_meta
from data.prepared import file_name
from data.synthetic import SyntheticSet
from data.target_scale import TARGET_SCALES
from data.untrusted import read_json
from distillation.run import resolved, run_method
from evaluation.equivalent_images import equivalent_images
from evaluation.jobs import Job
from evaluation.measure import CellStore
from evaluation.recipes import PRETRAIN, SCRATCH
from evaluation.slurm import JobFlags, run_jobs
from evaluation.target import default_checkpoint
from evaluation.transfer import (
    READ,
    TARGET_ERROR,
    Measure,
    ScratchFlags,
    TargetModel,
    TargetTransfer,
    TestFlags,
    Transfer,
    labelled_indices,
    load_targets,
    parse_shots,
)
from krr_st import baselines, target
from krr_st.config import RECIPES, TrainFlags, shared_flags
from methods import METHODS
from utils import checkpoint, cli
from utils.cli import flag
from utils.errors import UserError, pick
from utils.plots import Lines, save_lines
from utils.precision import PRECISIONS
from utils.run_folder import changed_flags, changed_inputs, write_json
from utils.seed import make_generator
from utils.table import format_mean_std, markdown

# Each lever alone: flags of train.py that replace the study's common ones.
LEVERS: dict[str, dict[str, Any]] = {
    "krr_st": {},
    "lr 1e-3": {"outer_lr": 1e-3},
    "lr 3e-2": {"outer_lr": 3e-2},
    "lr_y 1e-1": {"outer_lr_y": 1e-1},
    "lr_y 1e-3": {"outer_lr_y": 1e-3},
    "ridge 1e-4": {"ridge": 1e-4},
    "ridge 1e-2": {"ridge": 1e-2},
    "T 100": {"online_iteration": 100},
    "T 2000": {"online_iteration": 2000},
    "pool 20": {"num_models": 20},
    "k-means start": {"init_images": "kmeans"},
    "bf16": {"precision": "bf16"},
    "steps 4000": {"outer_iteration": 4000},
    "steps 4000 lr_y 1e-1": {"outer_iteration": 4000, "outer_lr_y": 1e-1},
    "best": {**RECIPES["best"], "pool_mixup": None},
    "best, plain blends": {**RECIPES["best"], "pool_mixup": None, "hybrid": None},
    "best, plain blends in batches of 256": {
        **RECIPES["best"],
        "pool_mixup": None,
        "hybrid": None,
        "outer_iteration": 2000,
        "outer_batch_size": 256,
        "view_batch": 256,
    },
}
# Sets that need no distillation: row -> method of krr_st.baselines, more of its flags.
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "random + features": ("random_features", {}),
    "k-means + features": ("kmeans_features", {}),
    "herding + features": ("herding_features", {}),
    "high-loss + features": ("high_loss_features", {}),
    "random + features, blended views": ("random_features", dict(views=50, blend=True)),
    "random + features, hybrid views": ("random_features", dict(views=50, blend=True, hybrid=True)),
    "random + class labels": ("random", {}),
}
HELD_OUT = 0.2
# How flags begin that say how a run is judged, not what its set is.
_NOT_OF_SET = ("pre_", "test_", "eval_")
FINETUNED = ("10", "all")  # labels per class
TARGET = "the target model itself"


@dataclass(frozen=True)
class StudyFlags(JobFlags):
    """Flags of the study."""

    data_dir: Path = flag(Path("./datasets"), "folder of the prepared tensors")
    folder: Path = flag(Path("./study"), "where checkpoints, runs and results go")
    data_name: str = flag("cifar10", "labelled prepared set; distillation never reads its labels")
    img_size: int = flag(16, "side in pixels", minimum=8)
    network: str = flag("convnet_64_128_256_bn", "target, pool and student network")
    student: str | None = flag(None, "network of pool and students, where it is another one than the target")
    test_model: str | None = flag(None, "network that sets are judged with, where it is not the student")
    target_ckpt: Path | None = flag(None, "checkpoint of the target model; default: it is trained first")
    probe_on: str = flag(
        "body", "what probes read, as in test.py: body, outputs or both", choices=tuple(READ)
    )
    fractions: tuple[float, ...] = flag(
        (0.01, 0.05), "shares of the training labels that the probes learn from", above=0, maximum=1
    )
    target_error: bool = flag(False, "also measure the error of the outputs, as test.py does")
    validation: bool = flag(False, "probe on a held-out fifth of the training images")
    target_epochs: int = flag(15, "epochs of the target model", minimum=1)
    num_images: int = flag(100, "images in each set", minimum=1)
    curve: tuple[int, ...] = flag((50, 100, 200, 500, 1000, 2000), "numbers of random real images", minimum=1)
    levers: tuple[str, ...] = flag(("krr_st",), f"of: {'; '.join(LEVERS)}; or all, or none")
    seeds: int = flag(3, "repetitions, each with sets, networks and labels of its own", minimum=1)
    outer_iteration: int = flag(3000, "outer steps", minimum=1)
    outer_lr: float = flag(1e-2, "learning rate of X_s and Y_s", above=0)
    outer_batch_size: int = flag(256, "real images per outer step", minimum=1)
    num_models: int = flag(5, "networks in the pool", minimum=1)
    online_iteration: int = flag(500, "age limit of the pool networks", minimum=1)
    target_scale: str | None = flag(
        None, "std: all sets of features are learned standardised", choices=TARGET_SCALES
    )
    pool_mixup: bool | None = flag(None, "mixup of the set in KRR-ST's pool and kernel")
    pre_mixup: bool | None = flag(None, "mixup in pre-training on every set of features but blended views")
    precision: str = flag("fp32", "of distillation; all else is fp32", choices=tuple(PRECISIONS))
    device: str | None = flag(None, "cpu, cuda, cuda:N or mps; default: the best there is")
    pre_iteration: int = flag(200, "steps of pre-training on a set of features", minimum=1)
    finetune_iteration: int = flag(0, "steps of fine-tuning; 0: probes only", minimum=0)
    targets: tuple[str, ...] = flag((), "more prepared sets of this size to transfer to")
    extra_sets: tuple[str, ...] = flag((), "more sets as NAME=METHOD=PATH: dm=dm=synthetic_data/cifar10/dm")
    shots: str = flag("1_5_10_50", "labelled images per class of the few-shot probes")


def validation_set(flags: StudyFlags) -> str:
    """Write the training images as a set of its own, a fifth of them as test split; returns its name.

    A UserError where they have no labels, and where the set is there but of other training images.
    """
    name, size = f"{flags.data_name}_val", flags.img_size
    folder, source = flags.data_dir / name, load_set(flags.data_name, size, flags.data_dir, splits=("train",))
    meta, whole = read_meta(folder), source.train
    facts = meta["sizes"].setdefault(str(size), {})
    if (folder / file_name("Y", "test", size)).exists():
        if facts.get("held_out_of", source.fingerprint) != source.fingerprint:
            raise UserError(f"{folder} was made from another {flags.data_name}; remove it to make it again")
    else:
        if whole.labels is None:
            raise UserError(f"--data_name {flags.data_name}: has no labels; probes need them")
        facts.update(asdict(source.stats), held_out_of=source.fingerprint)
        write_json(folder / "meta.json", {**meta, "hflip": source.hflip})
        order = torch.randperm(len(whole), generator=make_generator(0, "held-out images"))
        held_out = int(HELD_OUT * len(whole))
        for split, index in (("train", order[held_out:]), ("test", order[:held_out])):
            for kind, tensor in (("X", whole.images), ("Y", whole.labels)):
                checkpoint.save(tensor[index], folder / file_name(kind, split, size))
    return name


@dataclass(frozen=True)
class Row:
    """One row of the tables, or one number of random images: whose set is measured, and what makes it."""

    name: str
    method: str
    folder: Callable[[int], Path | None]  # of the set, by seed; None: no set
    make: Callable[[int], object] = lambda seed: None
    check: Callable[[int], object] = lambda seed: None  # raises a UserError where another set is there
    judge: type[Transfer] = Transfer  # measures it

    @property
    def classes(self) -> bool:
        """Whether networks learn class labels: their outputs are not compared."""
        return self.method != SCRATCH and PRETRAIN[self.method].loss == "cross_entropy"


class Study:
    """The rows of one study and the jobs that make and measure their sets.

    Raises:
        UserError: flags that do not fit, or missing data.
    """

    def __init__(self, flags: StudyFlags) -> None:
        self.flags = flags
        self.name = validation_set(flags) if flags.validation else flags.data_name
        self.folder = flags.folder / self.name
        self.suffix = "-std" if flags.target_scale == "std" else ""
        made = default_checkpoint(flags.network, self.name, flags.folder / "teacher_ckpt")
        self.checkpoint = flags.target_ckpt or made
        if flags.target_ckpt and not self.checkpoint.exists():
            raise UserError(f"--target_ckpt {self.checkpoint} does not exist")
        self.student = flags.student or flags.network
        self.test_model = flags.test_model or self.student
        self.targets = load_targets((self.name, *flags.targets), flags.img_size, flags.data_dir, None)
        count, train = flags.num_images, self.targets[0].train
        if count > len(train):
            raise UserError(f"--num_images {count} is more than the {len(train)} images in {train.path}")
        shots = () if flags.shots == "none" else parse_shots(flags.shots)
        read = READ[flags.probe_on]
        self.probes = [
            Measure("linear", on=on, fraction=fraction) for on in read for fraction in flags.fractions
        ]
        self.probes += [Measure(TARGET_ERROR, on="outputs")] * flags.target_error
        self.few_shot = [Measure("linear", count) for count in shots]
        self.finetuning = [Measure("finetune", count) for count in FINETUNED if flags.finetune_iteration]
        self.rows = [*self._rows()]
        self.curves = [self._baseline(f"curve {n}", "random_features", n) for n in flags.curve]
        for image_set, measure in itertools.product(self.targets, self.few_shot):
            labelled_indices(image_set, measure, 0)  # too many labels per class fail now
        # (row, target, measure) -> seed -> accuracy, of what is measured
        self.found: dict[tuple, dict[int, float]] = defaultdict(dict)
        self._read: set[tuple[str, int]] = set()
        self._target_models: dict[str, TargetModel] = {}  # their features of all images are kept

    def _rows(self) -> Iterator[Row]:
        flags = self.flags
        yield Row("no pre-training", SCRATCH, lambda seed: None)
        yield Row(TARGET, SCRATCH, lambda seed: None, judge=TargetTransfer)
        for name, (method, more) in SETS.items():
            yield self._baseline(name, method, flags.num_images, **more)
        for text in flags.extra_sets:
            name, method, path = [*text.split("=", 2), "", ""][:3]
            if not path:
                raise UserError(f"--extra_sets {name}: expected NAME=METHOD=PATH")
            pick(PRETRAIN, method, "method in --extra_sets")
            yield Row(name, method, lambda seed, path=path: Path(path.replace("{seed}", str(seed))))
        for lever in {"all": tuple(LEVERS), "none": ()}.get(flags.levers[0], flags.levers):
            pick(LEVERS, lever, "lever")
            of_lever = (functools.partial(f, lever) for f in (self.run_folder, self.distil, self.check_run))
            yield Row(lever, "krr_st", *of_lever)

    def _baseline(self, name: str, method: str, count: int, **more: Any) -> Row:
        given = dict(method=method, count=count, more=more)
        folder = functools.partial(self.set_folder, **given)
        return Row(name, method, folder, functools.partial(self.make_set, **given))

    def missing_jobs(self) -> list[Job]:
        """The target model, or else one job for each row and seed that is not measured."""
        if not self.checkpoint.exists():
            return [Job(f"{self.name}: target model", 0.0, self.make_target)]
        self.check_sources()
        rows = [(row, seed) for seed in range(self.flags.seeds) for row in (*self.rows, *self.curves)]
        for row, seed in rows:
            row.check(seed)
        return [
            Job(f"{self.name}: {row.name}, seed {seed}", 0.0, functools.partial(self.run_job, row, seed))
            for row, seed in rows
            if not self.read(row, seed)
        ]

    def check_sources(self) -> None:
        """Raise a UserError where the folder's sets are of another target model or data set."""
        record = self.folder / "target.json"
        found = {
            "target model": checkpoint.state_fingerprint(checkpoint.load_state(self.checkpoint)),
            "data set": self.targets[0].fingerprint,
        }
        if self.flags.target_ckpt is None:
            found["--target_epochs"] = str(self.flags.target_epochs)
        kept = read_json(record)
        if "target_ckpt" in kept:  # of older versions
            kept["target model"] = kept.pop("target_ckpt")
        if not kept:
            write_json(record, found)
        elif other := changed_inputs({"inputs": kept}, found):
            raise UserError(f"{self.folder} holds sets of {other}; give another --folder")

    def check_run(self, lever: str, seed: int) -> None:
        """Raise a UserError where the lever's set was distilled with other flags."""
        config = self.run_folder(lever, seed) / "config.json"
        kept = read_json(config).get("flags")
        wanted = cli.identity(resolved(METHODS["krr_st"], self.train_flags(lever, seed)))
        kept, wanted = (
            {k: v for k, v in flags.items() if not k.startswith(_NOT_OF_SET)}
            for flags in (kept if isinstance(kept, dict) else {}, wanted)
        )
        if kept and (changed := changed_flags(kept, wanted)):
            raise UserError(
                f"{config.parent} holds a run with other flags ({changed}); give another --folder"
            )

    def run_job(self, row: Row, seed: int) -> None:
        """Make the row's set, where it is missing, and measure it."""
        row.make(seed)
        self.transfer(row, seed).repetition(seed, self.store(row))

    def make_target(self) -> None:
        """Train the target model once."""
        length = dict(epochs=self.flags.target_epochs, projector_dim=512, seed=0)
        self._run(target, **length, save_dir=self.checkpoint.parent)

    def set_folder(self, seed: int, method: str, count: int, more: dict[str, Any]) -> Path:
        """Where a set of `krr_st.baselines` is: a folder, or one compact file."""
        own = f"-{self.student}" if "high_loss" in method and self.student != self.flags.network else ""
        own += "-hybrid" * bool(more.get("hybrid"))
        place = self.folder / "sets" / f"{count}-{seed}{self.suffix}{own}" / self.name / method
        return place.with_suffix(".safetensors") if more else place

    def make_set(self, seed: int, method: str, count: int, more: dict[str, Any]) -> None:
        """One set of `krr_st.baselines`, where it is missing."""
        place = self.set_folder(seed, method, count, more)
        if not (place if more else place / "x_syn.pt").exists():
            which = dict(method=method, num_images=count, seed=seed, student=self.student, **more)
            if self.suffix and PRETRAIN[method].loss == "mse":
                which |= dict(target_scale=self.flags.target_scale)
            root = place.parents[1]
            self._run(baselines, **which, target_ckpt=self.checkpoint, synthetic_data_dir=root)

    def _run(self, module: ModuleType, **more: Any) -> None:
        """A command in this process, printed as a user would type it; its errors are raised."""
        f = self.flags
        given = dict(data_dir=f.data_dir, data_name=self.name, img_size=f.img_size, target_model=f.network)
        argv = cli.as_words(**given, **more, device=f.device)
        print(f"\n$ python -m {module.__name__} {shlex.join(argv)}", flush=True)
        module.main.__wrapped__(argv)

    def run_folder(self, lever: str, seed: int) -> Path:
        """Where a KRR-ST run is."""
        mixup = "-mixup" if self.flags.pool_mixup else ""
        return self.folder / "runs" / f"{lever.replace(' ', '_')}-{seed}{self.suffix}{mixup}"

    def train_flags(self, lever: str, seed: int) -> TrainFlags:
        """Those of a lever's run."""
        f, folder = self.flags, self.run_folder(lever, seed)
        networks = dict(target_model=f.network, target_ckpt=self.checkpoint)
        networks |= dict(train_model=self.student, test_model=None)
        place = dict(data_name=self.name, seed=seed, save_dir=folder.parent, exp_name=folder.name)
        length = dict(print_every=500, eval_every=10**9, test_iteration=500, pre_epoch=100)
        settings = shared_flags(f, TrainFlags) | networks | place | length
        return TrainFlags(**settings | LEVERS[lever])

    def distil(self, lever: str, seed: int) -> None:
        """One KRR-ST run; a finished one stays, however its set was judged at its end."""
        if (self.run_folder(lever, seed) / "results.json").exists():
            self.check_run(lever, seed)
            return
        run_method(METHODS["krr_st"], self.train_flags(lever, seed))
        gc.collect()  # the table of views is large

    def store(self, row: Row) -> CellStore:
        """The cells of a row."""
        return CellStore(self.folder / "test_log" / row.name / "results.jsonl")

    def transfer(self, row: Row, seed: int) -> Transfer:
        """All probes of a row's set (or of none) with one seed, on one pre-trained network."""
        f, path = self.flags, row.folder(seed)
        given = shared_flags(f, ScratchFlags) | dict(source_data_name=self.name, test_model=self.test_model)
        given |= dict(seed=seed, finetune_iteration=f.finetune_iteration or None)
        given |= dict(target_model=f.network, target_ckpt=self.checkpoint)
        given |= dict(target_error=f.target_error and not row.classes)
        flags = ScratchFlags(**given)
        if path is not None:
            features = PRETRAIN[row.method].loss == "mse"
            length = dict(pre_iteration=f.pre_iteration if features else None)
            views = SyntheticSet.load(path).views if features and f.pre_mixup else None
            mixed = views is not None and views.partners is not None
            mixup = dict(pre_mixup=f.pre_mixup if features and not mixed else None)
            flags = TestFlags(**given, **length, **mixup, method=row.method, synthetic_path=path)
        probes = [m for m in self.probes if m.on == "body" or not row.classes]
        if row not in self.curves:
            probes += [*self.few_shot, *self.finetuning]
        return row.judge(flags, probes, self.targets, self._target_models)

    def read(self, row: Row, seed: int) -> bool:
        """Whether a row is measured with a seed; its accuracies are in `found` then."""
        if (row.name, seed) in self._read:
            return True
        store = self.store(row)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                keys = self.transfer(row, seed).keys(seed)
        except UserError:  # no set yet, or what its job will say
            return False
        cells = [cell for key in keys if (cell := store.get(key))]
        if len(cells) < len(keys):
            return False
        for cell in cells:
            measure = Measure.of(cell)
            self.found[row.name, cell["target"], measure][seed] = cell[measure.field]
        self._read.add((row.name, seed))
        return True

    def mean(self, row: str, probe: Measure, target: str) -> float:
        """The mean accuracy, or error, of a row on a target set; NaN where it has none."""
        found = self.found[row, target, probe].values()
        return fmean(found) if found else math.nan

    def curve(self, probe: Measure, target: str) -> dict[int, float]:
        """Number of random images -> their mean accuracy or error on a target set."""
        return {count: self.mean(f"curve {count}", probe, target) for count in self.flags.curve}

    def worth(self, row: str, probe: Measure, target: str) -> str:
        """The equivalence ratio of a row on a target set."""
        sign = -1 if probe.protocol == TARGET_ERROR else 1  # the less, the better
        value, curve = self.mean(row, probe, target), self.curve(probe, target)
        if math.isnan(value):
            return ""
        signed = {count: sign * found for count, found in curve.items()}
        return str(equivalent_images(signed, sign * value, self.flags.num_images))

    def shown(self, row: str, measure: Measure, target: str) -> str:
        """The values of a row as a table prints them."""
        found = [*self.found[row, target, measure].values()]
        return format_mean_std(found, 3 if measure.protocol == TARGET_ERROR else 2) if found else ""


def jobs(flags: StudyFlags) -> Callable[[], list[Job]]:
    """What gives the jobs that the study lacks."""
    return Study(flags).missing_jobs


def tables(study: Study) -> dict[str, str]:
    """The Markdown tables of a finished study, for each target set: probes with their worth, few shots."""
    flags, rows, found = study.flags, [row.name for row in study.rows], {}
    for name in (image_set.name for image_set in study.targets):
        where = "" if name == study.name else f", {name}"
        heads, body, curves = [f"{flags.num_images} images{where}"], [[row] for row in rows], []
        for probe in study.probes:
            heads += [probe.heading(), "worth"]
            for line in body:
                line += [study.shown(line[0], probe, name), study.worth(line[0], probe, name)]
            numbers = [study.shown(f"curve {count}", probe, name) for count in flags.curve]
            curves.append([probe.heading(), *numbers])
        found[f"probe{where}"] = markdown(heads, body)
        found[f"curve{where}"] = markdown(["random images + features", *map(str, flags.curve)], curves)
        for title, measures in (("few-shot", study.few_shot), ("fine-tuning", study.finetuning)):
            if measures:
                heads = [f"{flags.num_images} images, {name}", *(measure.heading() for measure in measures)]
                lines = [[row, *(study.shown(row, measure, name) for measure in measures)] for row in rows]
                found[f"{title} {name}"] = markdown(heads, lines)
    return found


def draw(study: Study) -> None:
    """worth.png, a panel per measure: the curve of random images, and each row's set beside it."""
    panels: dict[str, Lines] = {}
    for probe in study.probes:
        curve, error = study.curve(probe, study.name), probe.protocol == TARGET_ERROR
        lines = panels[probe.heading() if error else f"accuracy in %, {probe.heading()}"] = {}
        lines["random images by their number"] = (list(curve), list(curve.values()))
        for row in study.rows:  # that of an untrained network would leave the others no room
            if not math.isnan(value := study.mean(row.name, probe, study.name)) and not (
                error and row.method == SCRATCH
            ):
                at = [*curve] if row.name == TARGET else [study.flags.num_images]
                lines[row.name] = (at, [value] * len(at))
    save_lines(panels, study.folder / "worth.png", x_label="images", log_x=True)


@cli.command(StudyFlags, prog="python -m krr_st.study", description=__doc__)
def main(flags: StudyFlags) -> int:
    """Run what is missing, then write and print the tables."""
    if len(set(flags.curve)) < 2:
        raise UserError("--curve needs two numbers of images or more")
    failed = run_jobs(jobs, flags, flags.folder)
    study = Study(flags)
    if left := len(study.missing_jobs()):
        print(f"jobs left: {left}; the tables are written once all are done")
        return 1 if failed else 0
    draw(study)
    split = "a held-out part of the training images" if flags.validation else "the test split"
    text = "\n\n".join(f"{title}\n\n{table}" for title, table in tables(study).items())
    note = (
        f"accuracy in %, or error in variances of the target's features, on {split} of each set (of "
        f"{flags.data_name} where none is named) at {flags.img_size} pixels; networks: {study.test_model}; "
        f"mean ± std over {flags.seeds} seeds; worth: random real images of equal accuracy or error, divided "
        f"by {flags.num_images}"
    )
    checkpoint.write_text(study.folder / "tables.md", f"{text}\n\n{note}\n")
    write_json(
        study.folder / "study.json", {"flags": cli.as_json(flags), "rows": [row.name for row in study.rows]}
    )
    print(f"\n{text}\n\n{note}\nwritten: {study.folder}/tables.md, worth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
