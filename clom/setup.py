"""What the matching family adds to the outer loop: experiments, evaluations, published files."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clom.config import DistillFlags, check_pool, default_run_folder, loops, result_name
from clom.export import export
from clom.plugin import Plugin
from clom.source import count_classes, keeps_meaning_mirrored, load_data, network_factory
from data.augment import denormalize
from data.augment.dc import dc_strategy
from data.augment.dsa import without_flip
from data.real_data import RealImages
from data.specs import DC_SPECS
from data.synthetic import SyntheticSet, save_experiments
from distillation.base import Distiller
from distillation.loop import Plan
from distillation.problem import Problem, check_start
from distillation.run import Method, Setup
from evaluation.parallel import in_parallel
from evaluation.recipes import DSA_STRATEGY, Recipe, check_strategy, dc_evaluation, no_augmentation
from evaluation.score import score_network
from models import eval_pool
from utils import checkpoint
from utils.distributed import Group
from utils.errors import UserError
from utils.plots import save_grid
from utils.run_folder import RunFolder, forget_run
from utils.seed import derive_seed, make_generator
from utils.table import markdown, mean_std


def evaluation_recipe(method: Method, flags: DistillFlags, network: str) -> Recipe:
    """How an evaluation trains a network on the set.

    With DSA where the method augments, else with the older augmentation where DC's is published
    so (MNIST, ConvNetBN).
    """
    dsa = flags.dsa_strategy
    dc = "none" if method.augments else dc_strategy(flags.dataset, network)
    recipe = dc_evaluation(flags.epoch_eval_train, flags.lr_net, flags.batch_train, dsa=dsa, dc=dc)
    return recipe.override(align_corners=flags.align_corners)


class MatchingSetup(Setup):
    """Runs of DC, DSA and DM: several experiments, judged by random networks trained on the set."""

    knobs = "lower --batch_real, --CLoM_batch_size or --batch_train"

    @classmethod
    def resolve(cls, method: Method, flags: DistillFlags) -> DistillFlags:
        """Fill in what the method, the data set and ipc decide.

        Raises:
            UserError: unknown networks or operations, alphas that do not fit, hf: models with ce.
        """
        if flags.CLoM_distance == "cos" and not flags.CLoM:
            print("--CLoM_distance is not used without --CLoM")
        if flags.num_images is not None:
            classes = count_classes(flags)
            if flags.num_images % classes:
                raise UserError(
                    f"--num_images {flags.num_images}: expected a multiple of the {classes} "
                    f"classes of {flags.dataset}"
                )
            flags = dataclasses.replace(flags, ipc=flags.num_images // classes)
        if flags.exp_name is not None:
            flags = dataclasses.replace(flags, save_path=Path("./results") / flags.exp_name)
        strategy = flags.dsa_strategy
        if not method.augments:
            if not no_augmentation(strategy):
                print(f"--dsa_strategy {strategy} is not used by --method {method.name}")
            strategy = "none"
        elif strategy is None:
            mirrors = keeps_meaning_mirrored(flags) or (method.mirrors and flags.dataset in DC_SPECS)
            strategy = DSA_STRATEGY if mirrors else without_flip(DSA_STRATEGY)
        check_strategy(strategy)
        eval_pool(flags.eval_mode, flags.model)
        outer, inner = loops(flags.ipc)
        if flags.CLoM:
            check_pool(flags)
        return dataclasses.replace(
            flags,
            dsa_strategy="none" if no_augmentation(strategy) else strategy,
            outer_loop=flags.outer_loop or outer,
            inner_loop=inner if flags.inner_loop is None else flags.inner_loop,
            source_dataset=flags.source_dataset or flags.dataset,
            save_path=flags.save_path or default_run_folder(flags),
        )

    def __init__(
        self, method: Method, flags: DistillFlags, device: torch.device, group: Group, held: ExitStack
    ) -> None:
        super().__init__(method, flags, device, group, held)
        self.image_set = load_data(flags)
        self.networks = eval_pool(flags.eval_mode, flags.model)
        for name in {flags.model, *self.networks}:
            network_factory(name, self.image_set, device)  # an unfit network fails now
        self.real = RealImages.from_set(self.image_set, device)
        check_start(self.real, flags.ipc, flags.init)
        self.plugin = Plugin(flags, self.image_set, self.real) if flags.CLoM else None

    @property
    def folder(self) -> Path:
        """--save_path."""
        return Path(self.flags.save_path)

    @property
    def name(self) -> str:
        """The published name of the file of synthetic sets."""
        flags = self.flags
        return result_name(flags.method, flags.dataset, flags.model, flags.ipc)

    def experiment_path(self, run: RunFolder, experiment: int) -> Path:
        """Where a finished experiment is kept until all are done, and for later ones to join it."""
        return run.path / f"exp{experiment}_{self.name}"

    def begun(self, run: RunFolder) -> None:
        """Drop sets and pictures of another run."""
        path = run.path / self.name
        pictures = run.path.glob(path.stem.replace("res_", "vis_", 1) + "_exp*_iter*.png")
        kept = run.path.glob(f"exp*_{path.name}")
        for stale in (path, path.with_suffix(".json"), *pictures, *kept):
            stale.unlink(missing_ok=True)

    def finished(self, run: RunFolder) -> bool:
        """Whether all experiments are there and the results written."""
        paths = [self.experiment_path(run, e) for e in range(self.flags.num_exp)]
        return run.finished and all(path.exists() for path in paths)

    def run(self, run: RunFolder) -> dict[str, Any]:
        """Run what is missing of `num_exp` experiments; write the res file after each."""
        flags, done = self.flags, []
        for experiment in range(flags.num_exp):
            path = self.experiment_path(run, experiment)
            if path.exists():
                done.append(checkpoint.load(path, what="finished experiment"))
                continue
            done.append(self.run_experiment(run, experiment))
            checkpoint.save(done[-1], path)
            forget_run(run.state_path)
            self.write(run, done)
        self.write(run, done)
        networks = self.summarize(done)
        rows = [[r["network"], f"{r['mean']:.4f} ± {r['std']:.4f}", str(r["n"])] for r in networks]
        print(markdown(["network", "test accuracy", "n"], rows))
        return {
            "iterations": flags.Iteration,
            "experiments": len(done),
            "networks": networks,
            "seconds_of_last_start": [r["seconds"] for r in done],
        }

    def run_experiment(self, run: RunFolder, experiment: int) -> dict[str, Any]:
        """images, labels (CPU), accuracies after the last iteration, seconds of this start."""
        flags, seed = self.flags, derive_seed(run.seed, "experiment", experiment)
        extra = self.plugin.term(make_generator(seed, "CLoM")) if self.plugin else None
        problem = Problem(self.image_set, self.device, seed, real=self.real, extra=extra)
        plan = Plan(flags.Iteration, flags.print_every, flags.save_every, "iteration", experiment)
        distiller, found = self.distil(run, problem, plan)
        return {
            "images": distiller.x_syn.detach().cpu(),
            "labels": distiller.y_syn.cpu(),
            "accuracies": found["evaluations"][-1][NetworkObserver.key],
            "seconds": found["seconds"],
        }

    def observer(self, run: RunFolder, plan: Plan, distiller: Distiller) -> NetworkObserver:
        """Pictures, and random networks trained on the images."""
        return NetworkObserver(self, run, distiller.problem, plan)

    def write(self, run: RunFolder, done: list[dict[str, Any]]) -> None:
        """Write `res_*.pt` with all finished experiments."""
        flags = self.flags
        info = {"method": flags.method, "model": flags.model, "ipc": flags.ipc, "CLoM": flags.CLoM}
        sets = [
            SyntheticSet(r["images"], r["labels"], self.image_set.stats, flags.dataset, info) for r in done
        ]
        save_experiments(run.path / self.name, sets, joined_accuracies(done))

    def summarize(self, done: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One entry per network; accuracies in [0, 1] after the last iteration."""
        networks = []
        for name, values in joined_accuracies(done).items():
            mean, std = mean_std(values)
            recipe = evaluation_recipe(self.method, self.flags, name)
            networks.append(
                {
                    "network": name,
                    "mean": mean,
                    "std": std,
                    "n": len(values),
                    "accuracies": values,
                    "augmentation": {"dsa": recipe.dsa, "dc": recipe.dc},
                }
            )
        return networks

    def after(self, run: RunFolder) -> None:
        """Say where the sets are; export the first one if wanted."""
        print(f"synthetic set: {run.path / self.name}")
        if self.flags.export is not None:
            export(run.path / self.name, self.flags.export, self.flags.method)


