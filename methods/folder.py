"""`python -m distillation`: a folder of pictures and some minutes in, a set and a report of its worth out.

Every stage is ordinary commands of the project, printed as a user would type them. Their lengths are chosen
from the measured speed of a few steps and kept in {out}/plan.json, so that the same command resumes.
"""

import contextlib
import hashlib
import io
import math
import re
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data.load import ImageSet, load_set
from data.loader import ImagePipeline
from data.prepare.__main__ import PrepareFlags
from data.prepare.folder import read_folder
from data.prepare.raw import Source
from data.specs import find_row
from data.synthetic import SyntheticSet
from data.synthetic.views import ViewFlags
from data.untrusted import read_json
from distillation.run import resolved, set_up
from evaluation.fit import Trainer
from evaluation.measure import CellStore, grouped
from evaluation.presets import resolve_preset
from evaluation.recipes import Recipe
from evaluation.target import Representation
from evaluation.transfer import JUDGED, JUDGED_ERROR, TARGET_ERROR, Measure, ScratchFlags, TestFlags, Transfer
from krr_st.config import BaselineFlags, TargetFlags
from krr_st.target import target_trainer
from methods.command import parse
from models import get_model
from utils import checkpoint, cli
from utils.cli import SEED, DeviceFlags, flag, how
from utils.commands import run_command
from utils.cost import largest, round_down
from utils.device import place, resolve_device
from utils.errors import UserError, entry_point
from utils.progress import duration
from utils.run_folder import claim_run, write_json
from utils.seed import local_seed, make_generator
from utils.table import format_mean_std, markdown

RECIPE = "best"  # of train.py, with its earlier batches: larger ones were not tried in runs of minutes
STEPS = dict(outer_iteration=2000, outer_batch_size=256, view_batch=256)
HELD_OUT = 0.2  # share of the pictures that only the judging sees, where the folder sets none apart
# Shares of the time left when a stage is planned; what remains is for starting, reading and the report.
TARGET_SHARE, JUDGE_SHARE, DISTIL_SHARE = 0.25, 0.3, 0.6
# Networks for a CPU, the first that takes so many steps of both trainings in its share of the time.
CPU_NETWORKS = ("convnet_64_128_256_bn", "convnet_32_64_128_bn", "convnet_16_32_64_bn")
ENOUGH_TARGET, ENOUGH_DISTIL = 200, 500
MOST_EPOCHS, MOST_STEPS = 1000, 160000
# So many seeds judge if each can have so many steps of pre-training; below the shortest it says nothing.
SEEDS, LEAST_PRETRAINING, SHORTEST_PRETRAINING = 3, 200, 20


@dataclass(frozen=True)
class FolderFlags(DeviceFlags):
    """Flags of `python -m distillation`."""

    minutes: float = flag(15.0, "time for all of it", above=0, maximum=1e5)
    num_images: int = flag(100, "images of the distilled set", minimum=2)
    img_size: int = flag(32, "side in pixels that the pictures are brought to", minimum=8, maximum=512)
    target: str | None = flag(
        None,
        "target model: hf:NAME_OR_FOLDER or torchvision:NAME as it is, or a network of zoo A that learns "
        "from the pictures; default: one that the minutes allow",
    )
    out: Path | None = how(None, "folder of everything; default: results/{name of the folder}")
    seed: int = flag(0, "seed of everything", **SEED)
    unlabelled: bool = flag(False, "sub-folders are not classes")
    skip_broken: bool = flag(False, "leave unreadable pictures out instead of stopping")
    no_hflip: bool = flag(False, "mirrored pictures mean something else (digits, text): never flip")


