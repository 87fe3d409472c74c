"""The one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from data.loader import TensorLoader
from evaluation.recipes import LOSSES, Recipe
from models.layout import images_at_once
from utils.errors import UserError, pick
from utils.progress import FiniteGuard, LossWindow

# (model, inputs, targets) -> scalar
LossFn = Callable[[nn.Module, Any, Any], Tensor]
# step, detached loss, learning rate of that step
StepHook = Callable[[int, Tensor, float], None]


def train_step(
    model: nn.Module, x: Any, y: Any, loss_fn: LossFn, optimizer: Optimizer, part: int | None = None
) -> Tensor:
    """One gradient step on one batch; returns the detached loss before the step.

    Args:
        model: the network.
        x: inputs.
        y: targets.
        loss_fn: (model, inputs, targets) -> scalar; a mean over the images where `part` is given.
        optimizer: over whatever is to be trained.
        part: images that go through the network together; the step is that of the whole batch,
            as long as no layer makes images interact. None: all.
    """
    optimizer.zero_grad(set_to_none=True)
    if part is None or part >= len(x):
        loss = loss_fn(model, x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()
    total = 0.0
    for x_part, y_part in zip(x.split(part), y.split(part), strict=True):
        loss = loss_fn(model, x_part, y_part) * (len(x_part) / len(x))
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total


class Trainer:
    """A network, what trains it by a recipe, and how far it has come.

    Args:
        model: network on the loader's device.
        loader: batches of (inputs, targets); its endless stream is used.
        recipe: loss, optimiser, schedule and length.
        scale: factor on the length.
        loss_fn: (model, inputs, targets) -> scalar, in place of the recipe's loss on the outputs.

    Attributes:
        step: optimiser steps taken.
        steps: optimiser steps in all.
        per_epoch: steps of one pass over the loader's images.
        window: the losses of the last pass.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: TensorLoader,
        recipe: Recipe,
        *,
        scale: float = 1.0,
        loss_fn: LossFn | None = None,
    ) -> None:
        self.model, self.loader, self.recipe = model, loader, recipe
        criterion = pick(LOSSES, recipe.loss, "loss")
        self.loss_fn = loss_fn or (lambda model, x, y: criterion(model(x), y))
        self.per_epoch = loader.steps_per_pass
        self.step, self.steps = 0, recipe.total_steps(self.per_epoch, scale)
        self.optimizer = recipe.make_optimizer(model.parameters())
        self.schedule = recipe.make_schedule(self.optimizer, self.steps, self.per_epoch)
        self.window = LossWindow(self.per_epoch)
        self._batches = None

    def run(
        self,
        until: int | None = None,
        *,
        what: str = "training",
        on_step: StepHook | None = None,
        progress: bool = False,
    ) -> nn.Module:
        """Train in train mode up to a step.

        Args:
            until: the last step; None: the recipe's last.
            what: the name of this training, for progress and messages.
            on_step: called after each step.
            progress: show a progress bar.

        Returns:
            The network in eval mode.

        Raises:
            UserError: a loss is not finite (names the step), or a batch too small for BatchNorm.
        """
        guard, recipe = FiniteGuard(what), self.recipe
        end = self.steps if until is None else min(until, self.steps)
        shape = (self.loader.batch_size, *self.loader.images.shape[1:])
        part = images_at_once(self.model.train(), shape, self.loader.device, shape[0])
        if self._batches is None:
            self._batches = iter(self.loader.forever())
        for step in tqdm(
            range(self.step + 1, end + 1), desc=what, disable=None if progress else True, leave=False
        ):
            rate = self.optimizer.param_groups[0]["lr"]
            try:
                x, y = next(self._batches)
                whole = part if isinstance(x, Tensor) and isinstance(y, Tensor) else None
                loss = train_step(self.model, x, y, self.loss_fn, self.optimizer, whole)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UserError(
                    f"{what}: a batch of one image leaves BatchNorm of this network a single "
                    "value; choose a batch size that leaves no last batch of one, or another "
                    "network"
                ) from None
            guard.check(loss, step)
            self.schedule.step()
            if recipe.fresh_momentum and step in {e * self.per_epoch for e in recipe.decay_epochs}:
                self.optimizer.state.clear()
            self.step = step
            self.window.add(loss)
            if on_step is not None:
                on_step(step, loss, rate)
        guard.flush()
        return self.model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed training needs."""
        parts = ("model", "optimizer", "schedule", "loader", "window")
        return {name: getattr(self, name).state_dict() for name in parts} | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in ("model", "optimizer", "schedule", "loader", "window"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self._batches = int(state["step"]), None


@torch.no_grad()
def predict(function: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Any]]) -> Tensor:
    """Outputs of `function` (a network or its `embed`) over one pass, joined: (N, D)."""
    return torch.cat([function(x) for x, _ in batches])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest score is at the label, in %; scores (N, K), labels (N,)."""
    return 100.0 * float((scores.argmax(1) == labels.to(scores.device)).double().mean())
