"""`python -m trajectory.experts`: train experts on the real images and keep their snapshots.

    python -m trajectory.experts --data_name cifar10 --zca
    python -m trajectory.experts --data_name cifar10 --targets features

Sources: Cazenavette et al., arXiv 2203.11932 (classes); Joshi et al., "Dataset Distillation via
Knowledge Distillation", ICLR 2025 (features).
"""

import contextlib
import functools
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.augment.dsa import check_strategy, without_flip
from data.load import ImageSet, load_set
from data.target_scale import TARGET_SCALES, TargetScale
from data.whitening import Whitening
from evaluation.fit import Trainer, outputs, real_loader
from evaluation.jobs import why_failed
from evaluation.parallel import in_parallel
from evaluation.presets import Preset, resolve_preset
from evaluation.recipes import DSA_STRATEGY, Recipe
from evaluation.score import share_correct
from evaluation.target import TARGET_CKPT, TARGET_MODEL, load_target, resolve_checkpoint
from evaluation.workers import PROCESSES, run_logged
from models import get_model
from models.layout import arranged
from trajectory.buffers import Trajectory, expert_files, expert_path
from utils import checkpoint, cli
from utils.cli import SEED, DeviceFlags, flag, how
from utils.cost import Cost, DryRunFlags
from utils.device import resolve_device
from utils.errors import UserError, entry_point
from utils.memory import out_of_memory_says
from utils.precision import DTYPES, float32_mode
from utils.progress import byte_size
from utils.run_folder import RunFolder, claim_run, is_claimed
from utils.seed import derive_seed, local_seed, make_generator

# Published values of the flags that are not given.
PUBLISHED: dict[str, dict[str, Any]] = {
    "classes": dict(train_epochs=50, lr_teacher=0.01, mom=0.0, l2=0.0, dsa_strategy=DSA_STRATEGY),
    "features": dict(train_epochs=20, lr_teacher=0.1, mom=0.9, l2=1e-4, dsa_strategy="none"),
}


@dataclass(frozen=True)
class ExpertFlags(DeviceFlags, DryRunFlags):
    """Flags of trajectory.experts."""

    data_dir: Path = how(Path("./datasets"), "folder of the prepared tensors")
    data_name: str = flag("cifar10", "data set: a listed name or a prepared set of yours")
    img_size: int | None = flag(None, "side in pixels; default: preset", minimum=4)
    targets: str = flag(
        "classes",
        "what experts learn: class labels (for mtt), or a target model's features of un-augmented images "
        "(for mkdt)",
        choices=tuple(PUBLISHED),
    )
    target_model: str | None = flag(None, TARGET_MODEL)
    target_ckpt: Path | None = how(None, TARGET_CKPT)
    target_scale: str | None = flag(
        None,
        "std: features with mean 0 and variance 1 over the training images; default: none",
        choices=TARGET_SCALES,
    )
    train_model: str | None = flag(
        None, "network (zoo A); default: three blocks of 128 with instance norm, four from 64 pixels on"
    )
    num_experts: int = flag(100, "experts to train", minimum=1, identity=False)
    train_epochs: int | None = flag(
        None, "epochs per expert; default: 50 for classes, 20 for features", minimum=1
    )
    lr_teacher: float | None = flag(
        None, "learning rate of SGD; default: 0.01 for classes, 0.1 for features", above=0
    )
    mom: float | None = flag(
        None, "momentum of SGD; default: 0 for classes, 0.9 for features", minimum=0, maximum=0.999
    )
    l2: float | None = flag(None, "weight decay; default: 0 for classes, 1e-4 for features", minimum=0)
    decay: bool = flag(False, "lower the learning rate to a tenth after half of the epochs")
    batch_train: int = flag(256, "images per step", minimum=1)
    dsa_strategy: str | None = flag(
        None, f"DSA operations joined by _, or none; default: {DSA_STRATEGY}, or none for features"
    )
    zca: bool = flag(False, "whiten images by ZCA (ridge 0.1) before they are augmented")
    snapshot_steps: int | None = flag(None, "steps between snapshots; default: those of an epoch", minimum=1)
    dtype: str = flag("fp32", "dtype of the parameters on disk; bf16 halves the files", choices=tuple(DTYPES))
    buffer_dir: Path | None = flag(
        None,
        "folder that the experts are written to; default: ./buffers/{data_name}_{img_size}/...",
        identity=False,
    )
    seed: int | None = flag(None, "seed; default: drawn and printed", **SEED, identity=False)
    overwrite: bool = flag(False, "start again in a folder that holds another run", identity=False)


