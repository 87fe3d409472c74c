"""The layout of networks and the size of batches with which they compute fast."""

import torch
from torch import nn

from utils.device import place

# 64 images of 32x32, feature maps of some 30 MB a layer of ConvNet: with freed memory kept, parts of
# 16 to 256 images took the same time on a CPU; without, small ones were faster.
CPU_PIXELS = 64 * 32 * 32


def images_at_once(
    network: nn.Module, shape: torch.Size | tuple[int, ...], device: torch.device, largest: int
) -> int:
    """How many images of a (B, C, H, W) batch to give a network, in its present mode, at once.

    All B where BatchNorm in training mode makes them interact; `largest` on a GPU or without
    convolutions.
    """
    if any(module.training for module in batch_norms(network)):
        return max(1, shape[0])
    convolves = any(isinstance(module, nn.Conv2d) for module in network.modules())
    if device.type != "cpu" or not convolves:
        return largest
    return max(1, CPU_PIXELS // (shape[-2] * shape[-1]))


def arranged(network: nn.Module, device: torch.device, layout: str = "channels_last") -> nn.Module:
    """Move a network to the device, in `layout`; channels-last only where that is faster and as exact.

    It is neither with GroupNorm or LayerNorm. On a CPU with torch 2.14, GroupNorm (the zoo's instance
    norm) took 2.5 times as long backwards and DM's gradient was off by 4e-3 against float64, in the
    default layout by 4e-6. A step of ConvNetLN took 1.4 times as long.
    """
    others = any(isinstance(module, (nn.GroupNorm, nn.LayerNorm)) for module in network.modules())
    return place(network, device, "contiguous" if others else layout)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of a network."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
