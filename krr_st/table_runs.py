"""What a table still lacks, as jobs, and what each of them costs."""

from __future__ import annotations

import functools

from evaluation.recipes import GAUSSIAN, finetune_recipe, pretrain_recipe
from krr_st.config import PRESETS, KdFlags, ScratchFlags, TablesFlags, TestFlags
from krr_st.kd import run_kd
from krr_st.table_layouts import Layout, collect, network, places
from krr_st.transfer import SCRATCH, run_transfer
from models import get_model
from utils import flops
from utils.cells import read_cells
from utils.distributed import local_gpu
from utils.jobs import Job


@functools.cache
def forward_flops(arch: str, size: int) -> int:
    """Floating-point operations of one image's forward pass."""
    shape = (3, size, size)
    return flops.forward_flops(lambda: get_model(arch, shape), shape)


def estimate(
    layout: Layout, method: str, model: str, targets: tuple[str, ...], seeds: int
) -> float:
    """Operations of a job: training steps x batch x three forward passes, for all seeds."""
    size, arch = PRESETS[layout.source].size, network(layout, model)
    images = 0
    if method not in (SCRATCH, GAUSSIAN):
        recipe = pretrain_recipe(method, layout.source, arch)
        count = PRESETS[layout.source].num_images
        images += recipe.total_steps(count) * min(recipe.batch_size, count)
    if layout.protocol == "finetune":
        for target in targets:
            recipe = finetune_recipe(target, arch, size)
            images += recipe.steps * recipe.batch_size
    else:
        images += 60000 * len(targets)  # feature extraction, or about as much for KD
    return 3.0 * seeds * images * forward_flops(arch, size)


def missing_jobs(layout: Layout, flags: TablesFlags) -> list[Job]:
    """One job for each method and network whose targets lack some of `num_test` seeds."""
    found = collect(layout, read_cells(flags.log_dir / "results.jsonl"), flags.steps_scale)
    lacking: dict[tuple[str, str], list[str]] = {}
    for place in places(layout):
        if len(found.get(place.key, [])) < flags.num_test:
            lacking.setdefault((place.method, place.model), []).append(place.target)
    budget = "" if layout.fraction is None else f" {100 * layout.fraction:g} % of labels"
    return [
        Job(
            f"{layout.source} {layout.protocol}{budget}: {method}, {network(layout, model)}",
            estimate(layout, method, model, tuple(targets), flags.num_test),
            functools.partial(run_job, layout, method, model, tuple(targets), flags),
        )
        for (method, model), targets in lacking.items()
    ]


def run_job(
    layout: Layout, method: str, model: str, targets: tuple[str, ...], flags: TablesFlags
) -> None:
    """Measure one method and network on its targets.

    Raises:
        UserError: no data or no synthetic set.
    """
    shared = dict(
        source_data_name=layout.source, target_data_name="_".join(targets),
        test_model=model, num_test=flags.num_test, data_dir=flags.data_dir,
        log_dir=flags.log_dir, gpu_id=local_gpu(flags.gpu_id), device=flags.device,
        seed=flags.seed, steps_scale=flags.steps_scale,
    )  # fmt: skip
    if layout.protocol == "kd":
        run_kd(KdFlags(**shared, method=method, synthetic_data_dir=flags.synthetic_data_dir))
        return
    shared.update(protocol=layout.protocol, label_fraction=layout.fraction)
    if method == SCRATCH:
        run_transfer(ScratchFlags(**shared))
        return
    run_transfer(
        TestFlags(
            **shared,
            method=method,
            pre_epoch=layout.pre_epoch,
            synthetic_data_dir=flags.synthetic_data_dir,
        )
    )
