"""What a method is given: real data, the target model, seed, device, and initial images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.augment import normalize, to_float
from data.load import ImageSet
from data.loader import ImagePipeline, TensorLoader, Transform
from data.real_data import RealImages
from data.target_scale import TargetScale
from data.whitening import Whitening
from distillation.selection import kmeans_indices, random_indices
from evaluation.fit import outputs
from evaluation.target import Target
from utils.distributed import Group
from utils.errors import UserError
from utils.seed import draw_seed, make_generator


@dataclass(frozen=True)
class Problem:
    """One distillation: what is given, not how it is solved."""

    image_set: ImageSet  # the source
    device: torch.device
    seed: int  # of every random stream
    group: Group = Group()  # processes that share the work
    target: Target | None = None  # None for methods that work with class labels; see `target_scale`
    real: RealImages | None = None  # labelled, class by class; None for methods without labels
    # (x_syn, y_syn) -> a scalar added to the method's own loss, such as CLoM; its draws have a state_dict.
    extra: Callable[[Tensor, Tensor], Tensor] | None = None
    whitening: Whitening | None = None  # networks see images whitened by it
    target_scale: TargetScale | None = None  # by which the features of `target` are standardised

    @property
    def classes(self) -> int:
        """Their number; 1 for a source without labels."""
        return self.image_set.num_classes or 1

    def whiten(self, x: Tensor) -> Tensor:
        """Normalised images as networks see them: whitened, where there is a whitening."""
        return x if self.whitening is None else self.whitening(x)

    def unscaled(self, y: Tensor) -> Tensor:
        """Target vectors (m, D) as the target model itself gives them."""
        return y if self.target_scale is None else self.target_scale.undo(y)

    def loader(
        self, batch_size: int, generator: torch.Generator, transform: Transform | None = None
    ) -> TensorLoader:
        """Batches (x, index) of the training images, dealt to the processes; by default normalised only.

        `batch_size` is that over all processes; `generator` draws the order and what `transform`
        draws. The last, smaller batch of each pass is kept.
        """
        return TensorLoader(
            self.image_set.train.images,
            None,
            batch_size=batch_size,
            device=self.device,
            generator=generator,
            transform=transform or ImagePipeline(self.image_set.stats),
            shard=self.group,
        )

    @torch.no_grad()
    def start_with_features(
        self, count: int, space: str = "normalized", images: str = "random"
    ) -> tuple[Tensor, Tensor]:
        """`count` real images (m, C, H, W) and the target model's features of them (m, D), float32.

        In the "raw" space the images are pixels in [0, 1] while the features belong to normalised
        ones, as in the released KRR-ST code. Images "kmeans" are the nearest to k-means centres in
        feature space.
        """
        train = self.image_set.train
        generator = make_generator(self.seed, "initial images")
        if images == "kmeans":
            points = outputs(self.target, train.images, self.image_set, self.device).float()
            index = kmeans_indices(points, count, draw_seed(generator))
        else:
            index = random_indices(self.image_set, count, generator)
        pixels = to_float(train.images[index].to(self.device))
        x = normalize(pixels, self.image_set.stats)
        y = torch.cat([self.target(chunk).float() for chunk in x.split(256)])
        return (pixels if space == "raw" else x), y

    def start_by_class(self, ipc: int, init: str) -> tuple[Tensor, Tensor]:
        """`ipc` images of every class, N(0, 1) noise or real ones, in class order; and int64 labels.

        They are as networks see them (`whiten`).
        """
        check_start(self.real, ipc, init)
        generator = make_generator(self.seed, "initial images")
        labels = torch.arange(self.real.num_classes).repeat_interleave(ipc).to(self.device)
        if init == "noise":
            shape = (len(labels), *self.image_set.img_shape)
            return torch.randn(shape, generator=generator).to(self.device), labels
        return self.whiten(torch.cat(list(self.real.draw_classes(ipc, generator)))), labels


def check_start(real: RealImages, ipc: int, init: str, num_images: int | None = None) -> None:
    """Raise a UserError for a class with fewer than ipc images to start from.

    `num_images` is given where that flag says how many there are, not --ipc.
    """
    counts = [len(index) for index in real.index_of_class]
    if init == "real" and min(counts) < ipc:
        c, flag = counts.index(min(counts)), "--ipc" if num_images is None else "--num_images"
        raise UserError(
            f"class {c} has {counts[c]} training images, {flag} {num_images or ipc} with --init real needs "
            f"{ipc}; use --init noise or a smaller {flag}"
        )
