"""The driver behind validate.py: what networks trained on a synthetic set reach on real images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clom.config import ValidateFlags, given_seed, parse_epochs, result_name
from clom.pool import checkpoint_name, model_folder
from clom.pretrain import in_space
from clom.source import load_data, network_factory
from data.augment import denormalize, normalize
from data.load import ImageSet
from data.synthetic import SyntheticSet
from data.synthetic.forms import detect_form
from evaluation.measure import CellStore
from evaluation.parallel import in_parallel
from evaluation.recipes import check_strategy, sgd_by_epochs
from evaluation.score import Score, score_network
from models import eval_pool
from utils import checkpoint, cli
from utils.device import resolve_gpus
from utils.errors import UserError
from utils.memory import out_of_memory_says
from utils.run_folder import environment, write_json
from utils.table import markdown, mean_std


def validate(flags: ValidateFlags) -> int:
    """Train `num_eval` networks of each name, print the table, write results.json.

    Finished networks are kept in results.jsonl and not trained again.

    Raises:
        UserError: bad flags, data or synthetic set.
    """
    check_strategy(flags.dsa_strategy)
    recipe = sgd_by_epochs(
        flags.epochs,
        flags.lr,
        flags.momentum,
        flags.weight_decay,
        flags.batch_size,
        parse_epochs(flags.lr_decay_step, "lr_decay_step"),
    ).override(dsa=flags.dsa_strategy if flags.dsa else "none", align_corners=flags.align_corners)
    names = [flags.model] if flags.eval_mode is None else eval_pool(flags.eval_mode, flags.model)
    print(json.dumps(cli.as_json(flags), indent=2))
    device, gpus = resolve_gpus(flags.device, flags.gpu_id, flags.multigpu)
    if len(gpus) > 1:
        print(f"--multigpu {flags.multigpu}: only GPU {gpus[0]} is used, the networks are small")
    if flags.dry_run:
        return 0
    image_set = load_data(flags)
    path = synthetic_path(flags)
    synthetic = load_synthetic(path, image_set, flags.experiment)
    check_count(synthetic, image_set, flags.ipc, path)
    image_set = in_space(image_set, flags.normalize_data)
    synthetic = to_space(synthetic, image_set)
    for name in names:
        network_factory(name, image_set, device)
    settings = {
        "dataset": flags.dataset,
        "size": image_set.size,
        "training": recipe.record(),
        "test_every": flags.save_every,
        "normalized": flags.normalize_data,
        "synthetic_set": checkpoint.fingerprint(synthetic.images, synthetic.targets),
    }
    folder = Path(flags.save_path) / flags.dataset / f"{flags.method}_{flags.model}_ipc{flags.ipc}"
    store = CellStore(Path(flags.save_path) / "results.jsonl")
    first = given_seed(flags) or 0

    def score(name: str, seed: int, check: Callable[[], None]) -> Score:
        """One network, with its state dicts if wanted."""
        kind = f"{flags.method}_ipc{flags.ipc}"
        published = model_folder(flags.pretrained_path, flags.dataset, name, kind)

        def save(epoch: int, model: nn.Module, accuracy: float) -> None:
            if not flags.save_model:
                return
            state = {k: v.cpu() for k, v in model.state_dict().items()}
            checkpoint.save(state, folder / f"{name}_seed{seed}_epoch{epoch}.pth")
            if epoch == recipe.epochs and seed == first:
                name_there = checkpoint_name(flags.dataset, name, epoch, kind)
                checkpoint.save(state, published / name_there)

        return score_network(
            network_factory(name, image_set, device),
            synthetic,
            image_set,
            recipe,
            seed=seed,
            device=device,
            test_every=flags.save_every,
            at_test=save,
            check=check,
        )

    jobs = [
        (name, seed, {**settings, "network": name, "seed": seed})
        for name in names
        for seed in range(first, first + flags.num_eval)
    ]
    missing = [job for job in jobs if flags.save_model or store.get(job[2]) is None]
    tasks = [lambda check, n=name, s=seed: score(n, s, check) for name, seed, _ in missing]
    with out_of_memory_says(device, "lower --batch_size"):
        for (name, seed, key), found in zip(missing, in_parallel(tasks, device), strict=True):
            store.add(key, **asdict(found))
            print(f"{name}, seed {seed}: {found.final:.4f} after the last epoch", flush=True)
    cells = [store.get(key) for _, _, key in jobs]
    summary = summarize(cells)
    write_json(
        folder / "results.json",
        {
            "flags": cli.as_json(flags),
            "synthetic_set": str(path),
            "environment": environment(device),
            "summary": summary,
            "cells": cells,
        },
    )
    print(table(summary))
    shown = f"DSA {recipe.dsa}" if flags.dsa else "none"
    print(
        f"test accuracy in [0, 1] after {flags.epochs} epochs, {flags.num_eval} seeds, "
        f"augmentation {shown}; 'best' is the largest over tests every {flags.save_every} epochs, "
        "chosen on the test set: not a result"
    )
    print(f"results: {folder / 'results.json'}")
    return 0


def synthetic_path(flags: ValidateFlags) -> Path:
    """The set to read: a run folder stands for the one res file in it.

    Raises:
        UserError: nothing is there, or several res files.
    """
    path = flags.synthesis_data_path
    name = result_name(flags.method, flags.dataset, flags.model, flags.ipc)
    if path is None:
        folder = Path("./condensed") / flags.dataset / flags.method
        found = sorted(folder.glob(f"*/{name}"))
        if len(found) != 1:
            shown = ", ".join(map(str, found)) or "none"
            raise UserError(f"looked for {folder}/*/{name} and found {shown}; give --synthesis_data_path")
        return found[0]
    if path.is_dir() and not any((path / mark).exists() for mark in ("x_syn.pt", "labels.csv")):
        found = sorted(path.glob("res_*.pt"))
        if len(found) == 1:
            return found[0]
    return path


def load_synthetic(path: Path, image_set: ImageSet, experiment: int = 0) -> SyntheticSet:
    """Read a set of any form and check that it fits the data set.

    A set without stored statistics is taken to be in the data set's normalised space.

    Raises:
        UserError: unreadable, or channels, size, labels or targets that do not fit.
    """
    form = detect_form(path)
    bare = form == "png" and not (path / "meta.json").exists()
    synthetic = SyntheticSet.load(
        path, form=form, experiment=experiment, stats=image_set.stats if bare else None
    )
    shape, classes = tuple(synthetic.images.shape[1:]), image_set.num_classes
    if shape != image_set.img_shape:
        raise UserError(
            f"{path} holds images of {shape} (C, H, W), {image_set.name} has "
            f"{tuple(image_set.img_shape)}; see --dataset and --img_size"
        )
    targets = synthetic.targets
    if synthetic.soft:
        sums = targets.sum(1) if targets.shape[1] == classes else torch.zeros(1)
        if targets.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            raise UserError(
                f"{path} holds target vectors {tuple(targets.shape)}; expected class indices or "
                f"probabilities of {classes} classes (for features use test.py)"
            )
    elif int(targets.max()) >= classes:
        raise UserError(f"{path} holds class {int(targets.max())}, {image_set.name} has {classes} classes")
    if synthetic.stats is None:
        synthetic = replace(synthetic, stats=image_set.stats)
    return synthetic


def check_count(synthetic: SyntheticSet, image_set: ImageSet, ipc: int, path: Path) -> None:
    """Say so where the set does not have ipc images per class."""
    expected = ipc * image_set.num_classes
    if len(synthetic) != expected:
        print(f"note: {path} holds {len(synthetic)} images; --ipc {ipc} means {expected}")


def to_space(synthetic: SyntheticSet, image_set: ImageSet) -> SyntheticSet:
    """The set in the normalised space of `image_set`, whatever its own was."""
    if synthetic.stats == image_set.stats:
        return synthetic
    images = normalize(denormalize(synthetic.images, synthetic.stats), image_set.stats)
    return replace(synthetic, images=images, stats=image_set.stats)


def summarize(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and population std over seeds for each network, in [0, 1]."""
    rows = []
    for name in dict.fromkeys(cell["network"] for cell in cells):
        own = [cell for cell in cells if cell["network"] == name]
        mean, std = mean_std([cell["final"] for cell in own])
        best, best_std = mean_std([cell["best"] for cell in own])
        rows.append(
            {
                "network": name,
                "n": len(own),
                "mean": mean,
                "std": std,
                "best_on_test_mean": best,
                "best_on_test_std": best_std,
            }
        )
    return rows


def table(summary: list[dict[str, Any]]) -> str:
    """Networks as rows: the last epoch, and the best one on the test set."""
    rows = [
        [
            r["network"],
            f"{r['mean']:.4f} ± {r['std']:.4f}",
            f"{r['best_on_test_mean']:.4f} ± {r['best_on_test_std']:.4f}",
            str(r["n"]),
        ]
        for r in summary
    ]
    return markdown(["network", "last epoch", "best (on test)", "n"], rows)