class NetworkObserver:
    """Draws the images, then tests them with `num_eval` random networks of each name.

    Args:
        setup: of the run.
        run: its folder.
        problem: of the experiment.
        plan: of the experiment.
    """

    key = "test"

    def __init__(self, setup: MatchingSetup, run: RunFolder, problem: Problem, plan: Plan) -> None:
        self.setup, self.folder, self.problem, self.plan = setup, run.path, problem, plan

    def due(self, step: int) -> bool:
        """From the start every `eval_interval` iterations with one network; else at the end."""
        flags = self.setup.flags
        often = flags.eval_mode in ("S", "SS") and step % flags.eval_interval == 0
        return often or step == self.plan.steps

    def evaluate(self, step: int, distiller: Distiller) -> dict[str, list[float]]:
        """Network -> test accuracies in [0, 1]."""
        self.draw(step, distiller.x_syn.detach())
        return {name: self.score(step, name, distiller) for name in self.setup.networks}

    def draw(self, step: int, x_syn: Tensor) -> None:
        """Write the picture of the images after a step."""
        flags, stem = self.setup.flags, Path(self.setup.name).stem.replace("res_", "vis_", 1)
        save_grid(
            denormalize(x_syn, self.setup.image_set.stats),
            self.folder / f"{stem}_exp{self.plan.experiment}_iter{step}.png",
            columns=flags.ipc,
            scale=1 if len(x_syn) > 400 else None,
        )

    def score(self, step: int, network: str, distiller: Distiller) -> list[float]:
        """Accuracies of `num_eval` random networks."""
        image_set, device, flags = self.setup.image_set, self.problem.device, self.setup.flags
        recipe = evaluation_recipe(self.setup.method, flags, network)
        score = functools.partial(
            score_network,
            network_factory(network, image_set, device),
            SyntheticSet(distiller.x_syn, distiller.y_syn),
            image_set,
            recipe,
            device=device,
        )
        seeds = [
            derive_seed(self.problem.seed, "evaluation", step, network, n) for n in range(flags.num_eval)
        ]
        tasks = [lambda check, own=own: score(seed=own, check=check) for own in seeds]
        found = [result.final for result in in_parallel(tasks, device)]
        mean, std = mean_std(found)
        print(
            f"iteration {step}: {network} {mean:.4f} ± {std:.4f} over {flags.num_eval} networks, "
            f"{recipe.epochs} epochs, augmentation dsa {recipe.dsa}, dc {recipe.dc}",
            flush=True,
        )
        return found

    def watch(self, step: int, distiller: Distiller) -> dict[str, Any]:
        """Nothing beside the losses of the steps."""
        return {}

    def saved(self, distiller: Distiller) -> None:
        """Nothing lies beside the state."""


def joined_accuracies(done: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Network -> accuracies of all experiments one after another, as in a res file."""
    joined: dict[str, list[float]] = {}
    for result in done:
        for name, values in result["accuracies"].items():
            joined.setdefault(name, []).extend(values)
    return joined
