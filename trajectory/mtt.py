"""MTT: labelled images on which a student follows experts that were trained on real ones."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distillation.one_set import ZCA, ClassFlags
from evaluation.recipes import DSA_STRATEGY
from trajectory.base import TrajectoryFlags, TrajectoryMatching
from trajectory.match import apply
from utils.cli import flag

CANDIDATES = 4  # real images looked at for each one that a set with learned labels starts from


@dataclass(frozen=True)
class MTTFlags(TrajectoryFlags, ClassFlags):
    """Flags of MTT; --lr_y above 0 learns soft labels, as DATM does."""

    zca: bool | None = flag(None, ZCA)


class MTT(TrajectoryMatching):
    """Matching training trajectories; DATM with `lr_y`, a range of starts and a threshold.

    `y_syn` is (m,) class indices, or with `lr_y` (m, K) logits whose softmax are the soft labels.

    Sources: Cazenavette et al., arXiv 2203.11932, alg. 1; Guo et al. (DATM), arXiv 2310.05773.
    """

    target_momentum = 0.9
    default_dsa = DSA_STRATEGY

    @property
    def width(self) -> int:
        """Classes."""
        return self.problem.real.num_classes

    @property
    def soft(self) -> bool:
        """Whether labels are learned."""
        return self.flags.lr_y > 0

    def criterion(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy against classes, or against the softmax of the label logits."""
        return F.cross_entropy(outputs, y.softmax(1) if self.soft else y)

    def start(self) -> tuple[Tensor, Tensor]:
        """Real images of each class or noise; with learned labels those that experts recognise."""
        ipc = self.flags.num_images // self.width
        if not self.soft or self.flags.init == "noise":
            x, labels = self.problem.start_by_class(ipc, self.flags.init)
            return x, F.one_hot(labels, self.width).float() if self.soft else labels
        found = [self.recognised(c, ipc) for c in range(self.width)]
        return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])

    @torch.no_grad()
    def recognised(self, c: int, count: int) -> tuple[Tensor, Tensor]:
        """`count` images of class c and their label logits.

        The images are those of a random draw that most experts classify correctly after their
        training, the logits the mean over these experts (over all, where there is none).
        """
        real, generator = self.problem.real, self.stream("initial images")
        x = self.problem.whiten(real.at(real.draw_class(c, CANDIDATES * count, generator)))
        ends = (self.experts.snapshot(e, self.experts.last) for e in range(len(self.experts)))
        logits = torch.stack([apply(self.student_network, end, x) for end in ends])  # (experts, n, K)
        votes = (logits.argmax(2) == c).float()
        best = votes.sum(0).argsort(descending=True, stable=True)[:count]
        weight = torch.where(votes.sum(0) > 0, votes, 1.0)  # (experts, n)
        mean = (weight[..., None] * logits).sum(0) / weight.sum(0)[:, None]
        return x[best], mean[best]

    def targets(self, y: Tensor) -> Tensor:
        """Class indices, or class probabilities."""
        return y.softmax(1) if self.soft else y
