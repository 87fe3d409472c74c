"""The driver behind methods/DC_DSA_DM/main.py: flags in, a finished run folder out."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clom.config import DistillFlags, resolve, result_name
from clom.distill import Schedule, check_start, initial_images, run_experiment
from clom.distillers import Distiller
from clom.distribution_matching import DistributionMatching
from clom.evaluate import published_augmentation, published_training, score_network
from clom.export import export
from clom.gradient_matching import GradientMatching
from clom.inputs import keeps_meaning_mirrored, load_data, make_clom, network_factory
from clom.loss import CLoM
from clom.real import RealImages
from data.augment import denormalize
from data.load import ImageSet
from data.synthetic import SyntheticSet, save_experiments
from evaluation.side_by_side import side_by_side
from models import eval_pool
from utils import checkpoint, cli
from utils.device import resolve_device
from utils.errors import UserError
from utils.images import save_grid
from utils.memory import out_of_memory_says
from utils.resume import forget_run
from utils.runlog import RunFolder, claim_run
from utils.seed import derive_seed, make_generator
from utils.table import markdown, mean_std

# Flags that do not decide what a run computes.
FREE_FLAGS = ("device", "gpu", "dry_run", "resume", "overwrite", "num_exp", "print_every",
              "save_every", "export", "data_path", "save_path", "tensorboard")  # fmt: skip
_KNOBS = "lower --batch_real, --CLoM_batch_size or --batch_train"
METHODS = {"DC": GradientMatching, "DSA": GradientMatching, "DM": DistributionMatching}


def run_distillation(flags: DistillFlags) -> int:
    """Distil as `flags` say; returns the exit code.

    Raises:
        UserError: bad flags, data, models or run folder; nothing is written then.
    """
    if flags.CLoM_distance == "cos" and not flags.CLoM:
        print("--CLoM_distance is not used without --CLoM")
    flags = resolve(flags, hflip=keeps_meaning_mirrored(flags))
    print(json.dumps(cli.as_json(flags), indent=2))
    device = resolve_device(flags.device, flags.gpu)
    if flags.dry_run:
        return 0
    image_set = load_data(flags)
    for name in {flags.model, *eval_pool(flags.eval_mode, flags.model)}:
        network_factory(name, image_set, device)  # an unfit network fails now, not at the end
    real = RealImages.from_set(image_set, device)
    check_start(real, flags.ipc, flags.init)
    with ExitStack() as held, out_of_memory_says(device, _KNOBS):
        with_clom = make_clom(flags, image_set, real, device)
        run = open_run(flags, image_set, device, held)
        if is_finished(flags, run):
            print(f"{run.path} holds the finished run of these flags; --overwrite runs it again")
        else:
            run_experiments(flags, run, image_set, real, with_clom, device)
    if flags.export is not None:
        export(res_path(flags, run), flags.export, flags.method)
    return 0


def open_run(
    flags: DistillFlags, image_set: ImageSet, device: torch.device, held: ExitStack
) -> RunFolder:
    """The run folder, claimed until `held` closes.

    With --overwrite the files of another run's experiments in it are dropped.

    Raises:
        UserError: it holds a run with other flags, is in use, or --resume finds none.
    """
    folder = Path(flags.save_path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save_path {folder} is a file; expected a folder")
    if flags.resume and not (folder / "config.json").exists():
        raise UserError(f"--resume: {folder} holds no run to go on with")
    held.enter_context(claim_run(folder))
    identity = {k: v for k, v in cli.as_json(flags).items() if k not in FREE_FLAGS}
    stats = image_set.stats
    run = RunFolder(
        folder, identity, seed=flags.seed, device=device, overwrite=flags.overwrite,
        tensorboard=flags.tensorboard,
        extra={"data_name": flags.dataset, "mean": stats.mean, "std": stats.std},
    )  # fmt: skip
    if not run.resumed:  # no set or picture may lie beside the configuration of another run
        path = res_path(flags, run)
        pictures = folder.glob(path.stem.replace("res_", "vis_", 1) + "_exp*_iter*.png")
        kept = folder.glob(f"exp*_{path.name}")
        for stale in (path, path.with_suffix(".json"), *pictures, *kept):
            stale.unlink(missing_ok=True)
    return run


def res_path(flags: DistillFlags, run: RunFolder) -> Path:
    """The published result file."""
    return run.path / result_name(flags.method, flags.dataset, flags.model, flags.ipc)


def experiment_path(flags: DistillFlags, run: RunFolder, experiment: int) -> Path:
    """Where a finished experiment is kept until all are done, and for later ones to join it."""
    return run.path / f"exp{experiment}_{res_path(flags, run).name}"


def is_finished(flags: DistillFlags, run: RunFolder) -> bool:
    """Whether all experiments are there and the results written."""
    paths = [experiment_path(flags, run, e) for e in range(flags.num_exp)]
    return run.finished and all(path.exists() for path in paths)


def run_experiments(
    flags: DistillFlags,
    run: RunFolder,
    image_set: ImageSet,
    real: RealImages,
    with_clom: Callable[[torch.Generator], CLoM] | None,
    device: torch.device,
) -> None:
    """Run what is missing of `num_exp` experiments; write the res file after each."""
    names = eval_pool(flags.eval_mode, flags.model)
    schedule = make_schedule(flags)
    done = []
    for experiment in range(flags.num_exp):
        path = experiment_path(flags, run, experiment)
        if path.exists():
            done.append(checkpoint.load(path, what="finished experiment"))
            continue
        seed = derive_seed(run.seed, "experiment", experiment)
        distiller = make_distiller(flags, image_set, real, with_clom, device, seed)
        evaluate = functools.partial(
            evaluate_images, flags, run, image_set, names, device, seed, experiment,
            distiller.y_syn,
        )  # fmt: skip
        result = run_experiment(distiller, evaluate, run, schedule, experiment=experiment)
        checkpoint.save(result, path)
        forget_run(run.state_path)
        done.append(result)
        write_res(flags, run, image_set, done)
    results = summarize(flags, done)
    if device.type == "cuda":
        results["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    path = write_res(flags, run, image_set, done)
    run.finish(results)
    print(table(results["networks"]))
    print(f"synthetic set: {path}")


def make_schedule(flags: DistillFlags) -> Schedule:
    """When the run logs, saves and evaluates: other networks than its own only at the end."""
    return Schedule(
        flags.Iteration, print_every=flags.print_every, save_every=flags.save_every,
        eval_every=flags.eval_interval if flags.eval_mode in ("S", "SS") else None,
    )  # fmt: skip


def make_distiller(
    flags: DistillFlags,
    image_set: ImageSet,
    real: RealImages,
    with_clom: Callable[[torch.Generator], CLoM] | None,
    device: torch.device,
    seed: int,
) -> Distiller:
    """The distiller of one experiment at its initial state."""
    x_syn, y_syn = initial_images(
        real, image_set.img_shape, flags.ipc, flags.init, make_generator(seed, "initial images")
    )
    options: dict[str, Any] = {}
    if flags.method != "DM":
        options = dict(
            metric=flags.dis_metric, outer_loop=flags.outer_loop, inner_loop=flags.inner_loop,
            lr_net=flags.lr_net, batch_train=flags.batch_train,
        )  # fmt: skip
    return METHODS[flags.method](
        x_syn, y_syn, real, new_network=network_factory(flags.model, image_set, device),
        lr_img=flags.lr_img, batch_real=flags.batch_real, strategy=flags.dsa_strategy,
        align_corners=flags.align_corners, seed=seed,
        clom=with_clom(make_generator(seed, "CLoM")) if with_clom is not None else None,
        **options,
    )  # fmt: skip


def evaluate_images(
    flags: DistillFlags,
    run: RunFolder,
    image_set: ImageSet,
    names: list[str],
    device: torch.device,
    seed: int,
    experiment: int,
    y_syn: Tensor,
    step: int,
    x_syn: Tensor,
) -> dict[str, list[float]]:
    """Draw the images, then test them with `num_eval` random networks of each name."""
    name = f"vis_{flags.method}_{flags.dataset}_{flags.model}_{flags.ipc}ipc"
    save_grid(
        denormalize(x_syn, image_set.stats), run.path / f"{name}_exp{experiment}_iter{step}.png",
        columns=flags.ipc, scale=1 if len(x_syn) > 400 else None,
    )  # fmt: skip
    accuracies = {}
    for network in names:
        augmentation = published_augmentation(
            flags.method, flags.dataset, network, flags.dsa_strategy, flags.align_corners
        )
        training = published_training(
            augmentation, flags.epoch_eval_train, flags.lr_net, flags.batch_train
        )
        new_network = network_factory(network, image_set, device)
        score = functools.partial(
            score_network, new_network, x_syn, y_syn, image_set, training, augmentation,
            device=device,
        )  # fmt: skip
        seeds = [derive_seed(seed, "evaluation", step, network, n) for n in range(flags.num_eval)]
        tasks = [
            lambda check, own=own, score=score: score(seed=own, on_step=check) for own in seeds
        ]
        accuracies[network] = [found.final for found in side_by_side(tasks, device)]
        mean, std = mean_std(accuracies[network])
        print(
            f"iteration {step}: {network} {mean:.4f} ± {std:.4f} over {flags.num_eval} networks, "
            f"{training.epochs} epochs, augmentation {augmentation.kind} {augmentation.strategy}",
            flush=True,
        )
    return accuracies


def experiment_sets(
    flags: DistillFlags, image_set: ImageSet, done: list[dict[str, Any]]
) -> list[SyntheticSet]:
    """Finished experiments as synthetic sets with what undoes their normalisation."""
    info = {"method": flags.method, "model": flags.model, "ipc": flags.ipc, "CLoM": flags.CLoM}
    return [
        SyntheticSet(r["images"], r["labels"], image_set.stats, flags.dataset, info) for r in done
    ]


def joined_accuracies(done: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Network -> accuracies of all experiments one after another, as in a res file."""
    joined: dict[str, list[float]] = {}
    for result in done:
        for name, values in result["accuracies"].items():
            joined.setdefault(name, []).extend(values)
    return joined


