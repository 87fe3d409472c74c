"""Flags of the KRR-ST commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krr_st.views import DTYPES, MODES
from utils.cli import flag
from utils.device import LAYOUTS
from utils.optim import SCHEDULES
from utils.precision import PRECISIONS
from utils.runlog import TENSORBOARD
from utils.saving import Every


@dataclass(frozen=True)
class CommonFlags:
    """Flags of every KRR-ST command."""

    data_dir: Path = flag(Path("./datasets"), "folder of the prepared tensors")
    gpu_id: int = flag(0, "which GPU, where CUDA is present", minimum=0)
    device: str | None = flag(None, "cpu, cuda, cuda:N or mps; default: the best there is")


_TARGET_MODEL = (
    "a name of zoo A, resnet50, hf:NAME_OR_FOLDER or torchvision:NAME; default: resnet18 "
    "(imagenette: resnet50)"
)
_TARGET_CKPT = (
    "its checkpoint; default: teacher_ckpt/barlow_twins_{target_model}_{data_name}.pt, with "
    "torchvision:NAME torchvision's weights"
)


# What `--recipe` puts in place of train.py's defaults; where each comes from: RESULTS.md.
RECIPES: dict[str, dict[str, Any]] = {
    "published": {},
    # A hundred images in minutes. On held-out images the rate of Y_s is ahead in train.py's own
    # evaluation, not in probes; what helps those is more steps (RESULTS.md).
    "short": {
        "outer_iteration": 2000, "outer_batch_size": 256, "outer_lr": 1e-2, "outer_lr_y": 1e-1,
        "num_models": 5, "online_iteration": 500,
    },
}  # fmt: skip


@dataclass(frozen=True)
class TrainFlags(CommonFlags):
    """Flags of train.py."""

    recipe: str = flag(
        "published", "settings put in place of the defaults; flags that are given win",
        choices=tuple(RECIPES),
    )  # fmt: skip
    seed: int | None = flag(None, "seed; default: drawn and printed", minimum=0)
    target_model: str | None = flag(None, _TARGET_MODEL)
    target_ckpt: Path | None = flag(None, _TARGET_CKPT)
    data_name: str = flag("cifar100", "source data set: a listed name or a prepared set of yours")
    save_dir: Path = flag(Path("./results"), "folder of the run folders")
    exp_name: str | None = flag(None, "name of the run folder; default: {data_name}")
    overwrite: bool = flag(False, "start again in a folder that holds another run")
    dry_run: bool = flag(False, "print the resolved configuration and stop")
    img_size: int | None = flag(None, "side in pixels; default: preset", minimum=4)
    num_images: int | None = flag(None, "synthetic images m; default: preset", minimum=1)
    train_model: str | None = flag(None, "network of the pool (zoo A); default: preset")
    test_model: str | None = flag(None, "network of the evaluation; default: train_model")
    syn_init: str = flag(
        "normalized",
        "start from normalised pixels, or from raw ones as the released code does",
        choices=("normalized", "raw"),
    )
    init_images: str = flag(
        "random", "start from random real images, or from those nearest to k-means centres of the "
        "target's features", choices=("random", "kmeans"),
    )  # fmt: skip
    ridge: float = flag(1e-6, "ridge λ relative to the trace of the kernel", above=0)

    num_models: int = flag(10, "networks in the pool", minimum=1)
    pool_reset: str = flag(
        "paper",
        "age of a replaced pool network: 0 as in the paper, or kept as in the released code",
        choices=("paper", "released"),
    )
    online_opt: str = flag("sgd", "optimiser of the pool networks", choices=("sgd", "adam"))
    online_iteration: int = flag(
        1000, "T: steps a pool network takes before it is replaced", minimum=1
    )
    online_lr: float = flag(0.1, "learning rate of the pool networks", above=0)
    online_wd: float = flag(1e-3, "weight decay of the pool networks", minimum=0)

    outer_opt: str = flag(
        "adam", "optimiser of X_s and Y_s: AdamW, or SGD with momentum 0.5", choices=("adam", "sgd")
    )
    outer_iteration: int = flag(160000, "outer steps", minimum=1)
    outer_batch_size: int = flag(1024, "real images an outer step", minimum=1)
    outer_lr: float = flag(
        1e-3, "learning rate of X_s and Y_s, decays linearly to 1e-3 of it", above=0
    )
    outer_lr_y: float | None = flag(
        None, "learning rate of Y_s where it is not that of X_s", above=0
    )
    outer_wd: float = flag(0.0, "weight decay of X_s and Y_s", minimum=0)
    outer_grad_norm: float = flag(0.0, "clip the gradient norm of each tensor; 0: off", minimum=0)

    precision: str = flag(
        "fp32", "of the networks (tf32: CUDA only); the kernel solve is never below float32",
        choices=PRECISIONS,
    )  # fmt: skip
    layout: str = flag(
        "channels_last", "memory layout of images in the networks", choices=tuple(LAYOUTS)
    )
    compile: bool = flag(False, "compile the pool network's passes with torch.compile")
    target_views: str = flag(
        "auto", "targets of real images: looked up by view (exact), computed at every step as "
        "published (online), or whichever fits the memory", choices=MODES,
    )  # fmt: skip
    views_dtype: str | None = flag(
        None, "of the looked-up targets; default: bf16 with --precision bf16, else fp32",
        choices=tuple(DTYPES),
    )  # fmt: skip
    views_dir: Path | None = flag(
        None, "keep looked-up targets in this folder, for other runs with this target and data"
    )

    print_every: int = flag(100, "steps between log lines", minimum=1)
    eval_every: int = flag(16000, "steps between linear evaluations", minimum=1)
    save_every: Every = flag(Every(2000), "steps between saves, or seconds such as 300s")
    tensorboard: bool = flag(False, TENSORBOARD)

    pre_opt: str = flag("sgd", "optimiser of pre-training in evaluations", choices=("sgd", "adam"))
    pre_epoch: int = flag(1000, "epochs of pre-training on the synthetic set", minimum=1)
    pre_batch_size: int = flag(256, "batch of pre-training", minimum=1)
    pre_lr: float = flag(0.1, "learning rate of pre-training", above=0)
    pre_wd: float = flag(1e-3, "weight decay of pre-training", minimum=0)
    test_opt: str = flag("sgd", "optimiser of the linear classifier", choices=("sgd", "adam"))
    test_iteration: int = flag(5000, "steps of the linear classifier", minimum=1)
    test_batch_size: int = flag(512, "batch of the linear classifier", minimum=1)
    test_lr: float = flag(0.2, "its learning rate, falls to 0 by a cosine", above=0)
    test_wd: float = flag(0.0, "weight decay of the linear classifier", minimum=0)


@dataclass(frozen=True)
class EpochFlags(CommonFlags):
    """Flags of the commands that train a network over epochs and write its checkpoint."""

    seed: int | None = flag(None, "seed; default: drawn and printed", minimum=0)
    img_size: int | None = flag(None, "side in pixels; default: preset", minimum=4)
    save_dir: Path = flag(Path("./teacher_ckpt"), "folder of the checkpoint")
    tensorboard: bool = flag(False, TENSORBOARD)
    overwrite: bool = flag(False, "train again over a checkpoint of another configuration")
    epochs: int = flag(200, "passes over the training images", minimum=1)
    save_every: int = flag(10, "epochs between saves of the run state", minimum=1)


@dataclass(frozen=True)
class TargetFlags(EpochFlags):
    """Flags of krr_st.target."""

    data_name: str = flag("cifar100", "data set to learn from; its labels are never used")
    target_model: str | None = flag(
        None, "architecture (zoo A, or resnet50); default: resnet18 (imagenette: resnet50)"
    )
    batch_size: int = flag(256, "images a step", minimum=2)
    opt: str = flag("adamw", "optimiser", choices=("adamw", "lars", "sgd"))
    lr: float = flag(1e-3, "peak learning rate (for lars try 0.3)", above=0)
    wd: float = flag(1e-4, "weight decay", minimum=0)
    warmup_epochs: float = flag(2, "linear warm-up before the cosine decay", minimum=0)
    off_diagonal: float = flag(5e-3, "weight of the off-diagonal term", minimum=0)
    projector_dim: int = flag(2048, "width of the projector", minimum=1)
    projector_layers: int = flag(3, "linear layers of the projector", minimum=1)
    min_crop: float = flag(0.2, "smallest crop as a share of the image area", above=0, maximum=1)
    jitter: float = flag(0.5, "strength of the colour jitter; 0: off", minimum=0, maximum=1.25)
    degrees: float = flag(0.0, "largest rotation of a view; 0: off", minimum=0, maximum=180)
    eval_every: int = flag(50, "epochs between k-NN evaluations (labelled sets only)", minimum=1)


@dataclass(frozen=True)
class BaselineFlags(CommonFlags):
    """Flags of krr_st.baselines."""

    seed: int | None = flag(0, "seed of the draw", minimum=0)
    method: str = flag("random", "random, random_features, kmeans, kmeans_features or gaussian")
    data_name: str = flag("cifar100", "source data set")
    img_size: int | None = flag(None, "side in pixels; default: preset", minimum=4)
    num_images: int | None = flag(None, "images in the set; default: preset", minimum=1)
    kmeans_space: str = flag(
        "feature", "where distances are measured for k-means", choices=("pixel", "feature")
    )
    target_model: str | None = flag(None, _TARGET_MODEL)
    target_ckpt: Path | None = flag(None, _TARGET_CKPT)
    synthetic_data_dir: Path = flag(Path("./synthetic_data"), "where the set is written")


@dataclass(frozen=True)
class MeasureFlags(CommonFlags):
    """Flags of test_scratch.py, test.py and test_kd.py."""

    seed: int | None = flag(0, "seed of the first repetition; the next ones add 1", minimum=0)
    source_data_name: str = flag("cifar100", "source: sets the image size and the base network")
    test_model: str = flag("base", "base (the source's network) or a name of zoo A")
    num_test: int = flag(3, "repetitions with different seeds", minimum=1)
    log_dir: Path = flag(Path("./test_log"), "where results are written")
    dropout: float = flag(0.0, "dropout before the last layer", minimum=0, maximum=0.99)
    img_size: int | None = flag(None, "side in pixels; default: the source's preset", minimum=4)
    steps_scale: float = flag(1.0, "factor on all training lengths, for quick looks", above=0)


@dataclass(frozen=True)
class PretrainFlags:
    """Flags that name a synthetic set and how it trains a network."""

    source_data_name: str = flag("tinyimagenet", "source: sets the image size and base network")
    method: str = flag(
        "krr_st",
        "whose synthetic set: random, kmeans, dc, dsa, dm, mtt, kip, frepo, krr_st, mkdt, "
        "random_features, kmeans_features, gaussian (in test_kd.py fresh noise, no set), in "
        "test_kd.py scratch (random_features without pre-training); it decides the recipe",
    )
    synthetic_data_dir: Path = flag(Path("./synthetic_data"), "its {source}/{method}/ is read")
    synthetic_path: Path | None = flag(None, "a set anywhere instead (e.g. results/EXP)")
    pre_epoch: int | None = flag(None, "pre-training epochs; default: table", minimum=1)
    pre_iteration: int | None = flag(None, "pre-training steps; default: table", minimum=1)
    pre_opt: str | None = flag(None, "pre-training optimiser", choices=("sgd", "adam"))
    pre_momentum: float | None = flag(
        None, "pre-training momentum (sgd); default: table", minimum=0, maximum=0.999
    )
    pre_schedule: str | None = flag(
        None, "how the pre-training rate falls; default: table", choices=tuple(SCHEDULES)
    )
    pre_warmup: int | None = flag(
        None, "warm-up steps (cosine), at most half of all; default: table", minimum=0
    )
    pre_lr: float | None = flag(None, "pre-training learning rate; default: table", above=0)
    pre_wd: float | None = flag(None, "pre-training weight decay; default: table", minimum=0)
    pre_batch_size: int | None = flag(None, "pre-training batch; default: table", minimum=1)
    pre_dsa: str | None = flag(None, "pre-training DSA strategy or none; default: table")


@dataclass(frozen=True)
class ScratchFlags(MeasureFlags):
    """Flags of test_scratch.py, and what test.py shares with it."""

    target_data_name: str = flag("full", "full, or target names joined by _")
    protocol: str = flag(
        "finetune",
        "finetune: train everything; linear: L-BFGS logistic regression on frozen features; probe: "
        "the same, the name later papers use (with --label_fraction); knn: 20 nearest neighbours",
        choices=("finetune", "linear", "probe", "knn"),
    )
    shots: str = flag("all", "labelled target images a class, or all; several joined by _ (10_all)")
    label_fraction: float | None = flag(
        None, "share of each class's target labels to use, instead of --shots", above=0, maximum=1
    )
    probe_on: str = flag(
        "body", "what linear, probe and knn read: the features before the last layer (body), the "
        "network's outputs, or first the one and then the other (both)",
        choices=("body", "outputs", "both"),
    )  # fmt: skip
    target_error: bool = flag(
        False, "also measure the mean squared error of the outputs against the target model's "
        "features of the test images, in units of the features' variances over the training "
        "images (1: predicting the mean)",
    )  # fmt: skip
    target_model: str | None = flag(None, f"for --target_error: {_TARGET_MODEL}")
    target_ckpt: Path | None = flag(None, _TARGET_CKPT)
    finetune_iteration: int | None = flag(None, "fine-tuning steps; default: table", minimum=1)
    finetune_opt: str | None = flag(None, "fine-tuning optimiser", choices=("sgd", "adam"))
    finetune_momentum: float | None = flag(
        None, "fine-tuning momentum (sgd); default: table", minimum=0, maximum=0.999
    )
    finetune_schedule: str | None = flag(
        None, "how the fine-tuning rate falls; default: table", choices=tuple(SCHEDULES)
    )
    finetune_lr: float | None = flag(None, "fine-tuning learning rate; default: table", above=0)
    finetune_wd: float | None = flag(None, "fine-tuning weight decay; default: table", minimum=0)
    finetune_batch_size: int | None = flag(None, "fine-tuning batch; default: table", minimum=1)


@dataclass(frozen=True)
class TestFlags(PretrainFlags, ScratchFlags):
    """Flags of test.py."""

    __test__ = False  # not a pytest class


_KD_BN = (
    "BatchNorm of the teacher and of the tested student: running statistics, or as released the "
    "statistics of the batch at hand (of the student both accuracies are reported)"
)


@dataclass(frozen=True)
class KdFlags(PretrainFlags, MeasureFlags):
    """Flags of test_kd.py."""

    target_data_name: str = flag("cifar10", "target: only its test split is read")
    teacher_ckpt: Path | None = flag(None, "default: teacher_ckpt/teacher_{target_data_name}.pt")
    teacher_arch: str = flag("resnet18", "architecture of the teacher (zoo A)")
    kd_bn: str = flag("running", _KD_BN, choices=("batch", "running"))
    kd_epoch: int | None = flag(None, "distillation epochs; default: table", minimum=1)
    kd_lr: float | None = flag(None, "distillation learning rate; default: table", above=0)
    kd_batch_size: int | None = flag(None, "distillation batch; default: table", minimum=1)


@dataclass(frozen=True)
class KdTeacherFlags(EpochFlags):
    """Flags of krr_st.kd_teacher."""

    data_name: str = flag("cifar10", "labelled data set to learn")
    arch: str = flag("resnet18", "architecture (zoo A)")
    batch_size: int = flag(128, "images a step", minimum=2)
    lr: float = flag(0.1, "peak learning rate of SGD, falls to 0 by a cosine", above=0)
    momentum: float = flag(0.9, "momentum of SGD", minimum=0, maximum=0.999)
    wd: float = flag(5e-4, "weight decay", minimum=0)


@dataclass(frozen=True)
class TablesFlags(CommonFlags):
    """Flags of krr_st.tables."""

    table: str = flag("1", "1, 2, 3, 4, fig3, or probe_{source}_{percent of labels}")
    run: bool = flag(False, "first run what is missing, cheapest first")
    log_dir: Path = flag(Path("./test_log"), "folder of the cells; the table is written there")
    synthetic_data_dir: Path = flag(Path("./synthetic_data"), "where the synthetic sets are")
    kd_bn: str = flag("running", f"table 4: {_KD_BN}", choices=("batch", "running"))
    published: Path | None = flag(None, "JSON file of published numbers to print beside ours")
    num_test: int = flag(3, "seeds a cell", minimum=1)
    seed: int = flag(0, "first seed", minimum=0)
    steps_scale: float = flag(1.0, "factor on training lengths with --run; marked †", above=0)
