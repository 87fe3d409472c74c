"""Transfer learning (Tables 1-3, Figure 3): the driver behind test.py and test_scratch.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.augment.crop_flip import default_padding
from data.load import ImageSet, load_set
from data.loader import ImagePipeline
from data.specs import KRR_SPECS
from evaluation.fit import Trainer, held_out_accuracy, outputs
from evaluation.measure import Cell, CellStore, grouped, spread
from evaluation.presets import resolve_targets
from evaluation.pretraining import MeasureFlags, Measurement, PretrainFlags, load_pretraining
from evaluation.probe import FROZEN, feature_error, frozen_accuracy, labelled_subset
from evaluation.recipes import Recipe, finetune_recipe, of_recipe
from evaluation.target import TARGET_CKPT, TARGET_MODEL, load_target, target_sample
from models import get_model
from utils.checkpoint import fingerprint
from utils.cli import flag
from utils.errors import UserError
from utils.optim import SCHEDULES
from utils.seed import derive_seed, local_seed, make_generator
from utils.table import format_mean_std, markdown

TARGET_ERROR = "target_error"
READ = {"body": ("body",), "outputs": ("outputs",), "both": ("body", "outputs")}  # by --probe_on


@dataclass(frozen=True)
class ScratchFlags(MeasureFlags):
    """Flags of test_scratch.py, and what test.py shares with it."""

    target_data_name: str = flag("full", "full, or target names joined by _")
    protocol: str = flag(
        "finetune",
        "finetune: train everything; linear: L-BFGS logistic regression on frozen features; probe: "
        "the same, the name later papers use (with --label_fraction); knn: 20 nearest neighbours; "
        "target_error: only what --target_error measures, which needs no labels",
        choices=("finetune", "linear", "probe", "knn", TARGET_ERROR),
    )
    shots: str = flag("all", "labelled target images per class, or all; several joined by _ (10_all)")
    label_fraction: float | None = flag(
        None,
        "share of each class's target labels to use, instead of --shots",
        above=0,
        maximum=1,
        instead_of="shots",
    )
    probe_on: str = flag(
        "body",
        "what linear, probe and knn read: the features before the last layer (body), the "
        "network's outputs, or first the one and then the other (both)",
        choices=tuple(READ),
    )
    target_error: bool = flag(
        False,
        "also measure the mean squared error of the outputs against the target model's "
        "features of the test images, in units of the features' variances over the training "
        "images (1: predicting the mean)",
    )
    target_model: str | None = flag(None, f"for --target_error: {TARGET_MODEL}")
    target_ckpt: Path | None = flag(None, TARGET_CKPT)
    finetune_iteration: int | None = of_recipe("fine-tuning steps", "target", minimum=1)
    finetune_opt: str | None = of_recipe("fine-tuning optimiser", "target", choices=("sgd", "adam"))
    finetune_momentum: float | None = of_recipe(
        "fine-tuning momentum (sgd)", "target", minimum=0, maximum=0.999
    )
    finetune_schedule: str | None = of_recipe(
        "fine-tuning learning-rate schedule", "target", choices=tuple(SCHEDULES)
    )
    finetune_lr: float | None = of_recipe("fine-tuning learning rate", "target", above=0)
    finetune_wd: float | None = of_recipe("fine-tuning weight decay", "target", minimum=0)
    finetune_batch_size: int | None = of_recipe("fine-tuning batch", "target", minimum=1)

    @property
    def wants_error(self) -> bool:
        """Whether the outputs are compared with the target model's features."""
        return self.target_error or self.protocol == TARGET_ERROR


@dataclass(frozen=True)
class TestFlags(PretrainFlags, ScratchFlags):
    """Flags of test.py."""

    __test__ = False  # not a pytest class


JUDGED_ERROR = (
    "The error is that of the networks' outputs, in variances of the target model's features (1: predicting "
    "their mean)."
)
JUDGED = f"Labels: accuracy of a linear classifier on the frozen network. {JUDGED_ERROR}"


@dataclass(frozen=True)
class Measure:
    """What is measured of a pre-trained network: one column of the table."""

    protocol: str  # one of --protocol, or TARGET_ERROR
    shots: str = "all"  # labelled images per class
    on: str = "body"  # what frozen protocols read, or "outputs"
    fraction: float | None = None  # share of each class's labels, in place of shots

    @classmethod
    def of(cls, cell: Cell) -> Measure:
        return cls(cell["protocol"], cell["shots"], cell.get("probe_on", "body"), cell["label_fraction"])

    @property
    def field(self) -> str:
        """Where a cell holds the value."""
        return "error" if self.protocol == TARGET_ERROR else "accuracy"

    def heading(self) -> str:
        if self.protocol == TARGET_ERROR:
            return "error of target features"
        budget = "all labels" if self.shots == "all" else f"{self.shots} labels per class"
        if self.fraction is not None:
            budget = f"{100 * self.fraction:g} % of labels"
        return budget if self.on == "body" else f"outputs, {budget}"


