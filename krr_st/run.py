"""The driver behind train.py: flags and presets in, a finished run folder out."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from data.augment import count_views, default_padding
from data.load import ImageSet
from data.specs import Stats
from evaluation.recipes import Recipe
from krr_st.config import TrainFlags
from krr_st.distill import Distiller, distill, initial_set, real_loader
from krr_st.held_out import HeldOutLoss
from krr_st.linear_eval import LinearEvaluations, is_labelled
from krr_st.pool import ModelPool
from krr_st.presets import resolve_preset
from krr_st.target_model import (
    load_target,
    resolve_checkpoint,
    target_command,
    target_sample,
)
from krr_st.views import DTYPES, TargetFunction, Targets, make_targets, plan_views
from models import get_model
from utils import checkpoint, cli
from utils.device import free_memory, place, resolve_device
from utils.distributed import Group, local_gpu, process_group, quiet_unless_first
from utils.errors import UserError
from utils.memory import SplitBatches, out_of_memory_says
from utils.optim import make_optimizer
from utils.precision import autocast, check_compile, check_precision, float32_mode
from utils.runlog import FollowedRun, RunFolder, claim_run
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
    """Distil as `flags` say, in this process or in all those that torchrun started.

    Returns:
        The exit code.

    Raises:
        UserError: bad flags, data, checkpoint or run folder; nothing is written then.
    """
    with quiet_unless_first():
        flags = resolve(flags)
        print(json.dumps(cli.as_json(flags), indent=2))
        device = resolve_device(flags.device, local_gpu(flags.gpu_id))
        check_precision(flags.precision, device)
        if flags.views_dir is not None and flags.views_dir.is_file():
            raise UserError(f"--views_dir {flags.views_dir} is a file; expected a folder")
        if flags.dry_run:
            return 0
        if flags.compile:
            check_compile(device)
        with (
            process_group(device) as group,
            float32_mode(flags.precision),
            out_of_memory_says(device, _KNOBS),
            ExitStack() as held,
        ):
            return _distill(flags, device, group, held)


_KNOBS = (
    "lower --outer_batch_size, --num_images or --num_models, or use --target_views online or "
    "--precision bf16"
)


def _distill(flags: TrainFlags, device: torch.device, group: Group, held: ExitStack) -> int:
    image_set = data.load(flags.data_name, flags.img_size, flags.data_dir)
    if flags.num_images > len(image_set.train):
        raise UserError(
            f"--num_images {flags.num_images} is more than the {len(image_set.train)} images "
            f"in {image_set.train.path}"
        )
    batch = min(flags.outer_batch_size, len(image_set.train))
    if batch % group.ranks:
        raise UserError(
            f"--outer_batch_size: a batch of {batch} images cannot be dealt to {group.ranks} "
            "processes; use a multiple of their number"
        )
    img_shape, stats = image_set.img_shape, image_set.stats
    if flags.syn_init == "raw":  # X_s lives in pixel space then: nothing to undo
        stats = Stats((0.0,) * image_set.channels, (1.0,) * image_set.channels)
    target = load_target(
        flags.target_model, flags.target_ckpt, img_shape, device,
        target_command(flags.target_model, flags.data_name, flags.img_size, flags.data_dir),
        image_set.stats,
        layout=flags.layout,
    )  # fmt: skip

    in_parts = SplitBatches(target)

    def represent(x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(flags.precision, device):
            return in_parts(x)

    get_model(flags.test_model, img_shape, target.dim)  # an unknown name fails now, not at the end
    make_pool_network(flags.train_model, img_shape, target.dim, torch.device("cpu"), 0)
    run = open_run(flags, stats, device, group, held)
    if run.finished:
        print(f"{run.path} holds the finished run of these flags; --overwrite runs it again")
        return 0
    if not is_labelled(image_set):
        print(f"{flags.data_name} has no labels: linear evaluation is skipped")
    elif image_set.test is None:
        print(f"{flags.data_name} has no test split: evaluations use the training images")
    x_syn, y_syn = initial_set(
        image_set, flags.num_images, represent, init=flags.syn_init, device=device,
        generator=make_generator(run.seed, "initial images"), images=flags.init_images,
    )  # fmt: skip
    pool = ModelPool(
        lambda seed: make_pool_network(
            flags.train_model, img_shape, target.dim, device, seed, flags.layout
        ),
        lambda model: make_optimizer(
            flags.online_opt, model.parameters(), lr=flags.online_lr, wd=flags.online_wd
        ),
        size=flags.num_models, max_steps=flags.online_iteration,
        generator=make_generator(run.seed, "pool"), reset=flags.pool_reset,
        precision=flags.precision, compile=flags.compile,
    )  # fmt: skip
    held_out = None
    if group.first:
        held_out = HeldOutLoss(
            image_set, represent, pool, x_syn, y_syn, ridge=flags.ridge,
            steps=flags.outer_iteration, device=device,
            generator=make_generator(run.seed, "held-out loss"),
        )  # fmt: skip
        print(f"held-out loss: {held_out}")
    distiller = Distiller(
        x_syn, y_syn, pool=pool,
        targets=make_run_targets(flags, image_set, represent, target.dim, device),
        loader=real_loader(
            image_set, flags.outer_batch_size, device, make_generator(run.seed, "real batches"),
            group.shard,
        ),
        ridge=flags.ridge, optimizer=flags.outer_opt, lr=flags.outer_lr, lr_y=flags.outer_lr_y,
        wd=flags.outer_wd,
        grad_norm=flags.outer_grad_norm, steps=flags.outer_iteration, precision=flags.precision,
        group=group, compile=flags.compile,
        target_sample=target_sample(represent, image_set, device),
    )  # fmt: skip
    results = distill(
        distiller, run, steps=flags.outer_iteration, print_every=flags.print_every,
        save_every=flags.save_every, evaluations=planned_evaluations(flags, image_set, device),
        held_out=held_out, stats=stats, device=device,
    )  # fmt: skip
    run.finish(results)
    print(f"synthetic set: {run.path}/x_syn.pt, y_syn.pt; picture: {run.path}/x_syn.png")
    return 0


def planned_evaluations(
    flags: TrainFlags, image_set: ImageSet, device: torch.device
) -> LinearEvaluations:
    """The linear evaluations that the flags ask for."""
    pretraining = Recipe(
        "mse", flags.pre_opt, flags.pre_lr, flags.pre_wd, "constant", flags.pre_batch_size,
        epochs=flags.pre_epoch,
    )  # fmt: skip
    classifier = Recipe(
        "cross_entropy", flags.test_opt, flags.test_lr, flags.test_wd, "cosine",
        flags.test_batch_size, steps=flags.test_iteration,
    )  # fmt: skip
    return LinearEvaluations(
        image_set, flags.eval_every, flags.outer_iteration, flags.test_model, pretraining,
        classifier, device,
    )  # fmt: skip


def open_run(
    flags: TrainFlags, stats: Stats, device: torch.device, group: Group, held: ExitStack
) -> RunFolder | FollowedRun:
    """The run folder, claimed and made by the first process, followed by the others.

    Raises:
        UserError: it holds a run with other flags, is in use, or cannot be written.
    """
    path, run = Path(flags.save_dir) / flags.exp_name, None
    if group.first:
        held.enter_context(claim_run(path))
        run = RunFolder(
            path, cli.as_json(flags), seed=flags.seed, device=device, overwrite=flags.overwrite,
            tensorboard=flags.tensorboard,
            extra={"data_name": flags.data_name, "mean": stats.mean, "std": stats.std},
        )  # fmt: skip
    shared = group.from_first((run.seed, run.finished) if run else None)
    return run or FollowedRun(path, *shared)


def make_run_targets(
    flags: TrainFlags,
    image_set: ImageSet,
    represent: TargetFunction,
    dim: int,
    device: torch.device,
) -> Targets:
    """Where the run's targets come from: a table of views, or the target model at every step.

    Raises:
        UserError: a table on disk cannot be made.
    """
    images, pad = image_set.train.images, default_padding(image_set.size)
    rows = len(images) * count_views(pad, image_set.hflip)
    draws = flags.outer_iteration * min(flags.outer_batch_size, len(images))
    dtype = DTYPES[flags.views_dtype or ("bf16" if flags.precision == "bf16" else "fp32")]
    plan = plan_views(
        flags.target_views, dtype, rows=rows, dim=dim, draws=draws, free=free_memory(device),
        keep=flags.views_dir is not None,
    )  # fmt: skip
    print(f"targets: {plan.kind} ({plan.why})")
    about = {}
    if plan.kind == "file":
        about = {
            "target_model": flags.target_model,
            "target": checkpoint.fingerprint(target_sample(represent, image_set, device)),
            "images": checkpoint.fingerprint(images),
            "stats": [image_set.stats.mean, image_set.stats.std],
            "pad": pad, "hflip": image_set.hflip, "precision": flags.precision,
        }  # fmt: skip
        if flags.target_ckpt is not None:
            about["checkpoint"] = hashlib.sha256(flags.target_ckpt.read_bytes()).hexdigest()[:16]
    return make_targets(
        represent, images, stats=image_set.stats, pad=pad, hflip=image_set.hflip, dim=dim,
        device=device, plan=plan, about=about,
        # On a GPU all at once: a view at a time leaves it idle. A CPU computes what is drawn.
        fill=device.type == "cuda" and draws >= rows,
        folder=flags.views_dir or Path(flags.save_dir) / "target_views",
    )  # fmt: skip


def make_pool_network(
    arch: str,
    img_shape: tuple[int, int, int],
    dim: int,
    device: torch.device,
    seed: int,
    layout: str = "channels_last",
) -> nn.Module:
    """A fresh zoo-A network with `dim` outputs, initialised from `seed` alone."""
    with local_seed(seed):
        return place(get_model(arch, img_shape, dim), device, layout)
