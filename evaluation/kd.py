"""Target data-free knowledge distillation (Table 4): the driver behind test_kd.py.

A classifier of the target teaches a student on synthetic images alone. Of the target only the test
split is read, and only to measure.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.augment.dsa import without_flip
from data.load import ImageSet, load_set
from data.loader import TensorLoader
from data.synthetic import SyntheticSet
from evaluation.fit import Trainer, accuracy
from evaluation.measure import Cell, CellStore, finish, spread
from evaluation.presets import resolve_preset
from evaluation.protocols import outputs
from evaluation.recipes import GAUSSIAN, KD, RANDOM_FEATURES, SCRATCH, Recipe, kd_loss
from evaluation.transfer import (
    MeasureFlags,
    PretrainFlags,
    Pretraining,
    build_backbone,
    load_pretraining,
    may_mirror,
)
from models import get_model
from models.layout import batch_norms
from utils import checkpoint
from utils.checkpoint import apply_state, fingerprint
from utils.cli import flag
from utils.device import place, resolve_device
from utils.errors import UserError, pick
from utils.memory import out_of_memory_says
from utils.seed import derive_seed, local_seed, make_generator, resolve_seed
from utils.table import format_mean_std, markdown

BN_MODES = {"running": "running statistics", "batch": "statistics of the test batch"}
KNOBS = "lower --pre_batch_size or --kd_batch_size"


KD_BN = (
    "BatchNorm of the teacher and of the tested student: running statistics, or as released the "
    "statistics of the batch at hand (of the student both accuracies are reported)"
)


@dataclass(frozen=True)
class KdFlags(PretrainFlags, MeasureFlags):
    """Flags of test_kd.py."""

    target_data_name: str = flag("cifar10", "target: only its test split is read")
    teacher_ckpt: Path | None = flag(None, "default: teacher_ckpt/teacher_{target_data_name}.pt")
    teacher_arch: str = flag("resnet18", "architecture of the teacher (zoo A)")
    kd_bn: str = flag("running", KD_BN, choices=("batch", "running"))
    kd_epoch: int | None = flag(None, "distillation epochs; default: table", minimum=1)
    kd_lr: float | None = flag(None, "distillation learning rate; default: table", above=0)
    kd_batch_size: int | None = flag(None, "distillation batch; default: table", minimum=1)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalises by the batch at hand; running statistics are left as they are.

    The released test_kd.py evaluates so. Dropout and everything else keep their mode.
    """
    norms = batch_norms(model)
    before = [(m.training, m.track_running_stats) for m in norms]
    try:
        for m in norms:
            m.training, m.track_running_stats = True, False  # False: nothing is written
        yield
    finally:
        for m, (training, tracking) in zip(norms, before, strict=True):
            m.training, m.track_running_stats = training, tracking


class NoiseLoader(TensorLoader):
    """Fresh N(0, 1) images at every step, in the batch sizes of passes over `images`, unread."""

    def forever(self) -> Iterator[tuple[Tensor, None]]:
        """Batches without end."""
        sizes = [len(part) for part in torch.arange(len(self.images)).split(self.batch_size)]
        for size in itertools.cycle(sizes):
            shape = (size, *self.images.shape[1:])
            yield torch.randn(shape, generator=self.generator).to(self.device), None


def load_teacher(flags: KdFlags, target: ImageSet) -> nn.Module:
    """The teacher with frozen weights, on the CPU in eval mode.

    Raises:
        UserError: no checkpoint (with the command that makes it), or one that does not fit.
    """
    name = f"teacher_{flags.target_data_name}.pt"
    path = flags.teacher_ckpt or Path("teacher_ckpt") / name
    if not path.exists():
        command = [
            "python",
            "-m",
            "krr_st.kd_teacher",
            "--data_name",
            flags.target_data_name,
            "--img_size",
            target.size,
            "--arch",
            flags.teacher_arch,
            "--data_dir",
            flags.data_dir,
            "--save_dir",
            path.parent,
        ]
        renamed = "" if path.name == name else f" (it writes {path.parent / name})"
        raise UserError(
            f"teacher checkpoint {path} does not exist; make it with: "
            f"{shlex.join(map(str, command))}{renamed}"
        )
    with local_seed(0):  # every weight is replaced
        teacher = get_model(flags.teacher_arch, target.img_shape, target.num_classes)
    apply_state(teacher, checkpoint.load_state(path, what="teacher checkpoint"), origin=path)
    return teacher.eval().requires_grad_(False)


