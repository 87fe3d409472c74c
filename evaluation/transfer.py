"""Transfer learning (Tables 1-3, Figure 3): the driver behind test.py and test_scratch.py."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.augment.crop_flip import default_padding
from data.load import ImageSet, load_set
from data.loader import ImagePipeline
from data.meta import keeps_meaning_mirrored, read_meta
from data.specs import KRR_SPECS
from data.synthetic import SyntheticSet
from data.target_scale import TARGET_SCALES
from evaluation.fit import StepHook, Trainer, held_out_accuracy, outputs, pretrain
from evaluation.measure import Cell, CellStore, finish, grouped, spread
from evaluation.presets import resolve_preset, resolve_targets
from evaluation.probe import FROZEN, feature_error, frozen_accuracy, labelled_subset
from evaluation.recipes import (
    BASELINES,
    MATCHING,
    PRETRAIN,
    SCRATCH,
    PreFlags,
    Recipe,
    finetune_recipe,
    of_recipe,
    pretrain_recipe,
)
from evaluation.target import TARGET_CKPT, TARGET_MODEL, load_target, target_sample
from models import get_model
from utils.checkpoint import apply_state, fingerprint
from utils.cli import SEED, DeviceFlags, as_json, flag, how, typed
from utils.cost import Cost, DryRunFlags, Forecast
from utils.device import place, resolve_device
from utils.errors import UserError, pick
from utils.memory import out_of_memory_says
from utils.optim import SCHEDULES
from utils.seed import derive_seed, local_seed, make_generator, resolve_seed
from utils.table import format_mean_std, markdown

TARGET_ERROR = "target_error"
READ = {"body": ("body",), "outputs": ("outputs",), "both": ("body", "outputs")}  # by --probe_on


@dataclass(frozen=True)
class NetworkFlags(DeviceFlags, DryRunFlags):
    """Flags that say which network, and how long it is trained."""

    data_dir: Path = flag(Path("./datasets"), "folder of the prepared tensors")
    seed: int | None = how(0, "seed of the first repetition; the next ones add 1", **SEED)
    source_data_name: str = flag("cifar100", "source: sets the image size and the base network")
    test_model: str = flag("base", "base (the source's network) or a name of zoo A")
    dropout: float = flag(0.0, "dropout before the last layer", minimum=0, maximum=0.99)
    img_size: int | None = flag(None, "side in pixels; default: the source's preset", minimum=4)
    steps_scale: float = flag(1.0, "factor on all training lengths, for quick trials", above=0)


@dataclass(frozen=True)
class MeasureFlags(NetworkFlags):
    """Flags of test_scratch.py, test.py and test_kd.py."""

    num_test: int = flag(3, "repetitions with different seeds", minimum=1)
    log_dir: Path = flag(Path("./test_log"), "where results are written")


@dataclass(frozen=True)
class PretrainFlags(PreFlags):
    """Flags that name a synthetic set and how it trains a network."""

    source_data_name: str = flag("tinyimagenet", "source: sets the image size and base network")
    method: str = flag(
        "krr_st",
        "whose synthetic set: random, kmeans, herding, high_loss, each also with _features, dc, dsa, dm, "
        "mtt, kip, frepo, krr_st, mkdt, gaussian (in test_kd.py fresh noise, no set), in "
        "test_kd.py scratch (random_features without pre-training); it decides the recipe",
    )
    synthetic_data_dir: Path = flag(Path("./synthetic_data"), "folder that holds {source}/{method}/")
    synthetic_path: Path | None = flag(
        None, "a set elsewhere: its folder (e.g. results/EXP) or file", instead_of="synthetic_data_dir"
    )
    pre_momentum: float | None = of_recipe("pre-training momentum (sgd)", minimum=0, maximum=0.999)
    pre_schedule: str | None = of_recipe("pre-training learning-rate schedule", choices=tuple(SCHEDULES))
    pre_warmup: int | None = of_recipe("warm-up steps (cosine), at most half of all", minimum=0)
    pre_target_scale: str | None = flag(
        None,
        "learn the set's target vectors standardised (std), which is undone in the network's outputs, or as "
        "they are; default: std where the set brings their statistics",
        choices=TARGET_SCALES,
    )


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
    finetune_iteration: int | None = of_recipe("fine-tuning steps", minimum=1)
    finetune_opt: str | None = of_recipe("fine-tuning optimiser", choices=("sgd", "adam"))
    finetune_momentum: float | None = of_recipe("fine-tuning momentum (sgd)", minimum=0, maximum=0.999)
    finetune_schedule: str | None = of_recipe("fine-tuning learning-rate schedule", choices=tuple(SCHEDULES))
    finetune_lr: float | None = of_recipe("fine-tuning learning rate", above=0)
    finetune_wd: float | None = of_recipe("fine-tuning weight decay", minimum=0)
    finetune_batch_size: int | None = of_recipe("fine-tuning batch", minimum=1)

    @property
    def wants_error(self) -> bool:
        """Whether the outputs are compared with the target model's features."""
        return self.target_error or self.protocol == TARGET_ERROR


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


