"""The driver behind train.py: flags and presets in, a finished run folder out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import data
from data.specs import Stats
from evaluation.recipes import Recipe
from krr_st.config import TrainFlags, resolve_preset
from krr_st.distill import Distiller, distill, initial_set, real_loader
from krr_st.pool import ModelPool
from krr_st.target_model import load_target, resolve_checkpoint
from models import get_model
from utils import cli
from utils.device import place, resolve_device
from utils.errors import UserError
from utils.optim import make_optimizer
from utils.runlog import RunFolder
from utils.seed import local_seed, make_generator


def resolve(flags: TrainFlags) -> TrainFlags:
    """Fill in what presets decide: size, m, networks, target and its checkpoint, run name."""
    preset = resolve_preset(flags.data_name, flags.data_dir, flags.img_size)
    network = flags.train_model or preset.network
    target_model = flags.target_model or preset.target_model
    filled = {
        "img_size": preset.size,
        "num_images": flags.num_images or preset.num_images,
        "train_model": network,
        "test_model": flags.test_model or network,
        "target_model": target_model,
        "target_ckpt": resolve_checkpoint(target_model, flags.target_ckpt, flags.data_name),
        "exp_name": flags.exp_name or flags.data_name,
    }
    return TrainFlags(**{**asdict(flags), **filled})


def run_distillation(flags: TrainFlags) -> int:
    """Distil as `flags` say; returns the exit code.

    Raises:
        UserError: bad flags, data, checkpoint or run folder; nothing is written then.
    """
    flags = resolve(flags)
    print(json.dumps(cli.as_json(flags), indent=2))
    device = resolve_device(flags.device, flags.gpu_id)
    if flags.dry_run:
        return 0
    image_set = data.load(flags.data_name, flags.img_size, flags.data_dir)
    if flags.num_images > len(image_set.train):
        raise UserError(
            f"--num_images {flags.num_images} is more than the {len(image_set.train)} images "
            f"in {image_set.train.path}"
        )
    img_shape, stats = image_set.img_shape, image_set.stats
    if flags.syn_init == "raw":  # X_s lives in pixel space then: nothing to undo
        stats = Stats((0.0,) * image_set.channels, (1.0,) * image_set.channels)
    target = load_target(
        flags.target_model, flags.target_ckpt, img_shape, device,
        f"python -m krr_st.target --data_name {flags.data_name} --img_size {flags.img_size} "
        f"--target_model {flags.target_model} --data_dir {flags.data_dir}", image_set.stats,
    )  # fmt: skip
    get_model(flags.test_model, img_shape, target.dim)  # an unknown name fails now, not at the end
    make_pool_network(flags.train_model, img_shape, target.dim, torch.device("cpu"), 0)
    run = RunFolder(
        Path(flags.save_dir) / flags.exp_name, cli.as_json(flags), seed=flags.seed, device=device,
        extra={"data_name": flags.data_name, "mean": stats.mean, "std": stats.std},
        overwrite=flags.overwrite,
    )  # fmt: skip
    if run.finished:
        print(f"{run.path} holds the finished run of these flags; --overwrite runs it again")
        return 0
    if image_set.num_classes is None:
        print(f"{flags.data_name} has no labels: linear evaluation is skipped")
    elif image_set.test is None:
        print(f"{flags.data_name} has no test split: evaluations use the training images")
    x_syn, y_syn = initial_set(
        image_set, flags.num_images, target, init=flags.syn_init, device=device,
        generator=make_generator(run.seed, "initial images"),
    )  # fmt: skip
    pool = ModelPool(
        lambda seed: make_pool_network(flags.train_model, img_shape, target.dim, device, seed),
        lambda model: make_optimizer(
            flags.online_opt, model.parameters(), lr=flags.online_lr, wd=flags.online_wd
        ),
        size=flags.num_models, max_steps=flags.online_iteration,
        generator=make_generator(run.seed, "pool"), reset=flags.pool_reset,
    )  # fmt: skip
    distiller = Distiller(
        x_syn, y_syn, target=target, pool=pool,
        loader=real_loader(
            image_set, flags.outer_batch_size, device, make_generator(run.seed, "real batches")
        ),
        ridge=flags.ridge, optimizer=flags.outer_opt, lr=flags.outer_lr, wd=flags.outer_wd,
        grad_norm=flags.outer_grad_norm, steps=flags.outer_iteration,
    )  # fmt: skip
    results = distill(
        distiller, image_set, run, steps=flags.outer_iteration, print_every=flags.print_every,
        save_every=flags.save_every, eval_every=flags.eval_every, test_model=flags.test_model,
        pretraining=Recipe(
            "mse", flags.pre_opt, flags.pre_lr, flags.pre_wd, "constant",
            flags.pre_batch_size, epochs=flags.pre_epoch,
        ),
        classifier=Recipe(
            "cross_entropy", flags.test_opt, flags.test_lr, flags.test_wd, "constant",
            flags.test_batch_size, steps=flags.test_iteration,
        ),
        stats=stats,
        device=device,
    )  # fmt: skip
    run.finish(results)
    print(f"synthetic set: {run.path}/x_syn.pt, y_syn.pt; picture: {run.path}/x_syn.png")
    return 0


def make_pool_network(
    arch: str, img_shape: tuple[int, int, int], dim: int, device: torch.device, seed: int
) -> nn.Module:
    """A fresh zoo-A network with `dim` outputs, initialised from `seed` alone."""
    with local_seed(seed):
        return place(get_model(arch, img_shape, dim), device)
