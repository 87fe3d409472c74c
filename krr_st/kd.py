"""Target data-free knowledge distillation (Table 4): the driver behind test_kd.py.

A classifier of the target teaches a student on synthetic images alone. Of the target only the test
split is read, and only to measure.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
from data.dsa import diff_augment, without_flip
from data.load import ImageSet
from data.loader import TensorLoader
from data.synthetic import SyntheticSet
from evaluation.fit import accuracy, fit, kd_loss, supervised
from evaluation.protocols import outputs
from evaluation.recipes import GAUSSIAN, KD, RANDOM_FEATURES, SCRATCH, Recipe
from krr_st.config import KdFlags
from krr_st.presets import resolve_preset
from krr_st.transfer import Pretraining, build_backbone, load_pretraining, may_mirror
from models import get_model
from utils import checkpoint, cli
from utils.cells import CellStore
from utils.checkpoint import apply_state, fingerprint
from utils.device import place, resolve_device
from utils.errors import UserError, pick
from utils.memory import out_of_memory_says
from utils.optim import make_optimizer, make_schedule
from utils.runlog import environment, write_json
from utils.seed import derive_seed, local_seed, make_generator, resolve_seed
from utils.table import format_mean_std, markdown, mean_std

BN_MODES = {"running": "running statistics", "batch": "statistics of the test batch"}


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalises by the batch at hand; running statistics are left as they are.

    The released test_kd.py evaluates so. Dropout and everything else keep their mode.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.training, m.track_running_stats) for m in norms]
    try:
        for m in norms:
            m.training, m.track_running_stats = True, False  # False: nothing is written
        yield
    finally:
        for m, (training, tracking) in zip(norms, before, strict=True):
            m.training, m.track_running_stats = training, tracking


def noise_batches(
    count: int,
    img_shape: tuple[int, int, int],
    batch_size: int,
    *,
    device: torch.device,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, None]]:
    """Fresh N(0, 1) images at every step, in the batch sizes of passes over `count` images."""
    sizes = [len(part) for part in torch.arange(count).split(batch_size)]
    for size in itertools.cycle(sizes):
        yield torch.randn((size, *img_shape), generator=generator).to(device), None


def synthetic_batches(
    images: Tensor, recipe: Recipe, *, device: torch.device, generator: torch.Generator
) -> Iterator[tuple[Tensor, None]]:
    """Endless augmented batches of synthetic images (m, C, H, W) in normalised space."""

    def augment(x: Tensor, draw: torch.Generator) -> Tensor:
        return diff_augment(x, recipe.dsa, generator=draw, align_corners=True)

    return TensorLoader(
        images, None, batch_size=recipe.batch_size, device=device, generator=generator,
        transform=augment,
    ).forever()  # fmt: skip


def taught(
    batches: Iterable[tuple[Tensor, None]], teacher: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """Put the teacher's logits (B, K) beside each batch."""
    for x, _ in batches:
        with torch.no_grad():
            logits = teacher(x)
        yield x, logits


def load_teacher(flags: KdFlags, target: ImageSet) -> nn.Module:
    """The teacher with frozen weights, on the CPU in eval mode.

    Raises:
        UserError: no checkpoint (with the command that makes it), or one that does not fit.
    """
    name = f"teacher_{flags.target_data_name}.pt"
    path = flags.teacher_ckpt or Path("teacher_ckpt") / name
    if not path.exists():
        command = [
            "python", "-m", "krr_st.kd_teacher", "--data_name", flags.target_data_name,
            "--img_size", target.size, "--arch", flags.teacher_arch,
            "--data_dir", flags.data_dir, "--save_dir", path.parent,
        ]  # fmt: skip
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
    """What all repetitions share."""

    target: ImageSet
    teacher: nn.Module
    arch: str
    synthetic: SyntheticSet | None  # None: gaussian
    pretraining: Pretraining | None  # None: scratch, gaussian
    count: int  # synthetic images, or how many noise images make an epoch
    recipe: Recipe
    dropout: float
    scale: float
    device: torch.device
    kd_bn: str

    def student(self, seed: int) -> nn.Module:
        """The backbone, pre-trained if at all, with a fresh head for the target's classes."""
        shape, classes = self.target.img_shape, self.target.num_classes
        backbone = build_backbone(
            self.arch, shape, self.pretraining, dropout=self.dropout, seed=seed, device=self.device
        )
        with local_seed(derive_seed(seed, "head", self.target.name)):
            student = get_model(self.arch, shape, classes, self.dropout)
        apply_state(student, backbone.state_dict(), origin="the pre-trained network", skip=("fc.",))
        return place(student, self.device)

    def run(self, seed: int) -> dict[str, float]:
        """Train one student; its test accuracies in % by BatchNorm mode."""
        student, generator = self.student(seed), make_generator(seed, "distillation")
        recipe, steps = self.recipe, self.recipe.total_steps(self.count, self.scale)
        if self.synthetic is None:
            batches = noise_batches(
                self.count, self.target.img_shape, recipe.batch_size,
                device=self.device, generator=generator,
            )  # fmt: skip
        else:
            batches = synthetic_batches(
                self.synthetic.images, recipe, device=self.device, generator=generator
            )
        optimizer = make_optimizer(
            recipe.optimizer, student.parameters(), lr=recipe.lr, wd=recipe.wd
        )
        schedule = make_schedule(
            recipe.schedule, optimizer, steps, every=recipe.epoch_steps(self.count)
        )
        self.teacher.train(self.kd_bn == "batch")  # its running statistics drift, as released
        with local_seed(derive_seed(seed, "dropout")):
            fit(
                student, taught(batches, self.teacher), supervised(kd_loss), optimizer,
                schedule, steps=steps, what="distillation", progress=True,
            )  # fmt: skip
        found = {"accuracy_running": self.measure(student)}
        with batch_statistics(student):
            found["accuracy_batch"] = self.measure(student)
        return found

    def measure(self, model: nn.Module) -> float:
        """Accuracy in % on the target's test split."""
        test = self.target.test
        return accuracy(outputs(model, test.images, self.target, self.device), test.labels)


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
    target = data.load(flags.target_data_name, preset.size, flags.data_dir, splits=("test",))
    if target.num_classes is None:
        raise UserError(f"{target.test.path.parent} has no labels; a target needs them")
    if not (target.hflip and may_mirror(flags.source_data_name, flags.data_dir)):
        recipe = recipe.override(dsa=without_flip(recipe.dsa))
    synthetic, pretraining, count = None, None, preset.num_images
    if flags.method != GAUSSIAN:
        untrained = flags.method == SCRATCH
        source = replace(flags, method=RANDOM_FEATURES) if untrained else flags
        pretraining = load_pretraining(source, preset.size, arch)
        synthetic, count = pretraining.synthetic, len(pretraining.synthetic)
        pretraining = None if untrained else pretraining
        shape = tuple(synthetic.images.shape[1:])
        if shape != target.img_shape:
            raise UserError(f"synthetic images are {shape}, those of the target {target.img_shape}")
    get_model(arch, target.img_shape, target.num_classes)  # an unknown name fails now
    teacher = place(load_teacher(flags, target), device)
    return Distillation(
        target, teacher, arch, synthetic, pretraining, count, recipe, flags.dropout,
        flags.steps_scale, device, flags.kd_bn,
    )  # fmt: skip


