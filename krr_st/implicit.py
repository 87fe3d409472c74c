"""Outer gradients of a pool network's own error, by implicit differentiation.

A network θ of the pool was trained on the set X. With the loss l(θ, X) of its outputs on the set and L(θ)
on real images, both the mean squared error of the target model's features,

    dL/dX = -∂/∂X ⟨∂l/∂θ, v⟩,    (∂²l/∂θ² + δI) v = ∂L/∂θ,

as if θ were where training ends. A few steps of conjugate gradients give v.

Sources: Loo et al., "Dataset Distillation with Convexified Implicit Gradients", arXiv 2302.06755, where the
network is linearised; Lorraine et al., "Optimizing Millions of Hyperparameters by Implicit
Differentiation", arXiv 1911.02590.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from krr_st.config import TrainFlags
from models.functional import functional_loss

STEPS, DAMPING = 4, 1e-2  # of conjugate gradients; δ

Vector = Sequence[Tensor]  # one part for each parameter


def implicit_gradients(flags: TrainFlags, learned: list[Tensor]) -> Callable[..., list[Tensor]]:
    """A function (network, X_s, Y_s, real images, their targets) -> L, and its gradients on `learned`."""

    def gradients(model: nn.Module, x_syn: Tensor, y_syn: Tensor, x: Tensor, y_real: Tensor) -> list[Tensor]:
        loss_fn = functional_loss(model, mse_loss, flags.precision)
        theta = [p.detach().requires_grad_() for p in model.parameters()]
        loss = loss_fn(theta, x, y_real)
        of_loss = torch.autograd.grad(loss, theta)
        inner = torch.autograd.grad(loss_fn(theta, x_syn, y_syn), theta, create_graph=True)

        def product(v: Vector) -> Vector:
            found = torch.autograd.grad(inner, theta, v, retain_graph=True, materialize_grads=True)
            return torch._foreach_add(found, v, alpha=DAMPING)

        v = conjugate_gradients(product, of_loss, STEPS)
        return [loss.detach(), *torch.autograd.grad(inner, learned, torch._foreach_neg(v))]

    return gradients


def conjugate_gradients(product: Callable[[Vector], Vector], b: Vector, steps: int) -> Vector:
    """Solve A v = b roughly: v after `steps` from 0, where `product` gives A v of a symmetric matrix A.

    From a direction of negative curvature on v stays as it is. Nothing waits for the device.
    """
    v, rest, direction = torch._foreach_mul(b, 0.0), b, b
    size = _dot(rest, rest)
    convex = torch.ones_like(size, dtype=torch.bool)
    for _ in range(steps):
        image = product(direction)
        curvature = _dot(direction, image)
        convex = convex & (curvature > 0)
        step = torch.where(convex, size / curvature, 0.0)
        v = torch._foreach_add(v, torch._foreach_mul(direction, step))
        rest = torch._foreach_sub(rest, torch._foreach_mul(image, step))
        size, before = _dot(rest, rest), size
        turn = torch.where(before > 0, size / before, 0.0)
        direction = torch._foreach_add(rest, torch._foreach_mul(direction, turn))
    return v


def _dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()
