"""MKDT: images with target vectors on which a student follows experts of knowledge distillation."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment import normalize, to_float
from distillation.one_set import FeatureFlags
from distillation.selection import random_indices
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
        image_set, device = self.problem.image_set, self.problem.device
        count, images = self.flags.num_images, image_set.train.images
        if self.flags.init == "random":
            index = random_indices(image_set, count, self.stream("initial images"))
            y = outputs(self.problem.target, images[index], image_set, device).float()
        else:
            targets = outputs(self.problem.target, images, image_set, device).float()
            index = self.errors(targets).topk(count).indices.cpu()
            y = targets[index.to(device)]
        return normalize(to_float(images[index].to(device)), image_set.stats), y

    @torch.no_grad()
    def errors(self, targets: Tensor) -> Tensor:
        """Mean squared error (N,) of each training image, averaged over the experts after an epoch."""
        image_set, device = self.problem.image_set, self.problem.device
        total = torch.zeros(len(targets), device=device)
        for expert in range(len(self.experts)):
            predict = functools.partial(apply, self.student_network, self.experts.snapshot(expert, 1))
            found = outputs(predict, image_set.train.images, image_set, device)
            total += (found - targets).square().mean(1)
        return total / len(self.experts)
