"""Matching a student's training to an expert's: the unrolled student, its gradients, the distance.

A student starts from the expert's parameters and trains on mini-batches of the synthetic set. With
g_i the gradient of its loss at θ_i, momentum μ and weight decay w, from v_0 = 0:

    v_{i+1} = μ v_i + g_i + w θ_i        θ_{i+1} = θ_i - α v_{i+1}        i = 0 ... N-1

The loss is a normalised distance of θ_N from the expert's later parameters. Pure functions.

Sources: Cazenavette et al., "Dataset Distillation by Matching Training Trajectories",
arXiv 2203.11932, alg. 1 (μ = w = 0); Cui et al., "Scaling Up Dataset Distillation to ImageNet-1K
with Constant Memory" (TESLA), arXiv 2211.10586.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from utils.errors import UserError
from utils.precision import autocast

Parameters = Sequence[Tensor]
LossFn = Callable[[Parameters, Tensor, Tensor], Tensor]  # (parameters, x, y) -> scalar
# Makes one mini-batch (x, y) from the synthetic set: the same each time, differentiable in the set.
Batch = Callable[[], tuple[Tensor, Tensor]]
Distance = Callable[[Parameters], Tensor]  # of the student's last parameters, a scalar
Gradients = tuple[Tensor, list[Tensor], Tensor]  # loss, of each input, of the step size

# A tensor that an expert moved by less than this share of its norm has rounding for a direction,
# such as the bias of a convolution before a norm.
UNMOVED = 1e-5
_UNMOVED = "the expert moved no tensor that counts; raise --vector_weight or --head_weight"


def apply(network: nn.Module, parameters: Parameters, x: Tensor) -> Tensor:
    """Outputs (B, K) of a network with other parameters, in the order of `network.parameters()`.

    Train mode: BatchNorm normalises by the batch. The network's own parameters and buffers stay as
    they are.
    """
    state = {name: buffer.clone() for name, buffer in network.named_buffers()}
    names = (name for name, _ in network.named_parameters())
    state.update(zip(names, parameters, strict=True))
    return functional_call(network.train(), state, (x,))


def functional_loss(
    network: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], precision: str = "fp32"
) -> LossFn:
    """The loss `criterion(outputs, y)` of a network as a function of its parameters; see `apply`.

    With precision bf16 the network computes in it, the criterion and the parameters do not.
    """

    def loss(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        with autocast(precision, x.device):
            outputs = apply(network, parameters, x)
        return criterion(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), y)

    return loss


def advance(
    theta: Parameters,
    gradient: Parameters,
    velocity: Parameters | None,
    lr: Tensor,
    momentum: float,
    wd: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """One step of SGD, differentiable: the next parameters and velocity (None: at rest)."""
    direction = [g + wd * p for g, p in zip(gradient, theta, strict=True)] if wd else list(gradient)
    if velocity is not None and momentum:
        direction = [momentum * v + d for v, d in zip(velocity, direction, strict=True)]
    return [p - lr * v for p, v in zip(theta, direction, strict=True)], direction


def unroll(
    loss_fn: LossFn,
    start: Parameters,
    batches: Sequence[Batch],
    lr: Tensor,
    momentum: float = 0.0,
    wd: float = 0.0,
) -> list[Tensor]:
    """θ_N after a step on each batch, differentiable in the set and in `lr` through all steps.

    `start` are N_p tensors θ_0 in the order that `loss_fn` takes; memory grows with the steps.
    """
    theta = [p.detach().requires_grad_() for p in start]
    velocity = None
    for make in batches:
        gradient = torch.autograd.grad(loss_fn(theta, *make()), theta, create_graph=True)
        theta, velocity = advance(theta, gradient, velocity, lr, momentum, wd)
    return theta


def full_gradients(
    loss_fn: LossFn,
    start: Parameters,
    batches: Sequence[Batch],
    distance: Distance,
    inputs: Sequence[Tensor],
    lr: Tensor,
    momentum: float = 0.0,
    wd: float = 0.0,
) -> Gradients:
    """The loss `distance(θ_N)` and its gradients, from one graph of all steps.

    Args:
        loss_fn: the student's loss.
        start: θ_0, one tensor per parameter.
        batches: mini-batches, one a step.
        distance: what is minimised.
        inputs: leaves with requires_grad that the batches are made of: images, targets.
        lr: α, a scalar leaf with requires_grad.
        momentum: μ.
        wd: w.

    Returns:
        The detached loss, the gradient of each input, the gradient of α.
    """
    loss = distance(unroll(loss_fn, start, batches, lr, momentum, wd))
    *of_inputs, of_lr = torch.autograd.grad(loss, [*inputs, lr], materialize_grads=True)
    return loss.detach(), of_inputs, of_lr


def stepwise_gradients(
    loss_fn: LossFn,
    start: Parameters,
    batches: Sequence[Batch],
    distance: Distance,
    inputs: Sequence[Tensor],
    lr: Tensor,
    momentum: float = 0.0,
    wd: float = 0.0,
    *,
    exact: bool = True,
) -> Gradients:
    """Like `full_gradients`, but only one step's graph lives at a time: N parameter vectors are kept.

    The steps are run once without a graph to the set, then back from the last one: at θ_i the
    student's gradient is taken again and multiplied by the adjoint ∂L/∂v_{i+1}.

    `exact=False` is TESLA's gradient: it leaves out how g_i depends on θ_i and by it on earlier
    batches, as if every θ_i were a constant. With μ = w = 0 it is the published formula

        ∂L/∂X_i = 2/D · ∂/∂X_i ⟨α (θ* - θ_0) + α² G, g_i⟩,   G = Σ g_i,   D = ‖θ_0 - θ*‖²

    The factor 2 is in it; TESLA's released code loses it.
    """
    rate, theta, velocity = lr.detach(), [p.detach() for p in start], None
    kept = []
    for make in batches:
        theta = [p.requires_grad_() for p in theta]
        with torch.no_grad():
            x, y = make()
        gradient = torch.autograd.grad(loss_fn(theta, x, y), theta)
        with torch.no_grad():
            after, velocity = advance(theta, gradient, velocity, rate, momentum, wd)
        kept.append((make, theta, velocity))
        theta = after
    end = [p.requires_grad_() for p in theta]
    loss = distance(end)
    of_theta = list(torch.autograd.grad(loss, end, materialize_grads=True))  # ∂L/∂θ_{i+1}
    of_velocity = [torch.zeros_like(p) for p in end]  # what reaches v_{i+1} from later velocities
    of_inputs, of_lr = [torch.zeros_like(t) for t in inputs], torch.zeros_like(rate)
    while kept:
        make, theta, velocity = kept.pop()
        of_lr -= sum((a * v).sum() for a, v in zip(of_theta, velocity, strict=True))
        adjoint = [b - rate * a for b, a in zip(of_velocity, of_theta, strict=True)]  # ∂L/∂v_{i+1}
        gradient = torch.autograd.grad(loss_fn(theta, *make()), theta, create_graph=True)
        wanted = [*inputs, *theta] if exact and kept else list(inputs)  # θ_0 is given
        live = [(g, a) for g, a in zip(gradient, adjoint, strict=True) if g.requires_grad]
        outputs, weights = zip(*live, strict=True)
        found = torch.autograd.grad(outputs, wanted, weights, materialize_grads=True)
        for total, part in zip(of_inputs, found, strict=False):
            total += part
        through = found[len(inputs) :] or [0.0] * len(theta)
        of_theta = [a + wd * b + h for a, b, h in zip(of_theta, adjoint, through, strict=True)]
        of_velocity = [momentum * b for b in adjoint]
    return loss.detach(), of_inputs, of_lr


tesla_gradients = functools.partial(stepwise_gradients, exact=False)  # every θ_i is a constant

UNROLLS: dict[str, Callable[..., Gradients]] = {
    "full": full_gradients,
    "checkpoint": stepwise_gradients,
    "tesla": tesla_gradients,
}


def layer_distance(end: Parameters, start: Parameters, goal: Parameters, weights: Sequence[float]) -> Tensor:
    """Weighted mean over tensors of ‖end - goal‖² / ‖start - goal‖², each with its own denominator.

    Tensors that the expert did not move are left out.
    """
    apart = torch.stack([(e - g).square().sum() for e, g in zip(end, goal, strict=True)])
    moved = torch.stack([(s - g).square().sum() for s, g in zip(start, goal, strict=True)])
    known = torch.stack([s.square().sum() for s in start])
    used = moved > UNMOVED**2 * known
    share = torch.where(used, torch.tensor(weights, dtype=moved.dtype, device=moved.device), 0.0)
    if not share.any():  # the only wait for the device
        raise UserError(_UNMOVED)
    return (share * apart / torch.where(used, moved, 1.0)).sum() / share.sum()


def matching_distance(
    end: Parameters, start: Parameters, goal: Parameters, weights: Sequence[float] | None = None
) -> Tensor:
    """‖end - goal‖² / ‖start - goal‖² of all parameters together, their squares weighted by tensor."""
    weights = [1.0] * len(end) if weights is None else weights
    after, before = (
        sum(w * (p - g).square().sum() for p, g, w in zip(side, goal, weights, strict=True) if w)
        for side in (end, start)
    )
    if not before > 0:
        raise UserError(_UNMOVED)
    return after / before


# How far a student's end is from the expert's goal, relative to the distance of the start: three lists of
# tensors of the same shapes and a weight >= 0 for each -> a scalar >= 0, differentiable in the first; a
# UserError where the expert did not move. "whole" is MTT's: the larger tensors, such as a wide head, make
# most of it.
DISTANCES: dict[str, Callable[[Parameters, Parameters, Parameters, Sequence[float]], Tensor]] = {
    "whole": matching_distance,
    "layer": layer_distance,
}


def tensor_weights(network: nn.Module, vector: float = 1.0, head: float = 1.0) -> list[float]:
    """A weight for each of `network.parameters()`: `vector` for biases and norms, `head` for the head.

    A head's bias gets the product; `head=0` matches the body alone.
    """
    own = {id(p) for p in network.head.parameters()}
    return [(vector if p.dim() < 2 else 1.0) * (head if id(p) in own else 1.0) for p in network.parameters()]