@dataclass(frozen=True)
class Distillation:
    """What all repetitions share.

    Attributes:
        flags: of the command.
        target: its test split is read.
        teacher: with frozen weights, on the device.
        arch: of the student.
        synthetic: the images; None for gaussian.
        pretraining: of the student; None for scratch and gaussian.
        count: synthetic images, or how many noise images make an epoch.
        recipe: of the distillation.
        device: where to compute.
    """

    flags: KdFlags
    target: ImageSet
    teacher: nn.Module
    arch: str
    synthetic: SyntheticSet | None
    pretraining: Pretraining | None
    count: int
    recipe: Recipe
    device: torch.device

    def student(self, seed: int) -> nn.Module:
        """The backbone, pre-trained if at all, with a fresh head for the target's classes."""
        shape, dropout = self.target.img_shape, self.flags.dropout
        backbone = build_backbone(
            self.arch, shape, self.pretraining, dropout=dropout, seed=seed, device=self.device
        )
        with local_seed(derive_seed(seed, "head", self.target.name)):
            student = get_model(self.arch, shape, self.target.num_classes, dropout)
        apply_state(student, backbone.state_dict(), origin="the pre-trained network", skip=("fc.",))
        return place(student, self.device)

    def run(self, seed: int) -> dict[str, float]:
        """Train one student; its test accuracies in % by BatchNorm mode."""
        student, recipe = self.student(seed), self.recipe
        make, images = TensorLoader, self.synthetic and self.synthetic.images
        if images is None:
            make, images = NoiseLoader, torch.empty(1).expand(self.count, *self.target.img_shape)
        loader = make(
            images,
            None,
            batch_size=recipe.batch_size,
            device=self.device,
            generator=make_generator(seed, "distillation"),
            transform=recipe.augment(),
        )

        def loss_fn(model: nn.Module, x: Tensor, _: None) -> Tensor:
            with torch.no_grad():
                logits = self.teacher(x)
            return kd_loss(model(x), logits)

        self.teacher.train(self.flags.kd_bn == "batch")  # its running statistics drift, as released
        trainer = Trainer(student, loader, recipe, scale=self.flags.steps_scale, loss_fn=loss_fn)
        with local_seed(derive_seed(seed, "dropout")):
            trainer.run(what="distillation", progress=True)
        found = {"accuracy_running": self.measure(student)}
        with batch_statistics(student):
            found["accuracy_batch"] = self.measure(student)
        return {"accuracy": found[f"accuracy_{self.flags.kd_bn}"], **found}

    def measure(self, model: nn.Module) -> float:
        """Accuracy in % on the target's test split."""
        test = self.target.test
        return accuracy(outputs(model, test.images, self.target, self.device), test.labels)

    def settings(self) -> dict[str, Any]:
        """Everything but the seed that a cell's values depend on."""
        flags, state = self.flags, self.teacher.state_dict()
        settings: dict[str, Any] = {
            "source": flags.source_data_name,
            "method": flags.method,
            "model": self.arch,
            "size": self.target.size,
            "protocol": "kd",
            "target": self.target.name,
            "dropout": flags.dropout,
            "steps_scale": flags.steps_scale,
            "count": self.count,
            "distillation": self.recipe.record(),
            "kd_bn": flags.kd_bn,
            "teacher_arch": flags.teacher_arch,
            "teacher": fingerprint(*(state[key] for key in sorted(state))),
        }
        if self.pretraining is not None:
            settings |= self.pretraining.record()
        elif self.synthetic is not None:
            synthetic = self.synthetic
            settings["synthetic_set"] = fingerprint(synthetic.images, synthetic.targets)
        return settings


