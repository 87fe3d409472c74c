"""Evaluation inside distillation: pre-train on the synthetic set, freeze, fit a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.load import ImageSet
from data.loader import ImagePipeline, TensorLoader
from data.synthetic import SyntheticSet
from evaluation.fit import Trainer, accuracy
from evaluation.protocols import outputs, pretrain
from evaluation.recipes import Recipe
from models import get_model
from utils.device import place
from utils.seed import derive_seed, local_seed, make_generator

# Features of the whole training split are kept when they take less than this.
_CACHE_BYTES = 4 << 30


def is_labelled(image_set: ImageSet) -> bool:
    """Whether a classifier can be trained on the set."""
    return image_set.num_classes is not None and image_set.train.labels is not None


@dataclass(frozen=True)
class LinearEvaluation:
    """Accuracy of a linear classifier on frozen features of a freshly pre-trained network.

    Without a test split (imagenet at 64 pixels) the training split stands in.

    Attributes:
        image_set: the labelled source.
        arch: zoo-A network.
        pretraining: how it is trained on the synthetic set.
        classifier: how the linear layer is trained on real features, without augmentation.
        device: where to compute.
        seed: of the run.

    Source: Lee et al., arXiv 2310.06511, sec. 4 (linear evaluation on the source).
    """

    image_set: ImageSet
    arch: str
    pretraining: Recipe
    classifier: Recipe
    device: torch.device
    seed: int

    def __call__(self, step: int, x_syn: Tensor, y_syn: Tensor) -> float:
        """Accuracy in % of the set after a step of the run.

        Args:
            step: each evaluation has its own random stream and leaves the others alone.
            x_syn: (m, C, H, W) synthetic images.
            y_syn: (m, D) their targets.
        """
        image_set, device = self.image_set, self.device
        with local_seed(derive_seed(self.seed, "evaluation", step)):
            model = place(get_model(self.arch, image_set.img_shape, y_syn.shape[1]), device)
            linear = nn.Linear(model.num_features, image_set.num_classes).to(device)
        generator = make_generator(self.seed, "evaluation batches", step)
        synthetic = SyntheticSet(x_syn, y_syn)
        pretrain(model, synthetic, self.pretraining, device=device, generator=generator)
        model.requires_grad_(False)
        images, labels = image_set.train.images, image_set.train.labels
        if len(images) * model.num_features * 4 <= _CACHE_BYTES:
            inputs, transform = outputs(model.embed, images, image_set, device), None
        else:
            inputs, pipeline = images, ImagePipeline(image_set.stats)

            def transform(x: Tensor, draw: torch.Generator) -> Tensor:
                return model.embed(pipeline(x, draw))

        loader = TensorLoader(
            inputs,
            labels,
            batch_size=self.classifier.batch_size,
            device=device,
            generator=generator,
            transform=transform,
        )
        Trainer(linear, loader, self.classifier).run(what="linear classifier", progress=True)
        held_out = image_set.test or image_set.train
        with torch.no_grad():
            scores = outputs(lambda x: linear(model.embed(x)), held_out.images, image_set, device)
        return accuracy(scores, held_out.labels)
