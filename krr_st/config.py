"""Flags of the KRR-ST commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.synthetic import CompactFlags
from data.synthetic.views import ViewFlags
from data.target_scale import TARGET_SCALES
from distillation.one_set import ZCA, ClassFlags, FeatureFlags
from evaluation.epochs import EpochFlags
from evaluation.target import TARGET_CKPT, TARGET_MODEL
from utils.cli import SEED, DeviceFlags, flag, same_flag
from utils.precision import DTYPES, PRECISIONS


def shared_flags(flags: Any, other: type) -> dict[str, Any]:
    """The flags that the command with the flags `other` has, too: name -> value."""
    return {k: v for k, v in vars(flags).items() if k in other.__dataclass_fields__}


# What `--recipe` puts in place of train.py's defaults; where each comes from: RESULTS.md.
RECIPES: dict[str, dict[str, Any]] = {
    "published": {},
    # A hundred images in minutes. On held-out images the rate of Y_s is ahead in train.py's own
    # evaluation, not in probes; what helps those is more steps (RESULTS.md).
    "short": {
        "outer_iteration": 2000,
        "outer_batch_size": 256,
        "outer_lr": 1e-2,
        "outer_lr_y": 1e-1,
        "num_models": 5,
        "online_iteration": 500,
    },
    # Each image in fifty hybrid views with the target model's features of each; the images are learned so
    # that these teach. On held-out images a larger rate costs accuracy in the probes, and so do
    # augmented real batches, which also keep the error higher, and half as large batches (RESULTS.md).
    "best": {
        "outer_iteration": 1800,
        "outer_batch_size": 512,
        "view_batch": 512,
        "augment": False,
        "outer_lr": 3e-3,
        "num_models": 5,
        "online_iteration": 1000,
        "ridge": 1e-3,  # on held-out images 1e-6, 1e-4, 1e-3: error .374, .326, .304 (RESULTS.md)
        "target_scale": "std",
        "views": 50,
        "blend": True,
        "hybrid": True,
        "pre_iteration": 1000,
    },
}


@dataclass(frozen=True)
class TrainFlags(ViewFlags, FeatureFlags):
    """Flags of KRR-ST."""

    recipe: str = flag(
        "published",
        "settings in place of the defaults; explicit flags take precedence; best: standardised targets, "
        "and 50 hybrid views of each image with the target model's features of each",
        choices=tuple(RECIPES),
    )
    train_model: str | None = flag(None, "network of the pool (zoo A); default: preset")
    syn_init: str = flag(
        "normalized",
        "start from normalised pixels, or raw ones as the released code",
        choices=("normalized", "raw"),
    )
    init_images: str = flag(
        "random",
        "start from random real images, or from those nearest to k-means centres of the target's features",
        choices=("random", "kmeans"),
    )
    ridge: float = flag(1e-6, "ridge λ relative to the trace of the kernel", above=0)

    num_models: int = flag(10, "networks in the pool", minimum=1)
    pool_mixup: bool | None = flag(
        None,
        "mixup of the set, in the training of pool networks and in the kernel; the set asks for it in "
        "pre-training, too; default: no",
    )
    view_batch: int = flag(
        256, "views of the set per outer step, and per step of a pool network", minimum=1, needs="views"
    )
    pool_reset: str = flag(
        "paper",
        "age of a replaced pool network: 0 as in the paper, or kept as in the released code",
        choices=("paper", "released"),
    )
    online_opt: str = flag("sgd", "optimiser of the pool networks", choices=("sgd", "adam"))
    online_iteration: int = flag(1000, "T: steps a pool network takes before it is replaced", minimum=1)
    online_lr: float = flag(0.1, "learning rate of the pool networks", above=0)
    online_wd: float = flag(1e-3, "weight decay of the pool networks", minimum=0)

    outer_opt: str = flag(
        "adam", "optimiser of X_s and Y_s: AdamW, or SGD with momentum 0.5", choices=("adam", "sgd")
    )
    outer_iteration: int = same_flag(FeatureFlags, "outer_iteration", default=160000)
    outer_batch_size: int = flag(1024, "real images per outer step", minimum=1)
    augment: bool | None = flag(None, "crop and flip the real images; default: yes, as published")
    outer_lr: float = flag(1e-3, "learning rate of X_s and Y_s, decays linearly to 1e-3 of it", above=0)
    outer_lr_y: float | None = flag(None, "learning rate of Y_s where it is not that of X_s", above=0)
    outer_wd: float = flag(0.0, "weight decay of X_s and Y_s", minimum=0)
    outer_grad_norm: float = flag(0.0, "clip the gradient norm of each tensor; 0: off", minimum=0)

    precision: str = flag(
        "fp32",
        "precision of the networks (tf32: CUDA only); kernel solves take at least float32",
        choices=PRECISIONS,
    )
    compile: bool = flag(False, "compile the pool network's passes with torch.compile")
    cuda_graph: bool | None = flag(
        None,
        "replay the pool networks' passes from CUDA graphs: less work for the host; default: wherever "
        "that is possible",
        identity=False,
    )
    target_views: str = flag(
        "auto",
        "targets of real images: looked up by view (exact), computed at every step as "
        "published (online), or whichever fits the memory",
        choices=("auto", "exact", "online"),
        identity=False,
    )
    views_dtype: str | None = flag(
        None,
        "dtype of looked-up targets; default: bf16 if --precision bf16, else fp32",
        choices=tuple(DTYPES),
    )
    views_dir: Path | None = flag(
        None, "keep looked-up targets in this folder, for runs with this target and data", identity=False
    )

    eval_every: int = flag(16000, "steps between linear evaluations", minimum=1)


@dataclass(frozen=True)
class FRePoFlags(ClassFlags):
    """Flags of FRePo."""

    outer_iteration: int = same_flag(ClassFlags, "outer_iteration", default=500000)
    eval_every: int = same_flag(ClassFlags, "eval_every", default=50000)
    outer_batch_size: int = flag(1024, "real images per outer step", minimum=1)
    outer_lr: float = flag(
        3e-4, "learning rate of images and label vectors (LAMB), falls to a tenth by a cosine", above=0
    )
    learn_label: bool | None = flag(None, "learn the label vectors; default: yes")
    use_flip: bool | None = flag(None, "mirrored copies of the set join the kernel; default: as published")
    zca: bool | None = flag(None, ZCA)
    num_models: int = same_flag(TrainFlags, "num_models")
    online_opt: str = same_flag(TrainFlags, "online_opt", default="adam")
    online_iteration: int = same_flag(TrainFlags, "online_iteration", default=100)
    online_lr: float = same_flag(TrainFlags, "online_lr", default=3e-4)
    online_wd: float = same_flag(TrainFlags, "online_wd", default=0.0)


@dataclass(frozen=True)
class KIPFlags(ClassFlags):
    """Flags of KIP by random features."""

    outer_batch_size: int = flag(1280, "real images per batch", minimum=1)
    num_batches: int = flag(4, "batches of real images per outer step", minimum=1)
    num_models: int = flag(8, "random networks that estimate the kernel, drawn anew at every step", minimum=1)
    outer_lr: float = flag(1e-3, "learning rate of the images (AdaBelief)", above=0)
    outer_lr_y: float | None = flag(
        None, "learning rate of the label vectors; default: that of the images", above=0
    )
    lr_transform: float = flag(5e-5, "learning rate of a linear map of all images; 0: no map", minimum=0)
    learn_label: bool | None = flag(None, "learn the label vectors; default: yes")
    platt: bool = flag(False, "cross-entropy with a learned temperature in place of the squared error")
    lr_temperature: float = flag(
        1e-2, "learning rate of the logarithm of this temperature", above=0, needs="platt"
    )
    zca: bool | None = flag(None, ZCA)


@dataclass(frozen=True)
class TargetFlags(EpochFlags):
    """Flags of krr_st.target."""

    data_name: str = flag("cifar100", "data set to learn from; its labels are never used")
    target_model: str | None = flag(
        None, "architecture (zoo A, or resnet50); default: resnet18 (imagenette: resnet50)"
    )
    batch_size: int = flag(256, "images per step", minimum=2)
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
    precision: str = flag("fp32", "precision of the networks; the loss is in float32", choices=tuple(DTYPES))


@dataclass(frozen=True)
class BaselineFlags(ViewFlags, CompactFlags, DeviceFlags):
    """Flags of krr_st.baselines."""

    data_dir: Path = flag(Path("./datasets"), "folder of the prepared tensors")
    seed: int | None = flag(0, "seed of the draw", **SEED, identity=False)
    method: str = flag(
        "random", "random, kmeans, herding or high_loss, each also with _features; or gaussian"
    )
    data_name: str = flag("cifar100", "source data set")
    img_size: int | None = flag(None, "side in pixels; default: preset", minimum=4)
    num_images: int | None = flag(None, "images in the set; default: preset", minimum=1)
    bytes: int | None = flag(
        None,
        "as many images as fit into these bytes with their targets, as they are stored",
        minimum=1,
        maximum=2**40,
        instead_of="num_images",
    )
    kmeans_space: str = flag(
        "feature", "where distances are measured for k-means and herding", choices=("pixel", "feature")
    )
    student: str | None = flag(None, "network whose losses count for high_loss; default: preset")
    num_students: int = flag(3, "students whose losses are averaged for high_loss", minimum=1)
    target_model: str | None = flag(None, TARGET_MODEL)
    target_ckpt: Path | None = flag(None, TARGET_CKPT)
    target_scale: str = flag(
        "none",
        "std: networks learn the features standardised over the training images, whose mean and standard "
        "deviation are written with the set",
        choices=TARGET_SCALES,
    )
    mixup: bool = flag(False, "the set asks for mixup in pre-training")
    synthetic_data_dir: Path = flag(Path("./synthetic_data"), "where the set is written")


@dataclass(frozen=True)
class KdTeacherFlags(EpochFlags):
    """Flags of krr_st.kd_teacher."""

    data_name: str = flag("cifar10", "labelled data set to learn")
    arch: str = flag("resnet18", "architecture (zoo A)")
    batch_size: int = flag(128, "images per step", minimum=2)
    lr: float = flag(0.1, "peak learning rate of SGD, falls to 0 by a cosine", above=0)
    momentum: float = flag(0.9, "momentum of SGD", minimum=0, maximum=0.999)
    wd: float = flag(5e-4, "weight decay", minimum=0)
