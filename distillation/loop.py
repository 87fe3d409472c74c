"""The one outer loop: steps, log, saves, evaluations, stopping and resuming."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from distillation.base import Distiller
from utils.errors import UserError
from utils.progress import FiniteGuard, LossWindow, Progress, SaveTimer
from utils.run_folder import Run, load_run, save_run
from utils.stop import StopRequest


@dataclass(frozen=True)
class Plan:
    """The length of a loop, and when it logs and saves."""

    steps: int  # outer steps in all
    print_every: int  # steps between log lines
    save_every: str | int  # steps (or seconds: "300s") between saves
    unit: str = "step"  # what a step is called
    experiment: int | None = None  # its number, if a run has several; the log's steps continue over them

    @property
    def label(self) -> str:
        """What runs, for progress and messages."""
        return "distilling" if self.experiment is None else f"experiment {self.experiment}"

    def log_step(self, step: int) -> int:
        """The number of a step in the log."""
        return (self.experiment or 0) * (self.steps + 1) + step

    def where(self, step: int) -> dict[str, int]:
        """The step in the form of a log entry."""
        named = {} if self.experiment is None else {"experiment": self.experiment}
        return {"step": self.log_step(step), **named, self.unit: step}


class Observer(Protocol):
    """Evaluates the set while it is distilled.

    `evaluate`, after steps that are `due`, gives what is logged under `key`, for the price of `cost`,
    counted as `Distiller.cost`; `watch` gives cheap numbers to log after a step, from 0, empty where none
    are due; `saved` writes what belongs beside the state, which is saved next.
    """

    key: str
    cost: float

    def due(self, step: int) -> bool: ...

    def evaluate(self, step: int, distiller: Distiller) -> Any: ...

    def watch(self, step: int, distiller: Distiller) -> dict[str, Any]: ...

    def saved(self, distiller: Distiller) -> None: ...


def run_loop(distiller: Distiller, run: Run, observer: Observer, plan: Plan) -> dict[str, Any]:
    """Run the outer loop from where `run` stopped to its end.

    The state after each save is that of an uninterrupted run, random draws included. The distiller
    comes in its initial state and is restored if the run has a save of this experiment; only the
    first of several processes calls the observer.

    Returns steps, the mean of each loss over the last `print_every` steps, evaluations (log entries),
    seconds and steps of this start. A UserError names the step of a loss that is not finite.
    """
    steps, unit, group = plan.steps, plan.unit, distiller.problem.group
    guard = FiniteGuard(plan.label)
    cost, forecast = distiller.cost(distiller.flags, distiller.problem.classes), distiller.forecast
    windows = {name: LossWindow(plan.print_every) for name in distiller.losses}
    parts = {"distiller": distiller, **windows}
    resumed = load_run(run.state_path, parts, experiment=plan.experiment)
    start = resumed or 0
    if start > steps:
        raise UserError(f"run state {run.state_path} is at {unit} {start} of {steps}; pass --overwrite")
    if resumed is None:
        distiller.begin()
    else:
        print(f"{plan.label}: resuming after {unit} {start} of {steps}")
        forecast.skip(start * cost)
    run.truncate_log(plan.log_step(start))
    evaluations = {e["step"]: e for e in run.read_log() if observer.key in e}
    began, timer, saved = time.perf_counter(), SaveTimer(plan.save_every), start
    progress = Progress(plan.label, unit, start, steps, bar=group.first)

    def save(step: int) -> None:
        nonlocal saved
        guard.flush()
        distiller.flush()
        if group.first and saved != step:
            observer.saved(distiller)
            save_run(run.state_path, step, parts, experiment=plan.experiment)
        saved = step

    def watch(step: int) -> None:
        found = observer.watch(step, distiller) if group.first else {}
        if not found:
            return
        logged = (e.keys() for e in run.read_log() if e.get("step") == plan.log_step(step))
        if not any(found.keys() <= keys for keys in logged):
            run.log(**plan.where(step), **found)

    if resumed is None:
        watch(0)
    with StopRequest() as stop:
        for step in range(start, steps + 1):
            due = group.first and observer.due(step)
            if due and plan.log_step(step) not in evaluations:
                save(step)
                where = f"in the evaluation after {unit} {step} of {steps}"
                # Several processes stop together or not at all.
                at_once = stop.at_once(where) if group.ranks == 1 else nullcontext()
                with progress.paused(), forecast.paused(observer.cost), at_once:
                    found = observer.evaluate(step, distiller)
                evaluations[plan.log_step(step)] = entry = {**plan.where(step), observer.key: found}
                run.log(**entry)
            if step == steps:
                break
            done, rate = step + 1, distiller.rate()
            try:
                if what := distiller.awaited():
                    save(step)
                    where = f"waiting for {what} after {unit} {step} of {steps}"
                    with progress.paused(), forecast.paused(0), stop.at_once(where):
                        print(where, flush=True)
                        distiller.wait()
                losses = distiller.timed_step()
            except UserError as error:  # the training of a network diverged, or a process was lost
                raise type(error)(f"{plan.label}, {unit} {done}: {error}") from None
            guard.check(sum(losses.values()), done)
            for name, window in windows.items():
                window.add(losses[name])
            progress.advance()
            last, leaving = done == steps, bool(stop) and group.ranks == 1
            if done % plan.print_every == 0 or last:
                guard.flush()
                # Several processes have to stop at the same step; agreeing costs a message.
                leaving = any(group.gathered(bool(stop)))
                means = {name: window.mean() for name, window in windows.items()}
                shown = ", ".join(f"{name} {means[name]:.4g}" for name in distiller.shown)
                speed = progress.report(done, shown)
                run.log(**plan.where(done), **means, lr=rate, steps_per_second=speed)
            watch(done)  # before the save: a resumed run logs again what comes after its own
            if timer.due(done) or last or leaving:
                save(done)
            if leaving and not last:
                progress.close()
                stop.leave(f"after {unit} {done} of {steps}")
    progress.close()
    return {
        "steps": steps,
        **{name: window.mean() for name, window in windows.items()},
        "evaluations": list(evaluations.values()),
        "seconds": time.perf_counter() - began,
        "steps_in_this_start": steps - start,
    }
