"""KRR-ST distillation: the outer loop over X_s and Y_s, its saves and its pictures."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from data.augment import default_padding, denormalize, normalize, to_float
from data.load import ImageSet
from data.loader import TensorLoader, ViewPipeline
from data.specs import Stats
from evaluation.protocols import outputs
from krr_st.baselines import kmeans_indices
from krr_st.held_out import HeldOutLoss
from krr_st.linear_eval import LinearEvaluations
from krr_st.loss import krr_loss
from krr_st.pool import ModelPool
from krr_st.views import RealBatch, TargetFunction, Targets
from utils import checkpoint
from utils.curves import read_series
from utils.distributed import ALONE, Group
from utils.finite import FiniteGuard
from utils.images import save_grid, save_lines
from utils.memory import SplitBatches
from utils.optim import make_optimizer, make_schedule
from utils.precision import autocast, compiled
from utils.progress import Progress
from utils.resume import has_state, load_run, save_run
from utils.runlog import LossWindow, RunFolder
from utils.saving import SaveTimer
from utils.seed import draw_seed
from utils.stop import StopRequest


class Distiller:
    """X_s, Y_s and all that moves with them; one call of `step` is one outer step.

    Args:
        x_syn: (m, C, H, W) float32 initial images on the device.
        y_syn: (m, D) float32 initial targets.
        targets: maps real batches to the target model's representations.
        pool: the networks features come from.
        loader: endless real batches, from `real_loader`.
        ridge: relative ridge of the kernel regression.
        optimizer: adam (AdamW) or sgd (momentum 0.5).
        lr: learning rate of both tensors; falls linearly to 1e-3 of it.
        lr_y: that of Y_s, where it is another.
        wd: weight decay.
        grad_norm: bound on the gradient norm of each tensor on its own; 0: none.
        steps: length of the run.
        precision: of the networks; the kernel solve and the updates are in float32 or better.
        group: the processes that share the real batch; each averages its gradients with the rest.
        compile: compile the networks' passes.
        target_sample: the target model's features (D,) of one fixed image, by which a saved state
            knows its target model.

    Source: Lee et al., arXiv 2310.06511, alg. 1.
    """

    def __init__(
        self,
        x_syn: Tensor,
        y_syn: Tensor,
        *,
        targets: Targets,
        pool: ModelPool,
        loader: TensorLoader,
        ridge: float,
        optimizer: str,
        lr: float,
        wd: float,
        grad_norm: float,
        steps: int,
        precision: str = "fp32",
        lr_y: float | None = None,
        group: Group = ALONE,
        compile: bool = False,
        target_sample: Tensor | None = None,
    ) -> None:
        self.target_sample = target_sample
        self.x_syn = x_syn.clone().requires_grad_()
        self.y_syn = y_syn.clone().requires_grad_()
        self.targets, self.pool, self.loader = targets, pool, loader
        self.ridge, self.grad_norm = ridge, grad_norm
        self.precision, self.group = precision, group
        embed = self._embed = compiled(lambda model, x: model.embed(x), compile)
        # Without `self`: a cycle would keep the table of views after the run.
        self._embed_real = SplitBatches(lambda x, model: embed(model, x))
        groups = [
            {"params": [self.x_syn]}, {"params": [self.y_syn], "lr": lr_y or lr},
        ]  # fmt: skip
        self.optimizer = make_optimizer(optimizer, groups, lr=lr, wd=wd, momentum=0.5)
        self.schedule = make_schedule("linear", self.optimizer, steps)
        self._batches = loader.forever()

    def step(self) -> Tensor:
        """One outer step; returns the loss before it (detached, on the device)."""
        slot = self.pool.draw()
        (x, view), index = next(self._batches)
        with autocast(self.precision, x.device):
            with torch.no_grad():
                y_real = self.targets(RealBatch(x, index, view))  # (b, D)
                f_real = self._embed_real(x, slot.model)  # (b, d)
            f_syn = self._embed(slot.model, self.x_syn)  # (m, d)
        loss = krr_loss(f_real, y_real, f_syn, self.y_syn, self.ridge)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss = loss.detach()
        self.group.average_([self.x_syn.grad, self.y_syn.grad, loss])
        if self.grad_norm > 0:
            for variable in (self.x_syn, self.y_syn):
                nn.utils.clip_grad_norm_(variable, self.grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.pool.update(slot, self.x_syn.detach(), self.y_syn.detach())
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "x_syn": self.x_syn.detach(),
            "y_syn": self.y_syn.detach(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "pool": self.pool.state_dict(),
            "loader": self.loader.state_dict(),
            "target_sample": self.target_sample,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            ValueError: it belongs to another target model.
        """
        before, now = state.get("target_sample"), self.target_sample
        if before is not None and now is not None:
            # Not bit by bit: the run may have moved to another device.
            now = now.to(before)
            if now.shape != before.shape or (now - before).norm() > 0.05 * before.norm():
                raise ValueError("the target model gives other features than before")
        with torch.no_grad():
            self.x_syn.copy_(state["x_syn"])
            self.y_syn.copy_(state["y_syn"])
        for name in ("optimizer", "schedule", "pool", "loader"):
            getattr(self, name).load_state_dict(state[name])


