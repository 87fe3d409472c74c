"""DC and DSA: synthetic images whose gradient on a network is that of real images."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clom.base import MatchingDistiller
from clom.config import DistillFlags
from clom.matching import gradient_distance
from distillation.problem import Problem
from evaluation.fit import Trainer
from evaluation.recipes import sgd_by_epochs
from models.layout import batch_norms, images_at_once

BATCH_NORM_IMAGES = 16  # real ones of each class, from which BatchNorm takes its statistics


class GradientMatching(MatchingDistiller):
    """DC; DSA when real and synthetic images are augmented alike.

    Invariant of the outer loop: the network has been trained `inner_loop` epochs on the synthetic
    set after each update of the images but the last.

    Source: Zhao et al., arXiv 2006.05929, alg. 1; Zhao and Bilen, arXiv 2102.08259, alg. 1.
    """

    ticks = True

    def __init__(self, problem: Problem, flags: DistillFlags) -> None:
        super().__init__(problem, flags)
        self._inner_optimizer: torch.optim.Optimizer | None = None  # of the network that keeps its place
        # Plain SGD on the current synthetic set, each image augmented by itself.
        recipe = sgd_by_epochs(flags.inner_loop, flags.lr_net, 0.0, 0.0, flags.batch_train)
        self.inner = recipe.override(dsa=flags.dsa_strategy, align_corners=flags.align_corners)

    @classmethod
    def cost(cls, flags: DistillFlags, classes: int) -> float:
        """The matching goes through the gradient once more."""
        inner = 3 * (flags.outer_loop - 1) * flags.inner_loop * flags.ipc * classes
        return flags.outer_loop * cls.update_cost(flags, classes) + inner

    @classmethod
    def update_cost(cls, flags: DistillFlags, classes: int) -> float:
        """That of one update of the images."""
        return 3 * flags.batch_real * classes + (6 + 3 * flags.CLoM) * flags.ipc * classes

    def step(self) -> dict[str, Tensor]:
        network, loops = self.draw_network(), self.flags.outer_loop
        total = clom = self.x_syn.new_zeros(())
        for outer in range(loops):
            if batch_norms(network):
                self._fix_statistics(network)
            gradient, distance = self._match(network)
            clom = clom + self.update_images(gradient)
            total = total + distance
            self.forecast.tick(self.update_cost(self.flags, self.real.num_classes))
            if outer < loops - 1:
                self._train_network(network)
        return {"loss": total / (self.real.num_classes * loops), "clom": clom / loops}

    def _match(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Gradient on the images and value of the distance summed over classes."""
        gradients, total = [], self.x_syn.new_zeros(())
        match = functools.partial(match_class, network, self.flags.dis_metric)
        for c, x_real in enumerate(self.draw_classes()):
            y = self.y_syn[c * self.ipc : (c + 1) * self.ipc]
            # Class by class instead of through the sum: the same gradient, one class's graph.
            gradient, distance = self.matched(match, x_real, self.images_of(c, c + 1), y)
            gradients.append(gradient)
            total = total + distance
        return torch.cat(gradients), total

    def _fix_statistics(self, network: nn.Module) -> None:
        """One forward pass over real images in train mode, then BatchNorm in eval mode."""
        reals = self.real.draw_classes(BATCH_NORM_IMAGES, self.stream("real images"))
        network.train()
        with torch.no_grad():
            network(torch.cat(list(reals)))
        for module in batch_norms(network):
            module.eval()

    def _train_network(self, network: nn.Module) -> None:
        """`inner_loop` epochs on the synthetic set as it is now."""
        if self.flags.inner_loop:
            x, generator = self.x_syn.detach().clone(), self.stream("inner loop")
            loader = self.inner.loader(x, self.y_syn, x.device, generator)
            optimizer, work = self._inner_optimizer, 3 * loader.batch_size
            trainer = Trainer(network, loader, self.inner, optimizer=optimizer, replays=self.replays)
            trainer.run(what="inner loop", on_step=lambda *_: self.forecast.tick(work)).train()
            if self.replays is not None:  # recorded with this optimiser, which has no momentum
                self._inner_optimizer = trainer.optimizer


def match_class(
    network: nn.Module, metric: str, x_real: Tensor, x_syn: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient on synthetic images of one class, with labels y, and value of their distance to real ones."""
    x_syn = x_syn.detach().requires_grad_()
    grads_real = gradient_in_parts(network, x_real, y[:1].expand(len(x_real)))
    grads_syn = network_gradient(network, x_syn, y, create_graph=True)
    distance = gradient_distance(grads_syn, grads_real, metric)
    return torch.autograd.grad(distance, x_syn)[0], distance.detach()


def gradient_in_parts(network: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """`network_gradient` of a real batch; the mean over images is joined from parts."""
    total: list[Tensor] = []
    part = images_at_once(network, x.shape, x.device, len(x))
    for x_part, y_part in zip(x.split(part), y.split(part), strict=True):
        gradient = network_gradient(network, x_part, y_part)
        scaled = torch._foreach_mul(gradient, len(x_part) / len(x))
        total = torch._foreach_add(total, scaled) if total else scaled
    return total


def network_gradient(
    network: nn.Module, x: Tensor, y: Tensor, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of the cross-entropy of images and their labels on every parameter."""
    loss = F.cross_entropy(network(x), y)
    return torch.autograd.grad(loss, list(network.parameters()), create_graph=create_graph)