def default_network(size: int) -> str:
    """The published ConvNet: blocks of 128 channels with instance norm, a fourth one from 64 pixels on."""
    return "convnet" + "_128" * (4 if size >= 64 else 3) + "_in"


def resolve(flags: ExpertFlags) -> ExpertFlags:
    """Fill in what the kind of targets and the preset decide, the folder included."""
    preset = resolve_preset(flags.data_name, flags.data_dir, flags.img_size)
    given = {k: v for k, v in PUBLISHED[flags.targets].items() if getattr(flags, k) is None}
    flags = replace(
        flags, img_size=preset.size, train_model=flags.train_model or default_network(preset.size), **given
    )
    check_strategy(flags.dsa_strategy)
    if flags.target_scale == "std" and flags.targets != "features":
        raise UserError("--target_scale std standardises features; use --targets features")
    if flags.targets == "classes" and (flags.target_model or flags.target_ckpt):
        raise UserError("a target model gives features; use --targets features, or leave out --target_model")
    if flags.targets == "features":
        model = flags.target_model or preset.target_model
        path = resolve_checkpoint(model, flags.target_ckpt, flags.data_name)
        flags = replace(flags, target_model=model, target_ckpt=path)
    return replace(flags, buffer_dir=flags.buffer_dir or default_folder(flags, preset))


def default_folder(flags: ExpertFlags, preset: Preset) -> Path:
    """./buffers/{data_name}_{img_size}/{train_model}_{targets}_{train_epochs}epochs[_zca][_std][_{target}].

    The target model is named where it is not the preset's.
    """
    more = ("_zca" if flags.zca else "") + ("_std" if flags.target_scale == "std" else "")
    if flags.targets == "features" and flags.target_model != preset.target_model:
        more += "_" + re.sub(r"\W+", "_", flags.target_model)
    name = f"{flags.train_model}_{flags.targets}_{flags.train_epochs}epochs{more}"
    return Path("./buffers") / f"{flags.data_name}_{flags.img_size}" / name


