"""Target data-free knowledge distillation (Table 4): the driver behind test_kd.py.

A classifier of the target teaches a student on synthetic images alone. Of the target only the test
split is read, and only to measure.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.augment.dsa import without_flip
from data.load import ImageSet, load_set
from data.meta import keeps_meaning_mirrored
from evaluation.fit import Trainer, held_out_accuracy
from evaluation.measure import Cell, CellStore, spread
from evaluation.pretraining import MeasureFlags, Measurement, PretrainFlags, load_pretraining
from evaluation.recipes import GAUSSIAN, KD, RANDOM_FEATURES, SCRATCH, kd_loss, of_recipe
from models import get_model
from models.layout import batch_norms
from utils import checkpoint
from utils.checkpoint import apply_state, fingerprint, state_fingerprint
from utils.cli import flag, typed
from utils.device import place
from utils.errors import UserError, pick
from utils.seed import derive_seed, local_seed, make_generator
from utils.table import format_mean_std, markdown

BN_MODES = {"running": "running statistics", "batch": "statistics of the test batch"}
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
    kd_epoch: int | None = of_recipe("distillation epochs", minimum=1)
    kd_lr: float | None = of_recipe("distillation learning rate", above=0)
    kd_batch_size: int | None = of_recipe("distillation batch", minimum=1)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block BatchNorm alone normalises by the batch at hand, as in the released test_kd.py."""
    norms = batch_norms(model)
    before = [(m.training, m.track_running_stats) for m in norms]
    try:
        for m in norms:
            m.training, m.track_running_stats = True, False  # False: nothing is written
        yield
    finally:
        for m, (training, tracking) in zip(norms, before, strict=True):
            m.training, m.track_running_stats = training, tracking


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """A loader's transform: fresh N(0, 1) images in place of x."""
    return torch.randn(x.shape, generator=generator).to(x.device)


def load_teacher(flags: KdFlags, target: ImageSet) -> nn.Module:
    """The teacher with frozen weights, on the CPU in eval mode; a UserError says how to make one."""
    name = f"teacher_{flags.target_data_name}.pt"
    path = flags.teacher_ckpt or Path("teacher_ckpt") / name
    if not path.exists():
        how = dict(data_name=flags.target_data_name, img_size=target.size, arch=flags.teacher_arch)
        how |= dict(data_dir=flags.data_dir, save_dir=path.parent)
        command = typed("python -m krr_st.kd_teacher", **how)
        renamed = "" if path.name == name else f" (it writes {path.parent / name})"
        raise UserError(f"teacher checkpoint {path} does not exist; make it with: {command}{renamed}")
    with local_seed(0):  # every weight is replaced
        teacher = get_model(flags.teacher_arch, target.img_shape, target.num_classes)
    apply_state(teacher, checkpoint.load_state(path, what="teacher checkpoint"), origin=path)
    return teacher.eval().requires_grad_(False)


