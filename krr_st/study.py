"""`python -m krr_st.study` (`make study`): what distilled images are worth, on a prepared set.

Sets of `num_images` images are compared by the same probes of freshly pre-trained networks: KRR-ST
with each lever alone, random real images with target features, k-means, class labels, nothing. The
accuracy of random images by their number turns an accuracy into an equivalence ratio. With
--validation the probes see a held-out part of the training images instead of the test split: choose
levers there. Finished work is kept; the same command resumes.
"""

import gc
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import torch

from data.load import load_set
from data.prepared import tensor_path
from data.target_scale import TARGET_SCALES
from distillation.run import run_method
from evaluation.equivalent_images import equivalent_images
from evaluation.measure import CellStore
from evaluation.recipes import PRETRAIN, SCRATCH
from evaluation.target import default_checkpoint
from evaluation.transfer import Measure, ScratchFlags, TestFlags, Transfer, load_targets, parse_shots
from krr_st import baselines, target
from krr_st.config import TrainFlags, shared_flags
from methods import METHODS
from utils import checkpoint, cli
from utils.cli import flag
from utils.errors import UserError, pick
from utils.plots import save_lines
from utils.precision import PRECISIONS
from utils.run_folder import write_json
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
}
# Sets that need no distillation: row -> method of krr_st.baselines.
SETS = {
    "random + features": "random_features",
    "k-means + features": "kmeans_features",
    "random + class labels": "random",
}
HELD_OUT = 0.2
FRACTIONS = (0.01, 0.05)
FINETUNED = ("10", "all")  # labels per class


@dataclass(frozen=True)
class StudyFlags:
    """Flags of the study."""

    data_dir: Path = flag(Path("./datasets"), "folder of the prepared tensors")
    folder: Path = flag(Path("./study"), "where checkpoints, runs and results go")
    data_name: str = flag("cifar10", "labelled prepared set; distillation never reads its labels")
    img_size: int = flag(16, "side in pixels", minimum=8)
    network: str = flag("convnet_64_128_256_bn", "target, pool and student network")
    validation: bool = flag(False, "probe on a held-out fifth of the training images")
    target_epochs: int = flag(15, "epochs of the target model", minimum=1)
    num_images: int = flag(100, "images in each set", minimum=1)
    curve: tuple[int, ...] = flag((50, 100, 200, 500, 1000, 2000), "numbers of random real images", minimum=1)
    levers: tuple[str, ...] = flag(("krr_st",), f"of: {', '.join(LEVERS)}, all, or none")
    seeds: int = flag(3, "repetitions, each with sets, networks and labels of its own", minimum=1)
    first_seed: int = flag(
        0, "start at this repetition, to share the work; run without it for the tables", minimum=0
    )
    outer_iteration: int = flag(3000, "outer steps", minimum=1)
    outer_lr: float = flag(1e-2, "learning rate of X_s and Y_s", above=0)
    outer_batch_size: int = flag(256, "real images per outer step", minimum=1)
    num_models: int = flag(5, "networks in the pool", minimum=1)
    online_iteration: int = flag(500, "age limit of the pool networks", minimum=1)
    target_scale: str | None = flag(
        None, "std: all sets of features are learned standardised", choices=TARGET_SCALES
    )
    pool_mixup: bool | None = flag(None, "mixup of the set in KRR-ST's pool and kernel")
    pre_mixup: bool | None = flag(None, "mixup in pre-training on every set of features")
    precision: str = flag("fp32", "of distillation; all else is fp32", choices=tuple(PRECISIONS))
    device: str | None = flag(None, "cpu, cuda, cuda:N or mps; default: the best there is")
    pre_iteration: int = flag(200, "steps of pre-training on a set of features", minimum=1)
    finetune_iteration: int = flag(0, "steps of fine-tuning; 0: probes only", minimum=0)
    targets: tuple[str, ...] = flag((), "more prepared sets of this size to transfer to")
    extra_sets: tuple[str, ...] = flag((), "more sets as NAME=METHOD=PATH: dm=dm=synthetic_data/cifar10/dm")
    shots: str = flag("1_5_10_50", "labelled images per class of the few-shot probes")


def validation_set(flags: StudyFlags) -> str:
    """Write the training images as a set of its own, a fifth of them as test split; returns its name."""
    name = f"{flags.data_name}_val"
    if not tensor_path(flags.data_dir, name, "Y", "test", flags.img_size).exists():
        whole = load_set(flags.data_name, flags.img_size, flags.data_dir).train
        order = torch.randperm(len(whole), generator=make_generator(0, "held-out images"))
        held_out = int(HELD_OUT * len(whole))
        for split, index in (("train", order[held_out:]), ("test", order[:held_out])):
            for kind, tensor in (("X", whole.images), ("Y", whole.labels)):
                path = tensor_path(flags.data_dir, name, kind, split, flags.img_size)
                checkpoint.save(tensor[index], path)
    return name


