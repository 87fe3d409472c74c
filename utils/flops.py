"""What a network costs, counted on shapes alone."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(make_model: Callable[[], nn.Module], img_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one (C, H, W) image's forward pass; no tensor has data."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make_model().eval()(torch.empty(1, *img_shape))
    return counter.get_total_flops()