class Plan:
    """{out}/plan.json: what was asked for, what was chosen for it, what is done, the seconds spent.

    The commands that follow from it stand there for readers: they are made anew, never read.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked, self._began = path, asked, time.monotonic()
        kept = read_json(path)
        begun = kept.get("chosen") or kept.get("done")  # else nothing was made of what was asked
        before = kept.get("asked", asked) if begun else asked
        before = before if isinstance(before, dict) else {}
        changed = [
            f"--{name} {before[name]}, not {now}"
            if name in before and name in FolderFlags.__dataclass_fields__
            else f"another {name}"
            for name, now in asked.items()
            if before.get(name) != now
        ]
        if changed:
            raise UserError(
                f"{path.parent} was begun with {' and '.join(changed)}; choose another --out, or "
                "remove that folder"
            )
        self.commands = kept.get("commands", {})
        try:
            self._before = float(kept.get("seconds", 0.0))
            self.chosen = {name: dict(values) for name, values in kept.get("chosen", {}).items()}
            self.done = [str(name) for name in kept.get("done", [])]
        except (TypeError, ValueError, AttributeError):
            raise UserError(f"{path} is damaged; remove {path.parent} to start again") from None

    @property
    def spent(self) -> float:
        """Seconds of all starts."""
        return self._before + time.monotonic() - self._began

    def choose(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, and what it gave before where it was asked already."""
        if name not in self.chosen:
            with contextlib.redirect_stdout(io.StringIO()):  # trials, which say nothing about the set
                self.chosen[name] = make()
            self.save()
        return self.chosen[name]

    def save(self) -> None:
        kept = dict(chosen=self.chosen, done=self.done, commands=self.commands)
        write_json(self.path, {"asked": self.asked, "seconds": self.spent, **kept})


