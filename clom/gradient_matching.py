"""DC and DSA: synthetic images whose gradient on a network is that of real images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clom.distillers import Distiller
from clom.layout import batch_norms, images_at_once
from clom.matching import gradient_distance
from clom.training import Training, make_augment, train_on

# Real images of each class from which BatchNorm takes its statistics.
BATCH_NORM_IMAGES = 16


class GradientMatching(Distiller):
    """DC; DSA when a strategy is given.

    Invariant of the outer loop: the network has been trained `inner_loop` epochs on the synthetic
    set after each update of the images but the last.

    Args:
        args: as Distiller.
        metric: a name in clom.matching.METRICS.
        outer_loop: updates of the images an iteration.
        inner_loop: epochs of the network between them.
        lr_net: learning rate of the network (SGD without momentum).
        batch_train: synthetic images a step of the network.
        kwargs: as Distiller.

    Source: Zhao et al., arXiv 2006.05929, alg. 1; Zhao and Bilen, arXiv 2102.08259, alg. 1.
    """

    def __init__(
        self,
        *args: Any,
        metric: str = "ours",
        outer_loop: int = 1,
        inner_loop: int = 1,
        lr_net: float = 0.01,
        batch_train: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.metric, self.outer_loop = metric, outer_loop
        # Plain SGD on the current synthetic set.
        self.inner = Training(inner_loop, lr_net, 0.0, 0.0, batch_train)

    def step(self) -> dict[str, Tensor]:
        """One iteration: a new network, `outer_loop` updates of the images."""
        network = self.draw_network()
        total = clom = self.x_syn.new_zeros(())
        for outer in range(self.outer_loop):
            if batch_norms(network):
                self._fix_statistics(network)
            gradient, distance = self._match(network)
            clom = clom + self.update_images(gradient)
            total = total + distance
            if outer < self.outer_loop - 1:
                self._train_network(network)
        return {
            "loss": total / (self.real.num_classes * self.outer_loop),
            "clom": clom / self.outer_loop,
        }

    def _match(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Gradient on the images and value of the distance summed over classes."""
        gradients, total = [], self.x_syn.new_zeros(())
        for c in range(self.real.num_classes):
            index = self.real.draw_class(c, self.batch_real, self.generators["real images"])
            x_c = self.images_of(c, c + 1)
            x_real, x_syn = self.siamese(self.real.at(index), x_c)
            grads_real = gradient_in_parts(network, x_real, c)
            grads_syn = network_gradient(network, x_syn, c, create_graph=True)
            distance = gradient_distance(grads_syn, grads_real, self.metric)
            # Class by class instead of through the sum: the same gradient, one class's graph.
            gradients += torch.autograd.grad(distance, x_c)
            total = total + distance.detach()
        return torch.cat(gradients), total

    def _fix_statistics(self, network: nn.Module) -> None:
        """One forward pass over real images in train mode, then BatchNorm in eval mode."""
        x, _ = self.real.draw_all_classes(BATCH_NORM_IMAGES, self.generators["real images"])
        network.train()
        with torch.no_grad():
            network(x)
        for module in batch_norms(network):
            module.eval()

    def _train_network(self, network: nn.Module) -> None:
        """`inner_loop` epochs on the synthetic set as it is now, each image augmented by itself."""
        trainer = train_on(
            network, self.x_syn.detach().clone(), self.y_syn, self.inner,
            augment=make_augment("dsa", self.strategy, self.align_corners),
            device=self.x_syn.device, generator=self.generators["inner loop"],
        )  # fmt: skip
        trainer.run(what="inner loop").train()


def gradient_in_parts(network: nn.Module, x: Tensor, label: int) -> list[Tensor]:
    """`network_gradient` of a real batch; the mean over images is joined from parts."""
    part = images_at_once(network, x.shape, x.device, len(x))
    total: list[Tensor] = []
    for x_part in x.split(part):
        gradient = network_gradient(network, x_part, label)
        scaled = torch._foreach_mul(gradient, len(x_part) / len(x))
        total = torch._foreach_add(total, scaled) if total else scaled
    return total


def network_gradient(
    network: nn.Module, x: Tensor, label: int, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of the cross-entropy of images of one class on every parameter."""
    y = torch.full((len(x),), label, device=x.device)
    loss = F.cross_entropy(network(x), y)
    return torch.autograd.grad(loss, list(network.parameters()), create_graph=create_graph)
