"""Optimisers and learning-rate schedules by name, with the field's defaults in one place."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from utils.errors import pick


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor by trust · ‖w‖ / ‖gradient + decay·w‖.

    Vectors (biases, normalisation) get neither decay nor scaling, as is usual for Barlow Twins.

    Source: You et al., "Large Batch Training of Convolutional Networks", arXiv 1708.03888, alg. 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight, size = p.norm(), update.norm()
                    ratio = group["trust"] * weight / size.clamp_min(1e-12)
                    update = update * torch.where((weight > 0) & (size > 0), ratio, 1.0)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.sub_(buffer, alpha=group["lr"])


class LAMB(torch.optim.Optimizer):
    """Adam whose step is scaled per tensor by ‖w‖ / ‖step + decay·w‖, 1 where either is zero.

    Source: You et al., "Large Batch Optimization for Deep Learning", arXiv 1904.00962, alg. 2.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group, p, m, v in _moments(self):
            update = (m / (v.sqrt() + group["eps"])).add(p, alpha=group["weight_decay"])
            weight, size = p.norm(), update.norm()
            ratio = torch.where((weight > 0) & (size > 0), weight / size.clamp_min(1e-30), 1.0)
            p.sub_(update * ratio, alpha=group["lr"])


class AdaBelief(torch.optim.Optimizer):
    """Adam with the variance of the gradient about its running mean in place of its square.

    Source: Zhuang et al., "AdaBelief Optimizer", arXiv 2010.07468, alg. 2.
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, dict(lr=lr, betas=(0.9, 0.999), eps=1e-16))

    @torch.no_grad()
    def step(self) -> None:
        for group, p, m, s in _moments(self, about_mean=True):
            p.addcdiv_(m, s.sqrt() + group["eps"], value=-group["lr"])


def _moments(
    optimizer: torch.optim.Optimizer, about_mean: bool = False
) -> Iterator[tuple[dict, Tensor, Tensor, Tensor]]:
    """(group, parameter, the unbiased running moments of its gradient: first, and second about 0 or it)."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = optimizer.state[p]
            if not state:
                state |= {"step": 0, "first": torch.zeros_like(p), "second": torch.zeros_like(p)}
            state["step"] += 1
            m, v, (first, second) = state["first"], state["second"], group["betas"]
            m.lerp_(p.grad, 1 - first)
            deviation = p.grad - m if about_mean else p.grad
            v.mul_(second).addcmul_(deviation, deviation, value=1 - second)
            if about_mean:
                v.add_(group["eps"])
            yield group, p, m / (1 - first ** state["step"]), v / (1 - second ** state["step"])


def _fused(params: list[Any]) -> bool | None:
    """One kernel for all tensors on CUDA; elsewhere torch's own choice."""
    tensors = [t for p in params for t in (p["params"] if isinstance(p, dict) else [p])]
    return True if all(t.is_cuda for t in tensors) else None


def _adam(params: list[Any], lr: float, momentum: float, wd: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, weight_decay=wd, fused=_fused(params))


# (parameters or groups, rate, momentum, weight decay) -> the optimiser
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, lr, momentum, wd: torch.optim.SGD(p, lr, momentum, weight_decay=wd, fused=_fused(p)),
    "adam": _adam,
    "adamw": _adam,
    "lars": LARS,
    "lamb": lambda p, lr, momentum, wd: LAMB(p, lr, weight_decay=wd),
}


def make_optimizer(
    name: str, params: Iterable[Any], *, lr: float, momentum: float = 0.9, wd: float = 0.0
) -> torch.optim.Optimizer:
    """An optimiser of OPTIMIZERS for tensors or torch's groups; `adam` means AdamW, as published.

    `momentum` is for sgd and lars; the weight decay `wd` is decoupled for adam.
    """
    return pick(OPTIMIZERS, name, "optimiser")(list(params), lr, momentum, wd)


def set_gradients(tensors: Iterable[Tensor], gradients: Iterable[Tensor]) -> None:
    """Hand over what torch.autograd.grad gave, in the layout of the tensors.

    As `backward` does: fused optimisers refuse a gradient that came back channels-last.
    """
    for tensor, gradient in zip(tensors, gradients, strict=True):
        same = gradient.stride() == tensor.stride()
        tensor.grad = gradient if same else torch.empty_like(tensor).copy_(gradient)


@contextlib.contextmanager
def reading_rate(optimizer: torch.optim.Optimizer, rate: Tensor) -> Iterator[None]:
    """Within the block the optimiser reads its rate from a tensor, and may be recorded as a CUDA graph."""
    kept = [dict(group) for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = rate
            if rate.is_cuda and "capturable" in group:  # fused AdamW can be recorded, but looks at the flag
                group["capturable"] = True
        yield
    finally:
        for group, before in zip(optimizer.param_groups, kept, strict=True):
            group.update(before)


def forget_steps(optimizer: torch.optim.Optimizer, in_place: bool) -> None:
    """Drop momenta and counts of steps; `in_place` they become those of before the first step."""
    if not in_place:
        optimizer.state.clear()
    for state in optimizer.state.values():
        for t in state.values():
            if isinstance(t, Tensor):
                t.zero_()


def _cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min((step - warmup) / max(1, steps - warmup), 1.0)))


# (step, steps, warm-up steps) -> factor of the learning rate
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda step, steps, warmup: 1.0,
    "linear": lambda step, steps, warmup: 1.0 + (1e-3 - 1.0) * min(step / steps, 1.0),
    "cosine": _cosine,
    "cosine_to_tenth": lambda step, steps, warmup: 0.1 + 0.9 * _cosine(step, steps, warmup),
    "tenth_at_half": lambda step, steps, warmup: 1.0 if step < steps // 2 else 0.1,
}


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, steps: int, warmup: int = 0, every: int = 1
) -> LambdaLR:
    """Learning-rate schedule of SCHEDULES over `steps` optimiser steps, stepped once after each.

    linear goes from 1 to 1e-3, cosine to 0 after `warmup` linear steps. The rate changes only once in
    `every` steps: those of an epoch, where it moves by epochs.
    """
    factor = pick(SCHEDULES, name, "schedule")
    return LambdaLR(optimizer, lambda step: factor(step // every * every, steps, warmup))