@torch.no_grad()
def initial_set(
    image_set: ImageSet,
    count: int,
    target: TargetFunction,
    *,
    init: str,
    device: torch.device,
    generator: torch.Generator,
    images: str = "random",
) -> tuple[Tensor, Tensor]:
    """X_s = `count` random real images, Y_s = the target model's features of those images.

    Args:
        image_set: the source.
        count: m.
        target: the frozen target model.
        init: "normalized", or "raw": X_s in pixel space [0, 1] while Y_s belongs to the
            normalised images, as in the released code.
        device: where to compute.
        generator: which images.
        images: "random", or "kmeans": the ones nearest to k-means centres in feature space.

    Returns:
        (m, C, H, W) and (m, D), float32.
    """
    if images == "kmeans":
        points = outputs(target, image_set.train.images, image_set, device).float()
        index = kmeans_indices(points, count, draw_seed(generator))
    else:
        index = torch.randperm(len(image_set.train), generator=generator)[:count]
    pixels = to_float(image_set.train.images[index].to(device))
    x = normalize(pixels, image_set.stats)
    y = torch.cat([target(chunk).float() for chunk in x.split(256)])
    return (pixels if init == "raw" else x), y


def real_loader(
    image_set: ImageSet,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator,
    shard: tuple[int, int] = (0, 1),
) -> TensorLoader:
    """Endless batches of the training images, crop, flip, normalise: ((x, views), index).

    The last, smaller batch of each pass is kept, as in the released code.

    Args:
        image_set: the source; labels are not read.
        batch_size: b, over all ranks.
        device: where batches are wanted.
        generator: order and views.
        shard: (rank, ranks).
    """
    pipeline = ViewPipeline(
        image_set.stats, pad=default_padding(image_set.size), hflip=image_set.hflip, shard=shard
    )
    return TensorLoader(
        image_set.train.images, None, batch_size=batch_size, device=device, generator=generator,
        transform=pipeline, with_index=True, shard=shard,
    )  # fmt: skip