def cell_settings(flags: KdFlags, shared: Distillation) -> dict[str, Any]:
    """Everything but the seed that a cell's values depend on."""
    state = shared.teacher.state_dict()
    settings: dict[str, Any] = {
        "source": flags.source_data_name, "method": flags.method, "model": shared.arch,
        "size": shared.target.size, "protocol": "kd", "target": shared.target.name,
        "dropout": shared.dropout, "steps_scale": shared.scale, "count": shared.count,
        "distillation": asdict(shared.recipe), "kd_bn": shared.kd_bn,
        "teacher_arch": flags.teacher_arch,
        "teacher": fingerprint(*(state[key] for key in sorted(state))),
    }  # fmt: skip
    if shared.pretraining is not None:
        settings["pretraining"] = asdict(shared.pretraining.recipe)
    if shared.synthetic is not None:
        settings["synthetic_set"] = fingerprint(shared.synthetic.images, shared.synthetic.targets)
    return settings


def run_kd(flags: KdFlags) -> int:
    """Measure every seed, print the table, write results.json.

    Raises:
        UserError: as `prepare`; finished cells stay in results.jsonl.
    """
    shared = prepare(flags)
    first = resolve_seed(flags.seed)
    store = CellStore(flags.log_dir / "results.jsonl")
    settings = cell_settings(flags, shared)
    if shared.pretraining is not None:
        print(f"pre-training: {shared.pretraining.recipe}")
    print(f"distillation: {shared.recipe}; teacher: {shared.kd_bn} statistics")
    headline, teacher_accuracy, cells = f"accuracy_{flags.kd_bn}", None, []
    for seed in range(first, first + flags.num_test):
        key = {**settings, "seed": seed}
        kept = cell = store.get(key)
        if cell is None:
            began = time.perf_counter()
            if teacher_accuracy is None:
                teacher_accuracy = shared.measure(shared.teacher)
                print(f"teacher: {teacher_accuracy:.2f} % at {shared.target.size} pixels")
            with out_of_memory_says(shared.device, "lower --pre_batch_size or --kd_batch_size"):
                found = shared.run(seed)
            cell = store.add(
                key, accuracy=found[headline], **found,
                teacher_accuracy=teacher_accuracy, seconds=time.perf_counter() - began,
            )  # fmt: skip
        cells.append(cell)
        print(
            f"{shared.target.name}, seed {seed}: {cell['accuracy_running']:.2f} % (running), "
            f"{cell['accuracy_batch']:.2f} % (batch){' (kept)' if kept else ''}",
            flush=True,
        )
    folder = flags.log_dir / flags.source_data_name / flags.method / shared.arch / "kd"
    write_json(folder / "results.json", {
        "flags": cli.as_json(flags), "environment": environment(shared.device),
        "summary": summarize(cells), "cells": cells,
    })  # fmt: skip
    print(table(cells, flags))
    print(f"results: {folder / 'results.json'}")
    return 0


def summarize(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and population std over seeds: the headline's, and of both BatchNorm modes."""
    row: dict[str, Any] = {
        "target": cells[0]["target"], "n": len(cells), "kd_bn": cells[0]["kd_bn"],
        "teacher_accuracy": cells[0]["teacher_accuracy"],
    }  # fmt: skip
    for field, suffix in (("accuracy", ""), *((f"accuracy_{m}", f"_{m}") for m in BN_MODES)):
        row[f"mean{suffix}"], row[f"std{suffix}"] = mean_std([cell[field] for cell in cells])
    return [row]


def table(cells: list[dict[str, Any]], flags: KdFlags) -> str:
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
