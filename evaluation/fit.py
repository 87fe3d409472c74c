"""The one training loop, and how what it trained is measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from data.load import ImageSet
from data.loader import ImagePipeline, TensorLoader
from data.synthetic import SyntheticSet
from data.whitening import Whitening
from evaluation.recipes import LOSSES, Recipe
from models.layout import images_at_once
from utils.cost import Cost, Forecast
from utils.errors import UserError, pick
from utils.graph import Replays
from utils.memory import SplitBatches
from utils.optim import forget_steps, make_optimizer, reading_rate
from utils.progress import FiniteGuard, LossWindow

PROBE_BATCH = 512
FEW_STEPS = 20  # to record a step takes as long as some steps do
_LARGE_BATCH = 64  # at 224 pixels one map of the zoo's residual networks takes 13 MB an image

# (model, inputs, targets) -> scalar
LossFn = Callable[[nn.Module, Any, Any], Tensor]
# step, detached loss, learning rate of that step
StepHook = Callable[[int, Tensor, float], None]


def train_step(
    model: nn.Module, x: Any, y: Any, loss_fn: LossFn, optimizer: Optimizer, part: int | None = None
) -> Tensor:
    """One gradient step on one batch; returns the detached loss before the step.

    `part` images go through the network at once (None: all), with the same step if the loss is a mean
    over images that no layer makes interact.
    """
    optimizer.zero_grad(set_to_none=True)
    whole = part is None or part >= len(x)
    total = 0.0
    for x_part, y_part in [(x, y)] if whole else zip(x.split(part), y.split(part), strict=True):
        loss = loss_fn(model, x_part, y_part)
        loss = loss if whole else loss * (len(x_part) / len(x))
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total


class Trainer:
    """A network, what trains it by a recipe, and how far it has come.

    Batches come from the loader's endless stream; `scale` is a factor on the recipe's length, and
    `loss_fn`, which sees whole batches, replaces its loss. `step` of `steps` optimiser steps are done,
    `per_epoch` make one pass over the images, and `window` holds the losses of the last pass.

    On CUDA steps of small batches are replayed (utils.graph), unless `loss_fn` is given. Trainings of one
    network by one recipe without momentum may share `replays`, with the `optimizer` of the first.
    """

    parts = ("model", "optimizer", "schedule", "loader", "window")

    def __init__(
        self,
        model: nn.Module,
        loader: TensorLoader,
        recipe: Recipe,
        *,
        scale: float = 1.0,
        loss_fn: LossFn | None = None,
        optimizer: Optimizer | None = None,
        replays: Replays | None = None,
    ) -> None:
        self.model, self.loader, self.recipe = model, loader, recipe
        criterion, self.splits = pick(LOSSES, recipe.loss, "loss"), loss_fn is None
        self.loss_fn = loss_fn or (lambda model, x, y: criterion(model(x), y))
        self.per_epoch = loader.steps_per_pass
        self.step, self.steps = 0, recipe.total_steps(self.per_epoch, scale)
        rates = dict(lr=recipe.lr, momentum=recipe.momentum, wd=recipe.wd)
        self.optimizer = optimizer or make_optimizer(recipe.optimizer, model.parameters(), **rates)
        self.schedule = recipe.make_schedule(self.optimizer, self.steps, self.per_epoch)
        self.window = LossWindow(self.per_epoch)
        self._batches, self.replays = None, replays or self._recording()

    def _recording(self) -> Replays | None:
        """Where steps will be recorded, if that pays and the optimiser can be."""
        recordable = all(group.get("fused") for group in self.optimizer.param_groups)
        if not self.splits or not recordable or self.steps <= FEW_STEPS:
            return None
        numbers = self.loader.batch_size * self.loader.images[0].numel()
        return Replays.where_they_help(numbers, self.loader.device)

    def run(
        self,
        until: int | None = None,
        *,
        what: str = "training",
        on_step: StepHook | None = None,
        progress: bool = False,
    ) -> nn.Module:
        """Train up to step `until` (None: the recipe's last); returns the network in eval mode.

        `what` names this training in messages; `on_step` is called after each step.

        Raises:
            UserError: a loss is not finite (names the step), or a batch too small for BatchNorm.
        """
        guard, recipe = FiniteGuard(what), self.recipe
        end = self.steps if until is None else min(until, self.steps)
        shape = (self.loader.batch_size, *self.loader.images.shape[1:])
        self.model.train()
        part = images_at_once(self.model, shape, self.loader.device, shape[0]) if self.splits else None
        if self._batches is None:
            self._batches = iter(self.loader.forever())
        hidden = None if progress else True  # None: hidden where nobody watches
        for step in tqdm(range(self.step + 1, end + 1), desc=what, disable=hidden, leave=False):
            rate = self.optimizer.param_groups[0]["lr"]
            try:
                loss = self._advance(*next(self._batches), part)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UserError(
                    f"{what}: a batch of one image leaves BatchNorm of this network a single value; "
                    "choose a batch size that leaves no last batch of one, or another network"
                ) from None
            guard.check(loss, step)
            self.schedule.step()
            if recipe.fresh_momentum and step in {e * self.per_epoch for e in recipe.decay_epochs}:
                forget_steps(self.optimizer, in_place=self.replays is not None)
            self.step = step
            self.window.add(loss)
            if on_step is not None:
                on_step(step, loss, rate)
        guard.flush()
        return self.model.eval()

    def _advance(self, x: Any, y: Any, part: int | None) -> Tensor:
        """One step; each size of a batch is recorded by itself."""
        model, loss_fn, optimizer = self.model, self.loss_fn, self.optimizer
        if self.replays is None:
            return train_step(model, x, y, loss_fn, optimizer, part)

        # All that changes from step to step is in tensors. It does not hold the trainer, which holds it.
        def step(x: Tensor, y: Tensor, rate: Tensor) -> list[Tensor]:
            with reading_rate(optimizer, rate):
                return [train_step(model, x, y, loss_fn, optimizer, part)]

        return self.replays.of(len(x), step)(x, y, x.new_full((), optimizer.param_groups[0]["lr"]))[0]

    def forecast(self, runs: float = 1, **given: Any) -> Forecast:
        """Of `runs` trainings like what is left of this one, in steps; `given` as for `Forecast`."""
        return Forecast(runs * (self.steps - self.step), self.loader.device, **given)

    def measure(self, runs: float = 1, **given: Any) -> Cost:
        """What `runs` such trainings take, from a few steps of this one."""
        forecast = self.forecast(runs, **given)
        return forecast.trial(lambda: self.run(on_step=lambda *_: forecast.tick(1)))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in self.parts} | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.step, self._batches = int(state["step"]), None
        self.replays = self._recording()  # momenta are in other places now


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest score is at the label, in %; scores (N, K), labels (N,)."""
    return 100.0 * (int((scores.argmax(1) == labels.to(scores.device)).sum()) / len(scores))


@torch.no_grad()
def outputs(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    image_set: ImageSet,
    device: torch.device,
    batch_size: int | None = None,
) -> Tensor:
    """`function` (a network, its `embed`) of normalised images in batches that fit: (N, D) on the device."""
    batch_size = batch_size or (PROBE_BATCH if image_set.size < 128 else _LARGE_BATCH)
    given = dict(batch_size=batch_size, device=device, generator=torch.Generator())
    loader = TensorLoader(images, None, transform=ImagePipeline(image_set.stats), shuffle=False, **given)
    function = SplitBatches(function)
    return torch.cat([function(x) for x, _ in loader.epoch()])


def held_out_accuracy(
    model: Callable[[Tensor], Tensor],
    image_set: ImageSet,
    device: torch.device,
    batch_size: int | None = None,
) -> float:
    """Accuracy in % on the test split, or on the training split of a set without one."""
    split = image_set.test or image_set.train
    return accuracy(outputs(model, split.images, image_set, device, batch_size), split.labels)


def set_loader(
    recipe: Recipe, synthetic: SyntheticSet, device: torch.device, generator: torch.Generator
) -> TensorLoader:
    """A recipe's batches of a synthetic set, whitened where the set says so; augmented after that.

    A network that is trained on them takes other images through the same whitening: its `prepare`.
    Where the recipe says so the targets are standardised, and its outputs have to be undone.

    Raises:
        UserError: the recipe asks for what the targets of the set do not allow.
    """
    recipe.check_targets(synthetic)
    targets, training = synthetic.targets, synthetic.training
    images = synthetic.images.to(device)
    if training.whitening is not None:
        images = training.whitening.to(device)(images)
    if recipe.target_scale == "std":
        targets = training.targets(targets)
    return recipe.loader(images, targets, device, generator)


def real_loader(
    recipe: Recipe,
    image_set: ImageSet,
    device: torch.device,
    generator: torch.Generator,
    targets: Tensor | None = None,
    whitening: Whitening | None = None,
) -> TensorLoader:
    """A recipe's batches of all training images, normalised, whitened and then augmented.

    With `targets` (N, ...) in place of their labels; `whitening` is on the device.
    """
    pipeline, augment, train = ImagePipeline(image_set.stats), recipe.augment(), image_set.train

    def transform(x: Tensor, draw: torch.Generator) -> Tensor:
        x = pipeline(x, draw)
        x = x if whitening is None else whitening(x)
        return x if augment is None else augment(x, draw)

    targets = train.labels if targets is None else targets
    return recipe.loader(train.images, targets, device, generator, transform)


def pretrain(
    model: nn.Module,
    synthetic: SyntheticSet,
    recipe: Recipe,
    generator: torch.Generator,
    scale: float = 1.0,
    on_step: StepHook | None = None,
) -> nn.Module:
    """Train `model` on a synthetic set, whose targets its outputs fit; `scale` is a factor on the length.

    Targets that were standardised for it are undone in its last layer. `on_step` is called after each step.
    The network is of first order from here on (models.base).
    """
    device = next(model.parameters()).device
    loader = set_loader(recipe, synthetic, device, generator)
    model.first_order = True
    Trainer(model, loader, recipe, scale=scale).run(what="pre-training", on_step=on_step, progress=True)
    if synthetic.training.whitening is not None:
        model.prepare = synthetic.training.whitening.to(device)
    if recipe.target_scale == "std":
        synthetic.training.targets.undo_in(model.head)
    return model