class FolderRun:
    """All stages for one folder of pictures; a UserError where it cannot be used."""

    def __init__(self, pictures: Path, flags: FolderFlags) -> None:
        self.pictures, self.flags = pictures, flags
        self.device = resolve_device(flags.device, flags.gpu_id)
        name = re.sub(r"[^\w.-]+", "_", pictures.resolve().name).lstrip("_.-")
        listed = name in ("", "raw") or find_row(name) is not None  # whose statistics are others
        self.name = f"my_{name}" if listed else name
        out = flags.out or Path("results") / self.name
        self.out = out if out.name else out.resolve()  # "." has no name to be a run's
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; expected a folder")
        if self.out.resolve().is_relative_to(pictures.resolve()):
            raise UserError(f"--out {self.out} lies inside the folder of pictures; choose one outside")
        self.data_dir, self.random_dir = self.out / "data", self.out / "random"
        # Flags of all commands that read the prepared pictures.
        self.place = dict(data_dir=self.data_dir, img_size=flags.img_size, seed=flags.seed)
        self.place |= dict(device=flags.device, gpu_id=flags.gpu_id)
        self.method, recipe = parse(["--recipe", RECIPE], "krr_st", prog="train.py", description="")
        self.recipe = replace(recipe, **STEPS)
        self.views = {f.name: getattr(self.recipe, f.name) for f in fields(ViewFlags)}
        self.foreign = ":" in (flags.target or "")  # the target model is one from elsewhere
        if flags.target and not self.foreign:
            Representation(flags.target, (3, flags.img_size, flags.img_size))  # an unknown name fails now
        self.source = self._read()
        self.labelled = len(self.source.class_names or ()) > 1  # sub-folders name two classes or more
        # Random images with class labels make a row where each class has one of them.
        self.can_label = self.labelled and flags.num_images >= len(self.source.class_names)
        asked = {"folder": str(pictures.resolve()), **cli.identity(flags), "set of pictures": self._digest()}
        self.plan = Plan(self.out / "plan.json", asked)
        if (self.out / "config.json").exists() and "distil" not in self.plan.chosen:
            raise UserError(f"{self.out} holds another run, such as one of train.py; choose another --out")

    def _read(self) -> Source:
        """List the pictures; some are set apart where the folder does not do so itself."""
        if not self.pictures.is_dir():
            raise UserError(f"{self.pictures} is not a folder; expected one that holds pictures")
        flags, how = self.flags, dict(unlabelled=self.flags.unlabelled)
        with contextlib.redirect_stdout(io.StringIO()):  # data.prepare is going to say what it leaves out
            source = read_folder(self.pictures, **how)
            self.apart = "test" in source.splits
            (train,) = source.splits["train"]
            least, total = max(2, flags.num_images), len(train.images)
            if total > least and not self.apart:
                source = read_folder(self.pictures, val_fraction=HELD_OUT, **how)
                (train,) = source.splits["train"]
        if len(train.images) < least or ("test" not in source.splits):
            kept = "" if self.apart else f", of which {HELD_OUT:.0%} are kept for judging the set"
            raise UserError(
                f"{self.pictures} holds {total} pictures{kept}; expected more, or a lower --num_images than "
                f"{flags.num_images}"
            )
        return source

    def _digest(self) -> str:
        """Which pictures there are: paths and sizes of the files."""
        digest = hashlib.sha256()
        for parts in self.source.splits.values():
            for path in (path for part in parts for path in part.images):
                name = path.relative_to(self.pictures)
                digest.update(f"{name}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    # What the stages share.

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return max(0.0, 60 * self.flags.minutes - self.plan.spent)

    @cached_property
    def image_set(self) -> ImageSet:
        return load_set(self.name, self.flags.img_size, self.data_dir)

    @property
    def network(self) -> str:
        """The network of the pool and of the judging."""
        return self.plan.choose("networks", self.choose_networks)["network"]

    @property
    def target(self) -> dict[str, Any]:
        """Flags that name the target model."""
        name = self.flags.target or self.plan.choose("networks", self.choose_networks)["target"]
        path = self.out / "target" / f"barlow_twins_{name}_{self.name}.pt"
        return dict(target_model=name, target_ckpt=None if self.foreign else path)

    # The stages.

    def stages(self) -> list[tuple[str, str, Callable[[], list[str]]]]:
        """In their order: the name, the title, and what gives the commands, without `python`."""
        learn = ("target", "The target model learns from the pictures, without labels", self.learn)
        return [
            ("prepare", f"Pictures become tensors of {self.flags.img_size} pixels", self.prepare),
            *([] if self.foreign else [learn]),
            ("random", "Random pictures, to compare with", self.draw),
            ("distil", f"Distillation into {self.flags.num_images} images", self.distil),
            ("judge", "What networks are worth that are pre-trained on them", self.judge),
        ]

    def prepare(self) -> list[str]:
        flags = self.flags
        how = PrepareFlags(
            data_name=self.name,
            size=flags.img_size,
            data_dir=self.data_dir,
            from_folder=self.pictures,
            val_fraction=0.0 if self.apart else HELD_OUT,
            unlabelled=flags.unlabelled,
            skip_broken=flags.skip_broken,
            no_hflip=flags.no_hflip,
        )
        return [cli.command_line("-m data.prepare", how) + " --overwrite"]

    def target_flags(self, name: str) -> TargetFlags:
        """Those of krr_st.target, but for the length."""
        given = dict(data_name=self.name, target_model=name, save_dir=self.out / "target")
        if len(self.image_set.train) < 2560:  # more steps from fewer pictures
            given["batch_size"] = 128
        if self.device.type == "cpu":  # the published projector would take most of the time
            given["projector_dim"] = 512
        return TargetFlags(**self.place, **given)

    def image_seconds(self, network: str) -> float:
        """Of one picture through a network, counted three times in training."""
        shape, recipe = self.image_set.img_shape, Recipe("mse", "sgd", 0.1, 0.0, "constant", 64, steps=10)
        images, views = self.image_set.train.images, ImagePipeline(self.image_set.stats)
        generator = make_generator(self.flags.seed, "speed")
        with local_seed(self.flags.seed):
            model = place(get_model(network, shape, 10), self.device)
        loader = recipe.loader(images, torch.zeros(len(images), 10), self.device, generator, views)
        cost = Trainer(model, loader, recipe).measure()
        return cost.seconds / cost.work / (3 * loader.batch_size)

    def choose_networks(self) -> dict[str, str]:
        """A GPU takes those of the preset, a CPU what the minutes allow."""
        if self.device.type != "cpu":
            preset = resolve_preset(self.name, self.data_dir, self.flags.img_size)
            return dict(target=preset.target_model, network=preset.network)
        flags = replace(self.recipe, num_images=self.flags.num_images)
        distil = ENOUGH_DISTIL * self.method.distiller.cost(flags, 1)
        learn = 0 if self.foreign else ENOUGH_TARGET * 2 * 3 * self.target_flags("").batch_size
        for name in CPU_NETWORKS:
            most = min(
                TARGET_SHARE * self.left / max(learn, 1),
                DISTIL_SHARE * (1 - TARGET_SHARE) * self.left / distil,
            )
            if self.image_seconds(name) <= most:
                break
        return dict(target=name, network=name)

    def choose_epochs(self) -> dict[str, int]:
        """As many as fit the share of the target model."""
        flags = self.target_flags(self.target["target_model"])
        trainer = target_trainer(flags, self.image_set, self.device, flags.seed)
        epoch = trainer.measure().seconds / flags.epochs
        return dict(epochs=min(MOST_EPOCHS, round_down(TARGET_SHARE * self.left / epoch)))

    def learn(self) -> list[str]:
        epochs = self.plan.choose("target", self.choose_epochs)["epochs"]
        flags = self.target_flags(self.target["target_model"])
        flags = replace(flags, epochs=epochs, eval_every=epochs, save_every=max(1, epochs // 20))
        return [cli.command_line("-m krr_st.target", flags)]

    def draw(self) -> list[str]:
        """krr_st.baselines; images with features are trained on as the distilled ones are."""
        shared = dict(data_name=self.name, num_images=self.flags.num_images, **self.target)
        shared |= dict(synthetic_data_dir=self.random_dir, **self.place)
        alike = dict(target_scale=self.recipe.target_scale or "none", mixup=bool(self.recipe.pool_mixup))
        chosen = [BaselineFlags(method="random_features", **shared, **alike, **self.views)]
        chosen += [BaselineFlags(method="random", **shared)] * self.can_label
        return [cli.command_line("-m krr_st.baselines", flags) for flags in chosen]

    def train_flags(self, steps: int, precision: str, pre_iteration: int) -> Any:
        """Those of train.py: the recipe, shortened in proportion: networks of the pool age with it."""
        recipe, count = self.recipe, self.flags.num_images
        shared = dict(data_name=self.name, num_images=count, train_model=self.network, **self.target)
        shared |= dict(save_dir=self.out.parent, exp_name=self.out.name, save_every="60s", **self.place)
        shared |= dict(outer_iteration=steps, eval_every=steps, print_every=max(1, steps // 20))
        age = round(recipe.online_iteration * steps / recipe.outer_iteration)
        shared |= dict(online_iteration=min(recipe.online_iteration, max(5, age)))
        # Its own evaluation at the end is a short one: the judging follows.
        return replace(recipe, precision=precision, pre_iteration=pre_iteration, test_iteration=500, **shared)

    def choose_distillation(self) -> dict[str, Any]:
        """The faster precision, and as many steps as its share of the time takes beside the judging's."""
        pre_iteration = self.choose_judging(JUDGE_SHARE * self.left)["pre_iteration"]
        budget, began = DISTIL_SHARE * self.left, time.monotonic()
        rates, evaluation, kind = {}, 0.0, self.method.distiller
        for precision in ("fp32", "bf16"):
            flags = self.train_flags(self.recipe.outer_iteration, precision, pre_iteration)
            with set_up(self.method, resolved(self.method, flags)) as setup:
                cost, evaluation = setup.measure(), setup.evaluation_cost()
                rates[precision] = cost.seconds / cost.work
        budget -= (time.monotonic() - began) / 2  # the run itself has to start, too
        classes, fastest = self.image_set.num_classes or 1, min(rates, key=rates.get)

        def seconds(steps: int) -> float:
            flags = self.train_flags(steps, fastest, pre_iteration)
            work = steps * kind.cost(flags, classes) + kind.start_cost(flags) + evaluation
            return rates[fastest] * work

        steps = round_down(largest(lambda n: seconds(n) <= budget, MOST_STEPS))
        return dict(steps=steps, precision=fastest, pre_iteration=pre_iteration)

    def distil(self) -> list[str]:
        flags = self.train_flags(**self.plan.choose("distil", self.choose_distillation))
        named = dict(method=self.method.name.lower())
        return [cli.command_line("train.py", flags, self.method.recipes[RECIPE], **named)]

    def time_judging(self) -> dict[str, float]:
        """Seconds of a step of pre-training, and of a row of one seed without it, from random pictures."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            judge = Transfer(self.rows(1, 1)["random_features"][0])
            judge.repetition(self.flags.seed, CellStore(Path(folder) / "results.jsonl"))
        row = time.monotonic() - began
        judge = Transfer(self.rows(1, None)["random_features"][0])
        cost, published = judge.measure(), judge.pretraining.recipe.steps_on(self.flags.num_images)
        step = cost.seconds / cost.work * judge.pretraining_work() / published
        return dict(row=row, step=step, published=published)

    def choose_judging(self, budget: float) -> dict[str, int]:
        """Seeds and steps of pre-training for so many seconds."""
        speed, trained = self.plan.choose("speed of judging", self.time_judging), 2 + self.can_label
        for seeds in range(SEEDS, 0, -1):
            steps = (budget / seeds - (trained + 1) * speed["row"]) / speed["step"] / trained
            if steps >= LEAST_PRETRAINING:
                break
        steps = max(SHORTEST_PRETRAINING, round_down(max(0, steps)))
        return dict(num_test=seeds, pre_iteration=min(round(speed["published"]), steps))

    def rows(self, num_test: int, pre_iteration: int | None) -> dict[str, tuple[ScratchFlags, str]]:
        """Folder of the results -> (the flags that judge it, what the row is called)."""
        count, name = self.flags.num_images, self.method.name
        shared = dict(source_data_name=self.name, target_data_name=self.name, test_model=self.network)
        shared |= dict(self.place, protocol=TARGET_ERROR, num_test=num_test)
        error: dict[str, Any] = self.target
        if self.labelled:
            fewest = int(self.image_set.train.labels.bincount().min())
            shared |= dict(protocol="linear", shots="10_all" if fewest >= 10 else "all")
            error |= dict(target_error=True)

        def test(row: str, method: str, **more: Any) -> TestFlags:
            more |= dict(log_dir=self.out / "judged" / row, pre_iteration=pre_iteration)
            return TestFlags(method=method, **shared, **more)

        drawn = self.random_dir / self.name / "random_features"  # in several views it is one compact file
        drawn = drawn.with_suffix(".safetensors") if self.views["views"] > 1 else drawn
        scratch = ScratchFlags(log_dir=self.out / "judged" / "scratch", **shared, **error)
        features = test("random_features", "random_features", synthetic_path=drawn, **error)
        rows = {
            "scratch": (scratch, "no pre-training"),
            "random_features": (features, f"{count} random pictures with features"),
        }
        if self.can_label:
            labels = test("random", "random", synthetic_data_dir=self.random_dir)
            rows["random"] = labels, f"{count} random pictures with class labels"
        distilled = test("distilled", name.lower(), synthetic_path=self.out, **error)
        return rows | {"distilled": (distilled, f"{count} images distilled by {name}")}

    @property
    def judged(self) -> dict[str, tuple[ScratchFlags, str]]:
        """The rows as they are judged, in what the distillation has left."""
        return self.rows(**self.plan.choose("judge", lambda: self.choose_judging(0.9 * self.left)))

    def judge(self) -> list[str]:
        return [
            cli.command_line("test.py" if isinstance(flags, TestFlags) else "test_scratch.py", flags)
            for flags, _ in self.judged.values()
        ]

    def table(self) -> list[dict[str, str]]:
        """What networks are worth: rows of heading -> mean ± standard deviation over the seeds."""
        found: dict[str, dict[Measure, str]] = {}
        for flags, label in self.judged.values():
            paths = [*flags.log_dir.glob("*/*/*/*/results.json")]
            if not paths:
                raise UserError(f"{flags.log_dir} is empty; remove {self.plan.path} to measure again")
            cells = grouped(read_json(paths[0])["cells"], Measure.of)
            values = {m: [cell[m.field] for cell in mine] for m, mine in cells.items()}
            found[label] = {m: format_mean_std(v, 3 if m.field == "error" else 2) for m, v in values.items()}
        measures = dict.fromkeys(measure for row in found.values() for measure in row)
        heads = {m: m.heading() + ("" if m.field == "error" else ", %") for m in measures}
        return [
            {"pre-training": label, **{head: row.get(m, "") for m, head in heads.items()}}
            for label, row in found.items()
        ]

    # The way through them.

    def run(self) -> int:
        """Run what is not done yet; returns the exit code of the command that stopped, or 0."""
        stages, plan = self.stages(), self.plan
        try:
            for number, (name, title, commands) in enumerate(stages, 1):
                if name in plan.done:
                    continue
                left = f"{duration(self.left)} of {self.flags.minutes:g} min left"
                print(f"\n[{number}/{len(stages)}] {title} ({left})", flush=True)
                plan.commands[name] = commands()
                for command in plan.commands[name]:
                    if code := run_command(command):
                        return code
                plan.done.append(name)
                plan.save()
        finally:
            if self.out.is_dir():
                plan.save()
        return self.finish()

    def finish(self) -> int:
        """Print what the set is worth, and write it where the report looks for it; write the report."""
        table, out = self.table(), self.out
        synthetic = SyntheticSet.load(out)
        which = checkpoint.fingerprint(synthetic.images, synthetic.targets)
        write_json(out / "judged" / "results.json", {"fingerprint": which, "summary": table})
        print()
        if code := run_command(shlex.join(["-m", "utils.report", str(out)])):
            return code
        seeds, steps = self.plan.chosen["judge"]["num_test"], self.plan.chosen["distil"]["steps"]
        unseen = f"{len(self.image_set.test)} pictures that were not learned from, {seeds} seeds"
        advice = ""
        if steps < ENOUGH_DISTIL:
            more = math.ceil(self.flags.minutes * ENOUGH_DISTIL / steps)
            advice = (
                f"The minutes allowed few outer steps ({steps}); --minutes {more} with another --out allows "
                f"about {ENOUGH_DISTIL}.\n\n"
            )
        print(
            f"\nWhat networks are worth, judged on {unseen}:\n\n"
            f"{markdown(list(table[0]), [list(row.values()) for row in table])}\n\n"
            f"{JUDGED if self.labelled else JUDGED_ERROR}\n\n"
            f"{advice}"
            f"set:    {out}/x_syn.pt, y_syn.pt; pictures: {out}/x_syn.png\n"
            f"report: {out}/report.html\n"
            f"{duration(self.plan.spent)} of {self.flags.minutes:g} min"
        )
        return 0


@entry_point
def main(argv: list[str] | None = None) -> int:
    """A folder of pictures in, a distilled set and a report of what it is worth out, in so many minutes.

    Stopped, it resumes when the same command is given again. Sub-folders become class labels, which only
    the judging uses. Every stage is an ordinary command, which is printed.
    """
    parser = cli.Parser(prog="python -m distillation", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of pictures (PNG, JPEG, TIFF, ...)")
    cli.add_flags(parser, FolderFlags)
    given = vars(parser.parse_args(argv))
    run = FolderRun(given.pop("folder").expanduser(), cli.take(FolderFlags, given))
    with claim_run(run.out / "plan"):
        return run.run()
