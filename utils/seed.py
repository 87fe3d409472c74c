"""Randomness from explicit generators: every stream is derived from one seed and a name."""

import contextlib
import hashlib
import secrets
import threading
from collections.abc import Iterator

import torch


def resolve_seed(seed: int | None) -> int:
    """Return `seed`, or draw and print one when it is None."""
    if seed is None:
        seed = secrets.randbelow(2**31)
        print(f"seed {seed} (drawn; pass --seed {seed} to repeat this run)")
    return seed


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for one named stream: independent of the order streams are created in."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def make_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for the stream `names` under `seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


_GLOBAL_STATE = threading.RLock()


def draw_seed(generator: torch.Generator) -> int:
    """Draw a 31-bit seed from a generator (advances it)."""
    return int(torch.randint(2**31 - 1, (1,), generator=generator))


@contextlib.contextmanager
def local_seed(seed: int) -> Iterator[None]:
    """Seed the global random state for code that knows no other (weight init, dropout, kornia).

    That of the CPU, and where CUDA is in use that of the current GPU. It is put back afterwards; threads
    take turns. Networks are built on the CPU inside, then moved.
    """
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with _GLOBAL_STATE, torch.random.fork_rng(devices=gpus):
        # Not torch.manual_seed, which would re-seed every GPU.
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield
