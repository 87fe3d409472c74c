"""`python -m data.prepare`: raw pictures -> prepared tensors, and checking prepared tensors.

python -m data.prepare --data_name digits
python -m data.prepare --data_name cifar10 --size 32 --download
python -m data.prepare --data_name cub2011 --size 32 --raw PATH
python -m data.prepare --data_name birds --size 64 --from_folder PATH --val_fraction 0.1
python -m data.prepare --check digits
"""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.prepare.check import check_prepared
from data.prepare.folder import read_folder
from data.prepare.raw import Source
from data.prepare.sources import SOURCES
from data.prepare.write import default_workers, write_prepared
from data.prepared import file_name
from data.specs import DC_SPECS, KRR_SPECS, DatasetSpec, find_row
from utils.cli import flag, parse
from utils.errors import UserError, entry_point, pick
from utils.run_folder import InUse, claim_run


@dataclass(frozen=True)
class PrepareFlags:
    """Flags of `python -m data.prepare`."""

    data_name: str | None = flag(None, "data set: a listed one, or any name with --from_folder")
    size: int | None = flag(None, "height = width in pixels [the set's own]", minimum=1, maximum=4096)
    data_dir: Path = flag(Path("./datasets"), "folder that holds one folder per prepared set")
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
    workers: int | None = flag(None, "processes that decode and resize [one per core]", minimum=1)
    check: str | None = flag(
        None, "verify this prepared set (all sizes, or --size) and stop", instead_of="from_folder"
    )


def _validate(flags: PrepareFlags) -> None:
    """Raise a UserError if flags are missing or do not go together."""
    if flags.from_folder is None:
        if flags.data_name is None:
            raise UserError("--data_name NAME, --from_folder PATH or --check NAME is needed")
        if find_row(flags.data_name) is None:
            raise UserError(
                f"unknown data set {flags.data_name!r}; valid: "
                f"{', '.join(sorted(KRR_SPECS | DC_SPECS))}; own pictures: --from_folder PATH"
            )
        for name in ("val_fraction", "unlabelled", "no_hflip"):
            if getattr(flags, name):
                raise UserError(f"--{name} is for --from_folder; {flags.data_name} has its own")
        return
    if flags.raw is not None or flags.download:
        raise UserError("--raw and --download are for listed sets, not for --from_folder")
    if flags.size is None and find_row(flags.data_name) is None:
        raise UserError("--size is needed with --from_folder")


def _folder_name(name: str) -> str:
    """Name of the folder that holds the tensors of a set."""
    spec = find_row(name)
    if spec is not None:
        return spec.folder
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{name!r} cannot name a set; --data_name takes letters, digits, '_', '-' and '.'")
    if name == "raw":
        raise UserError("--data_name raw is taken: DATA_DIR/raw holds downloads")
    return name


def _read_source(flags: PrepareFlags, name: str, spec: DatasetSpec | None) -> Source:
    """The raw set that the flags name, with as many classes as its row says."""
    if flags.from_folder is None:
        raw = flags.raw or flags.data_dir / "raw" / name
        source = pick(SOURCES, name, "data set")(raw, flags.download)
    else:
        source = read_folder(flags.from_folder, val_fraction=flags.val_fraction, unlabelled=flags.unlabelled)
    found = len(source.class_names or ())
    if spec is not None and found != spec.num_classes:
        raise UserError(f"{name} has {spec.num_classes} classes, but the raw set has {found}")
    return source


def _missing(folder: Path, spec: DatasetSpec | None, size: int) -> tuple[list[str], bool]:
    """Which files a complete set lacks, and whether it lacks all of them."""
    splits = ("train", "test") if spec is None or spec.has_test else ("train",)
    wanted = [file_name(kind, split, size) for split in splits for kind in "XY"]
    missing = [name for name in wanted if not (folder / name).exists()]
    return missing, len(missing) == len(wanted)


def _exists(flags: PrepareFlags, folder: Path, spec: DatasetSpec | None, size: int) -> bool:
    """Whether the listed set is complete; a UserError for an own set or one that is there in part."""
    missing, nothing = _missing(folder, spec, size)
    if nothing:
        return False
    if flags.from_folder is not None:
        raise UserError(f"{folder} is prepared at size {size}; replace it with --overwrite")
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; replace the rest of it, too, with --overwrite")
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time prepares a set, and takes its raw files; the others wait."""
    with contextlib.ExitStack() as claim:
        try:
            claim.enter_context(claim_run(folder))
        except InUse:
            print(f"another process prepares {folder}: waiting for it")
            claim.enter_context(claim_run(folder, patience=-1))
        yield


def prepare(flags: PrepareFlags) -> None:
    """Prepare one set at one size."""
    _validate(flags)
    name = flags.data_name or flags.from_folder.resolve().name
    spec, name = find_row(name), _folder_name(name)
    folder, size = flags.data_dir / name, flags.size or spec.sizes[0]
    writes = flags.overwrite or bool(_missing(folder, spec, size)[0])
    with _alone(folder) if writes else contextlib.nullcontext():
        if not flags.overwrite and _exists(flags, folder, spec, size):
            print(f"{name} at size {size} is prepared already in {folder}")
        else:
            _prepare(flags, name, spec, folder, size)


def _prepare(flags: PrepareFlags, name: str, spec: DatasetSpec | None, folder: Path, size: int) -> None:
    started = time.perf_counter()
    source = _read_source(flags, name, spec)
    entry = write_prepared(
        folder,
        size,
        spec.channels if spec else 3,
        source,
        workers=flags.workers or default_workers(),
        skip_broken=flags.skip_broken,
        # Another size of a set keeps what the first one was prepared with.
        **({"hflip": not flags.no_hflip} if flags.no_hflip or (flags.overwrite and not spec) else {}),
    )
    for split, items in entry["skipped"].items():
        print(f"skipped {len(items)} unreadable pictures of the {split} split (see meta.json)")
    counts = ", ".join(f"{count} {split}" for split, count in entry["counts"].items())
    classes = f"{len(source.class_names)} classes" if source.class_names else "no labels"
    print(f"{folder}: size {size}, {counts}, {classes}, {time.perf_counter() - started:.1f} s")


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    description = "Make prepared tensors from a raw data set or from any folder of images."
    flags = parse(PrepareFlags, argv, prog="python -m data.prepare", description=description)
    if flags.check is None:
        prepare(flags)
    else:
        check_prepared(flags.data_dir, _folder_name(flags.check), find_row(flags.check), flags.size)


if __name__ == "__main__":
    raise SystemExit(main())
