"""`python -m krr_st.kd_teacher`: train the teacher of test_kd.py on a labelled set.

The usual CIFAR recipe: SGD, cosine, crop and flip. The test split is read once, at the end.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data.augment import default_padding
from data.load import ImageSet
from data.loader import ImagePipeline, TensorLoader
from evaluation.fit import accuracy, fit, supervised
from evaluation.protocols import outputs
from krr_st.config import KdTeacherFlags, resolve_preset
from models import get_model
from utils import checkpoint, cli
from utils.device import resolve_device
from utils.errors import UserError, entry_point
from utils.optim import make_optimizer, make_schedule
from utils.resume import load_run, save_run
from utils.runlog import LossWindow, RunFolder
from utils.seed import derive_seed, local_seed, make_generator


def train_teacher(
    image_set: ImageSet,
    *,
    arch: str,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    wd: float,
    save_every: int,
    run: RunFolder,
    device: torch.device,
) -> nn.Module:
    """Train a classifier on the training images of `image_set`, going on where `run` stopped.

    Args:
        image_set: a labelled prepared set.
        arch: network, a name of zoo A.
        epochs: passes over the images (incomplete batches left out).
        batch_size: images a step.
        lr: peak learning rate, cosine to 0.
        momentum: of SGD.
        wd: weight decay.
        save_every: epochs between saves of the run state.
        run: folder of the log and the state; its seed is used.
        device: where to compute.

    Returns:
        The network in eval mode.
    """
    with local_seed(derive_seed(run.seed, "teacher")):
        model = get_model(arch, image_set.img_shape, image_set.num_classes).to(device)
    pipeline = ImagePipeline(
        image_set.stats, pad=default_padding(image_set.size), hflip=image_set.hflip
    )
    loader = TensorLoader(
        image_set.train.images, image_set.train.labels, batch_size=batch_size, device=device,
        generator=make_generator(run.seed, "batches"), transform=pipeline, drop_last=True,
    )  # fmt: skip
    per_epoch = len(image_set.train) // loader.batch_size
    steps = epochs * per_epoch
    optimizer = make_optimizer("sgd", model.parameters(), lr=lr, momentum=momentum, wd=wd)
    schedule = make_schedule("cosine", optimizer, steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "loader": loader}
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
        epoch, mean = step // per_epoch, window.mean()
        run.log(step=step, epoch=epoch, loss=mean, lr=rate)
        if epoch % max(1, epochs // 20) == 0:
            left = (time.perf_counter() - began) / (step - start) * (steps - step)
            print(f"epoch {epoch}/{epochs}: loss {mean:.4f}, {left:.0f} s left", flush=True)
        if epoch % save_every == 0 and step < steps:
            save_run(run.state_path, step, parts)

    return fit(
        model, loader.forever(), supervised(F.cross_entropy), optimizer, schedule,
        steps=steps, start=start, what="teacher", on_step=on_step,
    )  # fmt: skip


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the flags, train, write the checkpoint and the record of the run."""
    flags = cli.parse(KdTeacherFlags, argv, prog="python -m krr_st.kd_teacher", description=__doc__)
    device = resolve_device(flags.device, flags.gpu_id)
    size = resolve_preset(flags.data_name, flags.data_dir, flags.img_size).size
    image_set = data.load(flags.data_name, size, flags.data_dir)
    if image_set.num_classes is None:
        raise UserError(f"{image_set.train.path.parent} has no labels; a teacher needs them")
    get_model(flags.arch, image_set.img_shape)  # an unknown name fails before anything is written
    path = Path(flags.save_dir) / f"teacher_{flags.data_name}.pt"
    run = RunFolder(
        path.with_suffix(""), {**cli.as_json(flags), "img_size": size}, seed=flags.seed,
        device=device, overwrite=flags.overwrite,
    )  # fmt: skip
    if run.finished and path.exists():
        print(f"{path} is there already, trained with these flags; --overwrite trains it again")
        return 0
    began = time.perf_counter()
    model = train_teacher(
        image_set, arch=flags.arch, epochs=flags.epochs, batch_size=flags.batch_size, lr=flags.lr,
        momentum=flags.momentum, wd=flags.wd, save_every=flags.save_every, run=run, device=device,
    )  # fmt: skip
    checkpoint.save({k: v.cpu() for k, v in model.state_dict().items()}, path)
    test, found = image_set.test, None
    if test is not None:
        found = accuracy(outputs(model, test.images, image_set, device), test.labels)
    run.finish({
        "checkpoint": path, "loss": run.read_log()[-1]["loss"], "test_accuracy": found,
        "seconds": time.perf_counter() - began,
    })  # fmt: skip
    shown = "no test split" if found is None else f"test accuracy {found:.2f} %"
    print(f"teacher: {path} ({shown}); log: {run.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
