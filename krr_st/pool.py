"""The model pool: networks of all ages that the outer loop draws its features from."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from distillation.problem import Problem
from evaluation.fit import train_step
from models import get_model
from utils.device import place
from utils.errors import pick
from utils.graph import Recorder, Replayed
from utils.optim import make_optimizer
from utils.precision import autocast, compiled
from utils.seed import draw_seed, local_seed

# What a network is trained on: of images (m, C, H, W), targets (m, D) and a CPU generator.
Seen = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]

# A slot's age after its network was replaced. The released code forgets to reset it: such a slot is
# replaced again at every draw.
RESET_AGE: dict[str, Callable[[int], int]] = {"paper": lambda age: 0, "released": lambda age: age}

Tick = Callable[[int], None]  # told of each training step how many images it took


def no_tick(images: int) -> None:
    """Nobody is told."""


@dataclass
class Slot:
    """A network, its optimiser, and the SGD steps it has taken; what is replayed of its passes."""

    model: nn.Module
    optimizer: Optimizer
    age: int = 0
    replays: dict[str, Replayed] = field(default_factory=dict)


class ModelPool:
    """`size` networks trained on the current synthetic set, each of its own age.

    `make_network` gives a new network on its device, from an integer seed, and its optimiser. One
    that has taken `max_steps` (T) steps is replaced at its next update. Draws, ages and seeds come
    from the CPU `generator`; `reset` is a key of RESET_AGE; `precision`, `compile` and `criterion` (of
    outputs and targets) are those of the networks in training. With `seen` and its generator `draws` each
    of their steps is on what these make of the set, such as its mixup. With `cuda_graph` passes are
    replayed (utils.graph), and a network's weights and momenta keep their places: the optimiser has to be
    SGD.

    Invariant (reset "paper"): 0 <= age <= T, and `age` is the number of steps the slot's network
    has taken.

    Source: Lee et al., arXiv 2310.06511, alg. 1; the pool is FRePo's.
    """

    def __init__(
        self,
        make_network: Callable[[int], tuple[nn.Module, Optimizer]],
        *,
        size: int,
        max_steps: int,
        generator: torch.Generator,
        reset: str = "paper",
        precision: str = "fp32",
        compile: bool = False,
        criterion: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        seen: Seen | None = None,
        draws: torch.Generator | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self._make_network, self.max_steps, self.generator = make_network, max_steps, generator
        self._age_after_reset = pick(RESET_AGE, reset, "pool_reset")
        self.precision, self._criterion, self._seen, self._draws = precision, criterion, seen, draws
        self._forward = compiled(lambda model, x: model(x), compile)
        self.cuda_graph, self._recorder = cuda_graph, None
        self.slots = [Slot(*make_network(draw_seed(generator))) for _ in range(size)]

    def warm_up(self, x_syn: Tensor, y_syn: Tensor, progress: bool = False, tick: Tick = no_tick) -> None:
        """Train each network t steps on (x_syn, y_syn), t uniform in [1, T) (1 when T is 1)."""
        for slot in tqdm(self.slots, desc="model pool", disable=None if progress else True, leave=False):
            age = int(torch.randint(1, max(2, self.max_steps), (1,), generator=self.generator))
            self._train(slot, x_syn, y_syn, age, self._draws, tick)

    def spread_ages(self) -> None:
        """Let the untrained networks be replaced one after another: FRePo's start."""
        for number, slot in enumerate(self.slots):
            slot.age = number * self.max_steps // len(self.slots)

    def aged_copies(
        self, seed: int, ages: Sequence[int], x_syn: Tensor, y_syn: Tensor, tick: Tick = no_tick
    ) -> list[nn.Module]:
        """One network outside of the pool, made from `seed`, at rising ages; frozen, in eval mode."""
        slot, copies = Slot(*self._make_network(seed)), []
        draws = torch.Generator().manual_seed(seed)
        for age in ages:
            self._train(slot, x_syn, y_syn, age, draws, tick)
            copies.append(copy.deepcopy(slot.model).eval().requires_grad_(False))
        return copies

    def draw(self) -> Slot:
        """A uniformly drawn slot; its network is in eval mode with frozen parameters."""
        slot = self.slots[int(torch.randint(len(self.slots), (1,), generator=self.generator))]
        slot.model.eval().requires_grad_(False)
        return slot

    def update(self, slot: Slot, x_syn: Tensor, y_syn: Tensor) -> None:
        """One step of training on the set, or a new network in place of one that took T."""
        if slot.age < self.max_steps:
            self._train(slot, x_syn, y_syn, slot.age + 1, self._draws)
            return
        self._replace(slot, *self._make_network(draw_seed(self.generator)))
        slot.age = self._age_after_reset(slot.age)

    def replayed(
        self, slot: Slot, name: str, function: Callable[..., Sequence[Tensor]]
    ) -> Callable[..., Sequence[Tensor]]:
        """The function `name` of a slot's network; with `cuda_graph` that of the first call, replayed."""
        if not self.cuda_graph:
            return function
        if name not in slot.replays:
            on_cuda = next(slot.model.parameters()).is_cuda
            self._recorder = self._recorder or (Recorder() if on_cuda else None)
            slot.replays[name] = Replayed(function, self._recorder)
        return slot.replays[name]

    def _replace(self, slot: Slot, model: nn.Module, optimizer: Optimizer) -> None:
        if not slot.replays:
            slot.model, slot.optimizer = model, optimizer
            return
        slot.model.load_state_dict(model.state_dict())
        for state in slot.optimizer.state.values():
            state["momentum_buffer"].zero_()

    def _train(
        self,
        slot: Slot,
        x_syn: Tensor,
        y_syn: Tensor,
        age: int,
        draws: torch.Generator | None,
        tick: Tick = no_tick,
    ) -> None:
        slot.model.train().requires_grad_(True)
        while slot.age < age:
            x, y = (x_syn, y_syn) if self._seen is None else self._seen(x_syn, y_syn, draws)
            self.replayed(slot, "train", functools.partial(self._step, slot.model, slot.optimizer))(x, y)
            slot.age += 1
            tick(len(x))

    def _step(self, model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> list[Tensor]:
        return [train_step(model, x, y, self._loss, optimizer)]

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with autocast(self.precision, x.device):
            outputs = self._forward(model, x)
        return self._criterion(outputs.float(), y)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimisers, ages, generator: what a resumed run needs."""
        slots = [
            {"model": slot.model.state_dict(), "optimizer": slot.optimizer.state_dict(), "age": slot.age}
            for slot in self.slots
        ]
        return {"generator": self.generator.get_state(), "slots": slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for slot, saved in zip(self.slots, state["slots"], strict=True):
            slot.model.load_state_dict(saved["model"])
            slot.optimizer.load_state_dict(saved["optimizer"])
            slot.age = saved["age"]
            slot.replays.clear()  # its momenta are in other places now
        self.generator.set_state(state["generator"])


def pool_network(problem: Problem, flags: Any, outputs: int, seed: int) -> tuple[nn.Module, Optimizer]:
    """A new network of the pool, initialised from `seed` alone, and its optimiser, by the online flags."""
    with local_seed(seed):
        network = get_model(flags.train_model, problem.image_set.img_shape, outputs)
    network.first_order = True
    network = place(network, problem.device, flags.layout)
    lr, wd = flags.online_lr, flags.online_wd
    return network, make_optimizer(flags.online_opt, network.parameters(), lr=lr, wd=wd)
