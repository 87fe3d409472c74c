"""Inspect or convert a synthetic set.

python -m data.synthetic inspect PATH [--out grid.png]
python -m data.synthetic convert SRC DST --form pair|res|safetensors|compact|png|npz|hf
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.meta import stored_sizes
from data.prepared import spaced
from data.specs import DC_SPECS, KRR_SPECS
from data.synthetic.card import CardFlags
from data.synthetic.compact import CompactFlags
from data.synthetic.forms import FORMS, detect_form, save_compact, save_hf, stored_bytes
from data.synthetic.set import SyntheticSet
from utils import cli
from utils.cli import flag
from utils.errors import UserError, entry_point, pick
from utils.run_folder import SET_FILE


@dataclass(frozen=True)
class ConvertFlags:
    """What is converted."""

    views: int | None = flag(None, "keep the first so many views of each image; default: all", minimum=1)


def summarize(synthetic: SyntheticSet) -> list[str]:
    """What a set holds, one fact a line."""
    images, targets = synthetic.images, synthetic.targets
    shape = " x ".join(map(str, images.shape[1:]))
    each = synthetic.views_each
    seen = f", {each} views of each of {len(synthetic) // each}" if each > 1 else ""
    lines = [
        f"images   {len(synthetic)} of {shape} (C x H x W){seen}, {_range(images)}",
        f"targets  {_count_targets(targets)}",
        "finite   yes: no NaN or infinite value in images or targets",
    ]
    if synthetic.stats is None:
        lines.append("stats    unknown (give --data_name to de-normalise)")
    else:
        outside = share_outside(synthetic)
        lines.append(f"stats    mean {synthetic.stats.mean}, std {synthetic.stats.std}")
        lines.append(f"pixels   {outside:.2%} outside [0, 1] after de-normalising")
    lines.append(f"data     {synthetic.data_name or 'unknown'}")
    told = {"whitening": "of all images", "targets": "networks learn them standardised"}
    record = synthetic.training.record()
    lines += [f"training {key}: {told.get(key, value)}" for key, value in record.items()]
    return lines + [f"info     {key}: {json.dumps(value)}" for key, value in synthetic.info.items()]


def weigh(synthetic: SyntheticSet, path: Path, experiment: int) -> list[str]:
    """The bytes of images X and targets Y as stored, and as float32 (classes: int64); of views, all."""
    x_bytes, y_bytes, words = stored_bytes(path, experiment)
    stored, plain = (x_bytes, y_bytes), (synthetic.images.nbytes, synthetic.targets.nbytes)
    count = len(synthetic) // synthetic.views_each
    lines = [f"compact  {words}"] if words else []
    for name, (x, y) in (("stored", stored), ("float32", plain)):
        total = f"X {x} + Y {y} = {x + y} bytes"
        lines.append(
            f"{name:8} {total}, per image {' + '.join(f'{v / count:.6g}' for v in (x, y))}"
            f" = {(x + y) / count:.6g}"
        )
    lines[-1] += f"; {sum(plain) / sum(stored):.3g} times the stored"
    more = sum(t.nbytes for t in synthetic.training.pack()[0].values())
    return lines + [f"training {more} bytes more"] * bool(more)


def _range(values: Tensor) -> str:
    return f"range {values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}"


def share_outside(synthetic: SyntheticSet) -> float:
    """The share of de-normalised values outside [0, 1], which clamping changes."""
    # Half an 8-bit step of tolerance: real pixels return from normalised space with rounding.
    pixels = synthetic.unclamped_pixels() - 0.5
    return float((pixels.abs() > 0.5 + 0.5 / 255).float().mean())


def _count_targets(targets: Tensor) -> str:
    if targets.is_floating_point():
        return f"float vectors of length {targets.shape[1]}, {_range(targets)}"
    classes, counts = (v.tolist() for v in targets.unique(return_counts=True))
    if min(counts) == max(counts):
        return f"class indices, {len(classes)} classes with {counts[0]} each"
    listed = ", ".join(f"{c}: {n}" for c, n in zip(classes[:20], counts[:20], strict=True))
    more = f", ... (from {min(counts)} to {max(counts)} each)" if len(classes) > 20 else ""
    return f"class indices, {len(classes)} classes: {listed}{more}"


def draw(synthetic: SyntheticSet, path: Path, limit: int = 100) -> str:
    """Draw a grid of at most `limit` images spread evenly over the set, each in its first view alone."""
    from utils.plots import save_grid  # torchvision: slow to import, and only drawing needs it

    synthetic = synthetic.plain()
    chosen = spaced(len(synthetic), limit)
    if synthetic.stats is None:
        values, how = synthetic.images, "stretched to the full range, the statistics are unknown"
        values = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    else:
        values, how = synthetic.to_pixels(), "de-normalised and clamped"
    save_grid(values[chosen], path)
    return f"grid     {path}: {len(chosen)} of {len(synthetic)} images, {how}"


def _load_flagged(args: argparse.Namespace, path: Path) -> SyntheticSet:
    load = partial(SyntheticSet.load, path, data_name=args.data_name, experiment=args.experiment)
    if args.data_name is None:
        return load()
    rows, name = {"krr": KRR_SPECS, "dc": DC_SPECS}[args.family], args.data_name
    folder = args.data_dir / (rows[name].folder if name in rows else name)
    if name not in rows and not folder.is_dir():
        pick(rows, name, f"data set (nothing of that name is prepared in {args.data_dir} either):")
    stats = stored_sizes(folder) | (rows[name].stats if name in rows else {})
    # The first time only for its size: a PNG folder is normalised with the values that belong to it.
    size = load(stats=next(iter(stats.values()))).images.shape[-1] if stats else None
    if size not in stats:
        at = "" if size is None else f" at size {size}"
        raise UserError(f"{name} has no published mean and std{at}, and none are in {folder / 'meta.json'}")
    return load(stats=stats[size])


def _inspect(args: argparse.Namespace) -> None:
    synthetic = _load_flagged(args, args.path)
    print(f"{args.path}: {detect_form(args.path)} form")
    print("\n".join(summarize(synthetic) + weigh(synthetic, args.path, args.experiment)))
    if args.out is not None:
        print(draw(synthetic, args.out))


def _convert(args: argparse.Namespace) -> None:
    how, card = cli.take(CompactFlags, vars(args)), cli.take(CardFlags, vars(args))
    if args.form != "compact" and how != CompactFlags():
        raise UserError(f"--form {args.form} has neither sizes nor types: --x_... and --y_... need compact")
    if args.form != "hf" and card != CardFlags():
        raise UserError(f"--form {args.form} has no card: --license and --results need hf")
    synthetic = _load_flagged(args, args.src)
    if args.views is not None:
        have = synthetic.views_each
        if args.views > have:
            raise UserError(
                f"--views {args.views}: {args.src} has {have} of each image; expected at most that"
            )
        synthetic = synthetic.first_views(args.views)
    taken = args.dst / "x_syn.pt" if args.form == "pair" and args.dst.is_dir() else args.dst
    if args.form != "png" and taken.is_file() and not args.overwrite:  # png never replaces a folder
        raise UserError(f"{taken} exists already; pass --overwrite to replace it")
    if args.form == "pair" and (args.dst / SET_FILE).exists():
        raise UserError(f"{args.dst} holds {SET_FILE}, which is read first; choose another folder")
    if args.form == "compact":
        save_compact(synthetic, args.dst, how)
    elif args.form == "hf":
        save_hf(synthetic, args.dst, args.src, card)
    else:
        synthetic.save(args.dst, args.form)
    again = SyntheticSet.load(args.dst, form=args.form)
    worst = float((again.images - synthetic.images).abs().max())
    same = "equal" if torch.equal(again.targets, synthetic.targets) else "NOT equal"
    if args.form == "compact":
        print("\n".join(weigh(again, args.dst, 0)))
        if synthetic.soft and same != "equal":
            same = f"by at most {float((again.targets - synthetic.targets).abs().max()):.3g}"
    print(f"{args.dst}: {len(again)} images in {args.form} form")
    if synthetic.views is not None and again.views is None:
        each = synthetic.views_each
        print(
            f"lost     that {each} images each are views of one: networks train on them {each} times as long"
        )
    if args.form == "png":
        print(f"lost     {share_outside(synthetic):.2%} of pixels clamped to [0, 1], rest at 8 bits")
    print(f"checked  read back: images differ by at most {worst:.3g}, targets {same}")
    if detect_form(args.src) == "res" and synthetic.info["num_experiments"] > 1:
        print(f"lost     only experiment {args.experiment} of {args.src} was converted")


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Inspect or convert a synthetic set."""
    parser = cli.Parser(prog="python -m data.synthetic", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="print what a set holds")
    inspect.add_argument("path", type=Path, help="folder or file of any form")
    inspect.add_argument("--out", type=Path, help="draw a grid of at most 100 images into this PNG")
    convert = commands.add_parser("convert", help="write a set in another form")
    convert.add_argument("src", type=Path, help="folder or file of any form")
    convert.add_argument("dst", type=Path, help="folder (pair, png, hf) or file (the other forms)")
    convert.add_argument("--form", required=True, choices=tuple(FORMS), help="form to write")
    convert.add_argument("--overwrite", action="store_true", help="replace a pair or file that is there")
    cli.add_flags(convert, ConvertFlags)
    cli.add_flags(convert, CompactFlags)
    cli.add_flags(convert, CardFlags)
    for command in (inspect, convert):
        command.add_argument("--data_name", help="use the mean and std of this data set")
        command.add_argument(
            "--family", choices=("krr", "dc"), default="krr", help="whose published ones [krr]"
        )
        command.add_argument(
            "--data_dir", type=Path, default="datasets", help="of prepared sets, for others [datasets]"
        )
        command.add_argument("--experiment", type=int, default=0, help="of a res file [0]")
    args = parser.parse_args(argv)
    {"inspect": _inspect, "convert": _convert}[args.command](args)


if __name__ == "__main__":
    raise SystemExit(main())
