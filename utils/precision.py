"""How exactly networks compute: fp32, tf32 or bf16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from utils.errors import UserError

T = TypeVar("T")

# What each one costs and keeps. Losses, kernels and optimisers stay in float32 or better in all.
PRECISIONS = ("fp32", "tf32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of what is kept


def check_precision(name: str, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        UserError: tf32 without CUDA.
    """
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}; valid: {', '.join(PRECISIONS)}")
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is a mode of NVIDIA GPUs; {device} has fp32 and bf16")


@contextlib.contextmanager
def float32_mode(name: str) -> Iterator[None]:
    """Within the block float32 products are exact (fp32) or rounded to TF32 (tf32, bf16) on CUDA.

    PyTorch's own default differs between convolutions (TF32) and matrix products (exact).
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32 = cudnn.allow_tf32 = name != "fp32"
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


def autocast(name: str, device: torch.device) -> AbstractContextManager:
    """Networks called in the block compute in bfloat16 where `name` says so; weights stay float32.

    Args:
        name: fp32, tf32 or bf16.
        device: where the networks live.
    """
    if name != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def compiled(function: Callable[..., T], wanted: bool) -> Callable[..., T]:
    """`torch.compile(function)` if wanted; networks of one kind share what is compiled.

    Args:
        function: takes the network as an argument.
        wanted: the flag.
    """
    return torch.compile(function) if wanted else function


def check_compile(device: torch.device) -> None:
    """Try torch.compile on a small thing, so that a machine without a compiler fails at once.

    Raises:
        UserError: it does not work here.
    """
    x = torch.ones(4, device=device)
    try:
        torch.compile(lambda t: (t + 1).sin())(x)
    except Exception as error:  # whatever the back end of the day raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--compile: torch.compile does not work here ({reason})") from None
