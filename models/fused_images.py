"""The first block of a ConvNet on CUDA in bf16, convolution included: its large feature map is never written.

Of 1 or 3 channels a 3x3 convolution is a product with 9 or 27 numbers a pixel: cheaper to compute again in
each pass than to write and read its result, and cuDNN is slow at it (a third of a whole step of KRR-ST).
Convolution, BatchNorm, ReLU and 2x2 average pooling are one kernel forward; backward, kernels lead from the
gradient of the pooled map to that of the images or of the weights. Operands are rounded to bfloat16 as under
autocast; sums, and what is between the layers, are float32.

Arguments that all share: images x (B, C_in, H, W), weights as `packed`, and for each of the C channels a
scale and a shift, which stand for BatchNorm.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # not on a Mac, nor with torch's builds for CPUs
    triton = None

_MOST_CHANNELS = 512  # one block holds them all
OPERANDS = torch.bfloat16  # of the products
TAPS = 32  # numbers of a patch, 9 a channel, filled up with zeros
# Pooled pixels and channels of a block, and pixels of one with all channels: on an H100 the fastest.
_PIXELS, _CHANNELS, _NARROW = 32, 128, 16
_FOLDED = 256  # pixels of a block of images
_PROGRAMS = 528  # share a reduction: four for each multiprocessor of an H100
_WARPS = 4


def takes_images(conv: nn.Conv2d, x: Tensor, training: bool) -> bool:
    """Whether a convolution that models.fused can compute is one for these kernels.

    In training there is no gradient of the images.
    """
    if conv.in_channels * 9 > TAPS or conv.kernel_size != (3, 3) or conv.padding != (1, 1):
        return False
    if conv.out_channels > _MOST_CHANNELS or (x.is_cuda and not _takes_bf16(x.device)):
        return False
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return autocast and not (training and x.requires_grad)


@functools.cache
def _takes_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def packed(weight: Tensor) -> Tensor:
    """(C, C_in, 3, 3) -> (C, TAPS), rounded."""
    flat = weight.detach().flatten(1)
    return F.pad(flat, (0, TAPS - flat.shape[1])).to(OPERANDS)


def moments(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of the convolution's result over the batch."""
    h, w = x.shape[2] // 2, x.shape[3] // 2
    patch = x[0, :, h - 1 : h + 2, w - 1 : w + 2].flatten().float()
    origin = weights[:, : len(patch)].float().mv(patch)  # of all differences: small sums of squares
    partial = _partial(x, weights, 2)
    _launch(_statistics, x, weights, origin, partial, programs=_PROGRAMS)
    first, second = partial.sum(0) / (x.numel() // x.shape[1])
    return origin + first, second - first.square()


def pooled(x: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """pool(relu(scale * conv(x) + shift)), (B, C, H / 2, W / 2) in bfloat16, channels-last."""
    shape, how = (len(x), len(weights), x.shape[2] // 2, x.shape[3] // 2), torch.channels_last
    out = torch.empty(shape, dtype=torch.bfloat16, device=x.device, memory_format=how)
    _launch(_forward, x, weights, scale, shift, out)
    return out


def gradient_sums(
    grad: Tensor, x: Tensor, weights: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Sums (2, C) of dz, the gradient before ReLU, and of dz times the normalised map."""
    partial = _partial(x, weights, 2)
    _launch(_gradient_sums, x, weights, grad, scale, shift, mean, rstd, partial, programs=_PROGRAMS)
    return partial.sum(0)


def weight_gradient(
    grad: Tensor, x: Tensor, weights: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """Gradient (C, C_in, 3, 3) of the weights; that of the map y is scale dz - (slope y + offset)."""
    partial = _partial(x, weights, TAPS)
    _launch(_weight_gradient, x, weights, grad, scale, shift, slope, offset, partial, programs=_PROGRAMS)
    flat = partial.sum(0)[: 9 * x.shape[1]].mT
    return flat.reshape(len(weights), x.shape[1], 3, 3)


def image_gradient(grad: Tensor, x: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Gradient of the images, in their layout."""
    columns = torch.empty(x.numel() // x.shape[1], TAPS, dtype=OPERANDS, device=x.device)
    _launch(_columns, x, weights, grad, scale, shift, columns, whole=True)
    out, (b, c, h, w) = torch.empty_like(x), x.shape
    grid = (triton.cdiv(b * h * w, _FOLDED),)
    _fold[grid](columns, out, b * h * w, h, w, *out.stride(), c, TAPS, _FOLDED)
    return out


def _partial(x: Tensor, weights: Tensor, count: int) -> Tensor:
    return torch.empty(_PROGRAMS, count, len(weights), dtype=torch.float32, device=x.device)


def _launch(
    kernel: Any, x: Tensor, weights: Tensor, *rest: Tensor, programs: int = 0, whole: bool = False
) -> None:
    """A program for each block of pixels, or `programs` that share them; and of channels, unless `whole`."""
    b, c_in, h, w = x.shape
    pixels, channels = b * (h // 2) * (w // 2), len(weights)
    wide = max(16, triton.next_power_of_2(channels))
    block = (_NARROW, wide) if whole else (_PIXELS, _CHANNELS)
    grid = programs or triton.cdiv(pixels, block[0]), triton.cdiv(channels, block[1])
    shape = pixels, h // 2, w // 2, *x.stride(), channels, c_in, TAPS, *block
    kernel[grid](x, weights, *rest, *shape, num_warps=_WARPS)


if triton is not None:

    @triton.jit
    def vector(values, channel, channels):
        """A number of each channel, in a row."""
        return tl.load(values + channel, channel < channels, 0.0)[None, :]

    @triton.jit
    def pixel_gradient(grad, pixel, pixels, channel, channels):
        """That of each pixel under a pooled one."""
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        return tl.load(grad + at, inside, 0.0).to(tl.float32) * 0.25

    @triton.jit
    def store_sums(first, second, partial, channel, channels):
        """Two sums over the pixels of this program, into its rows of (programs, 2, channels)."""
        here = partial + tl.program_id(0) * 2 * channels + channel
        tl.store(here, tl.sum(first, 0), channel < channels)
        tl.store(here + channels, tl.sum(second, 0), channel < channels)

    @triton.jit
    def _patches(
        x, weights, pixel, pixels, height, width, sb, sc, sh, sw,
        C_IN: tl.constexpr, TAPS: tl.constexpr, i: tl.constexpr, j: tl.constexpr,
    ):  # fmt: skip
        """What the convolution sees at pixel (i, j) of the 2x2 block of each pooled pixel."""
        tap = tl.arange(0, TAPS)
        channel, down, right = tap // 9, (tap % 9) // 3 - 1, tap % 3 - 1
        row, column = pixel // width, pixel % width
        image = row // height
        h = (2 * (row % height) + i)[:, None] + down[None, :]
        w = (2 * column + j)[:, None] + right[None, :]
        inside = (h >= 0) & (h < 2 * height) & (w >= 0) & (w < 2 * width)
        inside = inside & (pixel < pixels)[:, None] & (channel < C_IN)[None, :]
        at = image.to(tl.int64)[:, None] * sb + channel[None, :] * sc + h * sh + w * sw
        return tl.load(x + at, inside, 0.0).to(weights.dtype.element_ty)

    @triton.jit
    def _weights(weights, channel, channels, TAPS: tl.constexpr):
        """(TAPS, channels) of a block."""
        at = channel[None, :] * TAPS + tl.arange(0, TAPS)[:, None]
        return tl.load(weights + at, (channel < channels)[None, :], 0.0)

    @triton.jit
    def _forward(
        x, weights, scale, shift, out, pixels, height, width, sb, sc, sh, sw, channels,
        C_IN: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        taps = _weights(weights, channel, channels, TAPS)
        s, t = vector(scale, channel, channels), vector(shift, channel, channels)
        total = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                patch = _patches(x, weights, pixel, pixels, height, width, sb, sc, sh, sw, C_IN, TAPS, i, j)
                total += tl.maximum(tl.dot(patch, taps) * s + t, 0.0)
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        tl.store(out + at, (total * 0.25).to(out.dtype.element_ty), inside)

    @triton.jit
    def _statistics(
        x, weights, origin, partial, pixels, height, width, sb, sc, sh, sw, channels,
        C_IN: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """Sums, and sums of squares, of the differences from `origin`; of each program's pixels."""
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        taps, zero = _weights(weights, channel, channels, TAPS), vector(origin, channel, channels)
        first = tl.zeros((PIXELS, CHANNELS), tl.float32)
        second = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for start in range(tl.program_id(0) * PIXELS, pixels, tl.num_programs(0) * PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            for i in tl.static_range(2):
                for j in tl.static_range(2):
                    patch = _patches(
                        x, weights, pixel, pixels, height, width, sb, sc, sh, sw, C_IN, TAPS, i, j
                    )
                    value = tl.where((pixel < pixels)[:, None], tl.dot(patch, taps) - zero, 0.0)
                    first += value
                    second += value * value
        store_sums(first, second, partial, channel, channels)

    @triton.jit
    def _gradient_sums(
        x, weights, grad, scale, shift, mean, rstd, partial, pixels, height, width, sb, sc, sh, sw, channels,
        C_IN: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        taps = _weights(weights, channel, channels, TAPS)
        s, t = vector(scale, channel, channels), vector(shift, channel, channels)
        m, r = vector(mean, channel, channels), vector(rstd, channel, channels)
        first = tl.zeros((PIXELS, CHANNELS), tl.float32)
        second = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for start in range(tl.program_id(0) * PIXELS, pixels, tl.num_programs(0) * PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            g = pixel_gradient(grad, pixel, pixels, channel, channels)
            for i in tl.static_range(2):
                for j in tl.static_range(2):
                    patch = _patches(
                        x, weights, pixel, pixels, height, width, sb, sc, sh, sw, C_IN, TAPS, i, j
                    )
                    value = tl.dot(patch, taps)
                    d_z = tl.where(value * s + t > 0, g, 0.0)
                    first += d_z
                    second += d_z * (value - m) * r
        store_sums(first, second, partial, channel, channels)

    @triton.jit
    def _weight_gradient(
        x, weights, grad, scale, shift, slope, offset, partial,
        pixels, height, width, sb, sc, sh, sw, channels,
        C_IN: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        taps = _weights(weights, channel, channels, TAPS)
        s, t = vector(scale, channel, channels), vector(shift, channel, channels)
        a, b = vector(slope, channel, channels), vector(offset, channel, channels)
        total = tl.zeros((TAPS, CHANNELS), tl.float32)
        for start in range(tl.program_id(0) * PIXELS, pixels, tl.num_programs(0) * PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            g = pixel_gradient(grad, pixel, pixels, channel, channels)
            for i in tl.static_range(2):
                for j in tl.static_range(2):
                    patch = _patches(
                        x, weights, pixel, pixels, height, width, sb, sc, sh, sw, C_IN, TAPS, i, j
                    )
                    value = tl.dot(patch, taps)
                    d_y = tl.where(value * s + t > 0, g * s, 0.0) - (value * a + b)
                    total += tl.dot(tl.trans(patch), d_y.to(taps.dtype))
        tap = tl.arange(0, TAPS)[:, None]
        at = (tl.program_id(0) * TAPS + tap) * channels + channel[None, :]
        tl.store(partial + at, total, (channel < channels)[None, :] & (tap < TAPS))

    @triton.jit
    def _columns(
        x, weights, grad, scale, shift, columns, pixels, height, width, sb, sc, sh, sw, channels,
        C_IN: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """What each pixel of the map sends back to the numbers of its patch; CHANNELS are all of them."""
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        channel, tap = tl.arange(0, CHANNELS), tl.arange(0, TAPS)
        taps = _weights(weights, channel, channels, TAPS)
        s, t = vector(scale, channel, channels), vector(shift, channel, channels)
        g = pixel_gradient(grad, pixel, pixels, channel, channels) * s
        row, column = pixel // width, pixel % width
        inside = (pixel < pixels)[:, None] & (tap < 9 * C_IN)[None, :]
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                patch = _patches(x, weights, pixel, pixels, height, width, sb, sc, sh, sw, C_IN, TAPS, i, j)
                d_y = tl.where(tl.dot(patch, taps) * s + t > 0, g, 0.0)
                sent = tl.dot(d_y.to(taps.dtype), tl.trans(taps))
                at = ((2 * row + i).to(tl.int64) * (2 * width) + 2 * column + j)[:, None] * TAPS + tap[
                    None, :
                ]
                tl.store(columns + at, sent.to(columns.dtype.element_ty), inside)

    @triton.jit
    def _fold(
        columns, out, pixels, height, width, sb, sc, sh, sw,
        C_IN: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr,
    ):  # fmt: skip
        """Adds up what each number of the images is sent: it is in nine patches."""
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        row, w = pixel // width, pixel % width
        h, image = row % height, (row // height).to(tl.int64)
        for channel in tl.static_range(C_IN):
            total = tl.zeros((PIXELS,), tl.float32)
            for down in tl.static_range(3):
                for right in tl.static_range(3):
                    y, z = h - down + 1, w - right + 1
                    inside = (pixel < pixels) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
                    at = ((image * height + y) * width + z) * TAPS + channel * 9 + down * 3 + right
                    total += tl.load(columns + at, inside, 0.0).to(tl.float32)
            at = image * sb + channel * sc + h * sh + w * sw
            tl.store(out + at, total.to(out.dtype.element_ty), pixel < pixels)
