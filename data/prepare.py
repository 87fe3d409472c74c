"""`python -m data.prepare`: raw pictures -> prepared tensors, and checking prepared tensors.

python -m data.prepare --data_name digits
python -m data.prepare --data_name cifar10 --size 32 --download
python -m data.prepare --data_name cub2011 --size 32 --raw PATH
python -m data.prepare --data_name birds --size 64 --from_folder PATH --val_fraction 0.1
python -m data.prepare --check digits
"""

from __future__ import annotations

import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data.check import check_prepared
from data.convert import default_workers
from data.load import tensor_path
from data.meta import update_meta
from data.raw import Source
from data.raw_folder import read_folder
from data.sources import SOURCES
from data.specs import DC_SPECS, KRR_SPECS, DatasetSpec
from data.write import write_prepared
from utils.cli import flag, parse
from utils.errors import UserError, entry_point, pick


@dataclass(frozen=True)
class PrepareConfig:
    """Flags of `python -m data.prepare`."""

    data_name: str | None = flag(None, "data set: a listed one, or any name with --from_folder")
    size: int | None = flag(None, "height = width in pixels [the set's own]", minimum=1)
    data_dir: Path = flag(Path("./datasets"), "folder that holds one folder a prepared set")
    raw: Path | None = flag(None, "where the raw set lies [DATA_DIR/raw/NAME]")
    download: bool = flag(False, "fetch the raw set where torchvision can")
    from_folder: Path | None = flag(None, "make an own set from any folder of images")
    val_fraction: float = flag(
        0.0, "share of --from_folder that becomes the test split", minimum=0, maximum=0.9
    )
    unlabelled: bool = flag(False, "take no labels from the sub-folders of --from_folder")
    skip_broken: bool = flag(False, "leave unreadable pictures out instead of stopping")
    no_hflip: bool = flag(
        False, "mirrored pictures mean something else (digits, text): never flip --from_folder's"
    )
    overwrite: bool = flag(False, "replace a set that is prepared already")
    workers: int | None = flag(None, "processes that decode and resize [one a core]", minimum=1)
    check: str | None = flag(None, "verify this prepared set (all sizes, or --size) and stop")


def find_row(name: str | None) -> DatasetSpec | None:
    """The table row of a data set name: either family's spelling, or the prepared folder's."""
    for table in (KRR_SPECS, DC_SPECS):
        if name in table:
            return table[name]
    return next((row for row in DC_SPECS.values() if row.folder == name), None)


def _validate(config: PrepareConfig) -> None:
    """Check combinations of flags.

    Raises:
        UserError: flags missing or not for each other.
    """
    if config.from_folder is None:
        if config.data_name is None:
            raise UserError("--data_name NAME, --from_folder PATH or --check NAME is needed")
        if find_row(config.data_name) is None:
            raise UserError(
                f"unknown data set {config.data_name!r}; valid: "
                f"{', '.join(sorted(KRR_SPECS | DC_SPECS))}; own pictures: --from_folder PATH"
            )
        for name in ("val_fraction", "unlabelled", "no_hflip"):
            if getattr(config, name):
                raise UserError(f"--{name} is for --from_folder; {config.data_name} has its own")
        return
    if config.raw is not None or config.download:
        raise UserError("--raw and --download are for listed sets, not for --from_folder")
    if config.size is None and find_row(config.data_name) is None:
        raise UserError("--size is needed with --from_folder")


def _prepared_folder(name: str) -> str:
    """Name of the folder that holds the tensors of a set."""
    spec = find_row(name)
    if spec is not None:
        return spec.folder
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--data_name {name!r} must be letters, digits, '_', '-' and '.'")
    if name == "raw":
        raise UserError("--data_name raw is taken: DATA_DIR/raw holds downloads")
    return name


def _read_source(config: PrepareConfig, folder: str, spec: DatasetSpec | None) -> Source:
    """The raw set that the flags name, checked against the table where it is listed."""
    if config.from_folder is None:
        raw = config.raw or config.data_dir / "raw" / folder
        source = pick(SOURCES, folder, "data set")(raw, config.download)
    else:
        source = read_folder(
            config.from_folder, val_fraction=config.val_fraction, unlabelled=config.unlabelled
        )
    if spec is not None and len(source.class_names or ()) != spec.num_classes:
        raise UserError(
            f"{folder} has {spec.num_classes} classes, but the raw set has "
            f"{len(source.class_names or ())}"
        )
    return source


def _exists(config: PrepareConfig, folder: str, spec: DatasetSpec | None, size: int) -> bool:
    """Whether the listed set is there, whole.

    Raises:
        UserError: an own set is there, or a listed one in part; neither is replaced unasked.
    """
    splits = ("train", "test") if spec is None or spec.has_test else ("train",)
    wanted = [tensor_path(config.data_dir, folder, kind, s, size) for s in splits for kind in "XY"]
    missing = [path.name for path in wanted if not path.exists()]
    if len(missing) == len(wanted):
        return False
    if config.from_folder is not None:
        raise UserError(
            f"{config.data_dir / folder} is prepared at size {size}; replace it with --overwrite"
        )
    if missing:
        raise UserError(
            f"{config.data_dir / folder} lacks {', '.join(missing)}; replace the rest of it, too, "
            "with --overwrite"
        )
    return True


def prepare(config: PrepareConfig) -> None:
    """Prepare one set at one size.

    Raises:
        UserError: bad flags, raw data missing or damaged, or an own set that exists already.
    """
    _validate(config)
    name = config.data_name or config.from_folder.resolve().name
    folder, spec = _prepared_folder(name), find_row(name)
    size = config.size or spec.sizes[0]
    if not config.overwrite and _exists(config, folder, spec, size):
        print(f"{folder} at size {size} is prepared already in {config.data_dir / folder}")
        return
    started = time.perf_counter()
    source = _read_source(config, folder, spec)
    entry = write_prepared(
        config.data_dir,
        folder,
        size,
        spec.channels if spec else 3,
        source,
        workers=config.workers or default_workers(),
        skip_broken=config.skip_broken,
    )
    if config.no_hflip:
        update_meta(config.data_dir / folder, size, {}, hflip=False)
    for split, items in entry["skipped"].items():
        print(f"skipped {len(items)} unreadable pictures of the {split} split (see meta.json)")
    counts = ", ".join(f"{count} {split}" for split, count in entry["counts"].items())
    classes = f"{len(source.class_names)} classes" if source.class_names else "no labels"
    seconds = time.perf_counter() - started
    print(f"{config.data_dir / folder}: size {size}, {counts}, {classes}, {seconds:.1f} s")


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    description = "Make prepared tensors from a raw data set or from any folder of images."
    config = parse(PrepareConfig, argv, prog="python -m data.prepare", description=description)
    if config.check is not None:
        folder = _prepared_folder(config.check)
        check_prepared(config.data_dir, folder, find_row(config.check), config.size)
        return
    prepare(config)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files go
    sys.exit(main())
