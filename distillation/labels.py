"""The two kinds of labels of a synthetic set: where they come from, and how such a set is judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from data.augment.dsa import without_flip
from data.load import ImageSet
from data.prepared import labelled_classes
from data.real_data import RealImages
from data.synthetic import SyntheticSet, TrainingSettings
from distillation.problem import check_start
from distillation.run import Method
from evaluation.linear import LinearEvaluation
from evaluation.presets import Preset
from evaluation.recipes import Recipe, pretrain_recipe
from evaluation.score import score_networks
from evaluation.target import Target, load_target, resolve_checkpoint
from models import get_model
from models.layout import arranged
from utils.errors import UserError
from utils.seed import derive_seed, local_seed
from utils.table import format_mean_std

# (step, set) -> what is logged
Evaluation = Callable[[int, SyntheticSet], Any]


class Labels(Protocol):
    """Labels of one kind for one run."""

    key: str  # of the evaluations' log entries
    outputs: int  # of a network that is trained on the set
    given: dict[str, Any]  # fields of the Problem
    inputs: dict[str, str]  # what else than the source is read -> its fingerprint

    @staticmethod
    def resolve(method: Method, flags: Any, preset: Preset) -> dict[str, Any]:
        """Flags that this kind decides; a UserError where they do not fit."""

    def __init__(self, method: Method, flags: Any, image_set: ImageSet, device: torch.device) -> None:
        """Read what is needed, or raise a UserError."""

    def evaluation(self, seed: int) -> Evaluation | None:
        """How the set is evaluated in a run of that seed; None: there is nothing to test with."""

    def evaluation_cost(self) -> float:
        """Images through networks in one evaluation, counted as in `Distiller.cost`."""


def set_recipe(method: Method, flags: Any, image_set: ImageSet, training: TrainingSettings) -> Recipe:
    """How a network is trained on the method's set: the table's recipe, what the set says, the flags."""
    name, count = method.name.lower(), flags.num_images
    recipe = pretrain_recipe(name, flags.data_name, flags.test_model, count=count)
    stored = count if getattr(flags, "views", 1) > 1 else None
    recipe = recipe.fitted(training, stored).with_flags(flags, "pre_")
    if flags.pre_dsa is None and not image_set.hflip:
        recipe = recipe.override(dsa=without_flip(recipe.dsa))
    return recipe


def linear_recipe(flags: Any) -> Recipe:
    """How the linear classifier on frozen features is trained."""
    opt, lr, wd, batch = flags.test_opt, flags.test_lr, flags.test_wd, flags.test_batch_size
    return Recipe("cross_entropy", opt, lr, wd, "cosine", batch, steps=flags.test_iteration)


class FeatureLabels:
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
        self.method, self.flags, self.image_set, self.device = method, flags, image_set, device
        where = dict(data_name=flags.data_name, data_dir=flags.data_dir, layout=flags.layout)
        model = load_target(flags.target_model, flags.target_ckpt, image_set, device, **where)
        self.given, self.outputs = {"target": Target(model, flags.precision)}, model.dim
        self.inputs = {"target model": model.fingerprint}

    def evaluation(self, seed: int) -> Evaluation | None:
        """Accuracy in % of a linear classifier; None for a source without labels in each split."""
        flags, image_set = self.flags, self.image_set
        if not image_set.labelled:
            return None

        def evaluate(step: int, synthetic: SyntheticSet) -> float:
            recipes = set_recipe(self.method, flags, image_set, synthetic.training), linear_recipe(flags)
            linear = LinearEvaluation(image_set, flags.test_model, *recipes, self.device, seed)
            found = linear(step, synthetic)
            print(f"step {step}: linear accuracy {found:.2f} %", flush=True)
            return found

        return evaluate

    def evaluation_cost(self) -> float:
        """Pre-training, features of all images."""
        image_set = self.image_set
        if not image_set.labelled:
            return 0.0
        recipe = set_recipe(self.method, self.flags, image_set, TrainingSettings())
        read = sum(len(part) for part in (image_set.train, image_set.test) if part is not None)
        return recipe.work_on(self.flags.num_images * getattr(self.flags, "views", 1)) + read


class ClassLabels:
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
        self.method, self.flags, self.image_set, self.device = method, flags, image_set, device
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

    def evaluation(self, seed: int) -> Evaluation:
        """Test accuracies in % of `num_eval` networks."""
        flags, image_set = self.flags, self.image_set

        def evaluate(step: int, synthetic: SyntheticSet) -> list[float]:
            recipe = set_recipe(self.method, flags, image_set, synthetic.training)
            seeds = [derive_seed(seed, "evaluation", step, n) for n in range(flags.num_eval)]
            found = score_networks(self.new_network, synthetic, image_set, recipe, seeds, self.device)
            found = [100 * value for value in found]
            shown = f"{format_mean_std(found)} % over {len(found)} networks"
            print(f"step {step}: test accuracy {shown} ({recipe})", flush=True)
            return found

        return evaluate

    def evaluation_cost(self) -> float:
        """Training and test of each network."""
        recipe = set_recipe(self.method, self.flags, self.image_set, TrainingSettings())
        tested = len(self.image_set.test or self.image_set.train)
        return self.flags.num_eval * (recipe.work_on(self.flags.num_images) + tested)


# What a method's row calls them -> the kind.
LABELS: dict[str, type[Labels]] = {"features": FeatureLabels, "classes": ClassLabels}
