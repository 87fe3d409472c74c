"""The one driver: a method and its flags in, a finished run folder out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from data.augment import denormalize
from data.load import ImageSet
from data.specs import Stats
from distillation.base import Distiller
from distillation.loop import Plan, run_loop
from distillation.problem import Problem
from utils import checkpoint, cli
from utils.cost import Cost, Forecast, tensor_bytes
from utils.device import resolve_device
from utils.distributed import Group, launched, local_gpu, process_group, quiet_unless_first
from utils.errors import UserError
from utils.memory import out_of_memory_says
from utils.precision import float32_mode
from utils.run_folder import START_FILE, FollowedRun, Run, RunFolder, claim_run, forget_run


@dataclass(frozen=True)
class Method:
    """A row of the registry: all that the commands need to know about a method."""

    name: str  # as published, such as DSA; commands match it without case
    distiller: type[Distiller]
    setup: type[Setup]  # what its family adds around the outer loop
    flags: type
    about: str  # one line for --help
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of flags that differ within the family
    # (data set, ipc; in runs of one set all its images) -> published settings that differ from `defaults`
    published: Callable[[str, int], Mapping[str, Any]] = lambda dataset, ipc: {}
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # --recipe -> defaults
    augments: bool = False  # synthetic and real images are augmented alike (DSA)
    labels: str = "classes"  # or "features": what its set is labelled with
    mirrors: bool = False  # the published augmentation mirrors every listed data set, digits included


class Setup:
    """What a family of methods adds around the outer loop: data in, evaluations, files out.

    Errors in flags, data and checkpoints are raised when it is built, before anything is written.

    A family gives `folder`, the run folder; `run(run)`, which distils and returns what goes into
    results.json; and of one distillation `plan(experiment)`, its length; `problem(seed)`, what it is given;
    `evaluation_cost()`, the images through networks in one evaluation, counted as in `Distiller.cost`;
    `evaluations()`, their number; and `observer(run, plan, distiller)`, which evaluates the set, with the
    distiller in its initial state.
    """

    image_set: ImageSet  # the source
    knobs = ""  # flags that need less memory, in words
    length = ""  # the flag that says how long a run is
    shorter = ""  # more flags that shorten it, in words
    repeats = 1  # distillations of a run
    several_processes = False  # whether the family's methods run under torchrun

    def __init__(self, method: Method, flags: Any, device: torch.device, group: Group) -> None:
        self.method, self.flags, self.device, self.group = method, flags, device, group
        self.told = not group.first  # what the run takes
        if group.ranks > 1 and not self.several_processes:
            raise UserError(f"{method.name} runs in one process; start it without torchrun")

    @classmethod
    def resolve(cls, method: Method, flags: Any) -> Any:
        """Fill in what presets, the method and the data set decide; a UserError if flags do not fit."""
        return flags

    @classmethod
    def check(cls, flags: Any, device: torch.device) -> None:
        """Raise a UserError for what this device cannot do."""

    @property
    def syn_stats(self) -> Stats:
        """What undoes the normalisation of the set."""
        return self.image_set.stats

    @property
    def extra(self) -> dict[str, Any]:
        """More facts for config.json: the source, its folder, what undoes the normalisation of the set."""
        stats = self.syn_stats
        place = self.image_set.train.path.parent.parent
        return dict(data_name=self.image_set.name, data_dir=str(place), mean=stats.mean, std=stats.std)

    @property
    def inputs(self) -> dict[str, str]:
        """What the run reads -> its fingerprint: a run is resumed with the same or not at all."""
        return {"data set": self.image_set.fingerprint}

    def begun(self, run: RunFolder) -> None:
        """Remove files of another run from the folder of a new one."""

    def finished(self, run: Run) -> bool:
        """Whether everything that the flags ask for is there."""
        return run.finished

    def after(self, run: Run) -> None:
        """Do what follows a finished run, now or earlier."""

    def forecast(self, distiller: Distiller, plan: Plan) -> Forecast:
        """Of this distillation and those of the run that come after it."""
        flags, seen = self.flags, weakref.proxy(distiller)  # no cycle that would keep its tables
        runs, evaluation = self.repeats - (plan.experiment or 0), self.evaluation_cost()
        fixed = distiller.start_cost(flags) + min(2, self.evaluations()) * evaluation  # first and last
        more = max(0, self.evaluations() - 2) * evaluation
        return Forecast(
            runs * (plan.steps * distiller.cost(flags, distiller.problem.classes) + more + fixed),
            self.device,
            disk=lambda: 2 * tensor_bytes(seen.state_dict()),  # the last save and the one before it
            length=(f"--{self.length}", plan.steps),
            fixed=runs * fixed,
            shorter=self.shorter,
        )

    def measure(self) -> Cost:
        """What a run takes, from a few steps; nothing is written."""
        plan, distiller = self.plan(), self.method.distiller(self.problem(0), self.flags)
        distiller.forecast = forecast = self.forecast(distiller, plan)

        def run() -> None:
            for _ in range(max(1, plan.steps)):
                distiller.timed_step()

        return forecast.trial(run)

    def distil(self, run: Run, problem: Problem, plan: Plan) -> tuple[Distiller, dict[str, Any]]:
        """One distillation to its end; returns the distiller and what `run_loop` gives.

        Of a run's first one the images before the first step are kept, as pixels.
        """
        distiller = self.method.distiller(problem, self.flags)
        path = run.path / START_FILE
        if self.group.first and not plan.experiment and not path.exists():
            pixels = denormalize(distiller.plain().images, self.syn_stats).clamp(0, 1)
            checkpoint.save(pixels.mul(255).round().byte().cpu(), path)
        if not self.told:
            distiller.forecast = self.forecast(distiller, plan)
        found = run_loop(distiller, run, self.observer(run, plan, distiller), plan)
        self.told |= distiller.forecast.told
        return distiller, found


def resolved(method: Method, flags: Any) -> Any:
    """The flags, filled in with what the method, presets and data decide."""
    given = {k: v for k, v in method.defaults.items() if getattr(flags, k) is None}
    return method.setup.resolve(method, dataclasses.replace(flags, **given))


@contextlib.contextmanager
def set_up(method: Method, flags: Any) -> Iterator[Setup]:
    """Data and models of resolved flags; see `Setup`."""
    if launched() and ":" in (flags.device or ""):
        raise UserError(
            f"--device {flags.device}: torchrun gives each process its own GPU; use --device cuda"
        )
    device = resolve_device(flags.device, local_gpu(flags.gpu_id))
    method.setup.check(flags, device)
    precision = float32_mode(getattr(flags, "precision", None))
    with precision, process_group(device) as group, out_of_memory_says(device, method.setup.knobs):
        yield method.setup(method, flags, device, group)


def run_method(method: Method, flags: Any) -> int:
    """Distil as `flags` say, in all processes that torchrun started; returns the exit code.

    A UserError for bad flags, data, checkpoints or run folder; nothing is written then.
    """
    with quiet_unless_first():
        flags = resolved(method, flags)
        print(json.dumps(cli.as_json(flags), indent=2))
        if flags.cost and launched():
            raise UserError("--cost measures one process; start it without torchrun")
        if flags.dry_run and not flags.cost:
            method.setup.check(flags, resolve_device(flags.device, local_gpu(flags.gpu_id)))
            return 0
        with set_up(method, flags) as setup:
            if flags.cost:
                print(setup.measure())
                return 0
            with open_run(setup) as run:
                if setup.finished(run):
                    print(f"{run.path} holds the finished run of these flags; --overwrite repeats it")
                    if setup.group.first:
                        forget_run(run.state_path)  # of a start that was killed at its very end
                else:
                    results = setup.run(run)
                    if setup.device.type == "cuda":
                        results["peak_memory_bytes"] = torch.cuda.max_memory_allocated(setup.device)
                    run.finish(results)
                setup.after(run)
    return 0


def repeating(method: Method, flags: Any) -> str:
    """The command that repeats a run of these resolved flags, apart from its seed."""
    recipe = {"method": None, **method.recipes.get(getattr(flags, "recipe", ""), {})}
    given = dict(method=method.name.lower(), seed=None)
    return cli.command_line("python train.py", flags, recipe, **given)


@contextlib.contextmanager
def open_run(setup: Setup) -> Iterator[Run]:
    """The run folder, claimed and made by the first process, followed by the others.

    A UserError where it holds a run with other flags or inputs, is in use, or cannot be written.
    """
    path, flags, group = setup.folder, setup.flags, setup.group
    if not group.first:
        yield FollowedRun(path, *group.gathered(None)[0])
        return
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; expected a folder for the run")
    if getattr(flags, "resume", False) and not (path / "config.json").exists():
        raise UserError(f"--resume: {path} holds no run to resume")
    with claim_run(path):
        run = RunFolder(
            path,
            cli.identity(flags),
            seed=flags.seed,
            device=setup.device,
            overwrite=flags.overwrite,
            tensorboard=flags.tensorboard,
            command=repeating(setup.method, flags),
            extra=setup.extra,
            inputs=setup.inputs,
        )
        if not run.resumed:
            setup.begun(run)
        group.gathered((run.seed, run.finished))
        yield run