class Study:
    """The commands of one study, run in this process and printed as a user would type them."""

    def __init__(self, flags: StudyFlags) -> None:
        self.flags = flags
        self.name = validation_set(flags) if flags.validation else flags.data_name
        self.folder = flags.folder / self.name
        self.suffix = "-std" if flags.target_scale == "std" else ""
        self.checkpoint = default_checkpoint(flags.network, self.name, flags.folder / "teacher_ckpt")
        self.targets = load_targets((self.name, *flags.targets), flags.img_size, flags.data_dir, None)
        shots = () if flags.shots == "none" else parse_shots(flags.shots)
        self.probes = [Measure("linear", fraction=fraction) for fraction in FRACTIONS]
        self.few_shot = [Measure("linear", count) for count in shots]
        self.finetuning = [Measure("finetune", count) for count in FINETUNED if flags.finetune_iteration]
        # (row, target, measure) -> seed -> accuracy
        self.found: dict[tuple, dict[int, float]] = defaultdict(dict)

    def make_target(self) -> None:
        """Train the target model once."""
        if not self.checkpoint.exists():
            length = dict(epochs=self.flags.target_epochs, projector_dim=512, seed=0)
            self._run(target, **length, save_dir=self.checkpoint.parent)

    def make_set(self, method: str, count: int, seed: int) -> Path:
        """One set of `krr_st.baselines`; returns its folder."""
        root = self.folder / "sets" / f"{count}-{seed}{self.suffix}"
        folder = root / self.name / method
        if not (folder / "y_syn.pt").exists():
            which = dict(method=method, num_images=count, seed=seed)
            if self.suffix and PRETRAIN[method].loss == "mse":
                which |= dict(target_scale=self.flags.target_scale)
            self._run(baselines, **which, target_ckpt=self.checkpoint, synthetic_data_dir=root)
        return folder

    def _run(self, module: ModuleType, **more: Any) -> None:
        f = self.flags
        given = dict(data_dir=f.data_dir, data_name=self.name, img_size=f.img_size, target_model=f.network)
        given |= more | (dict(device=f.device) if f.device else {})
        argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        print(f"\n$ python -m {module.__name__} {shlex.join(argv)}", flush=True)
        if module.main(argv):
            raise UserError(f"the study stopped: {module.__name__} failed")

    def distil(self, lever: str, seed: int) -> Path:
        """One KRR-ST run; returns its folder."""
        f, runs = self.flags, self.folder / "runs"
        name = f"{lever.replace(' ', '_')}-{seed}{self.suffix}{'-mixup' if f.pool_mixup else ''}"
        networks = dict(target_model=f.network, target_ckpt=self.checkpoint, train_model=f.network)
        place = dict(data_name=self.name, seed=seed, save_dir=runs, exp_name=name)
        length = dict(print_every=500, eval_every=10**9, test_iteration=500, pre_epoch=100)
        settings = shared_flags(f, TrainFlags) | networks | place | length
        run_method(METHODS["krr_st"], TrainFlags(**settings | LEVERS[lever]))
        gc.collect()  # the table of views is large
        return runs / name

    def measure(self, row: str, method: str, path: Path | None, seed: int) -> None:
        """All probes of one set (or of none) with one seed, on one pre-trained network."""
        f = self.flags
        given = shared_flags(f, ScratchFlags) | dict(source_data_name=self.name, test_model=f.network)
        given |= dict(seed=seed, finetune_iteration=f.finetune_iteration or None)
        flags = ScratchFlags(**given)
        if path is not None:
            features = PRETRAIN[method].loss == "mse"
            length = dict(pre_iteration=f.pre_iteration if features else None)
            mixup = dict(pre_mixup=f.pre_mixup if features else None)
            flags = TestFlags(**given, **length, **mixup, method=method, synthetic_path=path)
        measures, targets = [*self.probes, *self.few_shot, *self.finetuning], self.targets
        if row.startswith("curve"):
            measures, targets = self.probes, targets[:1]
        store = CellStore(self.folder / "test_log" / row / "results.jsonl")
        for cell in Transfer(flags, measures, targets).repetition(seed, store):
            self.found[row, cell["target"], Measure.of(cell)][seed] = cell["accuracy"]

    def mean(self, row: str, probe: Measure) -> float:
        """The mean accuracy of a row on the source set."""
        return fmean(self.found[row, self.name, probe].values())

    def curve(self, probe: Measure) -> dict[int, float]:
        """Number of random images -> their mean accuracy."""
        return {count: self.mean(f"curve {count}", probe) for count in self.flags.curve}

    def shown(self, row: str, measure: Measure, target: str) -> str:
        """The accuracies of a row as a table prints them."""
        return format_mean_std([*self.found[row, target, measure].values()])


