"""CUDA graphs, which replay as a whole what the host would launch kernel by kernel, and side streams."""

import functools
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from utils.errors import first_line

LAUNCH_BOUND = 2**22  # numbers in a batch; with more of them the device takes longer than launching does
WARM_UP = 3  # calls before the recording: libraries choose algorithms, optimisers make their states


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for `beside`; None where there are none.

    Its kernels come first: small ones would wait until each large one of other streams is all under way.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


def beside(stream: torch.cuda.Stream | None, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What waits for a function's result: it begins now on the side stream; without one, when it is asked.

    The caller has to ask before what the function reads is freed.
    """
    if stream is None:
        return function
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function()

    def wait() -> Tensor:
        torch.cuda.current_stream().wait_stream(stream)
        return result

    return wait


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """One for all: libraries keep a workspace for every stream they have seen."""
    return torch.cuda.Stream(device)


class Recorder:
    """The stream and the memory that graphs share; no two of them may run at a time."""

    def __init__(self) -> None:
        self.stream = _recording_stream(torch.cuda.current_device())
        self.memory = torch.cuda.graph_pool_handle()
        self._warned = False

    def aside(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        """A call on that stream: a recording needs some before it."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outputs = function()
        here.wait_stream(self.stream)
        for t in outputs:
            t.record_stream(here)
        return outputs

    def record(
        self, function: Callable[[], list[Tensor]]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor]] | None:
        """The graph of a call, which does not run now, and where its outputs will be; None if it fails."""
        here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.memory, stream=self.stream):
                outputs = function()
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # a failed recording leaves its own
            if not self._warned:
                why = first_line(error)
                print(f"warning: no CUDA graph of this step ({why}); continuing without", flush=True)
            self._warned = True
            return None
        return graph, outputs


class Replayed:
    """A function of tensors that on CUDA is replayed from a graph, from its fourth call on.

    `function` maps tensors to tensors without making the host wait. What else it reads or writes has to
    stay in its place: weights, momenta. Inputs are copied to places of their own, results are copies;
    without a `recorder`, on other devices, that is all. Batches of another size than the largest, and
    a function that cannot be recorded, run as they are.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], recorder: Recorder | None = None) -> None:
        self._function, self._recorder = function, recorder
        self._forget()

    def _forget(self) -> None:
        self._inputs: list[Tensor] = []
        self._calls = 0
        self.recorded: tuple[torch.cuda.CUDAGraph, list[Tensor]] | None = None

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if not self._inputs or len(inputs[0]) > len(self._inputs[0]):
            self._forget()
            self._inputs = [t.detach().clone() for t in inputs]
        elif [t.shape for t in inputs] != [t.shape for t in self._inputs]:
            return list(self._function(*inputs))
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._calls += 1
        if self._recorder is None:
            return self._run()
        if self._calls <= WARM_UP:
            return self._recorder.aside(self._run)
        if self._calls == WARM_UP + 1:
            self.recorded = self._recorder.record(self._run)
        if self.recorded is None:
            return self._run()
        graph, outputs = self.recorded
        graph.replay()
        return [t.clone() for t in outputs]

    def _run(self) -> list[Tensor]:
        return list(self._function(*self._inputs))


class Replays:
    """Functions by name, each `Replayed`, that share a recorder: no two may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._recorder = Recorder() if device.type == "cuda" else None
        self._found: dict[Hashable, Replayed] = {}

    @classmethod
    def where_they_help(cls, numbers: int, device: torch.device) -> "Replays | None":
        """For batches of so many numbers: None where launching kernels is not what takes the time."""
        return cls(device) if device.type == "cuda" and numbers <= LAUNCH_BOUND else None

    def of(self, name: Hashable, function: Callable[..., Sequence[Tensor]]) -> Replayed:
        """The first function that came under this name."""
        if name not in self._found:
            self._found[name] = Replayed(function, self._recorder)
        return self._found[name]
