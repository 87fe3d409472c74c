"""How well a network's outputs predict the target model's features of images it never saw."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from data.load import ImageSet
from evaluation.probe import feature_error
from evaluation.protocols import outputs
from krr_st.target_model import target_sample
from utils.checkpoint import fingerprint


class TargetFeatures:
    """The target model's features of one image set, computed when they are first asked for.

    Args:
        target: the frozen target model, with its attribute `dim`.
        image_set: the set; its test images are the ones unseen.
        device: where to compute.

    Attributes:
        dim: width of the features.
        digest: what the target model computes, in short.
    """

    def __init__(self, target: nn.Module, image_set: ImageSet, device: torch.device) -> None:
        self._target, self._image_set, self._device = target, image_set, device
        self.dim: int = target.dim
        self.digest = fingerprint(target_sample(target, image_set, device))

    @functools.cached_property
    def splits(self) -> tuple[Tensor, Tensor]:
        """(N, dim) of the training images and (M, dim) of the test images."""
        train, test = (
            outputs(self._target, split.images, self._image_set, self._device).float()
            for split in (self._image_set.train, self._image_set.test)
        )
        return train, test

    def error(self, predicted: Tensor) -> float:
        """Mean squared error of outputs for the test images (M, dim); see `feature_error`."""
        train, test = self.splits
        return feature_error(predicted.float(), test, train)
