"""DM: synthetic images whose mean features under random networks are those of real images."""

import torch
from torch import Tensor, nn

from clom.base import MatchingDistiller
from clom.matching import distribution_distance
from models.layout import batch_norms, images_at_once

# Images that go through networks without BatchNorm at once on a GPU: synthetic, real, and real
# ones that are held there.
SYNTHETIC_AT_ONCE, REAL_AT_ONCE, REAL_HELD = 2048, 2048, 16384


class DistributionMatching(MatchingDistiller):
    """DM.

    With BatchNorm all classes go through the network together, which is what the method asks for.
    Without, the distance is a sum over classes: groups of them are as good, and need less memory.

    Source: Zhao and Bilen, arXiv 2110.04181, alg. 1.
    """

    def step(self) -> dict[str, Tensor]:
        network = self.draw_network().requires_grad_(False)
        classes, size = self.real.num_classes, self._classes_at_once(network)
        gradients, total = [], self.x_syn.new_zeros(())
        for first in range(0, classes, size):
            x_group = self.images_of(first, min(first + size, classes))
            distance = self._distance(network, x_group, first)
            # Group by group instead of through the sum: the same gradient, one group's graph.
            gradients += torch.autograd.grad(distance, x_group)
            total = total + distance.detach()
        clom = self.update_images(torch.cat(gradients))
        return {"loss": total / classes, "clom": clom}

    def _classes_at_once(self, network: nn.Module) -> int:
        if batch_norms(network):
            return self.real.num_classes
        x = self.x_syn
        synthetic = images_at_once(network, x.shape, x.device, SYNTHETIC_AT_ONCE)
        return max(1, min(synthetic // self.ipc, REAL_HELD // self.flags.batch_real))

    def _distance(self, network: nn.Module, x_group: Tensor, first: int) -> Tensor:
        """Distance summed over the classes of `x_group`, which begin with class `first`."""
        parts = x_group.split(self.ipc)
        reals = self.draw_classes(first, first + len(parts))
        reals, syns = zip(*map(self.siamese, reals, parts), strict=True)
        f_real, f_syn = embed_real(network, torch.cat(reals)), network.embed(torch.cat(syns))
        return distribution_distance(f_real, f_syn, [*map(len, reals)], [*map(len, syns)])


@torch.no_grad()
def embed_real(network: nn.Module, x: Tensor) -> Tensor:
    """Features (N, D) of real images; in one batch where BatchNorm makes the images interact."""
    part = images_at_once(network, x.shape, x.device, REAL_AT_ONCE)
    return torch.cat([network.embed(x_part) for x_part in x.split(part)])
