"""`python -m krr_st.baselines`: comparison sets that need no optimisation of images.

    python -m krr_st.baselines --method random_features --data_name digits --num_images 20

random: real images with class labels, class-balanced. random_features: real images with the target
model's features, what every KRR-ST result has to beat. Of the other choices there are two forms each,
NAME with labels (class by class, but for k-means) and NAME_features: kmeans, the real image nearest to
each k-means centre; herding, the images whose mean is nearest to that of all; high_loss, those with the
largest loss early in training (MKDT's start). gaussian: N(0, 1) noise with features.

With smaller sizes, types or ranks than usual (--x_size, --x_dtype, --y_rank, --y_dtype, --y_bits) or several
--views of each image, perhaps blended with others (--blend), the set is one compact file. --bytes gives sets
of equal storage.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.augment import normalize, to_float
from data.load import ImageSet, load_set
from data.synthetic import CompactFlags, SyntheticSet, TrainingSettings, save_compact
from data.synthetic.compact import images_within
from data.synthetic.forms import stored_bytes
from data.synthetic.views import SetViews, index_type
from data.target_scale import TargetScale
from distillation.selection import (
    balanced_indices,
    early_losses,
    herding_indices,
    kmeans_indices,
    per_class,
    random_indices,
)
from evaluation.fit import outputs
from evaluation.presets import resolve_preset
from evaluation.recipes import PRETRAIN, Recipe
from evaluation.target import load_target
from krr_st.config import BaselineFlags
from models import get_model
from utils import cli
from utils.device import place, resolve_device
from utils.errors import UserError, pick
from utils.memory import out_of_memory_says
from utils.seed import derive_seed, local_seed, make_generator, resolve_seed


@dataclass(frozen=True)
class Request:
    """What a baseline is made from."""

    image_set: ImageSet
    count: int
    space: str  # of distances
    student: str  # network whose losses count
    students: int
    seed: int
    device: torch.device
    target: Callable[[], nn.Module]  # loaded only where it is needed
    views: SetViews | None  # of the images; None: as they are

    def labels(self) -> Tensor:
        """Class labels of the training images."""
        train = self.image_set.train
        if train.labels is None:
            raise UserError(
                f"{train.path.parent} has no labels; use a method with features: random_features, "
                "kmeans_features, herding_features or high_loss_features"
            )
        return train.labels

    def images(self, index: Tensor) -> Tensor:
        """Normalised training images at `index`, on the device."""
        pixels = to_float(self.image_set.train.images[index].to(self.device))
        return normalize(pixels, self.image_set.stats)

    @torch.no_grad()
    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images, in each of their views, and the target model's features of them."""
        if self.views is not None:
            x = self.views.images(x, self.image_set.stats)
        return x, torch.cat([self.target()(chunk) for chunk in x.split(256)])

    def points(self) -> Tensor:
        """What distances are measured between: pixels, or the target model's features."""
        return to_float(self.image_set.train.images) if self.space == "pixel" else self.features()

    def features(self) -> Tensor:
        """The target model's, of all training images."""
        return outputs(self.target(), self.image_set.train.images, self.image_set, self.device).float()

    def losses(self, targets: Tensor) -> Tensor:
        """Of each training image after an epoch of MKDT's experts, with labels or features as targets."""
        width, loss = self.image_set.num_classes, "cross_entropy"
        if targets.is_floating_point():
            width, loss = targets.shape[1], "mse"
        recipe = Recipe(loss, "sgd", 0.1, 1e-4, "constant", 256, epochs=1)

        def network(seed: int) -> nn.Module:
            with local_seed(seed):
                return place(get_model(self.student, self.image_set.img_shape, width), self.device)

        seeds = [derive_seed(self.seed, "student", n) for n in range(self.students)]
        return early_losses(network, self.image_set, targets, recipe, seeds, self.device)


def _random(request: Request, labels: Tensor | None) -> Tensor:
    choose = random_indices if labels is None else balanced_indices
    return choose(request.image_set, request.count, make_generator(request.seed, "random"))


def _kmeans(request: Request, labels: Tensor | None) -> Tensor:
    index = kmeans_indices(request.points(), request.count, derive_seed(request.seed, "kmeans"))
    return index if labels is None else index[labels[index].argsort(stable=True)]


def _herding(request: Request, labels: Tensor | None) -> Tensor:
    points = request.points()
    if labels is None:
        return herding_indices(points, request.count)
    return per_class(
        labels, request.count, lambda mine, count: herding_indices(points[mine.to(points.device)], count)
    )


