"""What DC, DSA and DM share: images in class order, their optimiser, siamese augmentation, CLoM."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from clom.config import DistillFlags
from clom.source import network_factory
from data.augment.dsa import apply_drawn, draw_siamese, no_augmentation
from distillation.base import Distiller
from distillation.problem import Problem
from models.layout import arranged
from utils.device import refill, upload
from utils.graph import Replays
from utils.optim import set_gradients
from utils.seed import draw_seed

IMAGE_MOMENTUM = 0.5

# Real images, synthetic ones, other tensors -> gradient on the synthetic ones and value of a distance.
Match = Callable[..., tuple[Tensor, Tensor]]


class MatchingDistiller(Distiller):
    """Synthetic images in class order, matched to real ones of the same class.

    `x_syn` is (classes · ipc, C, H, W), `y_syn` 0 ipc times, 1 ipc times, ...; `extra` is CLoM or None.
    With `replays` passes are replayed (utils.graph): all networks drawn take the places of the first.
    """

    parts = ("optimizer", "extra")
    losses = ("loss", "clom")

    def __init__(self, problem: Problem, flags: DistillFlags) -> None:
        super().__init__(problem, flags)
        x_syn, self.y_syn = problem.start_by_class(flags.ipc, flags.init)
        self.x_syn = x_syn.clone().requires_grad_()
        self.real, self.extra, self.ipc = problem.real, problem.extra, flags.ipc
        numbers = flags.batch_real * self.x_syn[0].numel()
        self.replays, self._network = Replays.where_they_help(numbers, problem.device), None
        home = problem.device if self.replays is None else torch.device("cpu")
        self.new_network = network_factory(flags.model, problem.image_set, home)
        self.optimizer = torch.optim.SGD([self.x_syn], lr=flags.lr_img, momentum=IMAGE_MOMENTUM)

    @classmethod
    def cost(cls, flags: DistillFlags, classes: int) -> float:
        """Real images forward, synthetic ones forward and backward, CLoM's model alike."""
        return classes * (flags.batch_real + (3 + 3 * flags.CLoM) * flags.ipc)

    @property
    def shown(self) -> tuple[str, ...]:
        return self.losses if self.extra is not None else self.losses[:1]

    def draw_network(self) -> nn.Module:
        """A new random network in train mode; with `replays`, in the place of the one before."""
        network = self.new_network(draw_seed(self.stream("networks")))
        if self.replays is None:
            return network.train()
        if self._network is None:
            self._network = arranged(network, self.problem.device)
        else:
            refill(self._network, network)
        return self._network.train()

    def draw_classes(self) -> Iterator[Tensor]:
        """Real images of each class in turn: `batch_real` of it, or all if it has fewer."""
        return self.real.draw_classes(self.flags.batch_real, self.stream("real images"))

    def images_of(self, first: int, end: int) -> Tensor:
        """A new leaf with the images of classes first to end - 1: its gradient has their size."""
        return self.x_syn.detach()[first * self.ipc : end * self.ipc].clone().requires_grad_()

    def draw_augmentation(self, x: Tensor) -> tuple[str, Tensor]:
        """An operation and its values, on the device, for all batches of one class: see `apply_drawn`."""
        strategy, seed = self.flags.dsa_strategy, 0
        if not no_augmentation(strategy):
            seed = draw_seed(self.stream("augmentation"))
        name, values = draw_siamese(strategy, seed, x.shape[1:])
        return name, upload(values, x.device)

    def siamese(self, *batches: Tensor) -> list[Tensor]:
        """Augment batches of one class alike."""
        name, values = self.draw_augmentation(batches[0])
        return [apply_drawn(x, name, values, self.flags.align_corners) for x in batches]

    def matched(self, match: Match, x_real: Tensor, x_c: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """`match` of the images of one class augmented alike: the gradient on x_c and the value."""
        name, values = self.draw_augmentation(x_c)
        function = functools.partial(_match_augmented, match, name, self.flags.align_corners)
        if self.replays is not None:
            function = self.replays.of(name, function)
        return function(x_real, x_c, values, *more)

    def update_images(self, gradient: Tensor) -> Tensor:
        """One SGD step along `gradient` (m, C, H, W) plus CLoM's; returns alpha · CLoM."""
        value = gradient.new_zeros(())
        if self.extra is not None:
            value = self.extra(self.x_syn, self.y_syn)
            gradient = gradient + torch.autograd.grad(value, self.x_syn)[0]
        set_gradients([self.x_syn], [gradient])
        self.optimizer.step()
        self.x_syn.grad = None
        return value.detach()


def _match_augmented(
    match: Match, name: str, align_corners: bool, x_real: Tensor, x_c: Tensor, values: Tensor, *more: Tensor
) -> tuple[Tensor, Tensor]:
    """`matched` with an operation that has been drawn."""
    x_c = x_c.detach().requires_grad_()
    x_real, x_syn = (apply_drawn(x, name, values, align_corners) for x in (x_real, x_c))
    gradient, value = match(x_real, x_syn, *more)
    return torch.autograd.grad(x_syn, x_c, gradient)[0], value
