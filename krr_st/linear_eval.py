"""Evaluation inside distillation: pre-train on the synthetic set, freeze, fit a linear layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from data.load import ImageSet
from data.loader import ImagePipeline, TensorLoader
from data.synthetic import SyntheticSet
from evaluation.fit import accuracy
from evaluation.protocols import outputs, pretrain, train_by_recipe
from evaluation.recipes import Recipe
from models import get_model
from utils.device import place
from utils.seed import derive_seed, local_seed, make_generator

# Features of the whole training split are kept when they take less than this.
_CACHE_BYTES = 4 << 30


@dataclass
class LinearEvaluations:
    """The linear evaluations of one run: when they are due, and what they gave.

    Attributes:
        image_set: the source; without labels none is ever due.
        every: steps between them; one more at the end.
        steps: length of the run.
        arch: zoo-A network.
        pretraining: how it is trained on the synthetic set.
        classifier: how the linear layer is trained.
        device: where to compute.
        made: log entries of those that are made.
    """

    image_set: ImageSet
    every: int
    steps: int
    arch: str
    pretraining: Recipe
    classifier: Recipe
    device: torch.device
    made: list[dict[str, Any]] = field(default_factory=list)

    def due(self, step: int) -> bool:
        """Whether one belongs after this step and is not made yet."""
        wanted = step == self.steps or (step > 0 and step % self.every == 0)
        return (
            wanted and is_labelled(self.image_set)
            and all(entry["step"] != step for entry in self.made)
        )  # fmt: skip

    def make(self, step: int, x_syn: Tensor, y_syn: Tensor, seed: int) -> dict[str, Any]:
        """Evaluate the set after this step of the run with this seed; returns the log entry."""
        accuracy = linear_evaluation(
            x_syn, y_syn, self.image_set, arch=self.arch, pretraining=self.pretraining,
            classifier=self.classifier, device=self.device, seed=seed, step=step,
        )  # fmt: skip
        self.made.append({"step": step, "linear_accuracy": accuracy})
        return self.made[-1]


def is_labelled(image_set: ImageSet) -> bool:
    """Whether a classifier can be trained on the set."""
    return image_set.num_classes is not None and image_set.train.labels is not None


def linear_evaluation(
    x_syn: Tensor,
    y_syn: Tensor,
    image_set: ImageSet,
    *,
    arch: str,
    pretraining: Recipe,
    classifier: Recipe,
    device: torch.device,
    seed: int,
    step: int,
) -> float:
    """Accuracy in % of a linear classifier on frozen features of a freshly pre-trained network.

    Without a test split (imagenet at 64 pixels) the training split stands in.

    Args:
        x_syn: (m, C, H, W) synthetic images.
        y_syn: (m, D) their targets.
        image_set: the labelled source.
        arch: zoo-A network.
        pretraining: how it is trained on (x_syn, y_syn).
        classifier: how the linear layer is trained on real features, without augmentation.
        device: where to compute.
        seed: of the run.
        step: of the run; each evaluation has its own random stream and leaves the others alone.

    Source: Lee et al., arXiv 2310.06511, sec. 4 (linear evaluation on the source).
    """
    with local_seed(derive_seed(seed, "evaluation", step)):
        model = place(get_model(arch, image_set.img_shape, y_syn.shape[1]), device)
        linear = nn.Linear(model.num_features, image_set.num_classes).to(device)
    generator = make_generator(seed, "evaluation batches", step)
    pretrain(model, SyntheticSet(x_syn, y_syn), pretraining, device=device, generator=generator)
    model.requires_grad_(False)
    images, labels = image_set.train.images, image_set.train.labels
    if len(images) * model.num_features * 4 <= _CACHE_BYTES:
        inputs, transform = outputs(model.embed, images, image_set, device), None
    else:
        inputs, pipeline = images, ImagePipeline(image_set.stats)

        def transform(x: Tensor, draw: torch.Generator) -> Tensor:
            return model.embed(pipeline(x, draw))

    loader = TensorLoader(
        inputs, labels, batch_size=classifier.batch_size, device=device,
        generator=generator, transform=transform,
    )  # fmt: skip
    train_by_recipe(
        linear, loader.forever(), classifier, steps=classifier.steps, what="linear classifier"
    )
    held_out = image_set.test or image_set.train
    with torch.no_grad():
        scores = outputs(lambda x: linear(model.embed(x)), held_out.images, image_set, device)
    return accuracy(scores, held_out.labels)
