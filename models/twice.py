"""BatchNorm and instance norm whose gradient can be differentiated cheaply, for unrolled trainings.

PyTorch composes the second derivative of its norms of some hundred elementwise operations, on a CPU half of
the time of an unrolled training. Output and gradient here are PyTorch's own (on a CPU bit for bit); only the
gradient of the gradient is computed by its formula, in a few passes.

With x̂ = (x - μ) r over N values, r = 1/√(σ² + ε), and the cotangent g of the output, the gradient is

    ∂x = γ r (g - a - b x̂)     ∂γ = Σ g x̂     ∂β = Σ g     a = mean(g), b = mean(g x̂)

With cotangents u, v, w of these three, c = mean(u), d = mean(u x̂), e = mean(u g), its own gradient is

    of g:  γ r (u - c - d x̂) + v x̂ + w
    of x:  r (v - γ r d) (g - a - b x̂) - γ r² b (u - c - d x̂) - γ r² (e - a c - b d) x̂
    of γ:  N r (e - a c - b d)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ALL = (True, True, True)  # gradients of the map, the scale and the shift


class _Norm(torch.autograd.Function):
    """BatchNorm by the statistics of the batch: map (B, C, H, W), scale and shift (C,) -> map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *_NormBackward.apply(g, *ctx.saved_tensors, ctx.eps), None


class _NormBackward(torch.autograd.Function):
    """The gradient of `_Norm`; its mean and 1/√(σ² + ε) (C,) are functions of the map here, no inputs."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, x, weight, mean, scale)
        backward = torch.ops.aten.native_batch_norm_backward
        return backward(g, x, weight, None, None, mean, scale, True, eps, _ALL)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mu, r = ctx.saved_tensors
        if x.dtype in (torch.bfloat16, torch.float16):
            g, x, u = g.float(), x.float(), u.float()
        count = x.numel() // len(weight)
        a, c, e = (t.sum((0, 2, 3)) / count for t in (g, u, u * g))
        b, d = (((t * x).sum((0, 2, 3)) / count - m * mu) * r for t, m in ((g, a), (u, c)))
        apart, scaled = e - a * c - b * d, weight * r
        by_x = r * (v - scaled * d)  # in the gradient of g; of g in that of x
        of_g = _combined(w - scaled * c - by_x * mu, (u, scaled), (x, by_x))
        by_g, by_u = by_x, -scaled * r * b
        by_x = -(by_g * b + by_u * d + scaled * r * apart) * r
        of_x = _combined(-(by_g * a + by_u * c + by_x * mu), (g, by_g), (u, by_u), (x, by_x))
        return of_g, of_x, count * r * apart, None, None, None


def _combined(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of maps (B, C, H, W), each times a factor (C,), and a constant (C,)."""
    total = constant[:, None, None]
    for term, factor in terms:
        total = torch.addcmul(total, term, factor[:, None, None])
    return total


class _BatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        F._verify_batch_size(x.size())
        return _Norm.apply(x, self.weight, self.bias, self.eps)


class _InstanceNorm2d(nn.InstanceNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        F._verify_spatial_size(x.size())
        count, channels, *size = x.shape
        scale, shift = self.weight.repeat(count), self.bias.repeat(count)
        maps = x.contiguous().view(1, count * channels, *size)
        return _Norm.apply(maps, scale, shift, self.eps).view(x.shape)


def twice_differentiable(network: nn.Module) -> nn.Module:
    """The same network, its norms with a cheap gradient of their gradient.

    In training mode BatchNorm leaves its running statistics as they are. GroupNorm and LayerNorm stay
    PyTorch's.
    """
    for module in network.modules():
        if type(module) is nn.BatchNorm2d and module.affine:
            module.__class__ = _BatchNorm2d
        elif type(module) is nn.InstanceNorm2d and module.affine and not module.track_running_stats:
            module.__class__ = _InstanceNorm2d
    return network
