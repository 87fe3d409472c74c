"""BatchNorm, ReLU and 2x2 average pooling in one pass over the feature map, forward and backward, on CUDA.

After a convolution torch reads and writes the map once for the bias, twice for BatchNorm, once for ReLU
and reads it for the pooling; at batches of 1000 these passes take longer than the convolutions. Here,
forward, the map is read once (twice with batch statistics) and only the pooled one is written. Arithmetic
is in float32, maps are channels-last in float32, bfloat16 or float16. Gradients are of first order alone.
"""

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import fused_images
from utils.errors import first_line
from utils.memory import is_out_of_memory

try:
    import triton
    import triton.language as tl
except ImportError:  # not on a Mac, nor with torch's builds for CPUs
    triton = None

_PIXELS, _CHANNELS = 16, 128  # of a block of the pooled map
_ROWS, _PROGRAMS = 32, 528  # pixels a block of a reduction; four for each multiprocessor of an H100 share it
_WARPS = 4
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on a CPU, for tests


def fusable(layers: list[nn.Module], x: Tensor) -> bool:
    """Whether the next four layers are convolution, BatchNorm, ReLU and pooling that `fused` can compute.

    With fixed statistics their parameters may not need a gradient.
    """
    if triton is None or len(layers) < 4 or torch.compiler.is_compiling():
        return False
    if not (x.is_cuda or _INTERPRETED) or x.dtype == torch.float64:
        return False
    conv, norm, act, pool = layers = layers[:4]
    if not (type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and type(act) is nn.ReLU):
        return False
    if not isinstance(pool, nn.AvgPool2d) or pool.divisor_override is not None:
        return False
    if (pool.kernel_size, pool.stride, pool.padding) != (2, 2, 0):
        return False
    if norm.running_mean is None or norm.weight is None or norm.momentum is None:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or conv.groups != 1:
        return False
    sides = [n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], conv.padding, conv.kernel_size, strict=True)]
    if not conv.stride == conv.dilation == (1, 1) or any(side % 2 for side in sides):
        return False
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return False
    parameters = conv.weight, conv.bias, norm.weight, norm.bias
    learned = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
    return (norm.training or not learned) and _compiles(x.device)


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Whether Triton can make kernels for a device; says so where not: without a C compiler, say."""
    y, one = torch.ones(1, 1, 2, 2, device=device), torch.ones(1, device=device)
    try:
        _pooled(y.contiguous(memory_format=torch.channels_last), one, one)
    except Exception as error:  # whatever a compiler raises
        if is_out_of_memory(error):
            raise
        print(f"warning: no fused kernels on {device} ({first_line(error)}); continuing without", flush=True)
        return False
    return True


def fused(layers: list[nn.Module], x: Tensor) -> Tensor:
    """`pool(relu(norm(conv(x))))` of (B, C, H, W), where `fusable` holds; moves the running statistics."""
    conv, norm = layers[0], layers[1]
    images = fused_images.takes_images(conv, x, norm.training)
    if not norm.training:  # the bias of the convolution is part of the shift
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        shift = norm.bias - mean * scale
        if images:
            return _AffineOfImages.apply(x, fused_images.packed(conv.weight), scale, shift)
        return _Affine.apply(_convolved(conv, x), scale, shift)
    parameters = conv.bias, norm.weight, norm.bias, norm.eps
    if images:
        out, mean, var = _NormOfImages.apply(x, conv.weight, *parameters)
    else:
        out, mean, var = _Norm.apply(_convolved(conv, x), *parameters)
    with torch.no_grad():
        count = 4 * out.numel() / out.shape[1]
        norm.running_mean.lerp_(mean if conv.bias is None else mean + conv.bias, norm.momentum)
        norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
    return out


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution without its bias, channels-last."""
    y = F.conv2d(x, conv.weight, None, padding=conv.padding)
    return y.contiguous(memory_format=torch.channels_last)