@dataclass(frozen=True)
class Pretraining:
    """A synthetic set, how a network is trained on it, and with how many outputs."""

    synthetic: SyntheticSet
    recipe: Recipe
    outputs: int

    def record(self) -> dict[str, Any]:
        """What a cell's value depends on."""
        digest = fingerprint(self.synthetic.images, self.synthetic.targets)
        more = {"training": training.record()} if (training := self.synthetic.training) else {}
        return {"pretraining": self.recipe.record(), "synthetic_set": digest, **more}


def source_classes(name: str, data_dir: Path) -> int:
    """Classes of a source, by its row or else its meta.json; 0: unknown."""
    if name in KRR_SPECS:
        return KRR_SPECS[name].num_classes
    return len(read_meta(data_dir / name).get("class_names") or ())


def set_command(flags: PretrainFlags, size: int) -> str:
    """The command that makes the synthetic set that the flags name, where they look for it."""
    source, method, folder = flags.source_data_name, flags.method, flags.synthetic_data_dir
    named: dict[str, Any] = dict(method=method, data_name=source, img_size=size, data_dir=flags.data_dir)
    if method in BASELINES:
        return typed("python -m krr_st.baselines", **named, synthetic_data_dir=folder)
    if method not in MATCHING:
        return typed("python train.py", **named, save_dir=folder / source, exp_name=method)
    if classes := source_classes(source, flags.data_dir):
        named["ipc"] = max(1, resolve_preset(source, flags.data_dir, size).num_images // classes)
    return typed("python train.py", **named, export=folder / source / method)


def load_pretraining(flags: PretrainFlags, size: int, arch: str, *, kd: bool = False) -> Pretraining:
    """The synthetic set of a method and the recipe that belongs to it, with the flags put in.

    A UserError for an unknown method or a set that is missing, damaged or unfit: in size or labels.
    """
    source = flags.source_data_name
    pick(PRETRAIN, flags.method, "method")  # an unknown name fails before its set is looked for
    path = flags.synthetic_path or flags.synthetic_data_dir / source / flags.method
    if flags.synthetic_path is None and (one_file := path.with_name(f"{path.name}.safetensors")).exists():
        if path.exists():
            raise UserError(f"{path} and {one_file} are two sets; name one with --synthetic_path")
        path = one_file
    if not path.exists() and flags.synthetic_path is None:
        raise UserError(f"synthetic set {path} does not exist; make it with: {set_command(flags, size)}")
    synthetic = SyntheticSet.load(path)
    recipe = pretrain_recipe(flags.method, source, arch, kd=kd, count=len(synthetic))
    stored = None if synthetic.views is None else len(synthetic) // synthetic.views.each
    hflip = keeps_meaning_mirrored(flags.data_dir / source)
    recipe = recipe.for_set(synthetic.training, stored, flags, hflip)
    found = tuple(synthetic.images.shape[2:])
    if found != (size, size):
        raise UserError(f"{path} holds images of {found} pixels, expected {size} x {size}; see --img_size")
    kinds = ("float vectors", "class indices")
    by_class, classes = recipe.loss == "cross_entropy", source_classes(source, flags.data_dir)
    width = synthetic.targets.shape[-1]
    soft_labels = by_class and synthetic.probabilities and width == (classes or width)
    if synthetic.soft == by_class and not soft_labels:
        wanted, found = kinds[by_class], kinds[not by_class]
        raise UserError(f"{path} holds {found}; method {flags.method} is pre-trained on {wanted}")
    try:
        recipe.check_targets(synthetic)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if synthetic.soft:
        return Pretraining(synthetic, recipe, synthetic.targets.shape[1])
    seen = int(synthetic.targets.max()) + 1
    if seen > (classes or seen):
        raise UserError(f"{path} holds label {seen - 1}, but {source} has {classes} classes")
    return Pretraining(synthetic, recipe, classes or seen)


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


class Measurement:
    """Networks of one source and method, measured with several seeds: what the three commands share.

    A subclass gives `repetition(seed, store)`, the cells of a seed; `keys(seed)`, what identifies
    them; `work()`, the images through networks that a seed takes, each counted three times
    in training; `summary(cells)`, the means over seeds; and `table(cells)`, the printed table and the note
    below it.
    """

    protocol: str  # the last folder of the results
    knobs: str  # flags that save memory, in words
    shorter: str  # flags that save time
    pretraining: Pretraining | None = None  # None: from scratch
    width = 1  # outputs of a network

    def __init__(self, flags: NetworkFlags) -> None:
        self.flags, self.method = flags, getattr(flags, "method", SCRATCH)
        self.preset = resolve_preset(flags.source_data_name, flags.data_dir, flags.img_size)
        self.arch = self.preset.network if flags.test_model == "base" else flags.test_model.lower()
        self.device = resolve_device(flags.device, flags.gpu_id)
        self.forecast = Forecast(0, self.device)  # speaks while `run` runs

    def settings(self) -> dict[str, Any]:
        """What the value of every cell depends on."""
        return {
            "source": self.flags.source_data_name,
            "method": self.method,
            "model": self.arch,
            "size": self.preset.size,
            "dropout": self.flags.dropout,
            "steps_scale": self.flags.steps_scale,
            **(self.pretraining.record() if self.pretraining else {}),
        }

    def backbone(self, seed: int, img_shape: tuple[int, int, int]) -> nn.Module:
        """A network initialised from `seed` and pre-trained, if at all; eval mode."""
        with local_seed(derive_seed(seed, "network")):
            model = place(get_model(self.arch, img_shape, self.width, self.flags.dropout), self.device)
            if self.pretraining is not None:
                synthetic, recipe = self.pretraining.synthetic, self.pretraining.recipe
                generator = make_generator(seed, "pre-training")
                watch = self.ticking(recipe, len(synthetic))
                pretrain(model, synthetic, recipe, generator, self.flags.steps_scale, watch)
        return model.eval()

    def ticking(self, recipe: Recipe, count: int) -> StepHook:
        """Tells the forecast of each step of a training on `count` images."""
        work = 3.0 * min(recipe.batch_size, count)
        return lambda *_: self.forecast.tick(work)

    def pretraining_work(self) -> float:
        """Images through a network in its pre-training, counted three times."""
        if self.pretraining is None:
            return 0.0
        return self.pretraining.recipe.work_on(len(self.pretraining.synthetic), self.flags.steps_scale)

    def with_new_head(self, backbone: nn.Module, target: ImageSet) -> nn.Module:
        """A copy of a network with a head for the target's classes, drawn by global randomness."""
        model = get_model(self.arch, target.img_shape, target.num_classes, self.flags.dropout)
        apply_state(model, backbone.state_dict(), origin="the pre-trained network", skip=("fc.",))
        model.prepare = backbone.prepare
        return place(model, self.device)

    def run(self) -> int:
        """Measure every seed, print the table, write results.json; finished cells stay in results.jsonl."""
        flags, first = self.flags, resolve_seed(self.flags.seed)
        if flags.dry_run or flags.cost:
            print(json.dumps(as_json(flags), indent=2))
            if flags.cost:
                print(self.measure())
            return 0
        store, cells = CellStore(flags.log_dir / "results.jsonl"), []
        seeds = range(first, first + flags.num_test)
        left = sum(any(store.get(key) is None for key in self.keys(seed)) for seed in seeds)
        self.forecast = self.new_forecast(left)
        with out_of_memory_says(self.device, self.knobs):
            for seed in seeds:
                cells += self.repetition(seed, store)
        text, note = self.table(cells)
        if flags.steps_scale != 1:
            note += f"; training lengths times {flags.steps_scale:g}: not comparable with the tables"
        folder = flags.log_dir / flags.source_data_name / self.method / self.arch / self.protocol
        finish(folder, flags, self.device, cells, self.summary(cells), f"{text}\n{note}")
        return 0

    def tell_pretraining(self) -> None:
        """Print how networks are pre-trained, and whether the set is one of another source."""
        scale, source = self.flags.steps_scale, self.flags.source_data_name
        print(f"pre-training: {self.pretraining.recipe}" + f"; length times {scale:g}" * (scale != 1))
        own = self.pretraining.synthetic.data_name
        if own and own.lower() != source.lower():
            print(f"note: the set was made from {own}, results are filed under --source_data_name {source}")

    def new_forecast(self, seeds: int) -> Forecast:
        """Of so many repetitions; their results take a few kilobytes."""
        return Forecast(seeds * self.work(), self.device, shorter=self.shorter)

    def measure(self) -> Cost:
        """What all repetitions take, from the first steps of one; its cells are thrown away."""
        self.forecast = self.new_forecast(self.flags.num_test)
        with tempfile.TemporaryDirectory() as folder:
            store = CellStore(Path(folder) / "results.jsonl")
            return self.forecast.trial(lambda: self.repetition(resolve_seed(self.flags.seed), store))


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
        self.measures = wanted_measures(flags) if measures is None else measures
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
