"""Synthetic sets: the single currency between distillation and evaluation, and its files.

    python -m data.synthetic inspect PATH [--out grid.png]
    python -m data.synthetic convert SRC DST --form pair|res|safetensors|png

KRR-ST writes float target vectors, the DC family class indices; every protocol reads either.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import synthetic_forms as forms
from data import synthetic_png as png
from data.augment import denormalize
from data.specs import DC_SPECS, KRR_SPECS, Stats
from data.synthetic_forms import Form, save_experiments
from data.synthetic_report import draw, share_outside, summarize
from utils import cli
from utils.errors import UserError, entry_point, pick

__all__ = ["FORMS", "SyntheticSet", "save_experiments"]

FORMS = {
    "pair": Form(forms.read_pair, forms.write_pair),
    "res": Form(forms.read_res, forms.write_res),
    "safetensors": Form(forms.read_safetensors, forms.write_safetensors),
    "png": Form(png.read_png, png.write_png),
}


@dataclass(frozen=True, eq=False)
class SyntheticSet:
    """Distilled images with their targets.

    The tensors are detached but share storage with what was given: clone first if that goes on
    being optimised.

    Attributes:
        images: m×C×H×W float32 in normalised space, m >= 1.
        targets: (m,) int64 class indices, or (m, D) float32 target vectors; other number types
            are cast to these.
        stats: mean and std that undo the normalisation; None if unknown.
        data_name: the set it was distilled from; None if unknown.
        info: JSON-able facts (method, accuracies, ...).

    Raises:
        UserError: wrong type, shape, dtype or length, or non-finite values.
    """

    images: Tensor
    targets: Tensor
    stats: Stats | None = None
    data_name: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images = _checked_images(self.images)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "targets", _checked_targets(self.targets, len(images)))
        if self.stats is not None:
            mean, std = self.stats.mean, self.stats.std
            if not len(mean) == len(std) == images.shape[1] or not min(std) > 0:
                raise UserError(
                    f"mean {mean} and std {std} do not fit images of {images.shape[1]} channels"
                )
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

    def unclamped_pixels(self) -> Tensor:
        """The images de-normalised: m×C×H×W float32, 1 is white, values may leave [0, 1].

        Raises:
            UserError: the statistics are unknown.
        """
        if self.stats is None:
            raise UserError("the mean and std of this synthetic set are unknown; give its data set")
        return denormalize(self.images, self.stats)

    def to_pixels(self) -> Tensor:
        """The images de-normalised and clamped to [0, 1]; raises like `unclamped_pixels`."""
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
        """Read any form without executing code from it.

        Args:
            path: folder or file, see `data.synthetic_forms`.
            form: one of FORMS; detected when None.
            stats: take the place of stored statistics (a PNG folder is normalised with them).
            data_name: takes the place of the stored name.
            experiment: which experiment of a `res_*.pt` file; other forms hold one.

        Raises:
            UserError: missing, damaged, unsafe or inconsistent files; the message names the path.
        """
        path = Path(path)
        name = form or forms.detect_form(path)
        if experiment and name != "res":
            raise UserError(f"{path} holds one experiment; only res files hold several")
        content = pick(FORMS, name, "form of a synthetic set").read(path, stats, experiment)
        if stats is not None:
            content["stats"] = stats
        if data_name is not None:
            content["data_name"] = data_name
        try:
            return cls(**content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, path: Path | str, form: str = "pair") -> None:
        """Write one form; each file appears whole or not at all.

        Args:
            path: a folder for "pair" and "png", a file for "res" and "safetensors".
            form: one of FORMS.

        Raises:
            UserError: unknown form, a set the form cannot hold, or `path` cannot be written.
        """
        plain = replace(self, images=_plain(self.images), targets=_plain(self.targets))
        pick(FORMS, form, "form of a synthetic set").write(plain, Path(path))


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy: saving a view would write the whole storage behind it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _checked_images(images: Tensor) -> Tensor:
    dense = isinstance(images, Tensor) and images.layout is torch.strided
    if not dense or not images.is_floating_point():
        kind = images.dtype if dense else type(images).__name__
        raise UserError(f"images are {kind}, expected a dense float tensor in normalised space")
    if images.dim() != 4 or 0 in images.shape:
        raise UserError(
            f"images have shape {tuple(images.shape)}, expected (m, C, H, W) with m at least 1"
        )
    images = images.detach().float()
    _check_finite(images, "images")
    return images


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
    targets = targets.detach()
    values = targets.float()
    _check_finite(values, "targets")
    if vectors:
        return values
    indices = targets.long()
    odd = (indices != targets).nonzero().flatten()
    if len(odd):
        row = int(odd[0])
        raise UserError(
            f"targets hold {float(targets[row]):g} in row {row}, expected whole numbers"
        )
    if int(indices.min()) < 0:
        raise UserError(f"targets hold class index {int(indices.min())}, expected 0 or more")
    return indices


def _check_finite(values: Tensor, what: str) -> None:
    bad = ~torch.isfinite(values).reshape(len(values), -1)
    if bad.any():
        first = int(bad.any(1).nonzero()[0])
        raise UserError(
            f"{what} hold {int(bad.sum())} non-finite values (NaN or inf), first in row {first}"
        )


def _load_flagged(args: argparse.Namespace, path: Path) -> SyntheticSet:
    synthetic = SyntheticSet.load(path, data_name=args.data_name, experiment=args.experiment)
    if args.data_name is None:
        return synthetic
    specs = {"krr": KRR_SPECS, "dc": DC_SPECS}[args.family]
    stats, size = pick(specs, args.data_name, "data set").stats, synthetic.images.shape[-1]
    if size not in stats:
        raise UserError(f"{args.data_name} has no published mean and std at size {size}")
    # Loading again lets a PNG folder be normalised with these values.
    return SyntheticSet.load(
        path, stats=stats[size], data_name=args.data_name, experiment=args.experiment
    )


def _inspect(args: argparse.Namespace) -> None:
    synthetic = _load_flagged(args, args.path)
    print(f"{args.path}: {forms.detect_form(args.path)} form")
    print("\n".join(summarize(synthetic)))
    if args.out is not None:
        print(draw(synthetic, args.out))


def _convert(args: argparse.Namespace) -> None:
    synthetic = _load_flagged(args, args.src)
    synthetic.save(args.dst, args.form)
    again = SyntheticSet.load(args.dst, form=args.form)
    worst = float((again.images - synthetic.images).abs().max())
    same = "equal" if torch.equal(again.targets, synthetic.targets) else "NOT equal"
    print(f"{args.dst}: {len(again)} images in {args.form} form")
    if args.form == "png":
        print(
            f"lost     {share_outside(synthetic):.2%} of pixels clamped to [0, 1], rest at 8 bits"
        )
    print(f"checked  read back: images differ by at most {worst:.3g}, targets {same}")
    if forms.detect_form(args.src) == "res" and synthetic.info["num_experiments"] > 1:
        print(f"lost     only experiment {args.experiment} of {args.src} was converted")


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Inspect or convert a synthetic set."""
    parser = cli._Parser(prog="python -m data.synthetic", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="print what a set holds")
    inspect.add_argument("path", type=Path, help="folder or file of any form")
    inspect.add_argument("--out", type=Path, help="draw a grid of at most 100 images into this PNG")
    convert = commands.add_parser("convert", help="write a set in another form")
    convert.add_argument("src", type=Path, help="folder or file of any form")
    convert.add_argument("dst", type=Path, help="folder (pair, png) or file (res, safetensors)")
    convert.add_argument("--form", required=True, choices=tuple(FORMS), help="form to write")
    for command in (inspect, convert):
        command.add_argument("--data_name", help="use the published mean and std of this data set")
        command.add_argument("--family", choices=("krr", "dc"), default="krr", help="whose [krr]")
        command.add_argument("--experiment", type=int, default=0, help="of a res file [0]")
    args = parser.parse_args(argv)
    {"inspect": _inspect, "convert": _convert}[args.command](args)


if __name__ == "__main__":
    raise SystemExit(main())
