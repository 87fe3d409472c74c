"""DM: synthetic images whose mean features under random networks are those of real images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clom.distillers import Distiller, batch_norms
from clom.matching import distribution_distance

# Real images go through networks without BatchNorm in parts of this size.
REAL_CHUNK = 2048


class DistributionMatching(Distiller):
    """DM; the arguments are those of Distiller.

    All classes go through the network together: without BatchNorm this equals one class after
    another, with BatchNorm it is what the method asks for.

    Source: Zhao and Bilen, arXiv 2110.04181, alg. 1.
    """

    def step(self) -> dict[str, Tensor]:
        """One iteration: a new frozen network, one update of the images."""
        network = self.draw_network().requires_grad_(False)
        classes = self.real.num_classes
        x_real, counts = self.real.draw_all_classes(self.batch_real, self.generators["real images"])
        x_syn = self.x_syn
        if self.augmented:
            parts = zip(x_real.split(counts), x_syn.split(self.ipc), strict=True)
            pairs = [self.siamese(*pair) for pair in parts]
            x_real, x_syn = (torch.cat(side) for side in zip(*pairs, strict=True))
        distance = distribution_distance(
            embed_real(network, x_real), network.embed(x_syn), counts, [self.ipc] * classes
        )
        (gradient,) = torch.autograd.grad(distance, self.x_syn)
        clom = self.update_images(gradient)
        return {"loss": distance.detach() / classes, "clom": clom}


@torch.no_grad()
def embed_real(network: nn.Module, x: Tensor) -> Tensor:
    """Features (N, D) of real images; in one batch where BatchNorm makes the images interact."""
    if batch_norms(network):
        return network.embed(x)
    return torch.cat([network.embed(part) for part in x.split(REAL_CHUNK)])
