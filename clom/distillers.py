"""What DC, DSA and DM share: the images, their optimiser, the draws, augmentation and CLoM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clom.loss import CLoM
from clom.real import RealImages
from clom.training import no_augmentation
from data.dsa import diff_augment
from utils.seed import draw_seed, make_generator

STREAMS = ("networks", "real images", "augmentation", "inner loop")
IMAGE_MOMENTUM = 0.5


class Distiller:
    """Synthetic images in class order and all that moves with them; `step` is one iteration.

    Args:
        x_syn: (m, C, H, W) float32 initial images on the device; m = ipc · classes.
        y_syn: (m,) int64 labels: 0 ipc times, 1 ipc times, ...
        real: the training images.
        new_network: seed -> a freshly initialised network on the device.
        lr_img: learning rate of the images (SGD, momentum 0.5).
        batch_real: real images of each class a step; a class with fewer gives all it has.
        strategy: DSA operations joined by `_`, or "none".
        align_corners: sampling convention of DSA.
        clom: the CLoM term, or None.
        seed: of every draw.
    """

    def __init__(
        self,
        x_syn: Tensor,
        y_syn: Tensor,
        real: RealImages,
        *,
        new_network: Callable[[int], nn.Module],
        lr_img: float,
        batch_real: int,
        strategy: str = "none",
        align_corners: bool = False,
        clom: CLoM | None = None,
        seed: int = 0,
    ) -> None:
        self.x_syn, self.y_syn, self.real = x_syn.clone().requires_grad_(), y_syn, real
        self.ipc = len(x_syn) // real.num_classes
        self.new_network, self.batch_real = new_network, batch_real
        self.strategy, self.align_corners, self.clom = strategy, align_corners, clom
        self.augmented = not no_augmentation(strategy)
        self.optimizer = torch.optim.SGD([self.x_syn], lr=lr_img, momentum=IMAGE_MOMENTUM)
        self.generators = {name: make_generator(seed, name) for name in STREAMS}

    def step(self) -> dict[str, Tensor]:
        """One iteration; returns detached scalars: loss (per class and update) and clom."""
        raise NotImplementedError

    def draw_network(self) -> nn.Module:
        """A new random network in train mode."""
        return self.new_network(draw_seed(self.generators["networks"])).train()

    def images_of(self, first: int, end: int) -> Tensor:
        """A new leaf with the images of classes first to end - 1: its gradient has their size."""
        part = self.x_syn.detach()[first * self.ipc : end * self.ipc]
        return part.clone().requires_grad_()

    def siamese(self, *batches: Tensor) -> list[Tensor]:
        """Augment batches of one class alike: one seed, one set of parameters."""
        if not self.augmented:
            return list(batches)
        seed = draw_seed(self.generators["augmentation"])
        return [
            diff_augment(
                x, self.strategy, seed=seed, siamese=True, align_corners=self.align_corners
            )
            for x in batches
        ]

    def update_images(self, gradient: Tensor) -> Tensor:
        """One SGD step along `gradient` (m, C, H, W) plus CLoM's; returns alpha · CLoM."""
        value = gradient.new_zeros(())
        if self.clom is not None:
            value = self.clom(self.x_syn, self.y_syn)
            gradient = gradient + torch.autograd.grad(value, self.x_syn)[0]
        self.x_syn.grad = gradient
        self.optimizer.step()
        self.x_syn.grad = None
        return value.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "x_syn": self.x_syn.detach(),
            "optimizer": self.optimizer.state_dict(),
            "generators": {name: g.get_state() for name, g in self.generators.items()},
            "clom": self.clom.state_dict() if self.clom is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        with torch.no_grad():
            self.x_syn.copy_(state["x_syn"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        if self.clom is not None:
            self.clom.load_state_dict(state["clom"])
