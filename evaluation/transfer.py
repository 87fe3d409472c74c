"""Transfer learning (Tables 1-3, Figure 3): the driver behind test.py and test_scratch.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.augment.dsa import without_flip
from data.load import ImageSet, ImageSplit, load_set
from data.meta import read_meta
from data.specs import KRR_SPECS
from data.synthetic import SyntheticSet
from evaluation.fit import finetune, outputs, pretrain
from evaluation.measure import Cell, CellStore, finish, grouped, spread
from evaluation.presets import Preset, resolve_preset, resolve_targets
from evaluation.probe import few_shot_indices, frozen_accuracy, label_fraction_indices
from evaluation.recipes import SCRATCH, Recipe, finetune_recipe, pretrain_recipe
from evaluation.target import (
    TARGET_CKPT,
    TARGET_MODEL,
    TargetFeatures,
    load_target,
    resolve_checkpoint,
    target_command,
)
from models import get_model
from utils.checkpoint import apply_state, fingerprint
from utils.cli import SEED, DeviceFlags, flag
from utils.device import place, resolve_device
from utils.errors import UserError
from utils.memory import out_of_memory_says
from utils.optim import SCHEDULES
from utils.seed import derive_seed, local_seed, make_generator, resolve_seed
from utils.table import format_mean_std, markdown

TARGET_ERROR = "target_error"


def _of_table(what: str, **limits: Any) -> Any:
    """A flag for a hyper-parameter whose default is the published table's."""
    return flag(None, f"{what}; default: table", **limits)


@dataclass(frozen=True)
class MeasureFlags(DeviceFlags):
    """Flags of test_scratch.py, test.py and test_kd.py."""

    data_dir: Path = flag(Path("./datasets"), "folder of the prepared tensors")
    seed: int | None = flag(0, "seed of the first repetition; the next ones add 1", **SEED, identity=False)
    source_data_name: str = flag("cifar100", "source: sets the image size and the base network")
    test_model: str = flag("base", "base (the source's network) or a name of zoo A")
    num_test: int = flag(3, "repetitions with different seeds", minimum=1)
    log_dir: Path = flag(Path("./test_log"), "where results are written")
    dropout: float = flag(0.0, "dropout before the last layer", minimum=0, maximum=0.99)
    img_size: int | None = flag(None, "side in pixels; default: the source's preset", minimum=4)
    steps_scale: float = flag(1.0, "factor on all training lengths, for quick looks", above=0)

    def setting(self) -> tuple[Preset, str, torch.device]:
        """The source's preset, the network that is tested, and where to compute."""
        preset = resolve_preset(self.source_data_name, self.data_dir, self.img_size)
        arch = preset.network if self.test_model == "base" else self.test_model.lower()
        return preset, arch, resolve_device(self.device, self.gpu_id)

    def settings(self, method: str, arch: str, size: int, pretraining: Pretraining | None) -> dict[str, Any]:
        """Everything but measure, target and seed that a cell's value depends on."""
        return {
            "source": self.source_data_name,
            "method": method,
            "model": arch,
            "size": size,
            "dropout": self.dropout,
            "steps_scale": self.steps_scale,
            **(pretraining.record() if pretraining else {}),
        }

    def footnote(self, text: str) -> str:
        """`text` below a table, with what makes its numbers incomparable."""
        return text + f"; lengths scaled by {self.steps_scale}, not the table's" * (self.steps_scale != 1)