def describe(cell: Cell) -> str:
    """A finished cell in one line."""
    measure, where = Measure.of(cell), f"{cell['target']}, seed {cell['seed']}"
    if measure.protocol == TARGET_ERROR:
        return f"{where}: error of target features {cell['error']:.4f}"
    return f"{where}, {measure.heading()}: {cell['accuracy']:.2f} %"


def parse_shots(joined: str) -> tuple[str, ...]:
    """`10_all` -> ("10", "all"); a UserError for what is neither a positive number nor all."""
    parts = joined.split("_")
    for part in parts:
        if part != "all" and not (part.isdecimal() and int(part) > 0):
            raise UserError(f"--shots {joined}: {part!r} is neither a positive number nor 'all'")
    return tuple(dict.fromkeys(parts))


def wanted_measures(flags: ScratchFlags) -> list[Measure]:
    """The measures that the flags ask for, in the table's order; a UserError where they do not fit."""
    fraction, error = flags.label_fraction, Measure(TARGET_ERROR, on="outputs")
    if flags.protocol == TARGET_ERROR:
        return [error]
    shots = ("all",) if fraction is not None else parse_shots(flags.shots)
    if flags.protocol == "finetune" and flags.probe_on != "body":
        raise UserError(
            f"--probe_on {flags.probe_on}: fine-tuning replaces the outputs; "
            "use --protocol linear, probe or knn"
        )
    found = [Measure(flags.protocol, count, on, fraction) for on in READ[flags.probe_on] for count in shots]
    return found + [error] * flags.target_error


def unused(flags: ScratchFlags) -> list[str]:
    """Flags that were given but mean nothing beside the others."""
    names = [] if flags.protocol == "finetune" else [n for n in vars(flags) if n.startswith("finetune_")]
    if flags.protocol == TARGET_ERROR:
        names += ["shots", "label_fraction", "probe_on"]
    if not flags.wants_error and (flags.protocol == "finetune" or isinstance(flags, TestFlags)):
        names += ["target_model", "target_ckpt"]
    return [name for name in names if getattr(flags, name) != getattr(ScratchFlags, name)]


def labelled_indices(target: ImageSet, measure: Measure, seed: int) -> Tensor:
    """Which labelled images a cell may use: a draw from `seed` alone, so the same for all methods."""
    labels, shots, fraction = target.train.labels, measure.shots, measure.fraction
    if fraction is None and shots == "all":
        return torch.arange(len(target.train))
    generator = make_generator(seed, "labelled subset", shots, fraction)
    try:
        return labelled_subset(labels, generator, None if fraction else int(shots), fraction)
    except UserError as error:
        raise UserError(f"{target.name}: {error}") from None


def load_targets(
    names: Sequence[str], size: int, data_dir: Path, img_shape: tuple[int, ...] | None, labelled: bool = True
) -> list[ImageSet]:
    """Read every target once; where its row has no test split the training images stand in for it.

    `img_shape` is the (C, H, W) that one network takes; None: the first target's. A UserError for a
    set that is missing, lacks labels or a test split, or has other channels.
    """
    targets: list[ImageSet] = []
    for name in names:
        target = load_set(name, size, data_dir)
        if target.test is None and name in KRR_SPECS and not KRR_SPECS[name].has_test:
            print(f"{name} has no test split: accuracies on it are those of its training images")
            target = replace(target, test=target.train)
        if target.test is None:
            raise UserError(f"{target.train.path.parent} has no test split; a target needs one")
        if labelled and not target.labelled:
            raise UserError(
                f"{target.train.path.parent} has no labels in each split; a target needs them "
                f"(--protocol {TARGET_ERROR} does without)"
            )
        found, img_shape = target.img_shape, img_shape or target.img_shape
        if found != img_shape:
            raise UserError(f"images of {name} are {found}, those the network is made for {img_shape}")
        targets.append(target)
    return targets


class Features:
    """Features of one target's images by the network that `network` gives, computed at most once."""

    def __init__(
        self,
        network: Callable[[], nn.Module],
        target: ImageSet,
        device: torch.device,
        tick: Callable[[float], None] = lambda work: None,
    ) -> None:
        self.network, self.target, self.device, self.tick = network, target, device, tick
        self._kept: dict[tuple[str, str], Tensor] = {}

    def __call__(self, split: str, on: str, index: Tensor | None = None) -> Tensor:
        """Body features or outputs of a split, or of its images at `index`: (N, D) on the device."""
        images, key = getattr(self.target, split).images, (split, on)
        if key not in self._kept:
            if index is not None and 4 * len(index) < len(images):
                return self._compute(images[index], on)  # the others' features may never be asked for
            self._kept[key] = self._compute(images, on)
        return self._kept[key] if index is None else self._kept[key][index.to(self.device)]

    def _compute(self, images: Tensor, on: str) -> Tensor:
        network = self.network()
        function = network.embed if on == "body" else network

        def counted(x: Tensor) -> Tensor:
            found = function(x)
            self.tick(len(x))
            return found

        return outputs(counted, images, self.target, self.device)


