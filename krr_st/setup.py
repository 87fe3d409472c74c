"""What the kernel regression family adds around the outer loop: target model, evaluation, files."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.augment import denormalize
from data.load import load_set
from data.specs import Stats
from distillation.base import Distiller
from distillation.loop import Plan
from distillation.problem import Problem
from distillation.run import Method, Setup
from evaluation.linear import LinearEvaluation, is_labelled
from evaluation.presets import resolve_preset
from evaluation.recipes import Recipe
from evaluation.target import load_target, resolve_checkpoint
from krr_st.config import TrainFlags
from models import get_model
from utils import checkpoint
from utils.distributed import Group
from utils.errors import UserError
from utils.memory import SplitBatches
from utils.plots import save_grid, save_lines
from utils.precision import autocast, check_compile, check_precision, float32_mode
from utils.run_folder import Run, RunFolder, read_series


class FrozenTarget:
    """The target model without gradient, in the run's precision, in parts where memory is short."""

    def __init__(self, model: torch.nn.Module, precision: str) -> None:
        self.dim, self.precision = model.dim, precision
        self._in_parts = SplitBatches(model)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Normalised images (b, C, H, W) -> features (b, dim)."""
        with autocast(self.precision, x.device):
            return self._in_parts(x)


class KernelSetup(Setup):
    """Runs of KRR-ST and its kin: one set, judged by a linear classifier on frozen features."""

    knobs = (
        "lower --outer_batch_size, --num_images or --num_models, or use --target_views online or "
        "--precision bf16"
    )
    several_processes = True

    @classmethod
    def resolve(cls, method: Method, flags: TrainFlags) -> TrainFlags:
        """Fill in what presets decide: size, m, networks, target and its checkpoint, run name."""
        preset = resolve_preset(flags.data_name, flags.data_dir, flags.img_size)
        network = flags.train_model or preset.network
        target_model = flags.target_model or preset.target_model
        return dataclasses.replace(
            flags,
            img_size=preset.size,
            num_images=flags.num_images or preset.num_images,
            train_model=network,
            test_model=flags.test_model or network,
            target_model=target_model,
            target_ckpt=resolve_checkpoint(target_model, flags.target_ckpt, flags.data_name),
            exp_name=flags.exp_name or flags.data_name,
        )

    @classmethod
    def check(cls, flags: TrainFlags, device: torch.device) -> None:
        """Raise a UserError for a precision or a compiler that is not to be had here."""
        check_precision(flags.precision, device)
        if flags.views_dir is not None and flags.views_dir.is_file():
            raise UserError(f"--views_dir {flags.views_dir} is a file; expected a folder")
        if flags.compile and not flags.dry_run:
            check_compile(device)

    def __init__(
        self, method: Method, flags: TrainFlags, device: torch.device, group: Group, held: ExitStack
    ) -> None:
        super().__init__(method, flags, device, group, held)
        held.enter_context(float32_mode(flags.precision))
        image_set = load_set(flags.data_name, flags.img_size, flags.data_dir)
        self.image_set, count = image_set, len(image_set.train)
        if flags.num_images > count:
            raise UserError(
                f"--num_images {flags.num_images} is more than the {count} images in {image_set.train.path}"
            )
        batch = min(flags.outer_batch_size, count)
        if batch % group.ranks:
            raise UserError(
                f"--outer_batch_size: a batch of {batch} images cannot be dealt to {group.ranks} "
                "processes; use a multiple of their number"
            )
        where = dict(data_name=flags.data_name, data_dir=flags.data_dir, layout=flags.layout)
        model = load_target(flags.target_model, flags.target_ckpt, image_set, device, **where)
        self.target, self.target_fingerprint = FrozenTarget(model, flags.precision), model.fingerprint
        for arch in (flags.train_model, flags.test_model):  # an unknown name fails now
            get_model(arch, image_set.img_shape, model.dim)

    @property
    def folder(self) -> Path:
        """{save_dir}/{exp_name}."""
        return Path(self.flags.save_dir) / self.flags.exp_name

    @property
    def syn_stats(self) -> Stats:
        """What undoes the normalisation of X_s; with a raw start there is nothing to undo."""
        if self.flags.syn_init != "raw":
            return self.image_set.stats
        return Stats((0.0,) * self.image_set.channels, (1.0,) * self.image_set.channels)

    @property
    def extra(self) -> dict[str, Any]:
        """The source and what undoes the normalisation of X_s."""
        stats = self.syn_stats
        return {"data_name": self.flags.data_name, "mean": stats.mean, "std": stats.std}

    @property
    def inputs(self) -> dict[str, str]:
        """The source and the weights of the target model."""
        return {**super().inputs, "target model": self.target_fingerprint}

    def run(self, run: Run) -> dict[str, Any]:
        """Distil one set; write it and its pictures."""
        flags, image_set = self.flags, self.image_set
        if not is_labelled(image_set):
            print(f"{flags.data_name} has no labels: linear evaluation is skipped")
        elif image_set.test is None:
            print(f"{flags.data_name} has no test split: evaluations use the training images")
        problem = Problem(image_set, self.device, run.seed, self.group, target=self.target)
        plan = Plan(flags.outer_iteration, flags.print_every, flags.save_every)
        distiller, results = self.distil(run, problem, plan)
        if self.group.first:
            pixels = denormalize(distiller.x_syn.detach()[:400], self.syn_stats)
            save_grid(pixels.clamp(0, 1), run.path / "x_syn.png")
            results |= self.draw_losses(run)
        return {**results, "linear_evaluations": results.pop("evaluations")}

    def observer(self, run: Run, plan: Plan, distiller: Distiller) -> SetObserver:
        """Linear evaluations, the held-out loss, the set beside every save."""
        return SetObserver(self, run, distiller)

    def draw_losses(self, run: RunFolder) -> dict[str, Any]:
        """Draw loss.png; returns where the held-out loss began and ended."""
        series = read_series(run.path / "log.jsonl")
        lines = {"real batches, networks of the pool": series["loss"]}
        found = {}
        if "held_out_loss" in series:
            curve = [e["held_out_loss"] for e in run.read_log() if "held_out_loss" in e]
            found = {"held_out_loss": {"of": self.monitored, "start": curve[0], "end": curve[-1]}}
            lines = {self.monitored: series["held_out_loss"], **lines}
        save_lines(
            lines,
            run.path / "loss.png",
            x_label="outer step",
            y_label="KRR loss",
            log_y=True,
            title="Only the fixed networks compare step with step: the pool's age and follow the set",
            legend="outside lower center",
        )
        return found

    def after(self, run: Run) -> None:
        """Say where the set is."""
        print(f"synthetic set: {run.path}/x_syn.pt, y_syn.pt; picture: {run.path}/x_syn.png")


class SetObserver:
    """Evaluates the set by a linear classifier, and writes it beside every save."""

    key = "linear_accuracy"

    def __init__(self, setup: KernelSetup, run: Run, distiller: Distiller) -> None:
        flags = self.flags = setup.flags
        self.monitor = distiller.monitor() if setup.group.first else None
        setup.monitored = str(self.monitor)
        if self.monitor is not None:
            print(f"held-out loss: {self.monitor}")
        self.path, self.labelled = run.path, is_labelled(setup.image_set)
        opt, lr, wd, batch = flags.pre_opt, flags.pre_lr, flags.pre_wd, flags.pre_batch_size
        pretraining = Recipe("mse", opt, lr, wd, "constant", batch, epochs=flags.pre_epoch)
        opt, lr, wd, batch = flags.test_opt, flags.test_lr, flags.test_wd, flags.test_batch_size
        steps = flags.test_iteration
        classifier = Recipe("cross_entropy", opt, lr, wd, "cosine", batch, steps=steps)
        self.evaluation = LinearEvaluation(
            setup.image_set, flags.test_model, pretraining, classifier, setup.device, run.seed
        )

    def due(self, step: int) -> bool:
        """Every `eval_every` steps and at the end, where the source has labels."""
        last = step == self.flags.outer_iteration
        return self.labelled and (last or (step > 0 and step % self.flags.eval_every == 0))

    def evaluate(self, step: int, distiller: Distiller) -> float:
        """Accuracy in %."""
        found = self.evaluation(step, distiller.x_syn.detach(), distiller.y_syn.detach())
        print(f"step {step}: linear accuracy {found:.2f} %", flush=True)
        return found

    def watch(self, step: int, distiller: Distiller) -> dict[str, Any]:
        """The loss under fixed networks, at the start, on the way and at the end."""
        if self.monitor is None or not self.monitor.due(step):
            return {}
        return {"held_out_loss": self.monitor(distiller.x_syn, distiller.y_syn)}

    def saved(self, distiller: Distiller) -> None:
        """Write x_syn.pt and y_syn.pt, the published result files: two plain CPU tensors."""
        checkpoint.save(distiller.x_syn.detach().cpu(), self.path / "x_syn.pt")
        checkpoint.save(distiller.y_syn.detach().cpu(), self.path / "y_syn.pt")