@dataclass(frozen=True)
class PretrainFlags:
    """Flags that name a synthetic set and how it trains a network."""

    source_data_name: str = flag("tinyimagenet", "source: sets the image size and base network")
    method: str = flag(
        "krr_st",
        "whose synthetic set: random, kmeans, dc, dsa, dm, mtt, kip, frepo, krr_st, mkdt, "
        "random_features, kmeans_features, gaussian (in test_kd.py fresh noise, no set), in "
        "test_kd.py scratch (random_features without pre-training); it decides the recipe",
    )
    synthetic_data_dir: Path = flag(Path("./synthetic_data"), "its {source}/{method}/ is read")
    synthetic_path: Path | None = flag(None, "a set anywhere instead (e.g. results/EXP)")
    pre_epoch: int | None = _of_table("pre-training epochs", minimum=1)
    pre_iteration: int | None = _of_table("pre-training steps", minimum=1)
    pre_opt: str | None = _of_table("pre-training optimiser", choices=("sgd", "adam"))
    pre_momentum: float | None = _of_table("pre-training momentum (sgd)", minimum=0, maximum=0.999)
    pre_schedule: str | None = _of_table("how the pre-training rate falls", choices=tuple(SCHEDULES))
    pre_warmup: int | None = _of_table("warm-up steps (cosine), at most half of all", minimum=0)
    pre_lr: float | None = _of_table("pre-training learning rate", above=0)
    pre_wd: float | None = _of_table("pre-training weight decay", minimum=0)
    pre_batch_size: int | None = _of_table("pre-training batch", minimum=1)
    pre_dsa: str | None = _of_table("pre-training DSA strategy or none")


@dataclass(frozen=True)
class ScratchFlags(MeasureFlags):
    """Flags of test_scratch.py, and what test.py shares with it."""

    target_data_name: str = flag("full", "full, or target names joined by _")
    protocol: str = flag(
        "finetune",
        "finetune: train everything; linear: L-BFGS logistic regression on frozen features; probe: "
        "the same, the name later papers use (with --label_fraction); knn: 20 nearest neighbours",
        choices=("finetune", "linear", "probe", "knn"),
    )
    shots: str = flag("all", "labelled target images per class, or all; several joined by _ (10_all)")
    label_fraction: float | None = flag(
        None, "share of each class's target labels to use, instead of --shots", above=0, maximum=1
    )
    probe_on: str = flag(
        "body",
        "what linear, probe and knn read: the features before the last layer (body), the "
        "network's outputs, or first the one and then the other (both)",
        choices=("body", "outputs", "both"),
    )
    target_error: bool = flag(
        False,
        "also measure the mean squared error of the outputs against the target model's "
        "features of the test images, in units of the features' variances over the training "
        "images (1: predicting the mean)",
    )
    target_model: str | None = flag(None, f"for --target_error: {TARGET_MODEL}")
    target_ckpt: Path | None = flag(None, TARGET_CKPT)
    finetune_iteration: int | None = _of_table("fine-tuning steps", minimum=1)
    finetune_opt: str | None = _of_table("fine-tuning optimiser", choices=("sgd", "adam"))
    finetune_momentum: float | None = _of_table("fine-tuning momentum (sgd)", minimum=0, maximum=0.999)
    finetune_schedule: str | None = _of_table("how the fine-tuning rate falls", choices=tuple(SCHEDULES))
    finetune_lr: float | None = _of_table("fine-tuning learning rate", above=0)
    finetune_wd: float | None = _of_table("fine-tuning weight decay", minimum=0)
    finetune_batch_size: int | None = _of_table("fine-tuning batch", minimum=1)


@dataclass(frozen=True)
class TestFlags(PretrainFlags, ScratchFlags):
    """Flags of test.py."""

    __test__ = False  # not a pytest class


@dataclass(frozen=True)
class Measure:
    """What is measured of a pre-trained network: one column of the table."""

    protocol: str  # one of --protocol, or TARGET_ERROR
    shots: str = "all"  # labelled images per class
    on: str = "body"  # what frozen protocols read, or "outputs"
    fraction: float | None = None  # share of each class's labels, in place of shots

    @classmethod
    def of(cls, cell: Cell) -> Measure:
        """The measure whose cell it is."""
        return cls(cell["protocol"], cell["shots"], cell.get("probe_on", "body"), cell["label_fraction"])

    @property
    def field(self) -> str:
        """Where a cell holds the value."""
        return "error" if self.protocol == TARGET_ERROR else "accuracy"

    def heading(self) -> str:
        """The head of the column."""
        if self.protocol == TARGET_ERROR:
            return "error of target features"
        budget = "all labels" if self.shots == "all" else f"{self.shots} labels per class"
        if self.fraction is not None:
            budget = f"{100 * self.fraction:g} % of labels"
        return budget if self.on == "body" else f"outputs, {budget}"

    def shown(self, values: Sequence[float]) -> str:
        """Mean and spread in the table."""
        return format_mean_std(values, 3 if self.protocol == TARGET_ERROR else 2)


