"""The two kinds of labels of a synthetic set: where they come from, and how such a set is judged."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.load import ImageSet
from data.loader import ImagePipeline
from data.prepared import labelled_classes
from data.real_data import RealImages
from data.synthetic import SyntheticSet, TrainingSettings
from distillation.problem import check_start
from distillation.run import Method
from evaluation.fit import Trainer, held_out_accuracy, outputs, pretrain
from evaluation.presets import Preset
from evaluation.recipes import Recipe, pretrain_recipe
from evaluation.score import score_networks
from evaluation.target import Target, load_target, resolve_checkpoint
from models import get_model
from models.layout import arranged
from utils.device import place
from utils.errors import UserError
from utils.seed import derive_seed, local_seed, make_generator
from utils.table import format_mean_std

# Features of the whole training split are kept when they take less than this.
_CACHE_BYTES = 4 << 30


class Labels:
    """Labels of one kind for one run; built, it has read what it needs, or raised a UserError.

    A kind gives `resolve(method, flags, preset)`, the flags that it decides, or a UserError where they do
    not fit; `evaluate(step, synthetic, seed)`, what is logged of a set after a step of a run of that seed;
    and `evaluation_cost()`, the images through networks that this takes, counted as in `Distiller.cost`.
    The last two are called only for a labelled source.
    """

    key: str  # of the evaluations' log entries
    outputs: int  # of a network that is trained on the set
    given: dict[str, Any]  # fields of the Problem
    inputs: dict[str, str]  # what else than the source is read -> its fingerprint

    def __init__(self, method: Method, flags: Any, image_set: ImageSet, device: torch.device) -> None:
        self.method, self.flags, self.image_set, self.device = method, flags, image_set, device

    def recipe(self, training: TrainingSettings) -> Recipe:
        """How a network is trained on the set: the method's recipe, what the set says, the flags."""
        flags, name = self.flags, self.method.name.lower()
        recipe = pretrain_recipe(name, flags.data_name, flags.test_model, count=flags.num_images)
        stored = flags.num_images if getattr(flags, "views", 1) > 1 else None
        return recipe.for_set(training, stored, flags, self.image_set.hflip)


def linear_recipe(flags: Any) -> Recipe:
    """How the linear classifier on frozen features is trained."""
    opt, lr, wd, batch = flags.test_opt, flags.test_lr, flags.test_wd, flags.test_batch_size
    return Recipe("cross_entropy", opt, lr, wd, "cosine", batch, steps=flags.test_iteration)


class FeatureLabels(Labels):
    """Features of a frozen target model; the set is judged by a linear classifier on a network's."""

    key = "linear_accuracy"

    @staticmethod
    def resolve(method: Method, flags: Any, preset: Preset) -> dict[str, Any]:
        """The target model and its checkpoint, the number of images."""
        name = flags.target_model or preset.target_model
        path = resolve_checkpoint(name, flags.target_ckpt, flags.data_name)
        count = flags.num_images or preset.num_images
        return dict(target_model=name, target_ckpt=path, num_images=count)

    def __init__(self, method: Method, flags: Any, image_set: ImageSet, device: torch.device) -> None:
        super().__init__(method, flags, image_set, device)
        where = dict(data_name=flags.data_name, data_dir=flags.data_dir, layout=flags.layout)
        model = load_target(flags.target_model, flags.target_ckpt, image_set, device, **where)
        self.given, self.outputs = {"target": Target(model, flags.precision)}, model.dim
        self.inputs = {"target model": model.fingerprint}

    def evaluate(self, step: int, synthetic: SyntheticSet, seed: int) -> float:
        """Accuracy in % of a linear classifier on frozen features of a freshly pre-trained network.

        Without a test split the training split stands in. Each evaluation has its own random stream and
        leaves the others alone. Source: Lee et al., arXiv 2310.06511, sec. 4.
        """
        flags, image_set, device = self.flags, self.image_set, self.device
        with local_seed(derive_seed(seed, "evaluation", step)):
            model = get_model(flags.test_model, image_set.img_shape, synthetic.targets.shape[1])
            linear = nn.Linear(model.num_features, image_set.num_classes).to(device)
        generator = make_generator(seed, "evaluation batches", step)
        model = place(model, device)
        pretrain(model, synthetic, self.recipe(synthetic.training), generator)
        model.requires_grad_(False)
        images, labels = image_set.train.images, image_set.train.labels
        if len(images) * model.num_features * 4 <= _CACHE_BYTES:
            inputs, transform = outputs(model.embed, images, image_set, device), None
        else:
            pipeline = ImagePipeline(image_set.stats)
            inputs, transform = images, lambda x, draw: model.embed(pipeline(x, draw))
        recipe = linear_recipe(flags)
        loader = recipe.loader(inputs, labels, device, generator, transform)
        Trainer(linear, loader, recipe).run(what="linear classifier", progress=True)
        found = held_out_accuracy(lambda x: linear(model.embed(x)), image_set, device)
        print(f"step {step}: linear accuracy {found:.2f} %", flush=True)
        return found

    def evaluation_cost(self) -> float:
        """Pre-training, features of all images."""
        recipe, splits = self.recipe(TrainingSettings()), (self.image_set.train, self.image_set.test)
        read = sum(len(part) for part in splits if part is not None)
        return recipe.work_on(self.flags.num_images * getattr(self.flags, "views", 1)) + read


