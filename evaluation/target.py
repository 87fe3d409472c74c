"""The frozen target model g: what the synthetic set has to reproduce."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from data.augment import normalize, to_float
from data.load import ImageSet
from data.space import Space, convert
from data.specs import Stats
from data.target_scale import TargetScale
from models import get_model
from models.fold import fold_frozen
from models.foundation import Foundation, load_hf, load_torchvision
from utils import checkpoint
from utils.checkpoint import state_fingerprint
from utils.cli import typed
from utils.device import place
from utils.errors import UserError, pick
from utils.memory import SplitBatches
from utils.precision import autocast


def _hf(name: str, path: Path | None) -> Foundation:
    if path is not None:
        raise UserError(f"--target_ckpt {path} has no meaning for hf:{name}, which has its own")
    return load_hf(name)


# `prefix:NAME` -> (NAME, local checkpoint) -> network.
FOREIGN: dict[str, Callable[[str, Path | None], Foundation]] = {"hf": _hf, "torchvision": load_torchvision}

# Help of the flags that name a target model.
TARGET_MODEL = (
    "a name of zoo A, resnet50, hf:NAME_OR_FOLDER or torchvision:NAME; default: resnet18 "
    "(imagenette: resnet50)"
)
TARGET_CKPT = (
    "checkpoint of the target model; default: teacher_ckpt/barlow_twins_{target_model}_{data_name}.pt, or "
    "torchvision's weights of torchvision:NAME"
)


class ForeignTarget(nn.Module):
    """A network from elsewhere as a map from normalised images of a data set to features (B, dim).

    The images are brought into the form it was made for; differentiable in them.
    """

    def __init__(self, found: Foundation, img_shape: tuple[int, int, int], stats: Stats) -> None:
        super().__init__()
        self.network, self.dim, self.mode = found.network, found.dim, found.mode
        self.given = Space(stats, tuple(img_shape[1:]))
        self.own = Space(Stats(found.mean, found.std), found.size)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(convert(x, self.given, self.own, self.mode))


class Representation(nn.Module):
    """resnet50 or a network of zoo A without its head, as a map from images to pooled features.

    The state dict of `backbone` is what a published target checkpoint holds.
    """

    def __init__(self, arch: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__()
        if arch == "resnet50":  # serves as a target model only
            from models.resnet import StandardResNet50  # torchvision is slow to import

            self.backbone = StandardResNet50(img_shape[0])
        else:
            self.backbone = get_model(arch, img_shape, 1)
        self.backbone.fc = nn.Identity()
        self.dim = self.backbone.num_pooled

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised images -> (B, dim): the last feature map averaged over space."""
        return self.backbone.pooled(x)


def default_checkpoint(arch: str, data_name: str, folder: Path | str = "teacher_ckpt") -> Path:
    """The published place of a target checkpoint."""
    return Path(folder) / f"barlow_twins_{arch}_{data_name}.pt"


def resolve_checkpoint(arch: str, given: Path | None, data_name: str) -> Path | None:
    """`given`, else the published place; None for `prefix:NAME`, which brings its own weights."""
    if given is not None:
        return Path(given)
    return None if ":" in arch else default_checkpoint(arch, data_name)


def load_target(
    arch: str,
    given: Path | None,
    image_set: ImageSet,
    device: torch.device,
    *,
    data_name: str,
    data_dir: Path,
    layout: str = "channels_last",
) -> nn.Module:
    """Load the target model of `data_name` for the images of `image_set`, in eval mode and frozen.

    The checkpoint is that of `resolve_checkpoint`: a plain state dict without the head (a head that
    is there is left out).

    Returns:
        A map from normalised images (B, C, H, W) to features (B, dim), with the attributes `dim` and
        `fingerprint`, that of its weights.

    Raises:
        UserError: missing file (with the command that makes it), or one that does not fit; an
            unknown, unreachable or unsuitable foreign network.
    """
    path, img_shape = resolve_checkpoint(arch, given, data_name), image_set.img_shape
    family, colon, name = arch.partition(":")
    if colon:
        found = pick(FOREIGN, family, "kind of target model")(name, path)
        model = ForeignTarget(found, img_shape, image_set.stats)
        model.fingerprint = state_fingerprint(found.network.state_dict())
        return place(model, device, layout).eval().requires_grad_(False)
    model = Representation(arch, img_shape)
    if not path.exists():
        how = dict(data_name=data_name, img_size=image_set.size, target_model=arch, data_dir=data_dir)
        command = typed("python -m krr_st.target", **how)
        raise UserError(f"target checkpoint {path} does not exist; make it with: {command}")
    state = checkpoint.load_state(path, what="target checkpoint")
    checkpoint.apply_state(model.backbone, state, origin=path, skip=("fc.",))
    model.fingerprint = state_fingerprint(model.backbone.state_dict())
    model.eval().requires_grad_(False)
    sample = torch.randn(2, *img_shape, generator=torch.Generator().manual_seed(0))
    model.backbone = fold_frozen(model.backbone, sample)
    return place(model, device, layout)


class Target:
    """The target model without gradient, in a run's precision, in parts where memory is short.

    Its features are standardised where a `scale` says how.
    """

    def __init__(self, model: nn.Module, precision: str, scale: TargetScale | None = None) -> None:
        self.dim, self.model, self.precision, self.scale = model.dim, model, precision, scale
        self._in_parts = SplitBatches(model)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Normalised images (b, C, H, W) -> features (b, dim)."""
        return self.differentiable(x)

    def differentiable(self, x: Tensor) -> Tensor:
        """The same, with the gradient to the images."""
        with autocast(self.precision, x.device):
            features = self._in_parts(x)
        return features if self.scale is None else self.scale(features)

    def scaled(self, scale: TargetScale) -> "Target":
        """The same target with standardised features."""
        return Target(self.model, self.precision, scale)


@torch.no_grad()
def target_sample(target: Target, image_set: ImageSet, device: torch.device) -> Tensor:
    """The target's features (D,) of the first training image: what it computes, wherever from."""
    x = normalize(to_float(image_set.train.images[:1]), image_set.stats).to(device)
    return target(x.expand(16, -1, -1, -1))[0].float()