def describe(cell: Cell) -> str:
    """A finished cell in one line."""
    measure = Measure.of(cell)
    where = f"{cell['target']}, seed {cell['seed']}"
    if measure.protocol == TARGET_ERROR:
        return f"{where}: error of target features {cell['error']:.4f}"
    on = "" if measure.on == "body" else " on outputs"
    return f"{where}, {measure.shots} shots{on}: {cell['accuracy']:.2f} %"


def parse_shots(joined: str) -> tuple[str, ...]:
    """`10_all` -> ("10", "all"); a UserError for what is neither a positive number nor all."""
    parts = joined.split("_")
    for part in parts:
        if part != "all" and not (part.isdecimal() and int(part) > 0):
            raise UserError(f"--shots {joined}: {part!r} is neither a positive number nor 'all'")
    return tuple(dict.fromkeys(parts))


def wanted_measures(flags: ScratchFlags) -> list[Measure]:
    """The measures that the flags ask for, in the table's order; a UserError where they do not fit."""
    fraction = flags.label_fraction
    shots = ("all",) if fraction is not None else parse_shots(flags.shots)
    if flags.protocol == "finetune" and flags.probe_on != "body":
        raise UserError(
            f"--probe_on {flags.probe_on}: fine-tuning replaces the outputs; "
            "use --protocol linear, probe or knn"
        )
    read = ("body", "outputs") if flags.probe_on == "both" else (flags.probe_on,)
    found = [Measure(flags.protocol, count, on, fraction) for on in read for count in shots]
    return found + [Measure(TARGET_ERROR, on="outputs")] * flags.target_error


@dataclass(frozen=True)
class Pretraining:
    """A synthetic set and how it trains a network; None in its place means: from scratch."""

    synthetic: SyntheticSet
    recipe: Recipe
    outputs: int
    scale: float

    def record(self) -> dict[str, Any]:
        """What a cell's value depends on."""
        digest = fingerprint(self.synthetic.images, self.synthetic.targets)
        return {"pretraining": self.recipe.record(), "synthetic_set": digest}


def build_backbone(
    arch: str,
    img_shape: tuple[int, int, int],
    pretraining: Pretraining | None,
    *,
    dropout: float,
    seed: int,
    device: torch.device,
    width: int = 1,
) -> nn.Module:
    """A network initialised from `seed`, pre-trained unless `pretraining` is None; eval mode.

    `width` is the number of outputs where no pre-training says it.
    """
    with local_seed(derive_seed(seed, "network")):
        model = get_model(arch, img_shape, pretraining.outputs if pretraining else width, dropout)
        model = place(model, device)
        if pretraining is not None:
            generator = make_generator(seed, "pre-training")
            pretrain(model, pretraining.synthetic, pretraining.recipe, generator, pretraining.scale)
    return model.eval()


def with_new_head(
    backbone: nn.Module, arch: str, target: ImageSet, dropout: float, device: torch.device
) -> nn.Module:
    """A copy of a pre-trained network with a head for the target's classes, drawn by global randomness."""
    model = get_model(arch, target.img_shape, target.num_classes, dropout)
    apply_state(model, backbone.state_dict(), origin="the pre-trained network", skip=("fc.",))
    return place(model, device)


def labelled_indices(target: ImageSet, measure: Measure, seed: int) -> Tensor:
    """Which labelled images a cell may use: a draw from `seed` alone, so the same for all methods."""
    labels, shots, fraction = target.train.labels, measure.shots, measure.fraction
    generator = make_generator(seed, "labelled subset", shots, fraction)
    if fraction is not None:
        return label_fraction_indices(labels, fraction, generator)
    if shots == "all":
        return torch.arange(len(labels))
    try:
        return few_shot_indices(labels, int(shots), generator)
    except UserError as error:
        raise UserError(f"{target.name}: {error}") from None


