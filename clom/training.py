"""How this family trains a network: SGD by epochs, step decay, DSA or the older DC augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clom.layout import images_at_once
from data.dc_augment import OPERATIONS as DC_OPERATIONS
from data.dc_augment import dc_augment
from data.dsa import OPERATIONS as DSA_OPERATIONS
from data.dsa import diff_augment
from data.load import ImageSet
from data.loader import TensorLoader, Transform
from evaluation.fit import accuracy, fit, supervised
from evaluation.protocols import PROBE_BATCH, outputs
from utils.errors import pick
from utils.runlog import LossWindow

DECAY = 0.1


@dataclass(frozen=True)
class Training:
    """One way to train a network; an epoch is one pass over the images.

    Attributes:
        epochs: length.
        lr: learning rate of SGD.
        momentum: in [0, 1).
        weight_decay: L2 coefficient.
        batch_size: images a step.
        decay_after: epochs after which the learning rate is multiplied by 0.1.
        fresh: start a new optimiser (no momentum) at each decay, as DC's evaluation does.
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    decay_after: tuple[int, ...] = ()
    fresh: bool = False

    def optimizer(self, model: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
        """SGD over all parameters."""
        return torch.optim.SGD(
            model.parameters(), lr=self.lr if lr is None else lr,
            momentum=self.momentum, weight_decay=self.weight_decay,
        )  # fmt: skip


def dc_evaluation(epochs: int, lr: float, batch_size: int) -> Training:
    """DC's evaluation with epoch_eval_train = E: epochs 0 to E, decay after number E//2+1."""
    return Training(
        epochs + 1, lr, batch_size=batch_size, decay_after=(epochs // 2 + 2,), fresh=True
    )  # fmt: skip


class Trainer:
    """A network, its optimiser and its batches; `run` goes on from `epoch`.

    Args:
        model: network on the loader's device.
        loader: batches of (images, targets).
        training: optimiser and length.
    """

    def __init__(self, model: nn.Module, loader: TensorLoader, training: Training) -> None:
        self.model, self.loader, self.training = model, loader, training
        self.optimizer = training.optimizer(model)
        self.window, self.epoch = LossWindow(len(loader)), 0

    def run(
        self,
        stops: Iterable[int] = (),
        at_stop: Callable[[int, float], None] | None = None,
        *,
        what: str = "training",
        progress: bool = False,
        on_step: Callable[[], None] = lambda: None,
    ) -> nn.Module:
        """Train to the last epoch.

        Args:
            stops: epochs after which `at_stop(epoch, mean loss of the epoch)` is called, with the
                network in eval mode; the last epoch always is one.
            at_stop: what to do there.
            what: name for messages and progress.
            progress: show a bar.
            on_step: called after each step.

        Returns:
            The network in eval mode.

        Raises:
            UserError: a loss is not finite.
        """
        training, per_epoch = self.training, len(self.loader)
        stops, decays = {*stops, training.epochs}, set(training.decay_after)
        batches, loss_fn = self.loader.forever(), supervised(F.cross_entropy)
        size = self.loader.batch_size
        shape = (size, *self.loader.images.shape[1:])
        part = images_at_once(self.model.train(), shape, self.loader.device, size)

        def after_step(step: int, loss: Tensor, rate: float) -> None:
            self.window.add(loss)
            on_step()

        for end in sorted(e for e in stops | decays if self.epoch < e <= training.epochs):
            fit(
                self.model, batches, loss_fn, self.optimizer, start=self.epoch * per_epoch,
                steps=end * per_epoch, what=what, progress=progress, part=part,
                on_step=after_step,
            )  # fmt: skip
            self.epoch = end
            if end in decays:
                self._decay()
            if end in stops and at_stop is not None:
                at_stop(end, self.window.mean())
        return self.model.eval()

    def _decay(self) -> None:
        if self.training.fresh:
            rate = self.optimizer.param_groups[0]["lr"] * DECAY
            self.optimizer = self.training.optimizer(self.model, rate)
            return
        for group in self.optimizer.param_groups:
            group["lr"] *= DECAY

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed training needs."""
        parts = ("model", "optimizer", "loader", "window")
        return {name: getattr(self, name).state_dict() for name in parts} | {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name in ("model", "optimizer", "loader", "window"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch = state["epoch"]


def make_augment(kind: str, strategy: str, align_corners: bool = False) -> Transform | None:
    """A loader's transform on normalised images.

    Args:
        kind: "dsa" (one operation a batch, each image its own parameters) or "dc" (the older one).
        strategy: operations joined by `_`; "none" gives None.
        align_corners: sampling convention of DSA's scale and rotate.
    """
    if no_augmentation(strategy):
        return None
    kinds: dict[str, Transform] = {
        "dsa": lambda x, generator: diff_augment(
            x, strategy, generator=generator, align_corners=align_corners
        ),
        "dc": lambda x, generator: dc_augment(x, strategy, generator),
    }
    return pick(kinds, kind, "augmentation")


def no_augmentation(strategy: str | None) -> bool:
    """Whether a strategy means none; the published default is the word None."""
    return strategy in (None, "", "none", "None")


def check_strategy(strategy: str | None, kind: str = "dsa") -> None:
    """Raise a UserError for an operation that does not exist."""
    table = {"dsa": DSA_OPERATIONS, "dc": DC_OPERATIONS}[kind]
    for name in () if no_augmentation(strategy) else strategy.split("_"):
        pick(table, name, f"{kind.upper()} operation")


def share_correct(model: nn.Module, image_set: ImageSet, device: torch.device) -> float:
    """Test accuracy in [0, 1]; without a test split, accuracy on the training split."""
    split = image_set.test or image_set.train
    part = images_at_once(model, split.images.shape, device, PROBE_BATCH)
    return accuracy(outputs(model, split.images, image_set, device, part), split.labels) / 100


def train_on(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    training: Training,
    *,
    augment: Transform | None,
    device: torch.device,
    generator: torch.Generator,
) -> Trainer:
    """A Trainer of `model` on tensors that are normalised already."""
    loader = TensorLoader(
        images, targets, batch_size=training.batch_size, device=device,
        generator=generator, transform=augment,
    )  # fmt: skip
    return Trainer(model, loader, training)
