"""`python -m krr_st.target`: train a self-supervised target model by Barlow Twins, label-free."""

import sys
from dataclasses import replace

import torch
from torch import Tensor, nn

from data.augment import normalize, to_float
from data.load import ImageSet, load_set
from data.prepared import spaced
from data.specs import Stats
from evaluation.epochs import make_checkpoint, train_epochs
from evaluation.fit import Trainer, outputs
from evaluation.presets import resolve_preset
from evaluation.probe import frozen_accuracy
from evaluation.recipes import Recipe
from evaluation.target import Representation, default_checkpoint
from krr_st.config import TargetFlags
from utils import cli
from utils.device import place, resolve_device
from utils.errors import UserError
from utils.precision import autocast
from utils.run_folder import RunFolder
from utils.seed import derive_seed, draw_seed, local_seed, make_generator

_KNN_ROWS = 10000  # of the bank: enough to watch a run


def barlow_twins_loss(z1: Tensor, z2: Tensor, off_diagonal: float = 5e-3) -> Tensor:
    """Distance of the views' cross-correlation matrix from the identity.

        Σ_i (1 - C_ii)² + off_diagonal · Σ_{i≠j} C_ij²,  C = Z₁ᵀZ₂ / n

    where Z₁ and Z₂ (n, p) are projections of two views of the same n ≥ 2 images, each column
    standardised over the batch. The result is in float32 or the wider dtype of the inputs.

    Raises:
        ValueError: shapes differ or n < 2.

    Source: Zbontar et al., "Barlow Twins", arXiv 2103.03230, eq. 1-2.
    """
    if z1.dim() != 2 or z1.shape != z2.shape or len(z1) < 2:
        found = f"{tuple(z1.shape)}, {tuple(z2.shape)}"
        raise ValueError(f"expected two (n, p) matrices with n >= 2, got {found}")
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    c = z1.mT @ z2 / len(z1)  # (p, p)
    diagonal = c.diagonal()
    off = c.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal * off


def projector(features: int, hidden: int, layers: int = 3) -> nn.Sequential:
    """The projection head: `layers` linear layers of width `hidden`, BatchNorm + ReLU between.

    Maps (n, features) to (n, hidden). Source: arXiv 2103.03230, sec. 2.2.
    """
    blocks: list[nn.Module] = [nn.Linear(features, hidden, bias=False)]
    for _ in range(layers - 1):
        blocks += [nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden, bias=False)]
    return nn.Sequential(*blocks)