class ExpertTraining:
    """How the experts of one folder are trained: the data, its targets, the recipe."""

    def __init__(self, flags: ExpertFlags, image_set: ImageSet, device: torch.device) -> None:
        self.flags, self.image_set, self.device = flags, image_set, device
        self.inputs = {"data set": image_set.fingerprint}
        dsa, loss = flags.dsa_strategy, "cross_entropy"
        if not image_set.hflip:
            dsa = without_flip(dsa)
        if flags.targets == "features":
            loss, (self.y, self.width) = "mse", self._features()
        elif image_set.train.labels is None:
            raise UserError(f"{image_set.train.path.parent} has no labels; use --targets features")
        else:
            self.y, self.width = image_set.train.labels, image_set.num_classes
        images, stats = image_set.train.images, image_set.stats
        self.whitening = Whitening.fit(images, stats, device).to(device) if flags.zca else None
        schedule = "tenth_at_half" if flags.decay else "constant"
        recipe = Recipe(loss, "sgd", flags.lr_teacher, flags.l2, schedule, flags.batch_train)
        self.recipe = recipe.override(
            epochs=flags.train_epochs, momentum=flags.mom, dsa=dsa, align_corners=False
        )
        self.every = flags.snapshot_steps or -(-len(self.y) // min(flags.batch_train, len(self.y)))
        if self.every > (steps := self.recipe.steps_on(len(self.y))):
            raise UserError(f"--snapshot_steps {self.every} is more than the {steps} steps of an expert")

    def _features(self) -> tuple[Tensor, int]:
        flags, image_set, device = self.flags, self.image_set, self.device
        where = dict(data_name=flags.data_name, data_dir=flags.data_dir)
        target = load_target(flags.target_model, flags.target_ckpt, image_set, device, **where)
        self.inputs["target model"] = target.fingerprint
        features = outputs(target, image_set.train.images, image_set, device).float()
        if flags.target_scale == "std":
            features = TargetScale.fit(features)(features)
        return features, target.dim

    def network(self, seed: int) -> nn.Module:
        """A new network, initialised from `seed` alone."""
        with local_seed(seed):
            network = get_model(self.flags.train_model, self.image_set.img_shape, self.width)
        return arranged(network, self.device)

    def trainer(self, seed: int) -> Trainer:
        """An expert before its first step."""
        given = (self.image_set, self.device, make_generator(seed, "batches"), self.y, self.whitening)
        loader = real_loader(self.recipe, *given)
        return Trainer(self.network(derive_seed(seed, "network")), loader, self.recipe)

    @property
    def bytes(self) -> int:
        """Disk space of one trajectory."""
        size = torch.finfo(DTYPES[self.flags.dtype]).bits // 8
        count = sum(p.numel() for p in self.network(0).parameters())
        return count * size * (1 + self.recipe.steps_on(len(self.y)) // self.every)

    def cost(self, count: int) -> Cost:
        """What `count` experts take, from a few steps of one that is thrown away."""
        at_once = min(count, torch.get_num_threads()) if self.device.type == "cpu" else 1
        given = dict(disk=lambda: count * self.bytes, shorter="fewer --num_experts or --train_epochs")
        with _one_thread(self.device):
            return self.trainer(0).measure(count / at_once, **given)

    def run(self, n: int, seed: int, check: Callable[[], None]) -> tuple[Trajectory, dict[str, float]]:
        """Expert n, its snapshots on the CPU, and what is logged; `check` may raise after each step."""
        trainer, dtype = self.trainer(seed), DTYPES[self.flags.dtype]
        trajectory = []
        for end in range(0, trainer.steps + 1, self.every):
            trainer.run(end, what=f"expert {n + 1}", on_step=lambda *_: check())
            # Copies: on a CPU, `.cpu()` alone would give the live weights.
            copies = (p.detach().to("cpu", dtype, copy=True) for p in trainer.model.parameters())
            trajectory.append([p.contiguous() for p in copies])
        facts = {"loss": trainer.window.mean()}
        if self.flags.targets == "classes":
            trainer.model.prepare = self.whitening
            facts["test_accuracy"] = share_correct(trainer.model, self.image_set, self.device)
        return trajectory, facts


def make_experts(flags: ExpertFlags, device: torch.device) -> Path:
    """Train what is missing of `num_experts` experts; returns their folder. `flags` are resolved.

    Raises:
        UserError: bad flags or data, experts of other flags in the folder, or too little disk space.
    """
    folder, count = Path(flags.buffer_dir), flags.num_experts
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--buffer_dir {folder} is a file; expected a folder")
    with claim_run(folder), out_of_memory_says(device, "lower --batch_train"):
        if not (folder / "config.json").exists() and expert_files(folder):
            raise UserError(f"{folder} holds experts of another origin; choose another --buffer_dir")
        image_set = load_set(flags.data_name, flags.img_size, flags.data_dir)
        missing = [n for n in range(count) if flags.overwrite or not expert_path(folder, n).exists()]
        training = ExpertTraining(flags, image_set, device) if missing else None
        if missing:
            announce(training, folder, len(missing))
        run = RunFolder(
            folder,
            cli.identity(flags),
            seed=flags.seed,
            device=device,
            overwrite=flags.overwrite,
            command=cli.command_line("python -m trajectory.experts", flags, seed=None),
            extra={"data_name": flags.data_name},
            inputs=training.inputs if training else {},
        )
        if not run.resumed:
            for path in expert_files(folder):
                path.unlink()
        if not missing and run.finished:
            print(f"{folder} holds the {count} experts of these flags; --overwrite trains them again")
            return folder

        seeds = [derive_seed(run.seed, "expert", n) for n in missing]
        tasks = [functools.partial(training.run, *task) for task in zip(missing, seeds, strict=True)]
        began, found = time.perf_counter(), _trained(tasks, device)
        for done, (n, (trajectory, facts)) in enumerate(zip(missing, found, strict=True), 1):
            checkpoint.save([trajectory], expert_path(folder, n))
            run.log(step=n + 1, **facts)
            left = (time.perf_counter() - began) / done * (len(missing) - done)
            shown = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in facts.items())
            print(f"expert {n + 1}/{count}: {shown}, {left:.0f} s left", flush=True)
        run.finish({"experts": count, "seconds_of_last_start": time.perf_counter() - began})
    return folder


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU torch has one thread in the block: an expert's sums round alike, however many are trained."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trained(tasks: list[Callable[..., Any]], device: torch.device) -> Iterator[Any]:
    """As `in_parallel`, which would give a single task all threads."""
    with _one_thread(device) if len(tasks) == 1 else contextlib.nullcontext():
        yield from in_parallel(tasks, device)


@contextlib.contextmanager
def made_beside(flags: ExpertFlags, device: torch.device, precision: str) -> Iterator[None]:
    """Within the block a second process calls `make_experts`; on a CPU it has half of the threads.

    Raises:
        UserError: one of the block's, with the last line of that process's log where it has failed.
    """
    folder = Path(flags.buffer_dir)
    log = folder.with_name(f"{folder.name}.log")
    print(f"a second process trains the others; log: {log}", flush=True)
    threads = max(1, torch.get_num_threads() // 2)
    job = functools.partial(_make_beside, flags, device, precision)
    process = PROCESSES.Process(target=run_logged, args=(job, log, None, threads))
    process.start()
    try:
        while process.is_alive() and not is_claimed(folder):
            time.sleep(0.1)
        yield
    except UserError as error:
        if not is_claimed(folder):  # it has ended, or is about to
            process.join(10)
        if process.exitcode:
            why = why_failed(process.exitcode, log)
            raise UserError(f"{error}; the process that trains them: {why}") from None
        raise
    finally:
        process.terminate()
        process.join()


def _make_beside(flags: ExpertFlags, device: torch.device, precision: str) -> None:
    @entry_point
    def make(argv: None) -> None:
        with float32_mode(precision):  # as in the run that it belongs to
            make_experts(flags, resolve_device(str(device)))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # left to the parent, with which `run_logged` ends this
    sys.exit(make())


def announce(training: ExpertTraining, folder: Path, count: int) -> None:
    """Print what `count` experts take; a UserError where the disk has too little."""
    cost, flags = training.cost(count), training.flags
    snapshots = 1 + training.recipe.steps_on(len(training.y)) // training.every
    length = f"{flags.train_epochs} epochs, {snapshots} snapshots each"
    print(f"training {count} experts for {length}, in {folder}")
    print(cost, flush=True)
    place = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < cost.disk:
        raise UserError(
            f"--buffer_dir {folder}: {byte_size(cost.disk)} are needed, {byte_size(free)} are free; fewer "
            "--num_experts or --train_epochs, or --dtype bf16"
        )


def expert_cost(flags: ExpertFlags, device: torch.device) -> Cost:
    """What all experts of resolved flags take; nothing is written."""
    image_set = load_set(flags.data_name, flags.img_size, flags.data_dir)
    return ExpertTraining(flags, image_set, device).cost(flags.num_experts)


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Train experts on the real images and keep the snapshots that MTT and MKDT match."""
    flags = cli.parse(ExpertFlags, argv, prog="python -m trajectory.experts", description=main.__doc__)
    flags = resolve(flags)
    print(json.dumps(cli.as_json(flags), indent=2))
    device = resolve_device(flags.device, flags.gpu_id)
    if flags.cost:
        print(expert_cost(flags, device))
    elif not flags.dry_run:
        print(f"experts: {make_experts(flags, device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