def prepare(flags: KdFlags) -> Distillation:
    """Read everything and check that it fits together.

    Raises:
        UserError: bad flags, data, synthetic set or teacher.
    """
    recipe = pick(KD, flags.method, "method").override(
        epochs=flags.kd_epoch, lr=flags.kd_lr, batch_size=flags.kd_batch_size
    )
    preset = resolve_preset(flags.source_data_name, flags.data_dir, flags.img_size)
    arch = preset.network if flags.test_model == "base" else flags.test_model.lower()
    device = resolve_device(flags.device, flags.gpu_id)
    target = load_set(flags.target_data_name, preset.size, flags.data_dir, splits=("test",))
    if target.num_classes is None:
        raise UserError(f"{target.test.path.parent} has no labels; a target needs them")
    if not (target.hflip and may_mirror(flags.source_data_name, flags.data_dir)):
        recipe = recipe.override(dsa=without_flip(recipe.dsa))
    synthetic, pretraining, count = None, None, preset.num_images
    if flags.method != GAUSSIAN:
        untrained = flags.method == SCRATCH
        source = replace(flags, method=RANDOM_FEATURES) if untrained else flags
        pretraining = load_pretraining(source, preset.size, arch, kd=True)
        synthetic, count = pretraining.synthetic, len(pretraining.synthetic)
        pretraining = None if untrained else pretraining
        shape = tuple(synthetic.images.shape[1:])
        if shape != target.img_shape:
            raise UserError(f"synthetic images are {shape}, those of the target {target.img_shape}")
    get_model(arch, target.img_shape, target.num_classes)  # an unknown name fails now
    teacher = place(load_teacher(flags, target), device)
    return Distillation(flags, target, teacher, arch, synthetic, pretraining, count, recipe, device)


def run_kd(flags: KdFlags) -> int:
    """Measure every seed, print the table, write results.json.

    Raises:
        UserError: as `prepare`; finished cells stay in results.jsonl.
    """
    shared = prepare(flags)
    first, store = resolve_seed(flags.seed), CellStore(flags.log_dir / "results.jsonl")
    if shared.pretraining is not None:
        print(f"pre-training: {shared.pretraining.recipe}")
    print(f"distillation: {shared.recipe}; teacher: {flags.kd_bn} statistics")
    settings, cells = shared.settings(), []

    @functools.cache
    def teacher_accuracy() -> float:
        found = shared.measure(shared.teacher.eval())
        print(f"teacher: {found:.2f} % at {shared.target.size} pixels")
        return found

    def compute(seed: int) -> Callable[[], dict[str, float]]:
        return lambda: {"teacher_accuracy": teacher_accuracy(), **shared.run(seed)}

    with out_of_memory_says(shared.device, KNOBS):
        for seed in range(first, first + flags.num_test):
            cells.append(store.measure({**settings, "seed": seed}, compute(seed), describe))
    folder = flags.log_dir / flags.source_data_name / flags.method / shared.arch / "kd"
    both = {f"mean_{m}": spread(cells, f"accuracy_{m}")["mean"] for m in BN_MODES}
    both |= {f"std_{m}": spread(cells, f"accuracy_{m}")["std"] for m in BN_MODES}
    row = {
        "target": shared.target.name,
        "kd_bn": flags.kd_bn,
        "teacher_accuracy": cells[0]["teacher_accuracy"],
        **spread(cells),
        **both,
    }
    finish(folder, flags, shared.device, cells, [row], table(cells, flags))
    return 0


def describe(cell: Cell) -> str:
    """A finished cell in one line."""
    return (
        f"{cell['target']}, seed {cell['seed']}: {cell['accuracy_running']:.2f} % (running), "
        f"{cell['accuracy_batch']:.2f} % (batch)"
    )


def table(cells: list[Cell], flags: KdFlags) -> str:
    """One row, the two BatchNorm modes as columns, test accuracy in %."""
    heads, values = [], []
    for mode, words in BN_MODES.items():
        heads.append(f"{words} (headline)" if mode == flags.kd_bn else words)
        values.append(format_mean_std([cell[f"accuracy_{mode}"] for cell in cells]))
    cell = cells[0]
    name = f"{cell['method']}, {cell['model']}, {cell['target']}"
    note = f"test accuracy in %, mean ± std over {flags.num_test} seeds"
    note += f"; the teacher has {cell['teacher_accuracy']:.2f}"
    note += f" and labels by {flags.kd_bn} statistics"
    if flags.steps_scale != 1:
        note += f"; lengths scaled by {flags.steps_scale}, not the table's"
    return f"{markdown(['student', *heads], [[name, *values]])}\n{note}"
