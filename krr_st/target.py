"""`python -m krr_st.target`: train a self-supervised target model by Barlow Twins, label-free."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import data
from data.load import ImageSet
from data.loader import TensorLoader
from evaluation.fit import fit
from evaluation.protocols import frozen_accuracy, outputs
from krr_st.barlow import TwoViews, barlow_twins_loss, projector
from krr_st.config import TargetFlags, resolve_preset
from krr_st.target_model import Representation, default_checkpoint
from utils import checkpoint, cli
from utils.device import place, resolve_device
from utils.errors import UserError, entry_point
from utils.optim import make_optimizer, make_schedule
from utils.resume import load_run, save_run
from utils.runlog import LossWindow, RunFolder
from utils.seed import derive_seed, local_seed, make_generator

_KNN_ROWS = 10000


def knn_accuracy(model: Representation, image_set: ImageSet, device: torch.device) -> float | None:
    """k-NN accuracy in % on the test split with the training split as bank; None without labels.

    The bank is cut to its first 10 000 rows, which is enough to watch a run.
    """
    if image_set.num_classes is None or image_set.test is None:
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
    per_epoch = len(image_set.train) // loader.batch_size
    steps = epochs * per_epoch
    optimizer = make_optimizer(opt, network.parameters(), lr=lr, wd=wd)
    schedule = make_schedule("cosine", optimizer, steps, round(warmup_epochs * per_epoch))
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "loader": loader}
    start = 0
    if run.state_path.exists():
        start, _ = load_run(run.state_path, parts)
        print(f"going on after epoch {start // per_epoch} of {epochs}")
    run.truncate_log(start)
    window, began = LossWindow(per_epoch), time.perf_counter()

    def on_step(step: int, loss: Tensor, rate: float) -> None:
        window.add(loss)
        if step % per_epoch:
            return
        epoch = step // per_epoch
        entry: dict[str, Any] = {"step": step, "epoch": epoch, "loss": window.mean(), "lr": rate}
        if epoch % eval_every == 0 or step == steps:
            entry["knn_accuracy"] = knn_accuracy(model.eval(), image_set, device)
            network.train()
        run.log(**entry)
        left = (time.perf_counter() - began) / (step - start) * (steps - step)
        _report(entry, epochs, left)
        if epoch % save_every == 0 and step < steps:
            save_run(run.state_path, step, parts)

    def loss_fn(net: nn.Module, pair: tuple[Tensor, Tensor], _: None) -> Tensor:
        return barlow_twins_loss(net(pair[0]), net(pair[1]), off_diagonal)

    fit(
        network, loader.forever(), loss_fn, optimizer, schedule,
        steps=steps, start=start, what="Barlow Twins", on_step=on_step,
    )  # fmt: skip
    return model


def _report(entry: dict[str, Any], epochs: int, left: float) -> None:
    """Print about twenty lines a run, and every evaluation."""
    knn = entry.get("knn_accuracy")
    if knn is not None or entry["epoch"] % max(1, epochs // 20) == 0:
        shown = "" if knn is None else f", k-NN accuracy {knn:.2f} %"
        line = f"epoch {entry['epoch']}/{epochs}: loss {entry['loss']:.3f}{shown}"
        print(f"{line}, {left:.0f} s left", flush=True)


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags, train, write the checkpoint and the record of the run."""
    flags = cli.parse(TargetFlags, argv, prog="python -m krr_st.target", description=__doc__)
    device = resolve_device(flags.device, flags.gpu_id)
    size = resolve_preset(flags.data_name, flags.data_dir, flags.img_size).size
    image_set = data.load(flags.data_name, size, flags.data_dir)
    path = default_checkpoint(flags.target_model, flags.data_name, flags.save_dir)
    if len(image_set.train) < 2:
        raise UserError(f"{image_set.train.path} holds one image; Barlow Twins needs at least two")
    run = RunFolder(
        path.with_suffix(""), {**cli.as_json(flags), "img_size": size}, seed=flags.seed,
        device=device, overwrite=flags.overwrite,
    )  # fmt: skip
    if run.finished and path.exists():
        print(f"{path} is there already, trained with these flags; --overwrite trains it again")
        return 0
    began = time.perf_counter()
    model = train_target(
        image_set, arch=flags.target_model, epochs=flags.epochs, batch_size=flags.batch_size,
        opt=flags.opt, lr=flags.lr, wd=flags.wd, warmup_epochs=flags.warmup_epochs,
        off_diagonal=flags.off_diagonal, projector_dim=flags.projector_dim,
        projector_layers=flags.projector_layers, min_crop=flags.min_crop, jitter=flags.jitter,
        degrees=flags.degrees, eval_every=flags.eval_every, save_every=flags.save_every,
        run=run, device=device,
    )  # fmt: skip
    checkpoint.save({k: v.cpu().contiguous() for k, v in model.backbone.state_dict().items()}, path)
    last = run.read_log()[-1]
    run.finish({
        "checkpoint": path, "loss": last["loss"], "knn_accuracy": last.get("knn_accuracy"),
        "seconds": time.perf_counter() - began,
    })  # fmt: skip
    print(f"target model: {path} (features of {model.dim}); log: {run.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
