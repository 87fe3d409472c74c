"""The precision of networks: fp32, tf32 or bf16; losses and optimisers take float32 at least."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from utils.errors import UserError, first_line

PRECISIONS = ("fp32", "tf32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of what is stored


def check_precision(name: str, device: torch.device) -> None:
    """Raise a UserError for tf32 without CUDA."""
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is a mode of NVIDIA GPUs; {device} has fp32 and bf16")


@contextlib.contextmanager
def float32_mode(name: str | None) -> Iterator[None]:
    """Within the block float32 products are exact (fp32) or rounded to TF32 (tf32, bf16) on CUDA.

    PyTorch's own default differs between convolutions (TF32) and matrix products (exact). None keeps
    it: commands without a flag, the DC family and evaluations, as in the released codes.
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    if name is not None:
        cuda.allow_tf32 = cudnn.allow_tf32 = name != "fp32"
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


def autocast(name: str, device: torch.device) -> contextlib.AbstractContextManager:
    """With bf16, networks called in the block compute in bfloat16; their weights stay float32."""
    if name != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def compiled(function: Callable, wanted: bool) -> Callable:
    """`torch.compile` it if wanted, for each batch size by itself.

    One that takes the network as an argument is compiled once for all networks. Each pass needs a
    function of its own: two batch sizes of one would be compiled again and again, or with symbolic sizes.
    """
    return torch.compile(function, dynamic=False, fullgraph=True) if wanted else function


def check_compile(device: torch.device) -> None:
    """Raise a UserError where torch.compile does not work, such as without a C++ compiler."""
    try:
        torch.compile(lambda t: (t + 1).sin())(torch.ones(4, device=device))
    except Exception as error:  # whatever the back end of the day raises
        reason = first_line(error)
        raise UserError(f"--compile: torch.compile does not work here ({reason})") from None
