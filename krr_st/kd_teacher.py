"""`python -m krr_st.kd_teacher`: train the teacher of test_kd.py on a labelled set.

The usual CIFAR recipe: SGD, cosine, crop and flip. The test split is read once, at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from data.augment import default_padding
from data.load import ImageSet
from data.loader import ImagePipeline, TensorLoader
from evaluation.fit import accuracy, supervised
from evaluation.protocols import outputs
from krr_st.config import KdTeacherFlags
from krr_st.epochs import make_checkpoint, train_epochs
from krr_st.presets import resolve_preset
from models import get_model
from utils import cli
from utils.device import place, resolve_device
from utils.errors import UserError, entry_point
from utils.optim import make_optimizer
from utils.runlog import RunFolder
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
        model = place(get_model(arch, image_set.img_shape, image_set.num_classes), device)
    pipeline = ImagePipeline(
        image_set.stats, pad=default_padding(image_set.size), hflip=image_set.hflip
    )
    loader = TensorLoader(
        image_set.train.images, image_set.train.labels, batch_size=batch_size, device=device,
        generator=make_generator(run.seed, "batches"), transform=pipeline, drop_last=True,
    )  # fmt: skip
    optimizer = make_optimizer("sgd", model.parameters(), lr=lr, momentum=momentum, wd=wd)
    train_epochs(
        model, loader, supervised(F.cross_entropy), optimizer,
        epochs=epochs, save_every=save_every, run=run, what="teacher",
    )  # fmt: skip
    return model


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

    def train(run: RunFolder) -> tuple[nn.Module, dict[str, float | None]]:
        model = train_teacher(
            image_set, arch=flags.arch, epochs=flags.epochs, batch_size=flags.batch_size,
            lr=flags.lr, momentum=flags.momentum, wd=flags.wd, save_every=flags.save_every,
            run=run, device=device,
        )  # fmt: skip
        test, found = image_set.test, None
        if test is not None and test.labels is not None:
            found = accuracy(outputs(model, test.images, image_set, device), test.labels)
            print(f"test accuracy {found:.2f} %")
        return model, {"test_accuracy": found}

    path = Path(flags.save_dir) / f"teacher_{flags.data_name}.pt"
    make_checkpoint(path, flags, size, device, train)
    return 0


if __name__ == "__main__":
    sys.exit(main())
