"""The one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from utils.errors import UserError
from utils.finite import FiniteGuard

# (model, inputs, targets) -> scalar
LossFn = Callable[[nn.Module, Any, Any], Tensor]


def supervised(criterion: Callable[[Tensor, Tensor], Tensor]) -> LossFn:
    """Lift `criterion(outputs, targets)` to the form `fit` takes."""
    return lambda model, x, y: criterion(model(x), y)


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of ½·Σ(f(x) - y)² (the loss of KIP and FRePo); both (B, K)."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


def kd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of the student's distribution under the teacher's, temperature 1.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K); no gradient is taken with respect to them.

    Returns:
        Scalar, mean over the batch of -Σ_k p_k log q_k.

    Source: Lee et al., arXiv 2310.06511, target data-free knowledge distillation (Table 4).
    """
    p = teacher_logits.detach().softmax(1)
    return -(p * student_logits.log_softmax(1)).sum(1).mean()


def train_step(
    model: nn.Module,
    x: Any,
    y: Any,
    loss_fn: LossFn,
    optimizer: Optimizer,
    part: int | None = None,
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
    if part is None or part >= len(x):
        loss = loss_fn(model, x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for x_part, y_part in zip(x.split(part), y.split(part), strict=True):
        loss = loss_fn(model, x_part, y_part) * (len(x_part) / len(x))
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFn,
    optimizer: Optimizer,
    schedule: LRScheduler | None = None,
    *,
    steps: int,
    start: int = 0,
    what: str = "training",
    on_step: Callable[[int, Tensor, float], None] | None = None,
    progress: bool = False,
    part: int | None = None,
) -> nn.Module:
    """Train `model` in place, in train mode, for steps `start + 1` to `steps`.

    Args:
        model: the network; left in eval mode.
        batches: yields (inputs, targets) on the model's device, for as long as it is asked.
        loss_fn: (model, inputs, targets) -> scalar.
        optimizer: over whatever is to be trained.
        schedule: stepped once after each step.
        steps: number of the last step.
        start: steps already taken (a resumed run).
        what: the name of this training, for progress and messages.
        on_step: called after each step with (step, detached loss, learning rate of that step).
        progress: show a progress bar.
        part: as in `train_step`.

    Returns:
        `model`.

    Raises:
        UserError: a loss is not finite (names the step), or a batch too small for BatchNorm.
    """
    guard = FiniteGuard(what)
    model.train()
    iterator = iter(batches)
    for step in tqdm(
        range(start + 1, steps + 1), desc=what, disable=None if progress else True, leave=False
    ):
        rate = optimizer.param_groups[0]["lr"]
        try:
            x, y = next(iterator)  # a teacher in train mode may label it
            loss = train_step(model, x, y, loss_fn, optimizer, part)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"{what}: a batch of one image leaves BatchNorm of this network a single value; "
                "choose a batch size that leaves no last batch of one, or another network"
            ) from None
        guard.check(loss, step)
        if schedule is not None:
            schedule.step()
        if on_step is not None:
            on_step(step, loss, rate)
    guard.flush()
    return model.eval()


@torch.no_grad()
def predict(function: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Any]]) -> Tensor:
    """Outputs of `function` (a network or its `embed`) over one pass, joined: (N, D)."""
    return torch.cat([function(x) for x, _ in batches])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest score is at the label, in %; scores (N, K), labels (N,)."""
    return 100.0 * float((scores.argmax(1) == labels.to(scores.device)).double().mean())