def write_res(
    flags: DistillFlags, run: RunFolder, image_set: ImageSet, done: list[dict[str, Any]]
) -> Path:
    """Write `res_*.pt` with all finished experiments."""
    path = res_path(flags, run)
    save_experiments(path, experiment_sets(flags, image_set, done), joined_accuracies(done))
    return path


def summarize(flags: DistillFlags, done: list[dict[str, Any]]) -> dict[str, Any]:
    """What goes into results.json; accuracies in [0, 1] after the last iteration."""
    networks = []
    for name, values in joined_accuracies(done).items():
        mean, std = mean_std(values)
        augmentation = published_augmentation(
            flags.method, flags.dataset, name, flags.dsa_strategy, flags.align_corners
        )
        networks.append(
            {"network": name, "mean": mean, "std": std, "n": len(values), "accuracies": values,
             "augmentation": [augmentation.kind, augmentation.strategy]}
        )  # fmt: skip
    return {
        "iterations": flags.Iteration,
        "experiments": len(done),
        "networks": networks,
        "seconds_of_last_start": [r["seconds"] for r in done],
    }


def table(networks: list[dict[str, Any]]) -> str:
    """Networks as rows: mean ± std and how many."""
    rows = [[r["network"], f"{r['mean']:.4f} ± {r['std']:.4f}", str(r["n"])] for r in networks]
    return markdown(["network", "test accuracy", "n"], rows)