def _high_loss(request: Request, labels: Tensor | None) -> Tensor:
    losses = request.losses(request.features() if labels is None else labels)
    if labels is None:
        return losses.topk(request.count).indices
    return per_class(labels, request.count, lambda mine, count: losses[mine].topk(count).indices)


# (request, labels or None for sets of features) -> indices of training images, by class with labels
CHOICES: dict[str, Callable[[Request, Tensor | None], Tensor]] = {
    "random": _random,
    "kmeans": _kmeans,
    "herding": _herding,
    "high_loss": _high_loss,
}


def _chosen(name: str, featured: bool, request: Request) -> tuple[Tensor, Tensor]:
    labels = None if featured else request.labels()
    index = CHOICES[name](request, labels)
    x = request.images(index)
    return request.with_features(x) if featured else (x, labels[index])


def _gaussian(request: Request) -> tuple[Tensor, Tensor]:
    shape = (request.count, *request.image_set.img_shape)
    x = torch.randn(shape, generator=make_generator(request.seed, "gaussian"))
    return request.with_features(x.to(request.device))


BASELINES: dict[str, Callable[[Request], tuple[Tensor, Tensor]]] = {
    f"{name}{suffix}": functools.partial(_chosen, name, bool(suffix))
    for name in CHOICES
    for suffix in ("", "_features")
} | {"gaussian": _gaussian}


@cli.command(BaselineFlags, prog="python -m krr_st.baselines", description=__doc__)
def main(flags: BaselineFlags) -> int:
    """Make one baseline set and write {synthetic_data_dir}/{data_name}/{method}/ (compact: .safetensors)."""
    make = pick(BASELINES, flags.method, "method")
    soft = PRETRAIN[flags.method].loss != "cross_entropy"
    for asked, what in (
        (flags.target_scale == "std", "target_scale std"),
        (flags.mixup, "mixup"),
        (flags.views > 1, f"views {flags.views}"),
        (flags.y_bits is not None, f"y_bits {flags.y_bits}"),
    ):
        if asked and not soft:
            raise UserError(f"--{what} needs target vectors; --method {flags.method} gives class labels")
    seed = resolve_seed(flags.seed)
    device = resolve_device(flags.device, flags.gpu_id)
    preset = resolve_preset(flags.data_name, flags.data_dir, flags.img_size)
    image_set = load_set(flags.data_name, preset.size, flags.data_dir, splits=("train",))
    name = flags.target_model or preset.target_model

    @functools.cache
    def target() -> nn.Module:
        where = dict(data_name=flags.data_name, data_dir=flags.data_dir)
        return load_target(name, flags.target_ckpt, image_set, device, **where)

    how = cli.take(CompactFlags, vars(flags))
    compact = flags.views > 1 or how != CompactFlags()
    classes = index_type(image_set.num_classes - 1) if compact and image_set.num_classes else torch.int64
    count, given = flags.num_images or preset.num_images, "--num_images"
    if flags.bytes is not None:
        label, given = target().dim if soft else classes, f"--bytes {flags.bytes}: room for"
        count = images_within(flags.bytes, image_set.img_shape, label, how, flags)
    if count > len(image_set.train) and make is not _gaussian:
        raise UserError(
            f"{given} {count} is more than the {len(image_set.train)} images in {image_set.train.path}"
        )
    student = flags.student or preset.network
    get_model(student, image_set.img_shape)  # an unknown name fails now
    views = flags.draw(count, image_set.size, image_set.hflip, derive_seed(seed, "views"))
    request = Request(
        image_set, count, flags.kmeans_space, student, flags.num_students, seed, device, target, views
    )
    with out_of_memory_says(device, "lower --num_images, --bytes or --views"):
        x, y = make(request)
    scale = None
    if flags.target_scale == "std":
        scale = TargetScale.fit(outputs(target(), image_set.train.images, image_set, device))
    training = TrainingSettings(targets=scale, mixup=flags.mixup or None)
    info = {"method": flags.method, "seed": seed}
    synthetic = SyntheticSet(x, y, image_set.stats, flags.data_name, info, training, views)
    path = Path(flags.synthetic_data_dir) / flags.data_name / flags.method
    if compact:
        path = path.with_name(f"{flags.method}.safetensors")
        save_compact(synthetic, path, how)
    else:
        synthetic.save(path)
    x_bytes, y_bytes, _ = stored_bytes(path)
    kind = "hybrid " if flags.hybrid else "blended " * flags.blend
    each = f" in {flags.views} {kind}views" if flags.views > 1 else ""
    print(f"{flags.method} of {flags.data_name}: {count} images{each} in {path}, {x_bytes + y_bytes} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
