"""Evaluation inside distillation: pre-train on the synthetic set, freeze, fit a linear layer."""

from dataclasses import dataclass

import torch
from torch import nn

from data.load import ImageSet
from data.loader import ImagePipeline
from data.synthetic import SyntheticSet
from evaluation.fit import Trainer, held_out_accuracy, outputs, pretrain
from evaluation.recipes import Recipe
from models import get_model
from utils.device import place
from utils.seed import derive_seed, local_seed, make_generator

# Features of the whole training split are kept when they take less than this.
_CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class LinearEvaluation:
    """Accuracy of a linear classifier on frozen features of a freshly pre-trained network.

    Without a test split the training split stands in. Source: Lee et al., arXiv 2310.06511, sec. 4.
    """

    image_set: ImageSet  # the labelled source
    arch: str  # zoo-A network
    pretraining: Recipe  # of the network on the synthetic set
    classifier: Recipe  # of the linear layer on real features, without augmentation
    device: torch.device
    seed: int

    def __call__(self, step: int, synthetic: SyntheticSet) -> float:
        """Accuracy in % of a set with target vectors (m, D), after a step of the run.

        Each evaluation has its own random stream and leaves the others alone.
        """
        image_set, device = self.image_set, self.device
        with local_seed(derive_seed(self.seed, "evaluation", step)):
            model = place(get_model(self.arch, image_set.img_shape, synthetic.targets.shape[1]), device)
            linear = nn.Linear(model.num_features, image_set.num_classes).to(device)
        generator = make_generator(self.seed, "evaluation batches", step)
        pretrain(model, synthetic, self.pretraining, generator)
        model.requires_grad_(False)
        images, labels = image_set.train.images, image_set.train.labels
        if len(images) * model.num_features * 4 <= _CACHE_BYTES:
            inputs, transform = outputs(model.embed, images, image_set, device), None
        else:
            pipeline = ImagePipeline(image_set.stats)
            inputs, transform = images, lambda x, draw: model.embed(pipeline(x, draw))
        loader = self.classifier.loader(inputs, labels, device, generator, transform)
        Trainer(linear, loader, self.classifier).run(what="linear classifier", progress=True)
        return held_out_accuracy(lambda x: linear(model.embed(x)), image_set, device)
