"""The contract of a distillation method."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.synthetic import SyntheticSet, TrainingSettings
from distillation.problem import Problem
from evaluation.presets import Preset
from utils.cli import SEED, DeviceFlags, flag, how
from utils.cost import DryRunFlags, Forecast
from utils.progress import Every
from utils.run_folder import TENSORBOARD
from utils.seed import make_generator


@dataclass(frozen=True)
class RunFlags(DeviceFlags, DryRunFlags):
    """Flags of every run of a method."""

    method: str = flag("krr_st", "distillation method")
    seed: int | None = how(None, "seed; default: drawn and printed", **SEED)
    overwrite: bool = how(False, "start again in a folder that holds another run")
    print_every: int = how(100, "steps between log lines", minimum=1)
    save_every: Every = how(Every(2000), "steps between saves of the run, or seconds such as 300s")
    tensorboard: bool = how(False, TENSORBOARD)


class Distiller:
    """A synthetic set and all that changes with it; one call of `step` is one outer step.

    A method is a subclass that sets `x_syn` and `y_syn` when it is built, and defines `step`. What
    `parts` names is saved by its own `state_dict`, random streams from `stream` by themselves.
    """

    x_syn: Tensor  # (m, C, H, W) float32, normalised, on the device
    y_syn: Tensor  # (m,) int64 class indices or (m, D) float32 target vectors
    whiten_normalized = False  # --zca is fitted to normalised images, not to pixels
    parts: tuple[str, ...] = ("optimizer",)  # attributes with a state of their own, or None
    losses: tuple[str, ...] = ("loss",)  # scalars that `step` returns
    ticks = False  # a step is long: it tells `forecast` of its parts itself

    def __init__(self, problem: Problem, flags: Any) -> None:
        self.problem, self.flags = problem, flags
        self.forecast = Forecast(0, problem.device)  # silent; the driver gives one that speaks
        self._streams: dict[str, torch.Generator] = {}

    def step(self) -> dict[str, Tensor]:
        """One outer step; returns detached scalars on the device, one per name in `losses`."""
        raise NotImplementedError

    @staticmethod
    def network(preset: Preset) -> str:
        """The method's own network where no flag names one."""
        return preset.network

    @staticmethod
    def test_network(network: str) -> str:
        """The network of evaluations where no flag names one; `network` is the method's own."""
        return network

    @classmethod
    def cost(cls, flags: Any, classes: int) -> float:
        """Images through the network per step, each counted three times in training; at least the set."""
        return 3.0 * flags.num_images

    @classmethod
    def start_cost(cls, flags: Any) -> float:
        """The same, before the first step."""
        return 0.0

    def timed_step(self) -> dict[str, Tensor]:
        """`step`, and the forecast told."""
        losses = self.step()
        if not self.ticks:
            self.forecast.tick(self.cost(self.flags, self.problem.classes))
        return losses

    def begin(self) -> None:
        """Do what comes once, before the first step of a new run."""

    def images(self) -> Tensor:
        """The set's images (m, C, H, W) as networks see them."""
        return self.x_syn

    def synthetic(self) -> SyntheticSet:
        """The set as it is now, in the source's normalised space: what is evaluated and written."""
        whitening = self.problem.whitening
        images = self.images().detach()
        images = images if whitening is None else whitening.undo(images)
        training = TrainingSettings(whitening=whitening, targets=self.problem.target_scale)
        return SyntheticSet(images, self.problem.unscaled(self.y_syn.detach()), training=training)

    def plain(self) -> SyntheticSet:
        """`synthetic` without further views of its images."""
        return self.synthetic().plain()

    def monitor(self) -> Any | None:
        """Losses that change with the set alone, made from the initial state; None without any.

        Called with `x_syn` and `y_syn` it gives a list, after steps that are `due(step)`.
        """
        return None

    def awaited(self) -> str:
        """What the next step needs and another process is still making, in words; "" for nothing."""
        return ""

    def wait(self) -> None:
        """Come back once what is `awaited` is there; the run is saved before, and a signal leaves at once."""

    def flush(self) -> None:
        """Bring files of the method to disk; called before every save."""

    def stream(self, name: str) -> torch.Generator:
        """The random stream of that name, seeded by the run's seed and saved with the state."""
        if name not in self._streams:
            self._streams[name] = make_generator(self.problem.seed, name)
        return self._streams[name]

    @property
    def shown(self) -> tuple[str, ...]:
        """The names of `losses` that are printed."""
        return self.losses

    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self.parts}
        return {
            "x_syn": self.x_syn.detach(),
            "y_syn": self.y_syn.detach(),
            "parts": {name: None if part is None else part.state_dict() for name, part in parts.items()},
            "streams": {name: stream.get_state() for name, stream in self._streams.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("x_syn", "y_syn"):
            saved, own = state[name], getattr(self, name)
            if saved.shape != own.shape or not saved.isfinite().all():
                raise ValueError(f"{name} is {tuple(saved.shape)} or not finite, expected {tuple(own.shape)}")
            with torch.no_grad():
                own.copy_(saved)
        for name in self.parts:
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(state["parts"][name])
        for name, saved in state["streams"].items():
            self.stream(name).set_state(saved)
