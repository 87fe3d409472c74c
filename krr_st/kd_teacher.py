"""`python -m krr_st.kd_teacher`: train the teacher of test_kd.py on a labelled set.

The usual CIFAR recipe: SGD, cosine, crop and flip. The test split is read once, at the end.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from data.augment.crop_flip import default_padding
from data.load import ImageSet, load_set
from data.loader import ImagePipeline
from evaluation.epochs import make_checkpoint, train_epochs
from evaluation.fit import Trainer, held_out_accuracy
from evaluation.presets import resolve_preset
from evaluation.recipes import Recipe
from krr_st.config import KdTeacherFlags
from models import get_model
from utils import cli
from utils.device import place, resolve_device
from utils.errors import UserError
from utils.run_folder import RunFolder
from utils.seed import derive_seed, local_seed, make_generator


def teacher_trainer(flags: KdTeacherFlags, image_set: ImageSet, device: torch.device, seed: int) -> Trainer:
    """A classifier before its first step."""
    with local_seed(derive_seed(seed, "teacher")):
        model = place(get_model(flags.arch, image_set.img_shape, image_set.num_classes), device)
    length = dict(epochs=flags.epochs, momentum=flags.momentum)
    recipe = Recipe("cross_entropy", "sgd", flags.lr, flags.wd, "cosine", flags.batch_size, **length)
    pad, train = default_padding(image_set.size), image_set.train
    pipeline = ImagePipeline(image_set.stats, pad=pad, hflip=image_set.hflip)
    generator = make_generator(seed, "batches")
    loader = recipe.loader(train.images, train.labels, device, generator, pipeline, drop_last=True)
    return Trainer(model, loader, recipe)


def train_teacher(
    flags: KdTeacherFlags, image_set: ImageSet, trainer: Trainer, run: RunFolder
) -> tuple[nn.Module, dict[str, float | None]]:
    """Train a classifier, resuming where `run` stopped.

    Returns it and its test accuracy in %, None without labelled test images.
    """
    train_epochs(trainer, run, save_every=flags.save_every, what="teacher")
    model = trainer.model
    if image_set.test is None or not image_set.labelled:
        return model, {"test_accuracy": None}
    found = held_out_accuracy(model, image_set, trainer.loader.device)
    print(f"test accuracy {found:.2f} %")
    return model, {"test_accuracy": found}


@cli.command(KdTeacherFlags, prog="python -m krr_st.kd_teacher", description=__doc__)
def main(flags: KdTeacherFlags) -> int:
    """Train, write the checkpoint and the record of the run."""
    device = resolve_device(flags.device, flags.gpu_id)
    size = resolve_preset(flags.data_name, flags.data_dir, flags.img_size).size
    image_set = load_set(flags.data_name, size, flags.data_dir)
    if image_set.num_classes is None:
        raise UserError(f"{image_set.train.path.parent} has no labels; a teacher needs them")
    get_model(flags.arch, image_set.img_shape)  # an unknown name fails before anything is written
    path = Path(flags.save_dir) / f"teacher_{flags.data_name}.pt"
    trained = teacher_trainer, train_teacher
    make_checkpoint(path, flags, image_set, device, *trained, "python -m krr_st.kd_teacher")
    return 0


if __name__ == "__main__":
    sys.exit(main())