class TargetTask:
    """One target set met by the network that `backbone` gives: features are computed at most once."""

    def __init__(self, backbone: Callable[[], nn.Module], target: ImageSet, device: torch.device) -> None:
        self.backbone, self.target, self.device = backbone, target, device
        self._kept: dict[tuple[str, str], Tensor] = {}

    def frozen(self, measure: Measure, index: Tensor) -> float:
        """Test accuracy in % of a classifier on frozen features of the images at `index`."""
        train, test, on = self.target.train, self.target.test, measure.on
        if ("train", on) not in self._kept and 4 * len(index) < len(train):
            # few: the others' features may never be asked for
            features = self._compute(train.images[index], on)
        else:
            features = self.features("train", on)[index.to(self.device)]
        seen, unseen = (features, train.labels[index]), (self.features("test", on), test.labels)
        return frozen_accuracy(measure.protocol, *seen, *unseen, self.target.num_classes)

    def features(self, split: str, on: str) -> Tensor:
        """Body features or outputs for a split, "train" or "test": (N, D) on the device."""
        if (split, on) not in self._kept:
            self._kept[split, on] = self._compute(getattr(self.target, split).images, on)
        return self._kept[split, on]

    def _compute(self, images: Tensor, on: str) -> Tensor:
        backbone = self.backbone()
        function = backbone.embed if on == "body" else backbone
        return outputs(function, images, self.target, self.device)


def may_mirror(name: str, data_dir: Path) -> bool:
    """Whether mirror images of a set mean the same: its row says so, or its meta.json if any."""
    spec = KRR_SPECS.get(name)
    return spec.hflip if spec else bool(read_meta(Path(data_dir) / name).get("hflip", True))


def source_classes(name: str, data_dir: Path) -> int:
    """How many classes a source has by its row, else its meta.json; 0 where neither says it."""
    spec = KRR_SPECS.get(name)
    return spec.num_classes if spec else len(read_meta(data_dir / name).get("class_names") or ())


def load_pretraining(flags: PretrainFlags, size: int, arch: str, *, kd: bool = False) -> Pretraining:
    """The synthetic set of a method and the recipe that belongs to it, with the flags put in.

    Raises:
        UserError: unknown method, missing or damaged set, one of another image size or with
            labels that the source does not have.
    """
    recipe = pretrain_recipe(flags.method, flags.source_data_name, arch, kd=kd).with_flags(flags, "pre_")
    if flags.pre_dsa is None and not may_mirror(flags.source_data_name, flags.data_dir):
        recipe = recipe.override(dsa=without_flip(recipe.dsa))
    path = flags.synthetic_path or flags.synthetic_data_dir / flags.source_data_name / flags.method
    synthetic = SyntheticSet.load(path)
    if synthetic.images.shape[2:] != (size, size):
        found = tuple(synthetic.images.shape[2:])
        raise UserError(f"{path} holds images of {found} pixels, expected {size} x {size}; see --img_size")
    by_class = recipe.loss == "cross_entropy"
    if synthetic.soft == by_class:
        wanted = "class indices" if by_class else "float vectors"
        raise UserError(f"{path}: method {flags.method} is pre-trained on {wanted}, found others")
    if synthetic.soft:
        return Pretraining(synthetic, recipe, synthetic.targets.shape[1], flags.steps_scale)
    seen = int(synthetic.targets.max()) + 1
    classes = source_classes(flags.source_data_name, flags.data_dir) or seen
    if seen > classes:
        raise UserError(f"{path} holds label {seen - 1}, but {flags.source_data_name} has {classes} classes")
    return Pretraining(synthetic, recipe, classes, flags.steps_scale)


