"""DM: synthetic images whose mean features under random networks are those of real images."""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clom.base import Match, MatchingDistiller
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
        reals, match = self.draw_classes(), functools.partial(match_features, network)
        for first in range(0, classes, size):
            x_group = self.images_of(first, min(first + size, classes))
            # Group by group instead of through the sum: the same gradient, one group's graph.
            if size == 1:
                gradient, distance = self.matched(match, next(reals), x_group)
            else:
                gradient, distance = self._match_group(match, x_group, reals)
            gradients.append(gradient)
            total = total + distance
        clom = self.update_images(torch.cat(gradients))
        return {"loss": total / classes, "clom": clom}

    def _classes_at_once(self, network: nn.Module) -> int:
        if batch_norms(network):
            return self.real.num_classes
        if self.replays is not None:
            return 1
        x = self.x_syn
        synthetic = images_at_once(network, x.shape, x.device, SYNTHETIC_AT_ONCE)
        return max(1, min(synthetic // self.ipc, REAL_HELD // self.flags.batch_real))

    def _match_group(self, match: Match, x_group: Tensor, reals: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """`match` of several classes, whose real images come next, each augmented by itself."""
        parts = x_group.split(self.ipc)
        pairs = itertools.starmap(self.siamese, zip(itertools.islice(reals, len(parts)), parts, strict=True))
        own_reals, syns = zip(*pairs, strict=True)
        counts, x_syn = [[*map(len, batches)] for batches in (own_reals, syns)], torch.cat(syns)
        gradient, distance = match(torch.cat(own_reals), x_syn, counts=counts)
        return torch.autograd.grad(x_syn, x_group, gradient)[0], distance


def match_features(
    network: nn.Module, x_real: Tensor, x_syn: Tensor, counts: list[list[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient on synthetic images, and value, of their distance to real ones, summed over classes.

    `counts` of real and of synthetic images of each class; without, they are of one.
    """
    x_syn = x_syn.detach().requires_grad_()
    f_real, f_syn = embed_real(network, x_real), network.embed(x_syn)
    distance = distribution_distance(f_real, f_syn, *(counts or ([len(x_real)], [len(x_syn)])))
    return torch.autograd.grad(distance, x_syn)[0], distance.detach()


@torch.no_grad()
def embed_real(network: nn.Module, x: Tensor) -> Tensor:
    """Features (N, D) of real images; in one batch where BatchNorm makes the images interact."""
    part = images_at_once(network, x.shape, x.device, REAL_AT_ONCE)
    return torch.cat([network.embed(x_part) for x_part in x.split(part)])
