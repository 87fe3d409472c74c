"""What a table still lacks, as jobs, and what each of them costs."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from data.synthetic import SyntheticSet
from evaluation.recipes import (
    GAUSSIAN,
    KD,
    SCRATCH,
    Recipe,
    finetune_recipe,
    pretrain_recipe,
)
from krr_st.config import KdFlags, ScratchFlags, TablesFlags, TestFlags
from krr_st.kd import run_kd
from krr_st.presets import PRESETS
from krr_st.table_layouts import Layout, collect, network, places
from krr_st.transfer import run_transfer
from models import get_model
from utils import flops
from utils.cells import read_cells
from utils.checkpoint import fingerprint
from utils.distributed import local_gpu
from utils.errors import UserError
from utils.jobs import Job


@functools.cache
def forward_flops(arch: str, size: int) -> int:
    """Floating-point operations of one image's forward pass."""
    shape = (3, size, size)
    return flops.forward_flops(lambda: get_model(arch, shape), shape)


# Images that are only looked at, a target: a test split, or training features as well.
_MEASURED = {"finetune": 10000, "kd": 20000, "probe": 60000}


def estimate(
    layout: Layout,
    method: str,
    model: str,
    targets: tuple[str, ...],
    seeds: int,
    steps_scale: float = 1.0,
) -> float:
    """Operations of a job, for all seeds: three forward passes a trained image, one a measured."""
    preset, arch = PRESETS[layout.source], network(layout, model)
    recipes = []
    if method not in (SCRATCH, GAUSSIAN):
        recipe = pretrain_recipe(method, layout.source, arch, kd=layout.protocol == "kd")
        recipes.append(recipe.override(epochs=layout.pre_epoch))
    if layout.protocol == "finetune":
        recipes += [finetune_recipe(target, arch, preset.size) for target in targets]
    elif layout.protocol == "kd":
        recipes += [KD[method]] * len(targets)
    count = preset.num_images
    trained = sum(r.total_steps(count, steps_scale) * _batch(r, count) for r in recipes)
    measured = _MEASURED[layout.protocol] * len(targets)
    return float(seeds * (3 * trained + measured) * forward_flops(arch, preset.size))


def _batch(recipe: Recipe, count: int) -> int:
    """Images a step; `count` synthetic ones bound it where epochs say the length."""
    return recipe.batch_size if recipe.steps else min(recipe.batch_size, count)


def missing_jobs(layout: Layout, flags: TablesFlags) -> list[Job]:
    """One job for each method and network whose targets lack some of `num_test` seeds.

    Cells of a synthetic set that has been replaced since do not count.
    """
    sets = present_sets(layout, flags.synthetic_data_dir)
    cells = [
        cell for cell in read_cells(flags.log_dir / "results.jsonl")
        if sets.get(cell.get("method")) in (None, cell.get("synthetic_set"))
    ]  # fmt: skip
    found = collect(layout, cells, flags.steps_scale)
    lacking: dict[tuple[str, str], list[str]] = {}
    for place in places(layout):
        if len(found.get(place.key, [])) < flags.num_test:
            lacking.setdefault((place.method, place.model), []).append(place.target)
    budget = "" if layout.fraction is None else f" {100 * layout.fraction:g} % of labels"
    return [
        Job(
            f"{layout.source} {layout.protocol}{budget}: {method}, {network(layout, model)}",
            estimate(layout, method, model, tuple(targets), flags.num_test, flags.steps_scale),
            functools.partial(run_job, layout, method, model, tuple(targets), flags),
        )
        for (method, model), targets in lacking.items()
    ]


def present_sets(layout: Layout, folder: Path) -> dict[str, str]:
    """Method -> the fingerprint that cells of its synthetic set carry, where there is one."""
    found = {}
    for method in layout.methods:
        with contextlib.suppress(UserError):  # none, or a damaged one: its job will say so
            synthetic = SyntheticSet.load(folder / layout.source / layout.set_folder(method))
            found[method] = fingerprint(synthetic.images, synthetic.targets)
    return found


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
        run_kd(
            KdFlags(
                **shared,
                method=method,
                kd_bn=layout.kd_bn,
                synthetic_data_dir=flags.synthetic_data_dir,
            )
        )
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
