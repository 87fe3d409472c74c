"""What clom.tables still lacks, as jobs: each is one run of main.py's driver in its own folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

from clom.config import DistillFlags
from clom.run import run_distillation
from clom.table_cells import Place, cell_flags, cell_key, data_facts, places, run_folder
from clom.table_config import TablesFlags
from models import get_network
from utils import flops
from utils.cells import CellStore
from utils.errors import UserError
from utils.jobs import Job

RESULTS = "results.jsonl"


def missing_jobs(flags: TablesFlags) -> list[Job]:
    """One job for every place and seed that has no finished cell.

    Raises:
        UserError: flags that do not fit together.
    """
    store = CellStore(flags.log_dir / RESULTS)
    jobs = []
    for place in places(flags):
        if place.start:  # comes with the cell that it is the start of
            continue
        run = cell_flags(flags, place)
        for seed in range(flags.seed, flags.seed + flags.num_exp):
            name = f"{place.column}: {place.row}, seed {seed}"
            try:
                key = cell_key(run, seed)
            except UserError as error:  # said in its turn, the others go on
                jobs.append(Job(name, 0.0, functools.partial(_refuse, str(error))))
                continue
            if store.get(key) is None:
                job = functools.partial(run_cell, flags, place, run, key)
                jobs.append(Job(name, estimate(run), job))
    return jobs


def _refuse(message: str) -> None:
    raise UserError(message)


def run_cell(flags: TablesFlags, place: Place, run: DistillFlags, key: dict[str, Any]) -> None:
    """Distil, evaluate, append the cell. A run that was stopped goes on from its last save.

    Raises:
        UserError: as `run_distillation`.
    """
    folder, began = run_folder(flags, place, key), time.perf_counter()
    run_distillation(dataclasses.replace(run, seed=key["seed"], save_path=folder))
    after = json.loads((folder / "results.json").read_text())["networks"][0]["accuracies"]
    percent = [100 * a for a in after]
    CellStore(flags.log_dir / RESULTS).add(
        key, accuracy=sum(percent) / len(percent), accuracies=percent,
        start_accuracies=[100 * a for a in accuracies_at_start(folder)],
        variant=place.variant.name, steps_scale=flags.steps_scale, folder=folder.name,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def accuracies_at_start(folder: Path) -> list[float]:
    """In [0, 1]: those of the images before the first iteration."""
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry.get("iteration") == 0 and "test" in entry:
            return next(iter(entry["test"].values()))
    return []


@functools.cache
def _network_flops(model: str, img_shape: tuple[int, int, int], num_classes: int) -> int:
    channels, *size = img_shape
    return flops.forward_flops(
        lambda: get_network(model, channels, num_classes, tuple(size)), img_shape
    )


def estimate(run: DistillFlags) -> float:
    """Operations of one cell: matching steps, the networks' own steps, two evaluations.

    A training step is taken as three forward passes; CLoM's model as the distilled network.
    """
    facts = data_facts(run.dataset, run.data_path, run.img_size)
    synthetic = run.ipc * facts.num_classes
    real = run.batch_real * facts.num_classes
    if run.method == "DM":
        images = run.Iteration * (real + 3 * synthetic)
    else:  # the matching goes through the gradient once more
        matched = run.outer_loop * (3 * real + 6 * synthetic)
        images = run.Iteration * (matched + 3 * (run.outer_loop - 1) * run.inner_loop * synthetic)
    if run.CLoM:
        images += 3 * run.Iteration * synthetic * (run.outer_loop if run.method != "DM" else 1)
    images += 2 * run.num_eval * 3 * run.epoch_eval_train * synthetic
    return float(images) * _network_flops(run.model, facts.img_shape, facts.num_classes)
