"""Out of memory: batches that may be split are, with the same result; else the knob is named.

And freed memory, which a process on a CPU keeps.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.memory import SplitBatches, is_out_of_memory, out_of_memory_says

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


class Limited:
    """A function of rows that takes at most `limit` of them."""

    def __init__(self, limit, error=torch.OutOfMemoryError):
        self.limit, self.error, self.sizes = limit, error, []

    def __call__(self, x, scale=1.0):
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise self.error("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore")
        return torch.stack([x.sum(1), x.square().sum(1)], 1) * scale


X = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
@pytest.mark.parametrize("limit", [1, 2, 3, 6, 12, 13, 99])
def test_the_result_is_that_of_the_whole_batch(limit, error, capsys):
    function = Limited(limit, error)
    split = SplitBatches(function)
    assert torch.equal(split(X, 2.0), Limited(99)(X, 2.0))
    assert ("out of memory with 13" in capsys.readouterr().out) == (limit < 13)
    assert max(function.sizes[-3:]) <= limit
    function.sizes.clear()
    assert torch.equal(split(X), Limited(99)(X))
    assert max(function.sizes) <= limit  # what did not fit is not tried again
    assert capsys.readouterr().out == ""


def test_nothing_is_split_where_all_fits():
    function = Limited(99)
    split = SplitBatches(function)
    split(X)
    assert function.sizes == [13] and split.limit is None


def test_not_even_one_row():
    with pytest.raises(torch.OutOfMemoryError):
        SplitBatches(Limited(0))(X)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    class Broken:
        calls = 0

        def __call__(self, x):
            self.calls += 1
            raise RuntimeError("size mismatch")

    broken = Broken()
    with pytest.raises(RuntimeError, match="size mismatch"):
        SplitBatches(broken)(X)
    assert broken.calls == 1
    with pytest.raises(RuntimeError, match="size mismatch"), out_of_memory_says(CPU, "knobs"):
        broken(X)
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling ...",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_what_backends_say_when_memory_is_out(words):
    assert is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_the_line_names_the_knob(error):
    with pytest.raises(UserError) as caught, out_of_memory_says(CPU, "lower --batch_size"):
        raise error
    text = str(caught.value)
    assert "cpu is out of memory: lower --batch_size" in text and "\n" not in text
    assert str(error).split("\n")[0] in text


def test_a_real_allocation_that_cannot_be_met():
    with pytest.raises(UserError, match="out of memory: lower it"), out_of_memory_says(CPU, "lower it"):
        torch.empty(1 << 60, dtype=torch.uint8)


FREED = """
import os
from pathlib import Path
import torch
from utils.device import resolve_device
from utils.memory import keep_freed_memory

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20

start = resident()
def freed():
    torch.ones(200 << 18)  # 200 MB, not held
    return resident() - start

found = [freed()]
resolve_device("cpu")
found.append(freed())
print(keep_freed_memory())
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told")
@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
def test_freed_memory_is_kept_on_a_cpu_unless_the_environment_says_otherwise(tuned):
    env = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    env |= {"MALLOC_TOP_PAD_": "131072"} if tuned else {}
    lines = subprocess.run(
        [sys.executable, "-c", FREED], env=env, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert lines[-2] == str(not tuned)
    before, kept = map(int, lines[-1].split())
    assert before < 100
    assert kept < 100 if tuned else kept > 190
