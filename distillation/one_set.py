"""Runs of one synthetic set, by any method: flags, data, evaluations on the way, files, pictures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.augment import denormalize
from data.augment.dsa import check_strategy
from data.load import load_set
from data.synthetic import save_compact
from data.synthetic.training import TRAINING_FILE, read_training, write_training
from data.target_scale import TARGET_SCALES, TargetScale
from data.whitening import Whitening
from distillation.base import Distiller, RunFlags
from distillation.labels import LABELS
from distillation.loop import Plan
from distillation.problem import Problem
from distillation.run import Method, Setup
from evaluation.fit import outputs
from evaluation.presets import resolve_preset
from evaluation.recipes import PRETRAIN, PreFlags
from evaluation.target import TARGET_CKPT, TARGET_MODEL
from models import get_model
from utils import checkpoint
from utils.cli import flag, how
from utils.device import LAYOUTS
from utils.distributed import Group
from utils.errors import UserError, pick
from utils.plots import save_grid
from utils.precision import PRECISIONS, check_precision
from utils.run_folder import SET_FILE, Run, RunFolder

TARGET_SCALE = (
    "std: target features are learned standardised, with mean 0 and variance 1 over the training images; "
    "the set says so to networks that are trained on it; default: none"
)

# For methods that whiten images: a flag `zca: bool | None`.
ZCA = "whiten images by ZCA (ridge 0.1) before networks see them; default: as published"


@dataclass(frozen=True)
class SetFlags(RunFlags):
    """Flags of every run of one synthetic set."""

    data_dir: Path = how(Path("./datasets"), "folder of the prepared tensors")
    recipe: str = flag("published", "settings in place of the defaults; explicit flags take precedence")
    data_name: str = flag("cifar100", "source data set: a listed name or a prepared set of yours")
    save_dir: Path = how(Path("./results"), "folder of the run folders")
    exp_name: str | None = how(None, "name of the run folder; default: {data_name}")
    img_size: int | None = flag(None, "side in pixels; default: preset", minimum=4)
    num_images: int | None = flag(None, "synthetic images m; default: preset", minimum=1)
    train_model: str | None = flag(
        None, "network of the method (zoo A); default: the preset's, or the method's own"
    )
    test_model: str | None = flag(None, "network of the evaluation; default: train_model")
    outer_iteration: int = flag(5000, "outer steps", minimum=1)
    eval_every: int = flag(1000, "steps between evaluations", minimum=1)
    precision: str = flag("fp32", "precision of the networks (tf32: CUDA only)", choices=PRECISIONS)
    layout: str = flag("channels_last", "memory layout of images in the networks", choices=tuple(LAYOUTS))


@dataclass(frozen=True)
class FeatureFlags(PreFlags, SetFlags):
    """Flags of methods whose labels are a target model's features."""

    target_model: str | None = flag(None, TARGET_MODEL)
    target_ckpt: Path | None = how(None, TARGET_CKPT)
    target_scale: str | None = flag(None, TARGET_SCALE, choices=TARGET_SCALES)
    test_opt: str = flag("sgd", "optimiser of the linear classifier", choices=("sgd", "adam"))
    test_iteration: int = flag(5000, "steps of the linear classifier", minimum=1)
    test_batch_size: int = flag(512, "batch of the linear classifier", minimum=1)
    test_lr: float = flag(0.2, "learning rate of the linear classifier, falls to 0 by a cosine", above=0)
    test_wd: float = flag(0.0, "weight decay of the linear classifier", minimum=0)


@dataclass(frozen=True)
class ClassFlags(PreFlags, SetFlags):
    """Flags of methods whose labels are classes."""

    num_images: int | None = flag(
        None,
        "synthetic images m, a multiple of the number of classes; default: about the preset's",
        minimum=1,
    )
    init: str = flag("real", "initial images: real ones, or noise N(0, 1)", choices=("real", "noise"))
    num_eval: int = flag(1, "networks per evaluation", minimum=1)