class TwoViews:
    """Two random views of each image, by kornia, batched on the images' device.

    Random resized crop, rotation, mirror, colour jitter, grey: what Barlow Twins uses at small sizes,
    as strong as the flags of these names say. Colours of images without three channels are left
    alone. Views have the images' shape and are normalised with `stats` last.
    """

    def __init__(
        self,
        img_shape: tuple[int, int, int],
        stats: Stats,
        *,
        hflip: bool,
        min_crop: float,
        jitter: float,
        degrees: float = 0.0,
    ) -> None:
        import kornia.augmentation as K  # slow to import, and only training a target needs it

        self.stats = stats
        crop = K.RandomResizedCrop(img_shape[1:], scale=(min_crop, 1.0), cropping_mode="resample")
        steps = [crop]
        if degrees > 0:
            steps.append(K.RandomRotation(degrees, p=1.0))
        if hflip:
            steps.append(K.RandomHorizontalFlip())
        if jitter > 0 and img_shape[0] == 3:
            steps.append(K.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.4 * jitter, 0.2 * jitter, p=0.8))
            steps.append(K.RandomGrayscale(p=0.2))
        self._augment = nn.Sequential(*steps)

    @torch.no_grad()
    def __call__(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(n, C, H, W) in pixel space -> two normalised float32 batches of (n, C, size, size)."""
        x = to_float(x)
        with local_seed(draw_seed(generator)):  # kornia draws from the global random state
            first, second = self._augment(torch.cat([x, x])).chunk(2)  # a call costs more than its images
        return normalize(first, self.stats), normalize(second, self.stats)


def knn_accuracy(model: Representation, image_set: ImageSet, device: torch.device) -> float | None:
    """k-NN accuracy in % on the test split with the training split as bank; None without labels."""
    train, test, classes = image_set.train, image_set.test, image_set.num_classes
    if test is None or not image_set.labelled:
        return None
    rows = spaced(len(train), _KNN_ROWS)  # not the first: sets may be in the order of their classes
    bank = outputs(model, train.images[rows], image_set, device)
    features = outputs(model, test.images, image_set, device)
    return frozen_accuracy("knn", (bank, train.labels[rows]), (features, test.labels), classes)


def target_trainer(flags: TargetFlags, image_set: ImageSet, device: torch.device, seed: int) -> Trainer:
    """A target model and its projector before the first step of Barlow Twins."""
    with local_seed(derive_seed(seed, "target")):
        model = Representation(flags.target_model, image_set.img_shape)
        head = projector(model.dim, flags.projector_dim, flags.projector_layers)
    how = dict(min_crop=flags.min_crop, jitter=flags.jitter, degrees=flags.degrees)
    views = TwoViews(image_set.img_shape, image_set.stats, hflip=image_set.hflip, **how)
    recipe = Recipe("mse", flags.opt, flags.lr, flags.wd, "cosine", flags.batch_size, flags.epochs)
    generator = make_generator(seed, "views")
    loader = recipe.loader(image_set.train.images, None, device, generator, views, drop_last=True)
    recipe = recipe.override(warmup=round(flags.warmup_epochs * loader.steps_per_pass))

    def loss_fn(net: nn.Module, pair: tuple[Tensor, Tensor], _: None) -> Tensor:
        with autocast(flags.precision, device):
            views = net(pair[0]), net(pair[1])
        return barlow_twins_loss(*views, flags.off_diagonal)

    return Trainer(place(nn.Sequential(model, head), device), loader, recipe, loss_fn=loss_fn)


def train_target(
    flags: TargetFlags, image_set: ImageSet, trainer: Trainer, run: RunFolder
) -> tuple[nn.Module, dict[str, float | None]]:
    """Train a target model, resuming where `run` stopped.

    Returns its backbone and the last k-NN accuracy: labels, where there are any, serve that alone.
    """
    model = trainer.model[0]

    def measure(epoch: int) -> dict[str, float | None]:
        if epoch % flags.eval_every and epoch != flags.epochs:
            return {}
        return {"knn_accuracy": knn_accuracy(model.eval(), image_set, trainer.loader.device)}

    train_epochs(trainer, run, save_every=flags.save_every, what="Barlow Twins", measure=measure)
    print(f"features of {model.dim}")
    return model.backbone, {"knn_accuracy": run.read_log()[-1].get("knn_accuracy")}


@cli.command(TargetFlags, prog="python -m krr_st.target", description=__doc__)
def main(flags: TargetFlags) -> int:
    """Train, write the checkpoint and the record of the run."""
    device = resolve_device(flags.device, flags.gpu_id)
    preset = resolve_preset(flags.data_name, flags.data_dir, flags.img_size)
    flags = replace(flags, target_model=flags.target_model or preset.target_model)
    image_set = load_set(flags.data_name, preset.size, flags.data_dir)
    if len(image_set.train) < 2:
        raise UserError(f"{image_set.train.path} holds one image; Barlow Twins needs at least two")
    Representation(flags.target_model, image_set.img_shape)  # an unknown name fails before a write
    path = default_checkpoint(flags.target_model, flags.data_name, flags.save_dir)
    trained = target_trainer, train_target
    make_checkpoint(path, flags, image_set, device, *trained, "python -m krr_st.target")
    return 0


if __name__ == "__main__":
    sys.exit(main())
