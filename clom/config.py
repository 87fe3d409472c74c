"""Flags of the commands of this family, and what is filled in for them."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from clom.loss import CE_FORMS, DISTANCES
from clom.matching import METRICS
from data.specs import DC_SPECS
from distillation.base import RunFlags
from evaluation.recipes import DSA_STRATEGY, Recipe, sgd_by_epochs
from models import EVAL_MODES, NETWORKS
from utils.cli import SEED, DeviceFlags, flag, how, same_flag
from utils.cost import DryRunFlags
from utils.errors import UserError, pick
from utils.progress import Every
from utils.run_folder import TENSORBOARD

PREFIX = "hf:"  # of a foundation model among the names of a pool
LONGEST_NAME = 150  # characters of a default run folder's name

# ipc -> (outer_loop, inner_loop), as published.
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


_EVAL_MODES = (
    "S the network itself without BatchNorm, SS as it is, M several architectures, B some with BatchNorm, "
    "W, D, A, P, N ConvNets of several widths, depths, activations, poolings, norms"
)


@dataclass(frozen=True)
class SourceFlags(DeviceFlags):
    """Flags of every command of this family."""

    model: str = flag("ConvNet", "network (DC zoo)")
    data_path: Path | None = how(
        None, "folder of the prepared sets; default: ./data/[dataset], else ./datasets", also=("data_dir",)
    )
    img_size: int | None = flag(None, "side in pixels; default: the published or only one", minimum=4)


@dataclass(frozen=True)
class CommonFlags(SourceFlags, DryRunFlags):
    """Flags of every command that works on one data set."""

    dataset: str = flag("CIFAR10", "data set: a listed name or a prepared set of yours", also=("data_name",))

    def __post_init__(self) -> None:
        """Names of listed sets get their published spelling: files and folders carry it."""
        for name in ("dataset", "source_dataset"):
            if getattr(self, name, None) is not None:
                object.__setattr__(self, name, DC_SPECS.spelling(getattr(self, name)))


@dataclass(frozen=True)
class CellFlags(SourceFlags):
    """Flags of a run that a table gives all its runs."""

    num_eval: int = flag(20, "random networks per evaluation", minimum=1)
    epoch_eval_train: int | None = flag(
        None, "epochs of networks in an evaluation; default: 300 (augmented: 1000)", minimum=0
    )
    Iteration: int | None = flag(
        None,
        "iterations; default: 1000 (DM: 20000); 0 evaluates the start (--init real: random real images)",
        minimum=0,
        also=("outer_iteration",),
    )
    lr_img: float | None = flag(
        None, "learning rate of the images; default: 0.1 (DM: 1.0)", above=0, also=("outer_lr",)
    )
    batch_real: int = flag(256, "real images of each class per step (all, if it has fewer)", minimum=1)
    init: str | None = flag(None, "initial images; default: noise (DM: real)", choices=("noise", "real"))
    save_every: Every = how(Every(100), "iterations between saves of the run, or seconds such as 300s")

    models_pool: tuple[str, ...] = flag(
        ("ConvNet",), "pre-trained models: DC zoo, or hf:NAME_OR_FOLDER (cos)", needs="CLoM"
    )
    model_num: int = flag(1, "pre-trained models of each architecture", minimum=1, needs="CLoM")
    epoch: int = flag(150, "epoch after which the pre-trained models were saved", minimum=0, needs="CLoM")
    source_dataset: str | None = flag(
        None, "data set of the pre-trained models; default: dataset", needs="CLoM"
    )
    pretrained_path: Path = flag(Path("./pretrained_model"), "folder of the pre-trained models")
    CLoM_batch_size: int = flag(8196, "real images of CLoM per step", minimum=1, needs="CLoM")
    CLoM_teacher_stats: str = flag(
        "own",
        "how images for the pre-trained models are normalised: as in their training (own), or as dataset, "
        "like the released code (target); always own for hf: models",
        choices=("own", "target"),
        needs="CLoM",
    )


@dataclass(frozen=True)
class DistillFlags(CellFlags, RunFlags, CommonFlags):
    """Flags of DC, DSA and DM."""

    method: str = same_flag(RunFlags, "method", default="DC")
    ipc: int = flag(1, "synthetic images per class", minimum=1)
    num_images: int | None = how(
        None,
        "synthetic images in all, in place of --ipc: a multiple of the number of classes",
        minimum=1,
        instead_of="ipc",
    )
    num_exp: int = how(1, "experiments with different draws", minimum=1)
    eval_mode: str = flag("S", f"networks of the evaluations: {_EVAL_MODES}", choices=EVAL_MODES)
    eval_interval: int = flag(500, "iterations between evaluations (eval_mode S, SS)", minimum=1)
    lr_net: float = flag(0.01, "learning rate of the networks", above=0)
    batch_train: int = flag(256, "batch size of network training", minimum=1)
    dsa_strategy: str | None = flag(
        None, f"DSA operations joined by _, or None; default: DSA and DM {DSA_STRATEGY}"
    )
    align_corners: bool = flag(False, "DSA samples with align_corners (the KRR-ST convention)")
    dis_metric: str = flag("ours", "distance of gradients", choices=tuple(METRICS))
    outer_loop: int | None = flag(None, "image updates per iteration (DC, DSA); default: by ipc", minimum=1)
    inner_loop: int | None = flag(
        None, "network epochs between image updates (DC, DSA); default: by ipc", minimum=0
    )
    save_path: Path | None = how(None, "run folder; default: ./condensed/[dataset]/[method]/...")
    exp_name: str | None = how(
        None, "name of the run folder in ./results, in place of --save_path", instead_of="save_path"
    )
    print_every: int = same_flag(RunFlags, "print_every", default=10, help="iterations between log lines")
    resume: bool = how(
        False, "stop if there is no run to resume (an existing one is always resumed)", instead_of="overwrite"
    )
    export: str | None = how(
        None, "also write x_syn.pt, y_syn.pt for the KRR-ST tables, e.g. synthetic_data/{source}/{method}"
    )

    CLoM: bool = flag(False, "add the CLoM loss")
    CLoM_distance: str = flag(
        "ce", "CLoM by cross-entropy (ce) or by cosine distance (cos)", choices=DISTANCES, needs="CLoM"
    )
    CLoM_ce_form: str = flag(
        "contrastive",
        "cross-entropy of CLoM: contrastive as in the paper, or classification as in the released code",
        choices=CE_FORMS,
        needs="CLoM",
    )
    alphas: tuple[float, ...] = flag(
        (1000.0,), "weight of CLoM: one, or one per architecture", minimum=0, needs="CLoM"
    )


@dataclass(frozen=True)
class TrainingFlags(CommonFlags):
    """Flags of the commands that train one network after another, each with the next seed."""

    normalize_data: bool = flag(False, "train (and test) on normalised images; else on [0, 1] pixels")
    epochs: int = flag(150, "passes over the data", minimum=1)
    batch_size: int = flag(256, "images per step", minimum=1)
    lr: float = flag(0.01, "learning rate", above=0)
    momentum: float = flag(0.9, "momentum", minimum=0, maximum=1)
    weight_decay: float = flag(0.005, "weight decay", minimum=0)
    lr_decay_step: str = flag("50,100", "epochs after which the rate falls to a tenth")
    seed: int | None = how(None, "seed; default: drawn and printed", minimum=0, also=("random_seed",))
    multigpu: str | None = how(None, "GPUs that share each batch, such as 0,1; overrides --gpu")
    pretrained_path: Path = how(Path("./pretrained_model"), "folder of the models")

    def recipe(self) -> Recipe:
        """SGD as the flags say; a UserError where --lr_decay_step is not a list of epochs."""
        parts = [part.strip() for part in self.lr_decay_step.split(",") if part.strip()]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            given = f"--lr_decay_step {self.lr_decay_step!r}"
            raise UserError(f"{given}: expected epochs joined by commas, such as 50,100")
        decay = tuple(map(int, parts))
        return sgd_by_epochs(self.epochs, self.lr, self.momentum, self.weight_decay, self.batch_size, decay)


@dataclass(frozen=True)
class OriginalFlags(TrainingFlags):
    """Flags of train_original_models.py."""

    num: int = how(1, "networks to train", minimum=1)
    save_every: int = how(1, "epochs between checkpoints", minimum=1)
    tensorboard: bool = how(False, TENSORBOARD)
    resume: bool = how(False, "count finished networks of the same flags towards num")


@dataclass(frozen=True)
class ValidateFlags(TrainingFlags):
    """Flags of validate.py."""

    method: str = flag("DC", "distiller of the set: names the default path and the results")
    ipc: int | None = flag(None, "images per class, which the set must hold; default: any", minimum=1)
    synthesis_data_path: Path | None = flag(
        None,
        "res_*.pt, a folder with x_syn.pt and y_syn.pt, a .safetensors file, a PNG folder, or a "
        "run folder; default: the run folder of --method, --dataset, --model, --ipc",
    )
    experiment: int = flag(0, "which experiment of a res file", minimum=0)
    eval_mode: str | None = flag(None, f"networks: {_EVAL_MODES}; default: only --model", choices=EVAL_MODES)
    num_eval: int = flag(3, "networks with different seeds, for mean and std", minimum=1)
    epochs: int = same_flag(TrainingFlags, "epochs", default=1000)
    lr: float | None = flag(None, "learning rate; default: the one learned with the set, else 0.01", above=0)
    momentum: float | None = same_flag(
        TrainingFlags,
        "momentum",
        default=None,
        help="momentum; default: the one that belongs to a learned rate, else 0.9",
    )
    weight_decay: float = same_flag(TrainingFlags, "weight_decay", default=5e-4)
    lr_decay_step: str = same_flag(TrainingFlags, "lr_decay_step", default="500")
    save_every: int = flag(50, "epochs between tests and checkpoints", minimum=1)
    dsa: bool = flag(False, "train with DSA")
    dsa_strategy: str | None = flag(
        None,
        "DSA operations joined by _; default: as published, without flip for an own set whose mirror images "
        "mean something else",
    )
    align_corners: bool = same_flag(DistillFlags, "align_corners")
    scores: bool = flag(
        False,
        "also DD-Ranking's label-robust and augmentation-robust scores: more networks are trained, on the "
        "set and on random images with and without DSA, on the set's classes where its labels are soft, and "
        "on all real images",
    )
    full_epochs: int = flag(150, "with --scores: passes over all real images", minimum=1)
    full_accuracy: float | None = flag(
        None,
        "with --scores: known test accuracy in [0, 1] of networks trained on all real images",
        minimum=0,
        maximum=1,
        instead_of="full_epochs",
    )
    save_model: bool = flag(
        False, "save networks at each test in save_path; the last of the first one also in pretrained_path"
    )
    save_path: Path = flag(Path("./test_log/validate"), "where results are written")
    seed: int = flag(0, "seed of the first network; the next ones add 1", also=("random_seed",), **SEED)
    multigpu: str | None = flag(None, "GPUs such as 0,1, of which the first is used: the networks are small")


def loops(ipc: int) -> tuple[int, int]:
    """(outer_loop, inner_loop): the published row, or that of the largest ipc below."""
    return LOOPS[max(row for row in LOOPS if row <= ipc)]


def pair_pool(flags: DistillFlags) -> list[tuple[str, float]]:
    """The architectures of the pool, each with its alpha; a single alpha serves all.

    A UserError for another count of alphas, unknown networks, or hf: models with ce.
    """
    names, alphas = flags.models_pool, flags.alphas
    for name in names:
        if not name.startswith(PREFIX):
            pick(NETWORKS, name, "network of --models_pool")
        elif flags.CLoM_distance == "ce":
            raise UserError(f"{name} has no class labels: use --CLoM_distance cos")
    if len(alphas) not in (1, len(names)):
        raise UserError(
            f"--alphas gives {len(alphas)} values for the {len(names)} names of --models_pool "
            f"({', '.join(names)}); expected one, or one each"
        )
    return list(zip(names, alphas * (len(names) // len(alphas)), strict=True))


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