def run_all(study: Study) -> list[str]:
    """Make and measure every set of the study; returns the rows in the table's order."""
    flags = study.flags
    levers = {"all": tuple(LEVERS), "none": ()}.get(flags.levers[0], flags.levers)
    for lever in levers:
        pick(LEVERS, lever, "lever")
    extra = [text.split("=", 2) for text in flags.extra_sets]
    for parts in extra:
        if len(parts) < 3:
            raise UserError(f"--extra_sets {parts[0]}: expected NAME=METHOD=PATH")
        pick(PRETRAIN, parts[1], "method in --extra_sets")
    study.make_target()
    for seed in range(flags.first_seed, flags.seeds):
        study.measure("no pre-training", SCRATCH, None, seed)
        for row, method in SETS.items():
            study.measure(row, method, study.make_set(method, flags.num_images, seed), seed)
        for row, method, path in extra:
            study.measure(row, method, Path(path.format(seed=seed)), seed)
        for lever in levers:
            study.measure(lever, "krr_st", study.distil(lever, seed), seed)
        for count in flags.curve:
            path = study.make_set("random_features", count, seed)
            study.measure(f"curve {count}", "random_features", path, seed)
    return ["no pre-training", *SETS, *(row for row, *_ in extra), *levers]


def tables(study: Study, rows: list[str]) -> dict[str, str]:
    """The Markdown tables of a finished study: probes with equivalence ratios, few shots."""
    flags, images = study.flags, f"{study.flags.num_images} images"
    heads, body, curves = [images], [[row] for row in rows], []
    for probe in study.probes:
        curve = study.curve(probe)
        heads += [probe.heading(), "worth"]
        for line in body:
            ratio = equivalent_images(curve, study.mean(line[0], probe), flags.num_images)
            line += [study.shown(line[0], probe, study.name), str(ratio)]
        numbers = [study.shown(f"curve {count}", probe, study.name) for count in flags.curve]
        curves.append([probe.heading(), *numbers])
    found = {
        "probe": markdown(heads, body),
        "curve": markdown(["random images + features", *map(str, flags.curve)], curves),
    }
    for name in (image_set.name for image_set in study.targets):
        for title, measures in (("few-shot", study.few_shot), ("fine-tuning", study.finetuning)):
            if measures:
                heads = [f"{images}, {name}", *(measure.heading() for measure in measures)]
                lines = [[row, *(study.shown(row, measure, name) for measure in measures)] for row in rows]
                found[f"{title} {name}"] = markdown(heads, lines)
    return found


def draw(study: Study, rows: list[str]) -> None:
    """worth.png: the curves of random images, and each row's set beside them."""
    lines: dict[str, tuple[Any, Any]] = {}
    for probe in study.probes:
        curve = study.curve(probe)
        lines[f"random + features, {probe.heading()}"] = (list(curve), list(curve.values()))
    for row in rows:
        lines[row] = ([study.flags.num_images], [study.mean(row, study.probes[-1])])
    save_lines(lines, study.folder / "worth.png", x_label="images", y_label="probe accuracy in %", log_x=True)


@cli.command(StudyFlags, prog="python -m krr_st.study", description=__doc__)
def main(flags: StudyFlags) -> int:
    """Run what is missing, then write and print the tables."""
    if len(set(flags.curve)) < 2:
        raise UserError("--curve needs two numbers of images or more")
    if flags.first_seed >= flags.seeds:
        raise UserError(f"--first_seed {flags.first_seed}: expected below --seeds {flags.seeds}")
    study = Study(flags)
    rows = run_all(study)
    if flags.first_seed:
        print("for the tables run the same command without --first_seed")
        return 0
    draw(study, rows)
    split = "a held-out part of the training images" if flags.validation else "the test split"
    text = "\n\n".join(f"{title}\n\n{table}" for title, table in tables(study, rows).items())
    note = (
        f"accuracy in % on {split} of {flags.data_name} at {flags.img_size} pixels, mean ± std "
        f"over {flags.seeds} seeds; worth: random real images of equal accuracy, divided by "
        f"{flags.num_images}"
    )
    checkpoint.write_text(study.folder / "tables.md", f"{text}\n\n{note}\n")
    write_json(study.folder / "study.json", {"flags": cli.as_json(flags), "rows": rows})
    print(f"\n{text}\n\n{note}\nwritten: {study.folder}/tables.md, worth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
