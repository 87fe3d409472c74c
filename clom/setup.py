"""What the matching family adds to the outer loop: experiments, evaluations, published files."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from clom.config import DistillFlags, default_run_folder, loops, pair_pool, result_name
from clom.loss import CLoM
from clom.pool import RealFeatures, load_pool, pool_fingerprint
from clom.source import count_classes, find_data_dir, load_data, network_factory, set_folder, to_space
from data.augment import denormalize
from data.augment.dc import dc_strategy
from data.augment.dsa import check_strategy, no_augmentation, without_flip
from data.meta import keeps_meaning_mirrored
from data.real_data import RealImages
from data.specs import DC_SPECS, KRR_SPECS
from data.synthetic import SyntheticSet, save_experiments
from distillation.base import Distiller
from distillation.loop import Observer, Plan
from distillation.problem import Problem, check_start
from distillation.run import Method, Setup
from evaluation.recipes import DSA_STRATEGY, Recipe, dc_evaluation
from evaluation.score import score_networks
from models import eval_pool
from utils import checkpoint
from utils.distributed import Group
from utils.errors import UserError
from utils.plots import save_grid
from utils.run_folder import RunFolder, forget_run
from utils.seed import derive_seed, make_generator
from utils.table import format_mean_std, markdown, mean_std


def evaluation_recipe(method: Method, flags: DistillFlags, network: str) -> Recipe:
    """How an evaluation trains a network: with DSA, or with DC's older augmentation (`dc_strategy`)."""
    dsa = flags.dsa_strategy
    dc = "none" if method.augments else dc_strategy(flags.dataset, network)
    recipe = dc_evaluation(flags.epoch_eval_train, flags.lr_net, flags.batch_train, dsa=dsa, dc=dc)
    return recipe.override(align_corners=flags.align_corners)


def siamese_strategy(method: Method, flags: DistillFlags) -> str:
    """DSA's operations on real and synthetic images, or "none"; a UserError for an unknown one."""
    strategy = flags.dsa_strategy
    if not method.augments:
        if not no_augmentation(strategy):
            print(f"--dsa_strategy {strategy} is not used by --method {method.name}")
        return "none"
    if strategy is None:
        mirrors = method.mirrors and flags.dataset in DC_SPECS
        mirrors = mirrors or keeps_meaning_mirrored(find_data_dir(flags) / flags.dataset)
        strategy = DSA_STRATEGY if mirrors else without_flip(DSA_STRATEGY)
    check_strategy(strategy)
    return "none" if no_augmentation(strategy) else strategy


