"""BatchNorm as part of the convolution before it, where it is a fixed affine map.

In eval mode BatchNorm computes s·x + t with s = γ/√(σ² + ε) and t = β - s·μ, so that
BN(w * x + b) = (s·w) * x + s·b + t: one pass over the feature map less, forward and backward.
Values change by float rounding only.
"""

import copy
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether `norm` is a BatchNorm2d that is a fixed affine map, and `conv` a plain convolution.

    Not so if its parameters need a gradient or either module has a forward hook.
    """
    if not (isinstance(norm, nn.BatchNorm2d) and type(conv) is nn.Conv2d):
        return False
    if norm.training or norm.running_mean is None or norm.weight is None:
        return False
    if norm._forward_hooks or conv._forward_hooks or conv.padding_mode != "zeros":
        return False
    return not (torch.is_grad_enabled() and (norm.weight.requires_grad or norm.bias.requires_grad))


def folded_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """`norm(conv(x))` of (B, C, H, W) in one convolution, where `can_fold` holds.

    Gradients reach x and the convolution's parameters.
    """
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@torch.no_grad()
def fold_frozen(model: nn.Module, sample: Tensor) -> nn.Module:
    """A copy of a frozen eval-mode network, BatchNorm that directly follows a convolution folded.

    Which follows which is observed on `sample`, (B, C, H, W) on its device. Where nothing can be
    folded or the copy computes something else, it is the network itself.
    """
    made: dict[int, tuple[str, Tensor]] = {}  # id of a tensor -> convolution; kept, so ids are unique
    pairs: dict[str, str] = {}  # BatchNorm -> convolution

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if type(module) is nn.Conv2d:
                made[id(output)] = name, output
            elif id(inputs[0]) in made:
                pairs[name] = made[id(inputs[0])][0]

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for name, module in modules.items():
            if type(module) is nn.Conv2d or isinstance(module, nn.BatchNorm2d):
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        wanted = model(sample)
    pairs = {norm: conv for norm, conv in pairs.items() if can_fold(modules[conv], modules[norm])}
    if not pairs or len(set(pairs.values())) < len(pairs):
        return model
    folded = copy.deepcopy(model)
    for norm, conv in pairs.items():
        fused = fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(norm))
        folded.set_submodule(conv, fused)
        folded.set_submodule(norm, nn.Identity())
    folded.requires_grad_(False)
    return folded if torch.allclose(folded(sample), wanted, rtol=1e-3, atol=1e-4) else model
