"""Flags of main.py, train_original_models.py and validate.py, and what is filled in for them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from clom.loss import CE_FORMS, DISTANCES
from clom.matching import METRICS
from clom.teachers import PREFIX, TEACHER_STATS, pair_alphas
from clom.training import check_strategy, no_augmentation
from data.dsa import without_flip
from data.specs import DC_SPECS
from evaluation.recipes import DSA_STRATEGY
from models import EVAL_MODES, NETWORKS, eval_pool
from utils.cli import flag, same_flag
from utils.errors import UserError, pick
from utils.runlog import TENSORBOARD
from utils.saving import Every

METHODS = ("DC", "DSA", "DM")
LONGEST_NAME = 150  # characters of a default run folder's name

# (outer_loop, inner_loop) by ipc, as published.
LOOPS: dict[int, tuple[int, int]] = {
    1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10),
}  # fmt: skip


@dataclass(frozen=True)
class CommonFlags:
    """Flags of every command of this family."""

    dataset: str = flag("CIFAR10", "data set: a listed name or a prepared set of yours")
    model: str = flag("ConvNet", "network (DC zoo)")
    data_path: Path | None = flag(
        None, "folder of the prepared sets; default: ./data/[dataset] if it holds one, ./datasets"
    )
    img_size: int | None = flag(
        None, "side in pixels; default: the published or only one", minimum=4
    )
    device: str | None = flag(None, "cpu, cuda, cuda:N or mps; default: the best there is")
    gpu: int = flag(0, "which GPU, where CUDA is present", minimum=0)
    dry_run: bool = flag(False, "print the resolved configuration and stop")

    def __post_init__(self) -> None:
        """Names of listed sets get their published spelling: files and folders carry it."""
        for name in ("dataset", "source_dataset"):
            if getattr(self, name, None) is not None:
                object.__setattr__(self, name, DC_SPECS.spelling(getattr(self, name)))


@dataclass(frozen=True)
class DistillFlags(CommonFlags):
    """Flags of methods/DC_DSA_DM/main.py."""

    method: str = flag("DC", "distiller", choices=METHODS)
    ipc: int = flag(1, "synthetic images a class", minimum=1)
    eval_mode: str = flag("S", "networks of the evaluations (see models)", choices=EVAL_MODES)
    num_exp: int = flag(1, "experiments with different draws", minimum=1)
    num_eval: int = flag(20, "random networks an evaluation", minimum=1)
    epoch_eval_train: int | None = flag(
        None, "epochs of each of them; default: 300, or 1000 with augmentation", minimum=0
    )
    eval_interval: int = flag(500, "iterations between evaluations (eval_mode S, SS)", minimum=1)
    Iteration: int | None = flag(
        None, "iterations; default: 1000 (DM: 20000); 0: the start itself is evaluated (with "
        "--init real, random real images)", minimum=0,
    )  # fmt: skip
    lr_img: float | None = flag(
        None, "learning rate of the images; default: 0.1 (DM: 1.0)", above=0
    )
    lr_net: float = flag(0.01, "learning rate of the networks", above=0)
    batch_real: int = flag(256, "real images of a class a step (all, if it has fewer)", minimum=1)
    batch_train: int = flag(256, "batch of network training", minimum=1)
    init: str | None = flag(
        None,
        "start of the images; default: noise (DM: real)",
        choices=("noise", "real"),
    )
    dsa_strategy: str | None = flag(
        None, f"DSA operations joined by _, or None; default: DSA and DM {DSA_STRATEGY}"
    )
    align_corners: bool = flag(False, "DSA samples with align_corners (the KRR-ST convention)")
    save_path: Path | None = flag(None, "run folder; default: ./condensed/[dataset]/[method]/...")
    dis_metric: str = flag("ours", "distance of gradients", choices=tuple(METRICS))
    outer_loop: int | None = flag(
        None, "image updates an iteration (DC, DSA); default: by ipc", minimum=1
    )
    inner_loop: int | None = flag(
        None, "network epochs between them (DC, DSA); default: by ipc", minimum=0
    )

    CLoM: bool = flag(False, "add the CLoM loss")
    CLoM_distance: str = flag("ce", "distance of CLoM", choices=DISTANCES)
    CLoM_ce_form: str = flag(
        "contrastive", "ce as defined in the paper, or as in the released code", choices=CE_FORMS
    )
    CLoM_batch_size: int = flag(8196, "real images of CLoM a step", minimum=1)
    models_pool: tuple[str, ...] = flag(
        ("ConvNet",), "architectures of the pre-trained models: DC zoo, or hf:NAME_OR_FOLDER (cos)"
    )
    alphas: tuple[float, ...] = flag(
        (1000.0,), "weight of CLoM: one, or one per architecture", minimum=0
    )
    model_num: int = flag(1, "pre-trained models of each architecture", minimum=1)
    epoch: int = flag(150, "their epoch", minimum=0)
    source_dataset: str | None = flag(None, "what they were trained on; default: dataset")
    pretrained_path: Path = flag(Path("./pretrained_model"), "folder of the pre-trained models")
    CLoM_teacher_stats: str = flag(
        "own", "images for them are normalised as in their training (own), or stay in the "
        "normalisation of dataset as in the released code (target); hf: models: own",
        choices=TEACHER_STATS,
    )  # fmt: skip

    seed: int | None = flag(None, "seed; default: drawn and printed", minimum=0)
    print_every: int = flag(10, "iterations between log lines", minimum=1)
    save_every: Every = flag(
        Every(100), "iterations between saves of the run state, or seconds such as 300s"
    )
    tensorboard: bool = flag(False, TENSORBOARD)
    resume: bool = flag(False, "insist on going on with a run (one that is there is gone on with)")
    overwrite: bool = flag(False, "start again in a folder that holds a run")
    export: str | None = flag(
        None, "also write x_syn.pt, y_syn.pt for the KRR-ST tables, e.g. "
        "synthetic_data/{source}/{method}"
    )  # fmt: skip


@dataclass(frozen=True)
class MatchDMFlags(DistillFlags):
    """Flags of methods/DC_DSA_DM/main_DM.py: DM unless told otherwise, and its own defaults."""

    method: str = same_flag(DistillFlags, "method", default="DM")
    ipc: int = same_flag(DistillFlags, "ipc", default=50)
    eval_mode: str = same_flag(DistillFlags, "eval_mode", default="SS")
    eval_interval: int = same_flag(DistillFlags, "eval_interval", default=2000)
    epoch_eval_train: int | None = same_flag(
        DistillFlags, "epoch_eval_train", default=1000, help="epochs of each of them"
    )


@dataclass(frozen=True)
class OriginalFlags(CommonFlags):
    """Flags of train_original_models.py."""

    num: int = flag(1, "networks to train", minimum=1)
    normalize_data: bool = flag(False, "train on normalised images (recorded beside the model)")
    epochs: int = flag(150, "passes over the data", minimum=1)
    batch_size: int = flag(256, "images a step", minimum=1)
    lr: float = flag(0.01, "learning rate", above=0)
    momentum: float = flag(0.9, "momentum", minimum=0, maximum=1)
    weight_decay: float = flag(0.005, "weight decay", minimum=0)
    lr_decay_step: str = flag("50,100", "epochs after which the rate falls to a tenth")
    save_every: int = flag(1, "epochs between checkpoints", minimum=1)
    random_seed: int | None = flag(None, "the published name of --seed", minimum=0)
    seed: int | None = flag(None, "seed; default: drawn and printed", minimum=0)
    multigpu: str | None = flag(None, "GPUs that share each batch, such as 0,1; wins over --gpu")
    pretrained_path: Path = flag(Path("./pretrained_model"), "folder of the models")
    tensorboard: bool = flag(False, TENSORBOARD)
    resume: bool = flag(False, "count networks that these flags have finished towards num")


@dataclass(frozen=True)
class ValidateFlags(CommonFlags):
    """Flags of validate.py."""

    method: str = flag("DC", "distiller of the set: names the default path and the results")
    ipc: int = flag(1, "images a class of the set, checked against it", minimum=1)
    synthesis_data_path: Path | None = flag(
        None,
        "res_*.pt, a folder with x_syn.pt and y_syn.pt, a .safetensors file, a PNG folder, or a "
        "run folder; default: the run folder of --method, --dataset, --model, --ipc",
    )
    experiment: int = flag(0, "which experiment of a res file", minimum=0)
    normalize_data: bool = flag(False, "train and test on normalised images; else on [0, 1] pixels")
    eval_mode: str | None = flag(
        None, "several networks (see models); default: only --model", choices=EVAL_MODES
    )
    num_eval: int = flag(3, "networks with different seeds, for mean and std", minimum=1)
    epochs: int = flag(1000, "passes over the synthetic set", minimum=1)
    batch_size: int = flag(256, "images a step", minimum=1)
    lr: float = flag(0.01, "learning rate", above=0)
    momentum: float = flag(0.9, "momentum", minimum=0, maximum=1)
    weight_decay: float = flag(5e-4, "weight decay", minimum=0)
    lr_decay_step: str = flag("500", "epochs after which the rate falls to a tenth")
    save_every: int = flag(50, "epochs between tests, and checkpoints", minimum=1)
    dsa: bool = flag(False, "train with DSA")
    dsa_strategy: str = flag(DSA_STRATEGY, "DSA operations joined by _")
    align_corners: bool = flag(False, "DSA samples with align_corners (the KRR-ST convention)")
    save_model: bool = flag(
        False, "save the networks at each test in save_path, the first one's last in "
        "pretrained_path, too"
    )  # fmt: skip
    pretrained_path: Path = same_flag(OriginalFlags, "pretrained_path")
    save_path: Path = flag(Path("./test_log/validate"), "where results are written")
    random_seed: int | None = same_flag(OriginalFlags, "random_seed")
    seed: int | None = flag(
        None, "seed of the first network, the next ones add 1; default: 0", minimum=0
    )
    multigpu: str | None = flag(
        None, "GPUs such as 0,1, of which the first is used: the networks are small"
    )


def resolve(flags: DistillFlags, hflip: bool = True) -> DistillFlags:
    """Fill in what the method and ipc decide; check what can be checked without data.

    Args:
        flags: as given.
        hflip: whether mirrored images of this data set keep their meaning.

    Raises:
        UserError: unknown networks or operations, alphas that do not fit, hf: models with ce.
    """
    dm = flags.method == "DM"
    strategy = flags.dsa_strategy
    if flags.method == "DC":
        if not no_augmentation(strategy):
            print(f"--dsa_strategy {strategy} is not used by --method DC")
        strategy = "none"
    elif strategy is None:
        # DM's published default mirrors every listed set.
        mirrors = hflip or (dm and flags.dataset in DC_SPECS)
        strategy = DSA_STRATEGY if mirrors else without_flip(DSA_STRATEGY)
    check_strategy(strategy)
    eval_pool(flags.eval_mode, flags.model)
    outer, inner = loops(flags.ipc)
    if flags.CLoM:
        check_pool(flags)
    return dataclasses.replace(
        flags,
        dsa_strategy="none" if no_augmentation(strategy) else strategy,
        Iteration=(20000 if dm else 1000) if flags.Iteration is None else flags.Iteration,
        lr_img=flags.lr_img or (1.0 if dm else 0.1),
        init=flags.init or ("real" if dm else "noise"),
        outer_loop=flags.outer_loop or outer,
        inner_loop=inner if flags.inner_loop is None else flags.inner_loop,
        source_dataset=flags.source_dataset or flags.dataset,
        save_path=flags.save_path or default_run_folder(flags),
    )


def loops(ipc: int) -> tuple[int, int]:
    """(outer_loop, inner_loop): the published row, or that of the largest ipc below."""
    return LOOPS[max(row for row in LOOPS if row <= ipc)]


def check_pool(flags: DistillFlags) -> None:
    """Check the pool's flags against each other.

    Raises:
        UserError: see `pair_alphas`; unknown networks; or hf: models with ce.
    """
    pair_alphas(flags.models_pool, flags.alphas)
    foreign = [name for name in flags.models_pool if name.startswith(PREFIX)]
    for name in flags.models_pool:
        if name not in foreign:
            pick(NETWORKS, name, "network of --models_pool")
    if flags.CLoM_distance == "ce" and foreign:
        raise UserError(f"{foreign[0]} has no class labels: use --CLoM_distance cos")


def default_run_folder(flags: DistillFlags) -> Path:
    """./condensed/{dataset}/{method}/{model}_ipc{ipc}[_clom-...], safe to type in a shell.

    With CLoM it names distance, source, models_pool, alphas, model_num and epoch.
    """
    name = f"{flags.model}_ipc{flags.ipc}"
    if flags.CLoM:
        pool, alphas = "+".join(flags.models_pool), "+".join(f"{a:.10g}" for a in flags.alphas)
        name += (
            f"_clom-{flags.CLoM_distance}-{flags.source_dataset or flags.dataset}-{pool}"
            f"_alpha{alphas}_num{flags.model_num}_epoch{flags.epoch}"
        )
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", name)
    if len(safe) > LONGEST_NAME:  # the whole name's digest in place of the rest
        safe = f"{safe[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path("./condensed") / flags.dataset / flags.method / safe


def result_name(method: str, dataset: str, model: str, ipc: int) -> str:
    """The published name of a file of synthetic sets."""
    return f"res_{method}_{dataset}_{model}_{ipc}ipc.pt"


def given_seed(flags: OriginalFlags | ValidateFlags) -> int | None:
    """--seed, or its published name."""
    return flags.random_seed if flags.seed is None else flags.seed


def parse_epochs(text: str, name: str) -> tuple[int, ...]:
    """`"50,100"` -> (50, 100); an empty string means no decay.

    Raises:
        UserError: something else than positive numbers.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--{name} {text!r}: expected epochs joined by commas, such as 50,100")
    return tuple(int(part) for part in parts)