class SetSetup(Setup):
    """Runs of one set with features or classes as labels, whichever the method's row says.

    It is the observer of its run, too.
    """

    knobs = "lower --num_images, or use --precision bf16"
    length = "outer_iteration"

    @property
    def shorter(self) -> str:
        """Flags that shorten the run; most CPUs compute slower in bf16."""
        found = "lower --num_images, a smaller --train_model"
        with_bf16 = self.device.type == "cuda" and self.flags.precision == "fp32"
        return f"{found}, --precision bf16" if with_bf16 else found

    @classmethod
    def resolve(cls, method: Method, flags: SetFlags) -> SetFlags:
        """Fill in what presets, the labels and the published settings decide."""
        preset = resolve_preset(flags.data_name, flags.data_dir, flags.img_size)
        network = flags.train_model or method.distiller.network(preset)
        given = pick(LABELS, method.labels, "labels").resolve(method, flags, preset)
        flags = dataclasses.replace(
            flags,
            img_size=preset.size,
            train_model=network,
            test_model=flags.test_model or method.distiller.test_network(network),
            exp_name=flags.exp_name or flags.data_name,
            **given,
        )
        published = method.published(flags.data_name, flags.num_images)
        unset = {name: value for name, value in published.items() if getattr(flags, name) is None}
        return dataclasses.replace(flags, **unset)

    @classmethod
    def check(cls, flags: SetFlags, device: torch.device) -> None:
        """Raise a UserError for a precision that is not to be had here, or augmentation that cannot be."""
        check_precision(flags.precision, device)
        check_strategy(flags.pre_dsa)
        if flags.pre_mixup and PRETRAIN[flags.method.lower()].loss == "cross_entropy":
            raise UserError(f"--pre_mixup needs target vectors; sets of {flags.method} have class labels")

    def __init__(self, method: Method, flags: SetFlags, device: torch.device, group: Group) -> None:
        super().__init__(method, flags, device, group)
        self.image_set = load_set(flags.data_name, flags.img_size, flags.data_dir)
        train = self.image_set.train
        if flags.num_images > len(train):
            raise UserError(
                f"--num_images {flags.num_images} is more than the {len(train)} images in {train.path}"
            )
        self.labels = LABELS[method.labels](method, flags, self.image_set, device)
        for arch in (flags.train_model, flags.test_model):  # an unknown name fails now
            get_model(arch, self.image_set.img_shape, self.labels.outputs)

    @property
    def folder(self) -> Path:
        return Path(self.flags.save_dir) / self.flags.exp_name

    @property
    def inputs(self) -> dict[str, str]:
        """The source, and what its labels are made by."""
        return {**super().inputs, **self.labels.inputs}

    def run(self, run: Run) -> dict[str, Any]:
        """Distil one set; write it and its pictures."""
        flags, image_set = self.flags, self.image_set
        if not image_set.labelled:
            print(f"{flags.data_name} lacks labels: linear evaluation is skipped")
        elif image_set.test is None:
            print(f"{flags.data_name} has no test split: evaluations use the training images")
        distiller, results = self.distil(run, self.problem(run.seed), self.plan())
        if self.group.first:
            pixels = denormalize(distiller.plain().images[:400], self.syn_stats)
            save_grid(pixels.clamp(0, 1), run.path / "x_syn.png")
            results |= self.drawn(run)
        return results

    def plan(self, experiment: int | None = None) -> Plan:
        return Plan(self.flags.outer_iteration, self.flags.print_every, self.flags.save_every)

    def problem(self, seed: int) -> Problem:
        """The data with what makes its labels, its whitening, the scale of its targets."""
        given = {**self.labels.given, "whitening": self.whitening()}
        if (scale := self.target_scale()) is not None:
            given |= dict(target=given["target"].scaled(scale), target_scale=scale)
        return Problem(self.image_set, self.device, seed, self.group, **given)

    def evaluation_cost(self) -> float:
        return self.labels.evaluation_cost() if self.image_set.labelled else 0.0

    def evaluations(self) -> int:
        """Every `eval_every` steps and at the end."""
        return -(-self.flags.outer_iteration // self.flags.eval_every)

    def whitening(self) -> Whitening | None:
        """That of the run, where --zca asks for one: an earlier start's, or fitted to the training images."""
        if not getattr(self.flags, "zca", False):
            return None
        found = read_training(self.folder / TRAINING_FILE).whitening
        if found is None:
            print("fitting the whitening", flush=True)
            images, stats = self.image_set.train.images, self.image_set.stats
            found = Whitening.fit(images, stats, self.device, self.method.distiller.whiten_normalized)
        return found.to(self.device)

    def target_scale(self) -> TargetScale | None:
        """That of the run, where --target_scale asks for one: an earlier start's, or fitted now."""
        if getattr(self.flags, "target_scale", None) != "std":
            return None
        found = read_training(self.folder / TRAINING_FILE).targets
        if found is None:
            images, target = self.image_set.train.images, self.labels.given["target"]
            found = TargetScale.fit(outputs(target, images, self.image_set, self.device))
        return found.to(self.device)

    def drawn(self, run: RunFolder) -> dict[str, Any]:
        """Draw more of a finished run; returns more results."""
        return {}

    def after(self, run: Run) -> None:
        print(f"synthetic set: {run.path}/x_syn.pt, y_syn.pt; picture: {run.path}/x_syn.png")

    def observer(self, run: Run, plan: Plan, distiller: Distiller) -> SetSetup:
        """Itself, with the method's monitor."""
        self.key, self.cost = self.labels.key, self.evaluation_cost()
        self.monitor = distiller.monitor() if self.group.first else None
        if self.monitor is not None:
            print(f"held-out loss: {self.monitor}")
        return self

    def due(self, step: int) -> bool:
        """Every `eval_every` steps and at the end, where there is something to test with."""
        every, last = self.flags.eval_every, step == self.flags.outer_iteration
        return self.image_set.labelled and (last or (step > 0 and step % every == 0))

    def evaluate(self, step: int, distiller: Distiller) -> Any:
        """Accuracy in %."""
        return self.labels.evaluate(step, distiller.synthetic(), distiller.problem.seed)

    def watch(self, step: int, distiller: Distiller) -> dict[str, Any]:
        """The loss that depends on the set alone, where the method has one."""
        if self.monitor is None or not self.monitor.due(step):
            return {}
        return {"held_out_loss": self.monitor(distiller.x_syn, distiller.y_syn)}

    def saved(self, distiller: Distiller) -> None:
        """Write x_syn.pt and y_syn.pt, the published result files: two plain CPU tensors.

        Beside them lies how to train on the set, where the set itself decides it. Of a set of views
        they hold the images as they are, set.safetensors holds all.
        """
        synthetic = distiller.synthetic()
        write_training(synthetic.training, self.folder / TRAINING_FILE)
        if synthetic.views is not None:
            save_compact(synthetic, self.folder / SET_FILE)
        plain = synthetic.plain()
        checkpoint.save(plain.targets.cpu(), self.folder / "y_syn.pt")
        checkpoint.save(plain.images.cpu(), self.folder / "x_syn.pt")
