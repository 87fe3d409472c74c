"""`python -m krr_st.target`: train a self-supervised target model by Barlow Twins, label-free."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor, nn

import data
from data.load import ImageSet
from data.loader import TensorLoader
from evaluation.protocols import frozen_accuracy, outputs
from krr_st.barlow import TwoViews, barlow_twins_loss, projector
from krr_st.config import TargetFlags
from krr_st.epochs import make_checkpoint, train_epochs
from krr_st.presets import resolve_preset
from krr_st.target_model import Representation, default_checkpoint
from utils import cli
from utils.device import place, resolve_device
from utils.errors import UserError, entry_point
from utils.optim import make_optimizer
from utils.runlog import RunFolder
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
        "knn", train, image_set.train.labels[:_KNN_ROWS], test, image_set.test.labels,
        image_set.num_classes,
    )  # fmt: skip


def train_target(
    image_set: ImageSet,
    *,
    arch: str,
    epochs: int,
    batch_size: int,
    opt: str,
    lr: float,
    wd: float,
    warmup_epochs: float,
    off_diagonal: float,
    projector_dim: int,
    projector_layers: int,
    min_crop: float,
    jitter: float,
    degrees: float,
    eval_every: int,
    save_every: int,
    run: RunFolder,
    device: torch.device,
) -> Representation:
    """Train a target model on the training images of `image_set`, going on where `run` stopped.

    Args:
        image_set: any prepared set; its labels only serve the k-NN accuracy that is logged.
        arch: network, a name of zoo A.
        epochs: passes over the images (incomplete batches left out).
        batch_size: images a step.
        opt: adamw, lars or sgd.
        lr: peak learning rate; linear warm-up, then cosine to 0.
        wd: weight decay.
        warmup_epochs: length of the warm-up.
        off_diagonal: weight of the loss's off-diagonal term.
        projector_dim: width of the projector.
        projector_layers: its linear layers.
        min_crop: smallest crop as a share of the area.
        jitter: strength of the colour jitter.
        degrees: largest rotation of a view.
        eval_every: epochs between k-NN accuracies.
        save_every: epochs between saves of the run state.
        run: folder of the log and the state; its seed is used.
        device: where to compute.

    Returns:
        The model in eval mode.
    """
    with local_seed(derive_seed(run.seed, "target")):
        model = Representation(arch, image_set.img_shape)
        head = projector(model.dim, projector_dim, projector_layers)
    network = place(nn.Sequential(model, head), device)
    views = TwoViews(
        image_set.size, image_set.channels, image_set.stats,
        hflip=image_set.hflip, min_crop=min_crop, jitter=jitter, degrees=degrees,
    )  # fmt: skip
    loader = TensorLoader(
        image_set.train.images, None, batch_size=batch_size, device=device,
        generator=make_generator(run.seed, "views"), transform=views, drop_last=True,
    )  # fmt: skip
    optimizer = make_optimizer(opt, network.parameters(), lr=lr, wd=wd)

    def loss_fn(net: nn.Module, pair: tuple[Tensor, Tensor], _: None) -> Tensor:
        return barlow_twins_loss(net(pair[0]), net(pair[1]), off_diagonal)

    def measure(epoch: int) -> dict[str, float | None]:
        if epoch % eval_every and epoch != epochs:
            return {}
        return {"knn_accuracy": knn_accuracy(model.eval(), image_set, device)}

    train_epochs(
        network, loader, loss_fn, optimizer, epochs=epochs, warmup_epochs=warmup_epochs,
        save_every=save_every, run=run, what="Barlow Twins", measure=measure,
    )  # fmt: skip
    return model


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags, train, write the checkpoint and the record of the run."""
    flags = cli.parse(TargetFlags, argv, prog="python -m krr_st.target", description=__doc__)
    device = resolve_device(flags.device, flags.gpu_id)
    preset = resolve_preset(flags.data_name, flags.data_dir, flags.img_size)
    flags = replace(flags, target_model=flags.target_model or preset.target_model)
    image_set = data.load(flags.data_name, preset.size, flags.data_dir)
    if len(image_set.train) < 2:
        raise UserError(f"{image_set.train.path} holds one image; Barlow Twins needs at least two")
    Representation(flags.target_model, image_set.img_shape)  # an unknown name fails before a write

    def train(run: RunFolder) -> tuple[nn.Module, dict[str, float | None]]:
        model = train_target(
            image_set, arch=flags.target_model, epochs=flags.epochs, batch_size=flags.batch_size,
            opt=flags.opt, lr=flags.lr, wd=flags.wd, warmup_epochs=flags.warmup_epochs,
            off_diagonal=flags.off_diagonal, projector_dim=flags.projector_dim,
            projector_layers=flags.projector_layers, min_crop=flags.min_crop, jitter=flags.jitter,
            degrees=flags.degrees, eval_every=flags.eval_every, save_every=flags.save_every,
            run=run, device=device,
        )  # fmt: skip
        print(f"features of {model.dim}")
        return model.backbone, {"knn_accuracy": run.read_log()[-1].get("knn_accuracy")}

    path = default_checkpoint(flags.target_model, flags.data_name, flags.save_dir)
    make_checkpoint(path, flags, preset.size, device, train)
    return 0


if __name__ == "__main__":
    sys.exit(main())
