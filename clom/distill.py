"""One distillation experiment: the iterations, their evaluations, pictures and saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clom.distillers import Distiller
from clom.real import RealImages
from utils.errors import UserError
from utils.finite import FiniteGuard
from utils.progress import Progress
from utils.resume import has_state, load_run, read_state, save_run
from utils.runlog import LossWindow, RunFolder
from utils.saving import SaveTimer
from utils.stop import StopRequest

# iteration, images -> evaluation network -> accuracies in [0, 1]
Evaluate = Callable[[int, Tensor], dict[str, list[float]]]


def initial_images(
    real: RealImages, shape: tuple[int, int, int], ipc: int, init: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The start: N(0, 1) noise, or real images of each class.

    Args:
        real: the training images.
        shape: (C, H, W).
        ipc: images a class.
        init: "noise" or "real".
        generator: of the draw.

    Returns:
        (classes · ipc, C, H, W) float32 in class order, and the int64 labels; on real's device.

    Raises:
        UserError: see `check_start`.
    """
    check_start(real, ipc, init)
    labels = torch.arange(real.num_classes).repeat_interleave(ipc).to(real.device)
    if init == "noise":
        return torch.randn((len(labels), *shape), generator=generator).to(real.device), labels
    return real.draw_all_classes(ipc, generator)[0], labels


def check_start(real: RealImages, ipc: int, init: str) -> None:
    """Raise a UserError for a class with fewer than ipc images to start from."""
    counts = [len(index) for index in real.index_of_class]
    if init == "real" and min(counts) < ipc:
        c = counts.index(min(counts))
        raise UserError(
            f"class {c} has {counts[c]} training images, --ipc {ipc} with --init real needs {ipc}; "
            "use --init noise or a smaller --ipc"
        )


class Schedule:
    """When what happens in an experiment.

    Args:
        steps: iterations in all.
        print_every: iterations between log lines.
        save_every: iterations (or seconds: "300s") between saves.
        eval_every: iterations between evaluations, from 0; None: only at the end.
    """

    def __init__(
        self, steps: int, *, print_every: int, save_every: str | int, eval_every: int | None
    ) -> None:
        self.steps, self.print_every, self.save_every = steps, print_every, save_every
        self.eval_every = eval_every

    def evaluates(self, step: int) -> bool:
        """Whether the images after `step` iterations are evaluated."""
        return step == self.steps or bool(self.eval_every and step % self.eval_every == 0)


def run_experiment(
    distiller: Distiller,
    evaluate: Evaluate,
    run: RunFolder,
    schedule: Schedule,
    *,
    experiment: int,
) -> dict[str, Any]:
    """Run one experiment from where `run` stopped to its end.

    The state after each save is the state of an uninterrupted run, draws included.

    Args:
        distiller: at its initial state; restored if the run's state belongs to this experiment.
        evaluate: tests the images.
        run: folder of log and state.
        schedule: when what happens.
        experiment: number from 0.

    Returns:
        images, labels (CPU), accuracies (network -> list in [0, 1]) after the last iteration, and
        seconds of this start.

    Raises:
        UserError: a non-finite loss, naming the iteration; the last save is kept.
    """
    guard = FiniteGuard(f"experiment {experiment}")
    windows = {name: LossWindow(schedule.print_every) for name in ("loss", "clom")}
    parts, start = {"distiller": distiller, **windows}, 0
    if state_belongs(run, experiment):
        start, _ = load_run(run.state_path, parts)
        print(f"experiment {experiment}: going on after iteration {start} of {schedule.steps}")
    offset = experiment * (schedule.steps + 1)  # log steps go on growing over experiments
    run.truncate_log(offset + start)
    accuracies = logged_accuracies(run, offset + start)
    began = time.perf_counter()
    progress = Progress(f"experiment {experiment}", "iteration", start, schedule.steps)
    timer, saved = SaveTimer(schedule.save_every), start
    with StopRequest() as stop:
        for step in range(start, schedule.steps + 1):
            if schedule.evaluates(step) and not (step == start and accuracies is not None):
                guard.flush()
                if saved != step:
                    save_run(run.state_path, step, parts, experiment=experiment)
                    saved = step
                where = f"in the evaluation after iteration {step} of {schedule.steps}"
                with progress.paused(), stop.at_once(where):
                    accuracies = evaluate(step, distiller.x_syn.detach())
                run.log(step=offset + step, experiment=experiment, iteration=step, test=accuracies)
            if step == schedule.steps:
                break
            try:
                losses = distiller.step()
            except UserError as error:  # the network's own training diverged
                raise UserError(f"experiment {experiment}, iteration {step + 1}: {error}") from None
            guard.check(losses["loss"] + losses["clom"], step + 1)
            for name, window in windows.items():
                window.add(losses[name])
            done = step + 1
            progress.advance()
            if done % schedule.print_every == 0 or done == schedule.steps:
                means = {name: window.mean() for name, window in windows.items()}
                run.log(step=offset + done, experiment=experiment, iteration=done, **means)
                clom = "" if distiller.clom is None else f", CLoM {means['clom']:.4g}"
                progress.report(done, f"loss {means['loss']:.4g}{clom}")
            if timer.due(done) or done == schedule.steps or stop:
                guard.flush()
                save_run(run.state_path, done, parts, experiment=experiment)
                saved = done
            if stop:
                progress.close()
                stop.leave(f"after iteration {done} of {schedule.steps}")
    progress.close()
    return {
        "images": distiller.x_syn.detach().cpu(),
        "labels": distiller.y_syn.cpu(),
        "accuracies": accuracies,
        "seconds": time.perf_counter() - began,
    }


def state_belongs(run: RunFolder, experiment: int) -> bool:
    """Whether the saved state is one of this experiment."""
    if not has_state(run.state_path):
        return False
    state = read_state(run.state_path)
    try:
        return int(state["tensors"]["experiment"]) == experiment
    except (KeyError, TypeError, ValueError):
        raise UserError(f"run state {run.state_path} is damaged; pass --overwrite") from None


def logged_accuracies(run: RunFolder, step: int) -> dict[str, list[float]] | None:
    """The evaluation at a log step, if an earlier start finished it."""
    found = [e["test"] for e in run.read_log() if e.get("step") == step and "test" in e]
    return found[-1] if found else None
