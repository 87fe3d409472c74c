"""Running what a table still lacks: cheapest first, resumable, with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from evaluation.recipes import finetune_recipe, pretrain_recipe
from krr_st.config import PRESETS, KdFlags, ScratchFlags, TablesFlags, TestFlags
from krr_st.kd import run_kd
from krr_st.table_layouts import Layout, Place, collect, network, places, read_cells
from krr_st.transfer import SCRATCH, run_transfer
from models import get_model
from utils.errors import UserError


@dataclass(frozen=True)
class Job:
    """One command: a method and a network on the targets whose cells are missing."""

    method: str
    model: str
    targets: tuple[str, ...]
    flops: float


def forward_flops(arch: str, size: int) -> int:
    """Floating-point operations of one image's forward pass (counted on shapes alone)."""
    with torch.device("meta"):
        model = get_model(arch, (3, size, size)).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def estimate(layout: Layout, job: Job, seeds: int) -> float:
    """Operations of a job: training steps x batch x three forward passes, for all seeds."""
    size, arch = PRESETS[layout.source].size, network(layout, job.model)
    images = 0
    if job.method not in (SCRATCH, "gaussian"):
        recipe = pretrain_recipe(job.method, layout.source, arch)
        count = PRESETS[layout.source].num_images
        images += recipe.total_steps(count) * min(recipe.batch_size, count)
    if layout.protocol == "finetune":
        for target in job.targets:
            recipe = finetune_recipe(target, arch, size)
            images += recipe.steps * recipe.batch_size
    else:
        images += 60000 * len(job.targets)  # feature extraction, or about as much for KD
    return 3.0 * seeds * images * forward_flops(arch, size)


def missing_jobs(layout: Layout, flags: TablesFlags) -> list[Job]:
    """Jobs for all places with fewer than `num_test` seeds, cheapest first."""
    found = collect(layout, read_cells(flags.log_dir))
    lacking: dict[tuple[str, str], list[Place]] = {}
    for place in places(layout):
        if len(found.get(place.key, [])) < flags.num_test:
            lacking.setdefault((place.method, place.model), []).append(place)
    jobs = []
    for (method, model), these in lacking.items():
        job = Job(method, model, tuple(p.target for p in these), 0.0)
        cost = estimate(layout, job, flags.num_test)
        jobs.append(Job(method, model, job.targets, cost))
    return sorted(jobs, key=lambda job: job.flops)


def _run_job(layout: Layout, job: Job, flags: TablesFlags) -> None:
    shared = dict(
        source_data_name=layout.source, target_data_name="_".join(job.targets),
        test_model=job.model, num_test=flags.num_test, data_dir=flags.data_dir,
        log_dir=flags.log_dir, gpu_id=flags.gpu_id, device=flags.device, seed=flags.seed,
        steps_scale=flags.steps_scale,
    )  # fmt: skip
    if layout.protocol == "kd":
        run_kd(KdFlags(**shared, method=job.method, synthetic_data_dir=flags.synthetic_data_dir))
        return
    shared.update(protocol=layout.protocol, label_fraction=layout.fraction)
    if job.method == SCRATCH:
        run_transfer(ScratchFlags(**shared))
        return
    run_transfer(
        TestFlags(
            **shared,
            method=job.method,
            pre_epoch=layout.pre_epoch,
            synthetic_data_dir=flags.synthetic_data_dir,
        )
    )


def run_missing(
    layout: Layout,
    flags: TablesFlags,
    run_job: Callable[[Layout, Job, TablesFlags], None] = _run_job,
) -> list[str]:
    """Run every missing job; one that cannot run (no data, no synthetic set) is said and skipped.

    Returns:
        What could not be run, one line each.
    """
    jobs = missing_jobs(layout, flags)
    done = spent = 0.0
    skipped = []
    for number, job in enumerate(jobs, start=1):
        left = sum(j.flops for j in jobs[number - 1 :])
        shown = f", about {left * spent / done / 60:.0f} min left" if done else ""
        print(f"\n[{number}/{len(jobs)}] {job.method}, {job.model}: {'_'.join(job.targets)}{shown}")
        began = time.perf_counter()
        try:
            run_job(layout, job, flags)
        except UserError as error:
            skipped.append(f"{job.method}, {job.model}: {error}")
            print(f"skipped: {error}")
            continue
        done += job.flops
        spent += time.perf_counter() - began
    return skipped
