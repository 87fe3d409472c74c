"""Synthetic sets: what distillation writes and every evaluation reads.

KRR-ST writes float target vectors, the DC family class indices.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.augment import denormalize
from data.specs import Stats
from data.synthetic.forms import FORMS, detect_form
from data.synthetic.training import TrainingSettings
from data.synthetic.views import SetViews
from utils.errors import UserError, pick


@dataclass(frozen=True, eq=False)
class SyntheticSet:
    """Distilled images with their targets.

    The tensors are detached but share storage with those given: clone these first if they are
    optimised further. Other number types are cast. A UserError for a wrong type, shape, dtype or length,
    and for non-finite values.
    """

    images: Tensor  # m×C×H×W float32 in normalised space, m >= 1
    targets: Tensor  # (m,) int64 class indices, or (m, D) float32 target vectors
    stats: Stats | None = None  # undo the normalisation; None if unknown
    data_name: str | None = None  # the set it was distilled from; None if unknown
    info: dict[str, Any] = field(default_factory=dict)  # JSON values: method, accuracies, ...
    # How to train on it, where the set itself decides it.
    training: TrainingSettings = field(default_factory=TrainingSettings)
    views: SetViews | None = None  # the images are k views of each k-th of them; forms but compact forget it

    def __post_init__(self) -> None:
        images = _checked_images(self.images)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "targets", _checked_targets(self.targets, len(images)))
        if self.stats is not None:
            self.stats.check_channels(images.shape[1], "synthetic set")
        if self.views is not None and len(self.views) != len(images):
            raise UserError(f"{len(self.views)} views, but there are {len(images)} images")
        self.training.check_images(images)
        self.training.check_targets(self.targets)
        try:
            json.dumps(self.info)
        except (TypeError, ValueError) as error:
            raise UserError(f"info must hold plain JSON values only ({error})") from None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def soft(self) -> bool:
        """True for float target vectors, False for class indices."""
        return self.targets.is_floating_point()

    @property
    def probabilities(self) -> bool:
        """Whether the targets are probabilities of classes: vectors not below 0 that sum to 1."""
        t = self.targets
        return self.soft and bool(t.min() >= 0 and ((t.sum(1) - 1).abs() <= 1e-3).all())

    @property
    def made_by(self) -> str | None:
        """The method that made it; None if unknown."""
        method = self.info.get("method")
        return method if isinstance(method, str) else None

    @property
    def views_each(self) -> int:
        """How many views there are of each image; 1 where the set is of images alone."""
        return 1 if self.views is None else self.views.each

    def plain(self) -> SyntheticSet:
        """The set without further views of its images."""
        return self.first_views(1)

    def first_views(self, count: int) -> SyntheticSet:
        """The set with the first views of each image, `count` of them or all if there are fewer."""
        if self.views is None:
            return self
        # Copies: saving a part of a tensor would write all of it.
        images, targets = (
            t.unflatten(0, (-1, self.views_each))[:, :count].flatten(0, 1).clone()
            for t in (self.images, self.targets)
        )
        return replace(self, images=images, targets=targets, views=self.views.first(count))

    def unclamped_pixels(self) -> Tensor:
        """The images de-normalised: m×C×H×W float32, 1 is white; a UserError if `stats` is unknown."""
        if self.stats is None:
            raise UserError("the mean and std of this synthetic set are unknown; give its data set")
        return denormalize(self.images, self.stats)

    def to_pixels(self) -> Tensor:
        """Like `unclamped_pixels`, clamped to [0, 1]."""
        return self.unclamped_pixels().clamp(0, 1)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        form: str | None = None,
        stats: Stats | None = None,
        data_name: str | None = None,
        experiment: int = 0,
    ) -> SyntheticSet:
        """Read a folder or file of any form of FORMS, detected when None, without executing code from it.

        `stats` and `data_name` replace what is stored (a PNG folder is normalised with them);
        `experiment` is a number in a `res_*.pt` file, other forms hold one. A UserError names the path of
        missing, damaged, unsafe or inconsistent files.
        """
        path = Path(path)
        name = form or detect_form(path)
        if experiment and name != "res":
            raise UserError(f"{path} holds one experiment; only res files hold several")
        fields = pick(FORMS, name, "form of a synthetic set").read(path, stats, experiment)
        given = {"stats": stats, "data_name": data_name}
        fields |= {key: value for key, value in given.items() if value is not None}
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, path: Path | str, form: str = "pair") -> None:
        """Write a form, into a folder ("pair", "png") or a file; each file whole or not at all."""
        pick(FORMS, form, "form of a synthetic set").write(self, Path(path))


def _checked_images(images: Tensor) -> Tensor:
    dense = isinstance(images, Tensor) and images.layout is torch.strided
    if not dense or not images.is_floating_point():
        kind = images.dtype if dense else type(images).__name__
        raise UserError(f"images are {kind}, expected a dense float tensor in normalised space")
    if images.dim() != 4 or 0 in images.shape:
        raise UserError(f"images have shape {tuple(images.shape)}, expected (m, C, H, W) with m at least 1")
    return _checked_finite(images, "images")


def _checked_targets(targets: Tensor, count: int) -> Tensor:
    wanted = f"({count},) class indices or ({count}, D) float vectors"
    if not isinstance(targets, Tensor) or targets.layout is not torch.strided:
        raise UserError(f"targets are {type(targets).__name__}, expected dense {wanted}")
    described = f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}"
    # A column of whole numbers is more likely a list of classes than vectors of one entry.
    vectors = targets.dim() == 2 and (targets.is_floating_point() or targets.shape[1] > 1)
    shape_fits = (targets.dim() == 1 or vectors) and 0 not in targets.shape
    if not shape_fits or targets.is_complex() or targets.dtype == torch.bool:
        raise UserError(f"{described}, expected {wanted}")
    if len(targets) != count:
        raise UserError(f"{described}, but there are {count} images")
    # The shape says what they are: the number type is cast, as the release does.
    values = _checked_finite(targets, "targets")
    if vectors:
        return values
    indices = targets.detach().long()
    odd = (indices != targets).nonzero().flatten()
    if len(odd):
        row = int(odd[0])
        raise UserError(f"targets hold {float(targets[row]):g} in row {row}, expected whole numbers")
    if int(indices.min()) < 0:
        raise UserError(f"targets hold class index {int(indices.min())}, expected 0 or more")
    return indices


def _checked_finite(values: Tensor, what: str) -> Tensor:
    """The values detached and in float32."""
    values = values.detach().float()
    bad = ~torch.isfinite(values).reshape(len(values), -1)
    if bad.any():
        first = int(bad.any(1).nonzero()[0])
        raise UserError(f"{what} hold {int(bad.sum())} non-finite values (NaN or inf), first in row {first}")
    return values
