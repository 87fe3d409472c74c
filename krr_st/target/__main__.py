"""`python -m krr_st.target`: train a self-supervised target model by Barlow Twins, label-free."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor, nn

from data.load import ImageSet, load_set
from data.loader import TensorLoader
from evaluation.epochs import make_checkpoint, train_epochs
from evaluation.fit import Trainer
from evaluation.presets import resolve_preset
from evaluation.protocols import frozen_accuracy, outputs
from evaluation.recipes import Recipe
from evaluation.target import Representation, default_checkpoint
from krr_st.config import TargetFlags
from krr_st.target.barlow import TwoViews, barlow_twins_loss, projector
from utils import cli
from utils.device import place, resolve_device
from utils.errors import UserError, entry_point
from utils.run_folder import RunFolder
from utils.seed import derive_seed, local_seed, make_generator

_KNN_ROWS = 10000


def knn_accuracy(model: Representation, image_set: ImageSet, device: torch.device) -> float | None:
    """k-NN accuracy in % on the test split with the training split as bank; None without labels.

    The bank is cut to its first 10 000 rows, which is enough to watch a run.
    """
    if image_set.num_classes is None or image_set.test is None or image_set.test.labels is None:
        return None
    train = outputs(model, image_set.train.images[:_KNN_ROWS], image_set, device)
    test = outputs(model, image_set.test.images, image_set, device)
    return frozen_accuracy(
        "knn", train, image_set.train.labels[:_KNN_ROWS], test, image_set.test.labels, image_set.num_classes
    )


def train_target(
    flags: TargetFlags, image_set: ImageSet, run: RunFolder, device: torch.device
) -> Representation:
    """Train a target model on the training images, resuming where `run` stopped.

    Args:
        flags: architecture, recipe, views.
        image_set: any prepared set; its labels only serve the k-NN accuracy that is logged.
        run: folder of the log and the state; its seed is used.
        device: where to compute.

    Returns:
        The model in eval mode.
    """
    with local_seed(derive_seed(run.seed, "target")):
        model = Representation(flags.target_model, image_set.img_shape)
        head = projector(model.dim, flags.projector_dim, flags.projector_layers)
    network = place(nn.Sequential(model, head), device)
    views = TwoViews(
        image_set.size,
        image_set.channels,
        image_set.stats,
        hflip=image_set.hflip,
        min_crop=flags.min_crop,
        jitter=flags.jitter,
        degrees=flags.degrees,
    )
    loader = TensorLoader(
        image_set.train.images,
        None,
        batch_size=flags.batch_size,
        device=device,
        generator=make_generator(run.seed, "views"),
        transform=views,
        drop_last=True,
    )
    recipe = Recipe(
        "mse",
        flags.opt,
        flags.lr,
        flags.wd,
        "cosine",
        flags.batch_size,
        epochs=flags.epochs,
        warmup=round(flags.warmup_epochs * loader.steps_per_pass),
    )

    def loss_fn(net: nn.Module, pair: tuple[Tensor, Tensor], _: None) -> Tensor:
        return barlow_twins_loss(net(pair[0]), net(pair[1]), flags.off_diagonal)

    def measure(epoch: int) -> dict[str, float | None]:
        if epoch % flags.eval_every and epoch != flags.epochs:
            return {}
        return {"knn_accuracy": knn_accuracy(model.eval(), image_set, device)}

    trainer = Trainer(network, loader, recipe, loss_fn=loss_fn)
    train_epochs(trainer, run, save_every=flags.save_every, what="Barlow Twins", measure=measure)
    return model


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags, train, write the checkpoint and the record of the run."""
    flags = cli.parse(TargetFlags, argv, prog="python -m krr_st.target", description=__doc__)
    device = resolve_device(flags.device, flags.gpu_id)
    preset = resolve_preset(flags.data_name, flags.data_dir, flags.img_size)
    flags = replace(flags, target_model=flags.target_model or preset.target_model)
    image_set = load_set(flags.data_name, preset.size, flags.data_dir)
    if len(image_set.train) < 2:
        raise UserError(f"{image_set.train.path} holds one image; Barlow Twins needs at least two")
    Representation(flags.target_model, image_set.img_shape)  # an unknown name fails before a write

    def train(run: RunFolder) -> tuple[nn.Module, dict[str, float | None]]:
        model = train_target(flags, image_set, run, device)
        print(f"features of {model.dim}")
        return model.backbone, {"knn_accuracy": run.read_log()[-1].get("knn_accuracy")}

    path = default_checkpoint(flags.target_model, flags.data_name, flags.save_dir)
    make_checkpoint(path, flags, preset.size, device, train)
    return 0


if __name__ == "__main__":
    sys.exit(main())
