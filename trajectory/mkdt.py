"""MKDT: images with target vectors on which a student follows experts of knowledge distillation."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment import normalize, to_float
from distillation.one_set import FeatureFlags
from distillation.selection import image_losses
from evaluation.fit import outputs
from trajectory.base import TrajectoryFlags, TrajectoryMatching
from trajectory.match import apply
from utils.cli import flag


@dataclass(frozen=True)
class MKDTFlags(TrajectoryFlags, FeatureFlags):
    """Flags of MKDT."""

    init: str = flag(
        "high_loss",
        "start from the real images that experts fit worst after an epoch, or from random ones",
        choices=("high_loss", "random"),
    )


class MKDT(TrajectoryMatching):
    """Trajectories of students of a self-supervised model; images, targets and step size are learned.

    `y_syn` is (m, D), at first the target model's features.

    Source: Joshi et al., "Dataset Distillation via Knowledge Distillation: Towards Efficient
    Self-Supervised Pre-training of Deep Networks", ICLR 2025.
    """

    criterion = staticmethod(F.mse_loss)

    @property
    def width(self) -> int:
        """The target model's features."""
        return self.problem.target.dim

    def start(self) -> tuple[Tensor, Tensor]:
        """Real images and the target model's features of them."""
        problem, count = self.problem, self.flags.num_images
        if self.flags.init == "random":
            return problem.start_with_features(count)
        image_set, device = problem.image_set, problem.device
        targets = outputs(problem.target, image_set.train.images, image_set, device).float()
        loss = torch.zeros(len(targets), device=device)
        for expert in range(len(self.experts)):
            predict = functools.partial(apply, self.student_network, self.experts.snapshot(expert, 1))
            loss += image_losses(predict, image_set, targets, device)
        index = loss.topk(count).indices
        pixels = to_float(image_set.train.images[index.cpu()].to(device))
        return normalize(pixels, image_set.stats), targets[index]
