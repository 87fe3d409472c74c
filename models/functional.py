"""Networks as functions of their parameters, for gradients through training."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from utils.precision import autocast

Parameters = Sequence[Tensor]
LossFn = Callable[[Parameters, Tensor, Tensor], Tensor]  # (parameters, x, y) -> scalar


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
