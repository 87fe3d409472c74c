"""What a network costs, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(make_model: Callable[[], nn.Module], img_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward pass.

    Args:
        make_model: builds the network; called where tensors have no data.
        img_shape: (C, H, W).
    """
    with torch.device("meta"):
        model = make_model().eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *img_shape))
    return counter.get_total_flops()
