"""Networks pre-trained on a synthetic set, measured with several seeds: what the commands share."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from data.load import ImageSet
from data.meta import keeps_meaning_mirrored, read_meta
from data.specs import KRR_SPECS
from data.synthetic import SyntheticSet
from data.target_scale import TARGET_SCALES
from evaluation.fit import StepHook, pretrain
from evaluation.measure import CellStore, finish
from evaluation.presets import resolve_preset
from evaluation.recipes import (
    BASELINES,
    MATCHING,
    PRETRAIN,
    SCRATCH,
    PreFlags,
    Recipe,
    of_recipe,
    pretrain_recipe,
)
from models import get_model
from utils.checkpoint import apply_state, fingerprint
from utils.cli import SEED, DeviceFlags, as_json, flag, how, typed
from utils.cost import Cost, DryRunFlags, Forecast
from utils.device import place, resolve_device
from utils.errors import UserError, pick
from utils.memory import out_of_memory_says
from utils.optim import SCHEDULES
from utils.seed import derive_seed, local_seed, make_generator, resolve_seed


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


def set_place(folder: Path, method: str) -> Path:
    """Where a method's set lies in the folder of its source: in a folder, or in one file.

    A UserError where both are there.
    """
    path, one_file = folder / method, folder / f"{method}.safetensors"
    if path.exists() and one_file.exists():
        raise UserError(f"{path} and {one_file} are two sets; name one with --synthetic_path")
    return one_file if one_file.exists() else path


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
    path = flags.synthetic_path or set_place(flags.synthetic_data_dir / source, flags.method)
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
        if recipe.loss == "half_squared_error" and width != (classes or width):
            raise UserError(
                f"{path} holds vectors of {width} entries; method {flags.method} is pre-trained on soft "
                f"labels, one for each of the {classes} classes of {source}"
            )
        return Pretraining(synthetic, recipe, width)
    seen = int(synthetic.targets.max()) + 1
    if seen > (classes or seen):
        raise UserError(f"{path} holds label {seen - 1}, but {source} has {classes} classes")
    return Pretraining(synthetic, recipe, classes or seen)


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
        """Print how networks are pre-trained, and whether the set is one of another source or method."""
        scale, source = self.flags.steps_scale, self.flags.source_data_name
        print(f"pre-training: {self.pretraining.recipe}" + f"; length times {scale:g}" * (scale != 1))
        own = self.pretraining.synthetic.data_name
        if own and own.lower() != source.lower():
            print(f"note: the set was made from {own}, results are filed under --source_data_name {source}")
        made_by = self.pretraining.synthetic.made_by
        if made_by and made_by.lower() != self.method:
            print(
                f"note: the set was made by {made_by}, but is used and filed as one of --method {self.method}"
            )

    def new_forecast(self, seeds: int) -> Forecast:
        """Of so many repetitions; their results take a few kilobytes."""
        return Forecast(seeds * self.work(), self.device, shorter=self.shorter)

    def measure(self) -> Cost:
        """What all repetitions take, from the first steps of one; its cells are thrown away."""
        self.forecast = self.new_forecast(self.flags.num_test)
        with tempfile.TemporaryDirectory() as folder:
            store = CellStore(Path(folder) / "results.jsonl")
            return self.forecast.trial(lambda: self.repetition(resolve_seed(self.flags.seed), store))