def distill(
    distiller: Distiller,
    run: RunFolder,
    *,
    steps: int,
    print_every: int,
    save_every: str | int,
    evaluations: LinearEvaluations,
    held_out: HeldOutLoss | None,
    stats: Stats,
    device: torch.device,
) -> dict[str, Any]:
    """Run the outer loop from where `run` stopped to the end; write the artefacts.

    Args:
        distiller: at its initial state; restored from the run's state if there is one.
        run: folder of log, state and results.
        steps: outer steps in all.
        print_every: steps between log lines.
        save_every: steps (or seconds: "300s") between saves of the set and of the run state.
        evaluations: linear evaluations, the first process's.
        held_out: the loss under fixed networks, the first process's.
        stats: what undoes the normalisation of X_s, for its picture.
        device: where to compute.

    Returns:
        What goes into results.json.

    Raises:
        UserError: a non-finite loss, naming the step; the last save is kept.
    """
    guard, window = FiniteGuard("distillation"), LossWindow(print_every)
    parts, start, timer = {"distiller": distiller, "losses": window}, 0, SaveTimer(save_every)
    first = distiller.group.first

    def measure(step: int) -> None:
        """Log the loss under the fixed networks."""
        run.log(step=step, held_out_loss=held_out(distiller.x_syn, distiller.y_syn))

    if has_state(run.state_path):
        start, _ = load_run(run.state_path, parts)
        print(f"going on after step {start} of {steps}")
    else:
        distiller.pool.warm_up(distiller.x_syn.detach(), distiller.y_syn.detach(), progress=first)
    run.truncate_log(start)
    if first and not any("held_out_loss" in e for e in run.read_log()):
        measure(start)
    evaluations.made = [e for e in run.read_log() if "linear_accuracy" in e]
    began = time.perf_counter()
    progress = Progress("distilling", "step", start, steps, bar=first)

    def evaluate(step: int) -> None:
        """The evaluation that is due after this step, if any; all must be saved before."""
        if not (first and evaluations.due(step)):
            return
        where = f"in the evaluation after step {step} of {steps}"
        # Several processes leave together or not at all.
        leaving = stop.at_once(where) if distiller.group.ranks == 1 else nullcontext()
        with progress.paused(), leaving:
            entry = evaluations.make(
                step, distiller.x_syn.detach(), distiller.y_syn.detach(), run.seed
            )
        run.log(**entry)
        progress.write(f"step {step}: linear accuracy {entry['linear_accuracy']:.2f} %")

    with StopRequest() as stop:
        evaluate(start)  # the last start may have been stopped in it
        for step in range(start + 1, steps + 1):
            rate = distiller.schedule.get_last_lr()[0]
            loss = distiller.step()
            guard.check(loss, step)
            window.add(loss)
            progress.advance()
            last, printing = step == steps, step % print_every == 0
            # Several processes have to leave at the same step; agreeing costs a message.
            leaving = bool(stop) and distiller.group.ranks == 1
            if printing or last:
                guard.flush()
                leaving = distiller.group.any(bool(stop))
                mean = window.mean()
                speed = progress.report(step, f"loss {mean:.4g}")
                run.log(step=step, loss=mean, lr=rate, steps_per_second=speed)
            if first and held_out.due(step):
                measure(step)  # before the save: a resumed run logs again what comes after its own
            if timer.due(step) or evaluations.due(step) or last or leaving:
                guard.flush()
                distiller.targets.flush()
                if first:
                    save_set(distiller, run)
                    save_run(run.state_path, step, parts)
            if leaving and not last:
                progress.close()
                stop.leave(f"after step {step} of {steps}")
            evaluate(step)
    progress.close()
    results = {
        "steps": steps,
        "loss": window.mean(),
        "linear_evaluations": evaluations.made,
        "seconds": time.perf_counter() - began,
        "steps_in_this_start": steps - start,
    }
    if device.type == "cuda":
        results["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    if first:
        curve = [e["held_out_loss"] for e in run.read_log() if "held_out_loss" in e]
        results["held_out_loss"] = {"of": str(held_out), "start": curve[0], "end": curve[-1]}
        draw_artefacts(distiller, stats, run, str(held_out))
    return results


def save_set(distiller: Distiller, run: RunFolder) -> None:
    """Write x_syn.pt and y_syn.pt, the published result files: two plain CPU tensors."""
    checkpoint.save(distiller.x_syn.detach().cpu(), run.path / "x_syn.pt")
    checkpoint.save(distiller.y_syn.detach().cpu(), run.path / "y_syn.pt")


def draw_artefacts(distiller: Distiller, stats: Stats, run: RunFolder, held_out: str) -> None:
    """Draw x_syn.png (de-normalised, at most 400 images) and loss.png.

    Args:
        distiller: at the end of the run.
        stats: what undoes the normalisation of its images.
        run: folder of the log and the pictures.
        held_out: what the loss under fixed networks is measured on.
    """
    pixels = denormalize(distiller.x_syn.detach()[:400], stats)
    save_grid(pixels.clamp(0, 1), run.path / "x_syn.png")
    series = read_series(run.path / "log.jsonl")
    save_lines(
        {held_out: series["held_out_loss"], "real batches, networks of the pool": series["loss"]},
        run.path / "loss.png", x_label="outer step", y_label="KRR loss", log_y=True,
        title="Only the fixed networks compare step with step: the pool's age and follow the set",
        legend="outside lower center",
    )  # fmt: skip