class MatchingSetup(Setup):
    """Runs of DC, DSA and DM: several experiments, judged by random networks trained on the set."""

    knobs = "lower --batch_real, --CLoM_batch_size or --batch_train"
    length = "Iteration"
    shorter = "lower --num_eval, --epoch_eval_train, --num_exp or --batch_real"

    @classmethod
    def resolve(cls, method: Method, flags: DistillFlags) -> DistillFlags:
        """Fill in what the method, the data set and ipc decide; a UserError if flags do not fit."""
        if flags.CLoM:
            pair_pool(flags)
        eval_pool(flags.eval_mode, flags.model)
        if flags.num_images is not None:
            ipc, rest = divmod(flags.num_images, classes := count_classes(flags))
            if rest:
                wanted = f"a multiple of the {classes} classes of {flags.dataset}"
                raise UserError(f"--num_images {flags.num_images}: expected {wanted}")
            flags = dataclasses.replace(flags, ipc=ipc)
        outer, inner = loops(flags.ipc)
        place = flags.save_path if flags.exp_name is None else Path("./results") / flags.exp_name
        return dataclasses.replace(
            flags,
            dsa_strategy=siamese_strategy(method, flags),
            outer_loop=flags.outer_loop or outer,
            inner_loop=inner if flags.inner_loop is None else flags.inner_loop,
            source_dataset=flags.source_dataset or flags.dataset,
            save_path=place or default_run_folder(flags),
        )

    def __init__(self, method: Method, flags: DistillFlags, device: torch.device, group: Group) -> None:
        super().__init__(method, flags, device, group)
        self.image_set, self.repeats = load_data(flags), flags.num_exp
        place = flags.export and export_folder(flags.export, flags.dataset, flags.method)
        if place and (place / "x_syn.pt").exists() and not (flags.overwrite or self.path.exists()):
            raise UserError(f"--export: {place} holds a set already; choose another folder, or remove it")
        pool = eval_pool(flags.eval_mode, flags.model)
        self.networks = {name: network_factory(name, self.image_set, device) for name in pool}
        network_factory(flags.model, self.image_set, device)  # one that does not fit fails now
        self.real = RealImages.from_set(self.image_set, device)
        check_start(self.real, flags.ipc, flags.init)
        self.pool = self.new_clom = None
        if flags.CLoM:
            self.pool = load_pool(flags, self.image_set, device)
            form = dict(distance=flags.CLoM_distance, ce_form=flags.CLoM_ce_form)
            form |= dict(real=RealFeatures(self.real), batch_size=flags.CLoM_batch_size)
            self.new_clom = functools.partial(CLoM, self.pool, **form)  # one more for each experiment

    @property
    def folder(self) -> Path:
        return Path(self.flags.save_path)

    @property
    def inputs(self) -> dict[str, str]:
        return super().inputs | ({"CLoM pool": pool_fingerprint(self.pool)} if self.pool else {})

    @property
    def path(self) -> Path:
        """The file of synthetic sets."""
        return self.folder / self.name

    @property
    def name(self) -> str:
        """Its published name."""
        flags = self.flags
        return result_name(flags.method, flags.dataset, flags.model, flags.ipc)

    def picture(self, experiment: int | str, step: int | str) -> str:
        """The published name of a picture."""
        return f"{Path(self.name).stem.replace('res_', 'vis_', 1)}_exp{experiment}_iter{step}.png"

    def experiment_path(self, run: RunFolder, experiment: int | str) -> Path:
        """Where a finished experiment is kept until all are done, and for later ones to join it."""
        return run.path / f"exp{experiment}_{self.name}"

    def begun(self, run: RunFolder) -> None:
        """Drop sets and pictures of another run."""
        path = self.path
        kept = (self.picture("*", "*"), self.experiment_path(run, "*").name)
        for stale in (path, path.with_suffix(".json"), *(p for each in kept for p in run.path.glob(each))):
            stale.unlink(missing_ok=True)

    def finished(self, run: RunFolder) -> bool:
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
            self.write(done)
        self.write(done)
        networks = []
        for name, values in joined_accuracies(done).items():
            (mean, std), recipe = mean_std(values), evaluation_recipe(self.method, flags, name)
            entry = {"network": name, "mean": mean, "std": std, "n": len(values), "accuracies": values}
            networks.append({**entry, "augmentation": {"dsa": recipe.dsa, "dc": recipe.dc}})
        rows = [[r["network"], format_mean_std(r["accuracies"], 4), str(r["n"])] for r in networks]
        print(markdown(["network", "test accuracy", "n"], rows))
        found = dict(iterations=flags.Iteration, experiments=len(done), networks=networks)
        return {**found, "seconds_of_last_start": [r["seconds"] for r in done]}

    def run_experiment(self, run: RunFolder, experiment: int) -> dict[str, Any]:
        """images, labels (CPU), accuracies after the last iteration, seconds of this start."""
        problem = self.problem(derive_seed(run.seed, "experiment", experiment))
        distiller, found = self.distil(run, problem, self.plan(experiment))
        images, labels = distiller.x_syn.detach().cpu(), distiller.y_syn.cpu()
        accuracies = found["evaluations"][-1][NetworkObserver.key]
        return dict(images=images, labels=labels, accuracies=accuracies, seconds=found["seconds"])

    def plan(self, experiment: int | None = 0) -> Plan:
        """The length of an experiment."""
        flags = self.flags
        return Plan(flags.Iteration, flags.print_every, flags.save_every, "iteration", experiment)

    def problem(self, seed: int) -> Problem:
        """The data by class, and CLoM."""
        extra = self.new_clom and self.new_clom(generator=make_generator(seed, "CLoM"))
        return Problem(self.image_set, self.device, seed, real=self.real, extra=extra)

    def evaluation_cost(self) -> float:
        """Training and test of `num_eval` networks of each name."""
        flags, image_set = self.flags, self.image_set
        count, tested = flags.ipc * image_set.num_classes, len(image_set.test or image_set.train)
        recipes = [evaluation_recipe(self.method, flags, name) for name in self.networks]
        return flags.num_eval * sum(recipe.work_on(count) + tested for recipe in recipes)

    def evaluations(self) -> int:
        """Those of `NetworkObserver`."""
        steps = self.flags.Iteration
        return sum(evaluation_due(self.flags, step, steps) for step in range(steps + 1))

    def observer(self, run: RunFolder, plan: Plan, distiller: Distiller) -> NetworkObserver:
        return NetworkObserver(self, run, plan)

    def write(self, done: list[dict[str, Any]]) -> None:
        """Write `res_*.pt` with all finished experiments."""
        flags = self.flags
        info = {name: getattr(flags, name) for name in ("method", "model", "ipc", "CLoM")}
        facts = (self.image_set.stats, flags.dataset, info)
        sets = [SyntheticSet(r["images"], r["labels"], *facts) for r in done]
        save_experiments(self.path, sets, joined_accuracies(done))

    def after(self, run: RunFolder) -> None:
        """Say where the sets are; export the first one if wanted."""
        print(f"synthetic set: {self.path}")
        if self.flags.export is not None:
            export(self.path, self.flags.export, self.flags.method, self.flags.overwrite)