@dataclass(frozen=True)
class TargetModel:
    """A target model on the images of one target set."""

    dim: int
    features: Features
    digest: str  # what it computes, in short


class Transfer(Measurement):
    """A synthetic set (with TestFlags) or none, and target sets: read and checked, ready to measure.

    `measures` and `targets` (read already) take the place of those that the flags name. `target_models`
    (by target set) collects the target models loaded so far; several Transfers with the same flags for them
    may share it. A UserError says what is wrong with flags, data or synthetic set.
    """

    knobs = "lower --pre_batch_size or --finetune_batch_size"
    shorter = "lower --pre_epoch, --finetune_iteration or --num_test"

    def __init__(
        self,
        flags: ScratchFlags,
        measures: list[Measure] | None = None,
        targets: list[ImageSet] | None = None,
        target_models: dict[str, TargetModel] | None = None,
    ) -> None:
        if measures is None:  # they are those that the flags say
            measures = wanted_measures(flags)
            if names := unused(flags):
                print(f"not used with --protocol {flags.protocol}: --{', --'.join(names)}")
        self.measures = measures
        super().__init__(flags)
        self.protocol, shape = flags.protocol, None
        if isinstance(flags, TestFlags):
            self.pretraining = load_pretraining(flags, self.preset.size, self.arch)
            self.width, shape = self.pretraining.outputs, tuple(self.pretraining.synthetic.images.shape[1:])
            self.tell_pretraining()
        self.common = self.settings()
        if targets is None:
            names = resolve_targets(flags.source_data_name, flags.target_data_name, flags.data_dir)
            labelled = any(measure.protocol != TARGET_ERROR for measure in self.measures)
            targets = load_targets(names, self.preset.size, flags.data_dir, shape, labelled)
        self.targets = targets
        for target in targets:  # what cannot be measured is said before anything is trained
            get_model(self.arch, target.img_shape, target.num_classes or 1)
            for measure in self.measures:
                labelled_indices(target, measure, flags.seed or 0)
        self.target_models = {} if target_models is None else target_models
        outputs_read = any(measure.on == "outputs" for measure in self.measures)
        if flags.wants_error or (self.pretraining is None and outputs_read):
            for target in targets:
                self._add_target_model(target)

    @property
    def target_name(self) -> str:
        """The target model's network."""
        return self.flags.target_model or self.preset.target_model

    def _add_target_model(self, target: ImageSet) -> None:
        flags, pretraining, name = self.flags, self.pretraining, self.target_name
        if target.name not in self.target_models:
            where = dict(data_name=flags.source_data_name, data_dir=flags.data_dir)
            model = load_target(name, flags.target_ckpt, target, self.device, **where)
            digest = fingerprint(target_sample(model, target, self.device))
            features = Features(lambda: model, target, self.device)
            self.target_models[target.name] = TargetModel(model.dim, features, digest)
        dim = self.target_models[target.name].dim
        if pretraining and not (pretraining.synthetic.soft and pretraining.outputs == dim):
            kind = "target vectors" if pretraining.synthetic.soft else "class labels"
            raise UserError(
                f"--target_error: the synthetic set has {kind} for {pretraining.outputs} outputs; "
                f"expected the {dim} features of target model {name}"
            )
        self.width = dim

    def key(self, target: ImageSet, measure: Measure, seed: int) -> dict[str, Any]:
        """All that a cell's value depends on."""
        key = {
            **self.common,
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
            key["target_model"] = self.target_models[target.name].digest
        return key

    def keys(self, seed: int) -> list[dict[str, Any]]:
        return [self.key(target, measure, seed) for target in self.targets for measure in self.measures]

    def finetuning(self, target: ImageSet) -> Recipe:
        """How a copy of the network is fine-tuned on a target."""
        return finetune_recipe(target.name, self.arch, target.size).with_flags(self.flags, "finetune_")

    def finetuned(self, backbone: nn.Module, target: ImageSet, index: Tensor, seed: int) -> float:
        """Test accuracy in % after training all of a copy on the images at `index`, with crop and flip."""
        recipe, train = self.finetuning(target), target.train
        print(f"fine-tuning on {target.name}: {recipe}, {'crop and flip' if target.hflip else 'crop'}")
        images, labels = train.images, train.labels
        if len(index) < len(train):
            images, labels = images[index], labels[index]
        views = ImagePipeline(target.stats, pad=default_padding(target.size), hflip=target.hflip)
        generator = make_generator(seed, "fine-tuning", target.name)
        with local_seed(derive_seed(seed, "head", target.name)):
            model = self.with_new_head(backbone, target)
            loader = recipe.loader(images, labels, self.device, generator, views)
            trainer = Trainer(model, loader, recipe, scale=self.flags.steps_scale)
            watch = self.ticking(recipe, len(index))
            trainer.run(what="fine-tuning", on_step=watch, progress=True)
            return held_out_accuracy(model, target, self.device)

    def work(self) -> float:
        total, scale = self.pretraining_work(), self.flags.steps_scale
        for target in self.targets:
            for measure in self.measures:
                if measure.protocol == "finetune":
                    index = labelled_indices(target, measure, self.flags.seed or 0)
                    total += self.finetuning(target).work_on(len(index), scale)
            frozen = {measure.on for measure in self.measures if measure.protocol != "finetune"}
            total += len(frozen) * (len(target.train) + len(target.test))
        return total

    def repetition(self, seed: int, store: CellStore) -> list[Cell]:
        """All cells of one seed: one pre-trained network serves every target and measure."""
        backbone = functools.cache(lambda: self.backbone(seed, self.targets[0].img_shape))
        cells = []
        for target in self.targets:
            features = self.features(backbone, target)
            for measure in self.measures:
                compute = functools.partial(self._measure, features, measure, seed)
                cells.append(store.measure(self.key(target, measure, seed), compute, describe))
        return cells

    def features(self, network: Callable[[], nn.Module], target: ImageSet) -> Features:
        """What is read of the network that `network` gives."""
        return Features(network, target, self.device, self.forecast.tick)

    def _measure(self, features: Features, measure: Measure, seed: int) -> dict[str, Any]:
        target, on = features.target, measure.on
        if measure.protocol == TARGET_ERROR:
            theirs = self.target_models[target.name].features
            wanted = (theirs(split, on).float() for split in ("test", "train"))
            return {"error": feature_error(features("test", on).float(), *wanted)}
        index = labelled_indices(target, measure, seed)
        if measure.protocol == "finetune":
            value = self.finetuned(features.network(), target, index, seed)
        else:
            train = features("train", on, index), target.train.labels[index]
            test = features("test", on), target.test.labels
            value = frozen_accuracy(measure.protocol, train, test, target.num_classes)
        return {"accuracy": value, "labelled": len(index)}

    def summary(self, cells: list[Cell]) -> list[dict[str, Any]]:
        groups = grouped(cells, lambda cell: (cell["target"], Measure.of(cell)))
        return [{"target": t, **asdict(m), **spread(mine, m.field)} for (t, m), mine in groups.items()]

    def table(self, cells: list[Cell]) -> tuple[str, str]:
        """Targets as rows, measures as columns: test accuracy in %, or the error."""
        measures, rows = list(dict.fromkeys(map(Measure.of, cells))), []
        for name, mine in grouped(cells, lambda cell: cell["target"]).items():
            stand_in = {cell.get("tested_on") for cell in mine} - {None}
            rows.append([" on ".join([name, *stand_in])])
            found = grouped(mine, Measure.of)
            for m in measures:
                values = [cell[m.field] for cell in found.get(m, ())]
                rows[-1].append(format_mean_std(values, 3 if m.protocol == TARGET_ERROR else 2))
        notes = [] if self.protocol == TARGET_ERROR else [f"test accuracy in %, {self.protocol}"]
        if self.flags.wants_error:
            notes.append("error of the outputs in variances of the target's features: 1 predicts the mean")
        note = f"{'; '.join(notes)}; mean ± std over {self.flags.num_test} seeds"
        return markdown(["target", *(m.heading() for m in measures)], rows), note


class TargetTransfer(Transfer):
    """The same of the target model itself, by frozen features: what pre-training on them aims at."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.measures = [measure for measure in self.measures if measure.protocol in FROZEN]
        for target in self.targets:
            self._add_target_model(target)

    def key(self, target: ImageSet, measure: Measure, seed: int) -> dict[str, Any]:
        model = dict(model=self.target_name, target_model=self.target_models[target.name].digest)
        return super().key(target, measure, seed) | model | dict(method="target")

    def features(self, network: Callable[[], nn.Module], target: ImageSet) -> Features:
        return self.target_models[target.name].features

    def _measure(self, features: Features, measure: Measure, seed: int) -> dict[str, Any]:
        # A target model is all body: its outputs are the features.
        return super()._measure(features, replace(measure, on="outputs"), seed)