def load_targets(
    names: Sequence[str], size: int, data_dir: Path, img_shape: tuple[int, ...] | None
) -> list[ImageSet]:
    """Read every target once; of a set that has no test split the training split stands in.

    `img_shape` is the (C, H, W) that one network takes; None: the first target's.

    Raises:
        UserError: a set that is missing, lacks labels or a test split, or has other channels.
    """
    targets: list[ImageSet] = []
    for name in names:
        target = load_set(name, size, data_dir)
        if target.test is None and name in KRR_SPECS and not KRR_SPECS[name].has_test:
            print(f"{name} has no test split: accuracies on it are those of its training images")
            target = replace(target, test=target.train)
        if target.num_classes is None or target.test is None or target.test.labels is None:
            what = "test split" if target.test is None else "labels in each split"
            raise UserError(f"{target.train.path.parent} has no {what}; a target needs both")
        wanted = img_shape or (targets or [target])[0].img_shape
        if target.img_shape != wanted:
            found = target.img_shape
            raise UserError(f"images of {name} are {found}, those the network is made for {wanted}")
        targets.append(target)
    return targets


class Transfer:
    """A synthetic set (or none) met by target sets: everything read and checked, ready to measure.

    `flags` are those of test_scratch.py, or TestFlags with a method; `measures` and `targets` (read
    already) take the place of theirs.

    Raises:
        UserError: bad flags, data or synthetic set.
    """

    def __init__(
        self,
        flags: ScratchFlags,
        measures: list[Measure] | None = None,
        targets: list[ImageSet] | None = None,
    ) -> None:
        self.flags = flags
        self.measures = wanted_measures(flags) if measures is None else measures
        preset, self.arch, self.device = flags.setting()
        self.method, self.pretraining, shape = SCRATCH, None, None
        if isinstance(flags, TestFlags):
            self.method = flags.method
            self.pretraining = load_pretraining(flags, preset.size, self.arch)
            shape = tuple(self.pretraining.synthetic.images.shape[1:])
            print(f"pre-training: {self.pretraining.recipe}")
        self.settings = flags.settings(self.method, self.arch, preset.size, self.pretraining)
        if targets is None:
            names = resolve_targets(flags.source_data_name, flags.target_data_name, flags.data_dir)
            targets = load_targets(names, preset.size, flags.data_dir, shape)
        self.targets = targets
        for target in targets:  # what cannot be measured is said before anything is trained
            get_model(self.arch, target.img_shape, target.num_classes)
            for measure in self.measures:
                labelled_indices(target, measure, flags.seed or 0)
        self.features: dict[str, TargetFeatures] = {}
        outputs_read = any(measure.on == "outputs" for measure in self.measures)
        if flags.target_error or (self.pretraining is None and outputs_read):
            self.features = {t.name: self._target_features(t, preset) for t in targets}

    def _target_features(self, target: ImageSet, preset: Preset) -> TargetFeatures:
        flags, pretraining = self.flags, self.pretraining
        name = flags.target_model or preset.target_model
        path = resolve_checkpoint(name, flags.target_ckpt, flags.source_data_name)
        hint = target_command(name, flags.source_data_name, preset.size, flags.data_dir)
        model = load_target(name, path, target.img_shape, self.device, hint, target.stats)
        if pretraining and not (pretraining.synthetic.soft and pretraining.outputs == model.dim):
            kind = "target vectors" if pretraining.synthetic.soft else "class labels"
            raise UserError(
                f"--target_error: the synthetic set has {kind} for {pretraining.outputs} outputs; "
                f"expected the {model.dim} features of target model {name}"
            )
        return TargetFeatures(model, target, self.device)

    @property
    def width(self) -> int:
        """Outputs of the network: the pre-training's, else the target model's features."""
        if self.pretraining is not None:
            return self.pretraining.outputs
        return next((features.dim for features in self.features.values()), 1)

    def key(self, target: ImageSet, measure: Measure, seed: int) -> dict[str, Any]:
        """All that a cell's value depends on."""
        key = {
            **self.settings,
            "protocol": measure.protocol,
            "target": target.name,
            "target_data": target.fingerprint,
            "shots": measure.shots,
            "label_fraction": measure.fraction,
            "seed": seed,
        }
        if measure.on == "outputs":
            key |= {"probe_on": "outputs", "width": self.width}
        if measure.protocol == "finetune":
            key["finetuning"] = self.finetuning(target).record()
        if target.test is target.train:
            key["tested_on"] = "training images"
        if measure.protocol == TARGET_ERROR:
            key["target_model"] = self.features[target.name].digest
        return key

    def finetuning(self, target: ImageSet) -> Recipe:
        """How a copy of the network is fine-tuned on a target."""
        return finetune_recipe(target.name, self.arch, target.size).with_flags(self.flags, "finetune_")

    def finetuned(self, task: TargetTask, index: Tensor, seed: int) -> float:
        """Test accuracy in % after fine-tuning a copy of the network on the images at `index`."""
        target, flags = task.target, self.flags
        recipe, train, backbone = self.finetuning(target), target.train, task.backbone()
        print(f"fine-tuning on {target.name}: {recipe}, {'crop and flip' if target.hflip else 'crop'}")
        if len(index) < len(train):
            train = ImageSplit(train.images[index], train.labels[index], train.path)
        generator = make_generator(seed, "fine-tuning", target.name)
        with local_seed(derive_seed(seed, "head", target.name)):
            model = with_new_head(backbone, self.arch, target, flags.dropout, self.device)
            return finetune(model, target, train, recipe, generator, flags.steps_scale)

    def repetition(self, seed: int, store: CellStore) -> list[Cell]:
        """All cells of one seed: one pre-trained network serves every target and measure."""
        cells, arch, device, dropout = [], self.arch, self.device, self.flags.dropout

        @functools.cache
        def backbone() -> nn.Module:
            shape = self.targets[0].img_shape
            common = dict(dropout=dropout, seed=seed, device=device, width=self.width)
            return build_backbone(arch, shape, self.pretraining, **common)

        for target in self.targets:
            task = TargetTask(backbone, target, device)
            for measure in self.measures:
                compute = functools.partial(self._measure, task, measure, seed)
                cells.append(store.measure(self.key(target, measure, seed), compute, describe))
        return cells

    def _measure(self, task: TargetTask, measure: Measure, seed: int) -> dict[str, Any]:
        if measure.protocol == TARGET_ERROR:
            return {"error": self.features[task.target.name].error(task.features("test", "outputs"))}
        index = labelled_indices(task.target, measure, seed)
        if measure.protocol == "finetune":
            value = self.finetuned(task, index, seed)
        else:
            value = task.frozen(measure, index)
        return {"accuracy": value, "labelled": len(index)}