def evaluation_due(flags: DistillFlags, step: int, steps: int) -> bool:
    """With one name every `eval_interval` iterations from the start; in any case at the end."""
    often = flags.eval_mode in ("S", "SS") and step % flags.eval_interval == 0
    return often or step == steps


class NetworkObserver(Observer):
    """Draws the images of one experiment, then tests them with `num_eval` networks of each name."""

    key = "test"

    def __init__(self, setup: MatchingSetup, run: RunFolder, plan: Plan) -> None:
        self.setup, self.folder, self.plan = setup, run.path, plan
        self.cost = setup.evaluation_cost()

    def due(self, step: int) -> bool:
        """See `evaluation_due`."""
        return evaluation_due(self.setup.flags, step, self.plan.steps)

    def evaluate(self, step: int, distiller: Distiller) -> dict[str, list[float]]:
        """Network -> test accuracies in [0, 1]."""
        setup, x_syn = self.setup, distiller.x_syn.detach()
        pixels, picture = denormalize(x_syn, setup.image_set.stats), setup.picture(self.plan.experiment, step)
        scale = 1 if len(x_syn) > 400 else None
        save_grid(pixels, self.folder / picture, columns=setup.flags.ipc, scale=scale)
        return {name: self.score(step, name, distiller) for name in setup.networks}

    def score(self, step: int, network: str, distiller: Distiller) -> list[float]:
        """Accuracies of `num_eval` random networks."""
        setup, seed = self.setup, distiller.problem.seed
        count, recipe = setup.flags.num_eval, evaluation_recipe(setup.method, setup.flags, network)
        given = (setup.networks[network], SyntheticSet(distiller.x_syn, distiller.y_syn), setup.image_set)
        seeds = [derive_seed(seed, "evaluation", step, network, n) for n in range(count)]
        found = score_networks(*given, recipe, seeds, setup.device)
        print(
            f"iteration {step}: {network} {format_mean_std(found, 4)} over {count} networks, "
            f"{recipe.epochs} epochs, augmentation dsa {recipe.dsa}, dc {recipe.dc}",
            flush=True,
        )
        return found


def joined_accuracies(done: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Network -> accuracies of all experiments one after another, as in a res file."""
    accuracies = [result["accuracies"] for result in done]
    return {name: [value for each in accuracies for value in each[name]] for name in accuracies[0]}


def export_folder(place: str, data_name: str, method: str) -> Path:
    """`place` with the names that the KRR-ST tables use, for which {source} and {method} in it stand."""
    return Path(place.replace("{source}", set_folder(data_name)).replace("{method}", method.lower()))


def export(path: Path, place: str, method: str, overwrite: bool) -> None:
    """Write the first experiment of a res file as the KRR-ST pair, into `export_folder`.

    It is normalised as that family does, where it knows the source at this size.
    """
    synthetic = SyntheticSet.load(path)
    source = set_folder(synthetic.data_name)
    stats = KRR_SPECS[source].stats.get(synthetic.images.shape[-1]) if source in KRR_SPECS else None
    if stats is not None:
        synthetic = dataclasses.replace(to_space(synthetic, stats), data_name=source)
    folder = export_folder(place, synthetic.data_name, method)
    if (folder / "x_syn.pt").exists() and not overwrite:
        before = SyntheticSet.load(folder, form="pair")
        if not torch.equal(before.images, synthetic.images):
            raise UserError(
                f"--export: {folder} holds another set; remove it and repeat this command, which finds {path}"
            )
    synthetic.save(folder, "pair")
    print(f"exported: {folder}/x_syn.pt, y_syn.pt")