class _Affine(torch.autograd.Function):
    """pool(relu(scale * y + shift)) with a scale and a shift (C,) for each channel of y (B, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(y, scale, shift)
        return _pooled(y, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, scale, shift = ctx.saved_tensors
        nothing = torch.zeros_like(scale)
        return _unpooled(_last(grad), y, scale, shift, nothing, nothing), None, None


class _AffineOfImages(torch.autograd.Function):
    """The same of a convolution of images, with weights as fused_images has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, scale, shift)
        return fused_images.pooled(x, weights, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return fused_images.image_gradient(_last(grad), *ctx.saved_tensors), None, None, None


class _Norm(torch.autograd.Function):
    """pool(relu(batch norm(y))), mean and biased variance of the batch; a bias before it has no effect."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, conv_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _moments(y)
        scale, shift, rstd = _standardising(mean, var, weight, bias, eps)
        ctx.save_for_backward(y, scale, shift, mean, rstd)
        ctx.biased = conv_bias is not None
        ctx.mark_non_differentiable(mean, var)
        return _pooled(y, scale, shift), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, shift, mean, rstd = ctx.saved_tensors
        grad, count = _last(grad), y.numel() // y.shape[1]
        d_bias, d_weight = _gradient_sums(grad, y, scale, shift, mean, rstd)
        line = _line(d_bias, d_weight, scale, mean, rstd, count)
        d_y = _unpooled(grad, y, scale, shift, *line)
        return d_y, torch.zeros_like(d_bias) if ctx.biased else None, d_weight, d_bias, None


class _NormOfImages(torch.autograd.Function):
    """The same of a convolution of images, which get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = fused_images.packed(conv_weight)
        mean, var = fused_images.moments(x, weights)
        scale, shift, rstd = _standardising(mean, var, weight, bias, eps)
        ctx.save_for_backward(x, weights, scale, shift, mean, rstd)
        ctx.biased = conv_bias is not None
        ctx.mark_non_differentiable(mean, var)
        return fused_images.pooled(x, weights, scale, shift), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, scale, shift, mean, rstd = ctx.saved_tensors
        grad, given = _last(grad), (x, weights, scale, shift)
        d_bias, d_weight = fused_images.gradient_sums(grad, *given, mean, rstd)
        line = _line(d_bias, d_weight, scale, mean, rstd, x.numel() // x.shape[1])
        d_conv = fused_images.weight_gradient(grad, *given, *line)
        return None, d_conv, torch.zeros_like(d_bias) if ctx.biased else None, d_weight, d_bias, None


def _standardising(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift (C,) that batch norm amounts to, and 1 / deviation."""
    rstd = torch.rsqrt(var + eps)
    scale = weight * rstd
    return scale, bias - mean * scale, rstd


def _line(
    d_bias: Tensor, d_weight: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Slope and offset (C,) of what batch statistics take from the gradient of y.

    dL/dy = scale (dz - mean(dz) - xhat mean(dz xhat)) = scale dz - (slope y + offset), as
    xhat = (y - mean) rstd, and sums of dz and dz xhat over `count` pixels are those of bias and weight.
    """
    slope = scale * rstd * d_weight / count
    return slope, scale * d_bias / count - slope * mean


def _last(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last)


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of y (B, C, H, W)."""
    rows, channels = y.numel() // y.shape[1], y.shape[1]
    origin = y[0, :, y.shape[2] // 2, y.shape[3] // 2].float()  # of all differences: small sums of squares
    partial = torch.empty(_PROGRAMS, 2, channels, dtype=torch.float32, device=y.device)
    grid = (_PROGRAMS, triton.cdiv(channels, _CHANNELS))
    _statistics_kernel[grid](y, origin, partial, rows, channels, _ROWS, _CHANNELS, num_warps=_WARPS)
    first, second = partial.sum(0) / rows
    return origin + first, second - first.square()


def _gradient_sums(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Sums (2, C) of dz, the gradient before ReLU, and of dz times the normalised map."""
    rows, channels = y.numel() // y.shape[1], y.shape[1]
    partial = torch.empty(_PROGRAMS, 2, channels, dtype=torch.float32, device=y.device)
    grid, blocks = (_PROGRAMS, triton.cdiv(channels, _CHANNELS)), (_ROWS // 4, _CHANNELS)
    given = grad, y, scale, shift, mean, rstd, partial
    _gradient_sums_kernel[grid](*given, rows // 4, y.shape[3] // 2, channels, *blocks, num_warps=_WARPS)
    return partial.sum(0)


def _pooled(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    b, c, h, w = y.shape
    shape, how = (b, c, h // 2, w // 2), {"memory_format": torch.channels_last}
    out = torch.empty(shape, dtype=y.dtype, device=y.device, **how)
    pixels = b * (h // 2) * (w // 2)
    grid = (triton.cdiv(pixels, _PIXELS), triton.cdiv(c, _CHANNELS))
    _forward_kernel[grid](y, scale, shift, out, pixels, w // 2, c, _PIXELS, _CHANNELS, num_warps=_WARPS)
    return out


def _unpooled(grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Gradient with respect to y: scale dz - (slope y + offset)."""
    b, c, h, w = y.shape
    d_y = torch.empty_like(y)
    pixels = b * (h // 2) * (w // 2)
    grid = (triton.cdiv(pixels, _PIXELS), triton.cdiv(c, _CHANNELS))
    _backward_kernel[grid](
        grad, y, scale, shift, slope, offset, d_y, pixels, w // 2, c, _PIXELS, _CHANNELS, num_warps=_WARPS
    )
    return d_y


if triton is not None:
    from models.fused_images import pixel_gradient, store_sums, vector

    @triton.jit
    def _offsets(pixel, width, channels, channel, i: tl.constexpr, j: tl.constexpr):
        """Where pixel (i, j) of the 2x2 block of a pooled pixel is, of a map twice as wide and high."""
        row, column = pixel // width, pixel % width
        at = (2 * row + i).to(tl.int64) * (2 * width) + 2 * column + j
        return at[:, None] * channels + channel[None, :]

    @triton.jit
    def _forward_kernel(
        y, scale, shift, out, pixels, width, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
    ):
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        s = vector(scale, channel, channels)
        t = vector(shift, channel, channels)
        total = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                value = tl.load(y + _offsets(pixel, width, channels, channel, i, j), inside, 0.0)
                total += tl.maximum(value.to(tl.float32) * s + t, 0.0)
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(out + at, (total * 0.25).to(out.dtype.element_ty), inside)

    @triton.jit
    def _backward_kernel(
        grad, y, scale, shift, slope, offset, d_y, pixels, width, channels,
        PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        s = vector(scale, channel, channels)
        t = vector(shift, channel, channels)
        a = vector(slope, channel, channels)
        b = vector(offset, channel, channels)
        g = pixel_gradient(grad, pixel, pixels, channel, channels) * s
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                place = _offsets(pixel, width, channels, channel, i, j)
                value = tl.load(y + place, inside, 0.0).to(tl.float32)
                found = tl.where(value * s + t > 0, g, 0.0) - (value * a + b)
                tl.store(d_y + place, found.to(d_y.dtype.element_ty), inside)

    @triton.jit
    def _statistics_kernel(y, origin, partial, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
        """Sums, and sums of squares, of the differences from `origin`; of each program's rows."""
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        zero = vector(origin, channel, channels)
        first = tl.zeros((ROWS, CHANNELS), tl.float32)
        second = tl.zeros((ROWS, CHANNELS), tl.float32)
        for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & (channel < channels)[None, :]
            at = row.to(tl.int64)[:, None] * channels + channel[None, :]
            value = tl.load(y + at, inside, 0.0).to(tl.float32) - zero
            value = tl.where(inside, value, 0.0)
            first += value
            second += value * value
        store_sums(first, second, partial, channel, channels)

    @triton.jit
    def _gradient_sums_kernel(
        grad, y, scale, shift, mean, rstd, partial, pixels, width, channels,
        PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """Sums of dz, the gradient before ReLU, and of dz times the normalised map."""
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        s = vector(scale, channel, channels)
        t = vector(shift, channel, channels)
        m = vector(mean, channel, channels)
        r = vector(rstd, channel, channels)
        first = tl.zeros((PIXELS, CHANNELS), tl.float32)
        second = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for start in range(tl.program_id(0) * PIXELS, pixels, tl.num_programs(0) * PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
            g = pixel_gradient(grad, pixel, pixels, channel, channels)
            for i in tl.static_range(2):
                for j in tl.static_range(2):
                    place = _offsets(pixel, width, channels, channel, i, j)
                    value = tl.load(y + place, inside, 0.0).to(tl.float32)
                    d_z = tl.where(value * s + t > 0, g, 0.0)
                    first += d_z
                    second += d_z * (value - m) * r
        store_sums(first, second, partial, channel, channels)