def run_transfer(flags: ScratchFlags) -> int:
    """Measure every (target, labels, seed) cell, print the table, write results.json.

    Finished cells stay in results.jsonl whatever comes after them.
    """
    first = resolve_seed(flags.seed)
    transfer = Transfer(replace(flags, seed=first))
    store, cells = CellStore(flags.log_dir / "results.jsonl"), []
    with out_of_memory_says(transfer.device, "lower --pre_batch_size or --finetune_batch_size"):
        for seed in range(first, first + flags.num_test):
            cells += transfer.repetition(seed, store)
    groups = grouped(cells, lambda cell: (cell["target"], Measure.of(cell)))
    summary = [
        {"target": target, **asdict(measure), **spread(mine, measure.field)}
        for (target, measure), mine in groups.items()
    ]
    folder = flags.log_dir / flags.source_data_name / transfer.method / transfer.arch / flags.protocol
    finish(folder, flags, transfer.device, cells, summary, table(cells, flags))
    return 0


def table(cells: list[Cell], flags: ScratchFlags) -> str:
    """Targets as rows, measures as columns: test accuracy in %, or the error."""
    measures = list(dict.fromkeys(map(Measure.of, cells)))
    rows = []
    for name, mine in grouped(cells, lambda cell: cell["target"]).items():
        stand_in = {cell.get("tested_on") for cell in mine} - {None}
        found = grouped(mine, Measure.of)
        shown = [m.shown([cell[m.field] for cell in found.get(m, ())]) for m in measures]
        rows.append([" on ".join([name, *stand_in]), *shown])
    text = markdown(["target", *(m.heading() for m in measures)], rows)
    note = f"test accuracy in %, {flags.protocol}, mean ± std over {flags.num_test} seeds"
    if flags.target_error:
        note += "; error of the outputs in variances of the target's features: 1 predicts the mean"
    return f"{text}\n{flags.footnote(note)}"