class Distillation(Measurement):
    """A teacher and the images it teaches on: read and checked, ready to train students.

    `synthetic` is None for gaussian, `pretraining` (of the student) for scratch, too; `count` images,
    synthetic or of noise, make an epoch. A UserError says what is wrong with flags, data or teacher.
    """

    protocol, knobs = "kd", "lower --pre_batch_size or --kd_batch_size"
    shorter = "lower --pre_epoch, --kd_epoch or --num_test"

    def __init__(self, flags: KdFlags) -> None:
        given = dict(epochs=flags.kd_epoch, lr=flags.kd_lr, batch_size=flags.kd_batch_size)
        self.recipe = pick(KD, flags.method, "method").override(**given)
        super().__init__(flags)
        size = self.preset.size
        self.target = target = load_set(flags.target_data_name, size, flags.data_dir, splits=("test",))
        if target.num_classes is None:
            raise UserError(f"{target.test.path.parent} has no labels; a target needs them")
        if not (target.hflip and keeps_meaning_mirrored(flags.data_dir / flags.source_data_name)):
            self.recipe = self.recipe.override(dsa=without_flip(self.recipe.dsa))
        self.synthetic, self.count = None, self.preset.num_images
        if flags.method == GAUSSIAN and flags.synthetic_path is not None:
            raise UserError("--synthetic_path: --method gaussian takes fresh noise, not a set")
        if flags.method != GAUSSIAN:
            source = replace(flags, method=RANDOM_FEATURES) if flags.method == SCRATCH else flags
            pretraining = load_pretraining(source, size, self.arch, kd=True)
            self.synthetic, self.count = pretraining.synthetic, len(pretraining.synthetic)
            if flags.method != SCRATCH:
                self.pretraining, self.width = pretraining, pretraining.outputs
            if self.synthetic.views is not None:
                self.recipe = self.recipe.in_steps(self.count // self.synthetic.views.each)
            shape = tuple(self.synthetic.images.shape[1:])
            if shape != target.img_shape:
                raise UserError(f"synthetic images are {shape}, those of the target {target.img_shape}")
        get_model(self.arch, target.img_shape, target.num_classes)  # an unknown name fails now
        self.teacher = place(load_teacher(flags, target), self.device)
        self.common = self.settings()
        if self.pretraining is not None:
            self.tell_pretraining()
        print(f"distillation: {self.recipe}; teacher: {flags.kd_bn} statistics")

    def settings(self) -> dict[str, Any]:
        settings = {
            **super().settings(),
            "protocol": self.protocol,
            "target": self.target.name,
            "target_data": self.target.fingerprint,
            "count": self.count,
            "distillation": self.recipe.record(),
            "kd_bn": self.flags.kd_bn,
            "teacher_arch": self.flags.teacher_arch,
            "teacher": state_fingerprint(self.teacher.state_dict()),
        }
        if self.pretraining is None and self.synthetic is not None:
            settings["synthetic_set"] = fingerprint(self.synthetic.images, self.synthetic.targets)
        return settings

    @functools.cached_property
    def teacher_accuracy(self) -> float:
        """In % on the target's test split."""
        found = held_out_accuracy(self.teacher.eval(), self.target, self.device)
        print(f"teacher: {found:.2f} % at {self.target.size} pixels")
        return found

    def student(self, seed: int) -> nn.Module:
        """The backbone, pre-trained if at all, with a fresh head for the target's classes."""
        backbone = self.backbone(seed, self.target.img_shape)
        with local_seed(derive_seed(seed, "head", self.target.name)):
            return self.with_new_head(backbone, self.target)

    def distil(self, seed: int) -> dict[str, float]:
        """Train one student; its test accuracies in % by BatchNorm mode."""
        found = {"teacher_accuracy": self.teacher_accuracy}
        student, generator = self.student(seed), make_generator(seed, "distillation")
        images, transform = torch.empty(1).expand(self.count, *self.target.img_shape), noise
        if self.synthetic is not None:
            images, transform = self.synthetic.images, None
        loader = self.recipe.loader(images, None, self.device, generator, transform)

        def loss_fn(model: nn.Module, x: Tensor, _: Tensor) -> Tensor:
            with torch.no_grad():
                logits = self.teacher(x)
            return kd_loss(model(x), logits)

        self.teacher.train(self.flags.kd_bn == "batch")  # its running statistics drift, as released
        trainer = Trainer(student, loader, self.recipe, scale=self.flags.steps_scale, loss_fn=loss_fn)
        with local_seed(derive_seed(seed, "dropout")):
            watch = self.ticking(self.recipe, self.count)
            trainer.run(what="distillation", on_step=watch, progress=True)
        found["accuracy_running"] = held_out_accuracy(student, self.target, self.device)
        with batch_statistics(student):
            found["accuracy_batch"] = held_out_accuracy(student, self.target, self.device)
        return found | {"accuracy": found[f"accuracy_{self.flags.kd_bn}"]}

    def keys(self, seed: int) -> list[dict[str, Any]]:
        return [{**self.common, "seed": seed}]

    def work(self) -> float:
        return self.pretraining_work() + self.recipe.work_on(self.count, self.flags.steps_scale)

    def repetition(self, seed: int, store: CellStore) -> list[Cell]:
        return [store.measure(key, lambda: self.distil(seed), describe) for key in self.keys(seed)]

    def summary(self, cells: list[Cell]) -> list[dict[str, Any]]:
        row = {
            "target": self.target.name,
            "kd_bn": self.flags.kd_bn,
            "teacher_accuracy": cells[0]["teacher_accuracy"],
            **spread(cells),
        }
        both = {f"{k}_{m}": spread(cells, f"accuracy_{m}")[k] for k in ("mean", "std") for m in BN_MODES}
        return [row | both]

    def table(self, cells: list[Cell]) -> tuple[str, str]:
        """One row, the two BatchNorm modes as columns, test accuracy in %."""
        flags = self.flags
        heads = [f"{words} (headline)" if mode == flags.kd_bn else words for mode, words in BN_MODES.items()]
        values = [format_mean_std([cell[f"accuracy_{mode}"] for cell in cells]) for mode in BN_MODES]
        note = (
            f"test accuracy in %, mean ± std over {flags.num_test} seeds; the teacher has "
            f"{cells[0]['teacher_accuracy']:.2f} and labels by {flags.kd_bn} statistics"
        )
        name = f"{self.method}, {self.arch}, {self.target.name}"
        return markdown(["student", *heads], [[name, *values]]), note


def describe(cell: Cell) -> str:
    """A finished cell in one line."""
    found = ", ".join(f"{cell[f'accuracy_{mode}']:.2f} % ({mode})" for mode in BN_MODES)
    return f"{cell['target']}, seed {cell['seed']}: {found}"