class ClassLabels(Labels):
    """Classes of a labelled source; the set is judged by random networks that are trained on it."""

    key = "test_accuracy"

    @staticmethod
    def resolve(method: Method, flags: Any, preset: Preset) -> dict[str, Any]:
        """The number of images: a multiple of the number of classes."""
        classes = labelled_classes(flags.data_name, flags.data_dir, preset.size)
        if classes is None:
            folder = Path(flags.data_dir) / flags.data_name
            raise UserError(
                f"{folder} has no labels; --method {method.name} works with classes (krr_st does without)"
            )
        if classes < 2:
            raise UserError(f"{flags.data_name} has one class; --method {method.name} needs two or more")
        if flags.num_images is None:
            return dict(num_images=max(1, preset.num_images // classes) * classes)
        if flags.num_images % classes:
            raise UserError(
                f"--num_images {flags.num_images}: expected a multiple of the {classes} classes of "
                f"{flags.data_name}"
            )
        return {}

    def __init__(self, method: Method, flags: Any, image_set: ImageSet, device: torch.device) -> None:
        super().__init__(method, flags, image_set, device)
        if not image_set.labelled:
            raise UserError(
                f"{image_set.train.path.parent} has no labels in each split; evaluations need them"
            )
        real = RealImages.from_set(image_set, device)
        check_start(real, flags.num_images // image_set.num_classes, flags.init, flags.num_images)
        self.given, self.outputs, self.inputs = {"real": real}, image_set.num_classes, {}

    def new_network(self, seed: int) -> nn.Module:
        """The evaluation's network, initialised from `seed` alone."""
        with local_seed(seed):
            network = get_model(self.flags.test_model, self.image_set.img_shape, self.outputs)
        return arranged(network, self.device)

    def evaluate(self, step: int, synthetic: SyntheticSet, seed: int) -> list[float]:
        """Test accuracies in % of `num_eval` networks."""
        recipe = self.recipe(synthetic.training)
        seeds = [derive_seed(seed, "evaluation", step, n) for n in range(self.flags.num_eval)]
        found = score_networks(self.new_network, synthetic, self.image_set, recipe, seeds, self.device)
        found = [100 * value for value in found]
        shown = f"{format_mean_std(found)} % over {len(found)} networks"
        print(f"step {step}: test accuracy {shown} ({recipe})", flush=True)
        return found

    def evaluation_cost(self) -> float:
        """Training and test of each network."""
        recipe = self.recipe(TrainingSettings())
        tested = len(self.image_set.test or self.image_set.train)
        return self.flags.num_eval * (recipe.work_on(self.flags.num_images) + tested)


# What a method's row calls them -> the kind.
LABELS: dict[str, type[Labels]] = {"features": FeatureLabels, "classes": ClassLabels}
