"""The file forms of a synthetic set: how each is recognised, read and written.

pair         folder with `x_syn.pt` and `y_syn.pt`, two plain tensors (KRR-ST's published form)
res          `res_*.pt`: {"data": [[images, labels], ...], "accs_all_exps": {...}} (DC family)
safetensors  one file: `images`, `targets`, and JSON in the metadata
compact      one safetensors file in fewer bytes, decoded when read (data/synthetic/compact.py); in a run
             folder set.safetensors, and x_syn.pt and y_syn.pt beside it are its images as they are
png          folder of 8-bit `00000.png`, ... for people and other tools. `labels.csv` (file,label)
             says which files belong to the set and in which order, `meta.json` holds the mean and
             std that lead back to normalised space. Pixels are clamped to [0, 1] and rounded.
npz          of KIP, RFAD and FRePo: `images` or `image`, channels last or first, `labels` or `label`
hf           folder for the Hugging Face Hub: a parquet file (data/synthetic/parquet.py), its card
             README.md, and meta.json as in a PNG folder

What is read are the fields of a `SyntheticSet`, which checks them: `images`, `targets` and, as far as
known, `stats`, `data_name`, `info` and `training`. The published forms hold no statistics: a small
JSON file of the same name lies beside them, and training.safetensors where the set says how to train
on it (the safetensors form holds that itself).
"""

from __future__ import annotations

import contextlib
import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.augment import normalize
from data.specs import Stats
from data.synthetic.card import CardFlags, write_card
from data.synthetic.compact import CompactFlags, count_bytes, decode, describe, encode
from data.synthetic.parquet import PARQUET, picture_bytes, read_parquet, write_parquet
from data.synthetic.training import (
    TRAINING_FILE,
    TrainingSettings,
    read_safetensors,
    read_training,
    write_safetensors,
    write_training,
)
from data.untrusted import check_regular, check_zip, open_picture, parse_json, read_json
from utils import checkpoint
from utils.errors import UserError
from utils.run_folder import SET_FILE

if TYPE_CHECKING:
    from data.synthetic.set import SyntheticSet

Fields = dict[str, Any]


class Form(NamedTuple):
    """One way of storing a set: fields = read(path, statistics or None, experiment)."""

    read: Callable[[Path, Stats | None, int], Fields]
    write: Callable[[SyntheticSet, Path], None]


# Forms that are folders, and the file that gives each away.
FOLDER_MARKS = {"safetensors": SET_FILE, "pair": "x_syn.pt", "png": "labels.csv", "hf": PARQUET}


def detect_form(path: Path) -> str:
    """The form of a path, by its name and the files in it; a UserError if it is none."""
    if not path.exists():
        raise UserError(f"synthetic set {path} does not exist")
    if path.is_dir():
        for form, mark in FOLDER_MARKS.items():
            if (path / mark).exists():
                return form
        if find_set(path) is not None:
            return "res"
        wanted = f"x_syn.pt and y_syn.pt, labels.csv with PNGs, {PARQUET} or one res_*.pt"
        raise UserError(f"{path} holds no synthetic set; expected {wanted}")
    if path.name in ("x_syn.pt", "y_syn.pt"):
        return "pair"
    return path.suffix[1:] if path.suffix in (".safetensors", ".npz") else "res"


def find_set(folder: Path) -> Path | None:
    """The set in a run folder: a form that is a folder, or the one res file; None without any."""
    if any((folder / mark).exists() for mark in FOLDER_MARKS.values()):
        return folder
    found = sorted(folder.glob("res_*.pt"))
    return found[0] if len(found) == 1 else None


def _describe(synthetic: SyntheticSet, **more: str) -> str:
    """What lies beside the tensors, as JSON."""
    stats = synthetic.stats
    described = {
        "mean": stats and stats.mean,
        "std": stats and stats.std,
        "data_name": synthetic.data_name,
        "info": synthetic.info,
        **more,
    }
    return json.dumps(described, indent=2) + "\n"


def _parse_description(raw: dict[str, Any], path: Path) -> Fields:
    """The fields in the JSON object of `path`; keys that are absent or null are left out."""
    stats = Stats.parse(raw, path)
    found: Fields = {} if stats is None else {"stats": stats}
    kinds = {"data_name": str, "info": dict}
    return found | {key: raw[key] for key, kind in kinds.items() if isinstance(raw.get(key), kind)}


def _read_beside(path: Path, training: str = TRAINING_FILE) -> Fields:
    """What lies beside tensors, as far as it is there: the description in `path`, how to train in a file."""
    return _parse_description(read_json(path), path) | {"training": read_training(path.with_name(training))}


def _write_beside(synthetic: SyntheticSet, path: Path, training: str = TRAINING_FILE, **more: str) -> None:
    checkpoint.write_text(path, _describe(synthetic, **more))
    write_training(synthetic.training, path.with_name(training))


def _same_name(path: Path) -> tuple[Path, str]:
    """Where those lie of a file that is not alone in its folder."""
    return path.with_suffix(".json"), f"{path.stem}.{TRAINING_FILE}"


def _stored(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU: saving a view would write all of its storage."""
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


def _read_pair(path: Path, stats: Stats | None, experiment: int) -> Fields:
    """Read a pair; its JSON file takes precedence over the config.json of a run folder."""
    folder = path if path.is_dir() else path.parent
    fields = {
        "images": checkpoint.load_tensor(folder / "x_syn.pt", what="synthetic images"),
        "targets": checkpoint.load_tensor(folder / "y_syn.pt", what="synthetic targets"),
    }
    return fields | _run_fields(folder) | _read_beside(folder / "x_syn.json")


def _run_fields(folder: Path) -> Fields:
    """What the config.json of a run folder says about its set."""
    path = folder / "config.json"
    raw = read_json(path)
    flags = raw.get("flags")
    method = flags.get("method") if isinstance(flags, dict) else None
    return _parse_description(raw, path) | {"info": {"method": method} if isinstance(method, str) else {}}


def _write_pair(synthetic: SyntheticSet, path: Path) -> None:
    """Write a pair; each file is whole or not at all. What gives a new one away comes last."""
    folder = path.parent if path.name in ("x_syn.pt", "y_syn.pt") else path
    _write_beside(synthetic, folder / "x_syn.json")
    checkpoint.save(_stored(synthetic.targets), folder / "y_syn.pt")
    checkpoint.save(_stored(synthetic.images), folder / FOLDER_MARKS["pair"])


def _read_res(path: Path, stats: Stats | None, experiment: int) -> Fields:
    """Read one experiment of a `res_*.pt`, or of the one in a run folder; its accuracies become info."""
    path = (find_set(path) or path) if path.is_dir() else path
    raw = checkpoint.load(path, what="synthetic file")
    runs = raw.get("data") if isinstance(raw, dict) else None
    if not isinstance(runs, list | tuple) or not runs:
        held = sorted(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise UserError(
            f"{path} holds {held}, expected a dict whose 'data' lists [images, labels]; a pair is "
            "read from the folder that holds x_syn.pt and y_syn.pt"
        )
    if not 0 <= experiment < len(runs):
        raise UserError(f"{path} holds experiments 0 to {len(runs) - 1}, not {experiment}")
    run = runs[experiment]
    if not isinstance(run, list | tuple) or len(run) != 2:
        raise UserError(f"{path}: experiment {experiment} is not a pair [images, labels]")
    accuracies = _accuracies(raw, path)
    fields = {"images": run[0], "targets": run[1]} | _read_beside(*_same_name(path))
    facts = {"accs_all_exps": accuracies, "experiment": experiment, "num_experiments": len(runs)}
    return fields | {"info": fields.get("info", {}) | facts}


def _accuracies(facts: dict[str, Any], path: Path) -> dict[str, list[float]]:
    """Network -> accuracies of all experiments; a UserError if they are something else."""
    try:
        given = (facts.get("accs_all_exps") or {}).items()
        return {str(name): [float(a) for a in values] for name, values in given}
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: accs_all_exps must map names to lists of numbers") from None


def save_experiments(
    path: Path | str, sets: Sequence[SyntheticSet], accuracies: dict[str, list[float]]
) -> None:
    """Write several experiments into one `res_*.pt`; the first one's facts go beside it as JSON.

    The published name is `res_{method}_{dataset}_{model}_{ipc}ipc.pt`; `accuracies` are evaluation network
    -> test accuracies in [0, 1]. A UserError for float targets, no set, or where it cannot be written.
    """
    path = Path(path)
    if not sets:
        raise UserError(f"cannot write {path}: no experiment is given")
    if path.suffix != ".pt" or path.name in ("x_syn.pt", "y_syn.pt"):
        raise UserError(f"cannot write {path}: a res file is named like res_DC_CIFAR10_10ipc.pt")
    if any(synthetic.soft for synthetic in sets):
        raise UserError(
            f"cannot write {path}: the res form holds class indices, these targets are float "
            "vectors; use --form pair or safetensors"
        )
    data = [[_stored(synthetic.images), _stored(synthetic.targets)] for synthetic in sets]
    scores = {name: [float(a) for a in values] for name, values in accuracies.items()}
    _write_beside(sets[0], *_same_name(path))
    checkpoint.save({"data": data, "accs_all_exps": scores}, path)


def _write_res(synthetic: SyntheticSet, path: Path) -> None:
    """Write one experiment, of several with its share of the accuracies, where they can be shared out."""
    which, of = (synthetic.info.get(name) for name in ("experiment", "num_experiments"))
    if not (type(which) is type(of) is int and 0 <= which < of):
        which, of = 0, 1
    shares = {
        name: values[which * len(values) // of : (which + 1) * len(values) // of]
        for name, values in _accuracies(synthetic.info, path).items()
        if len(values) % of == 0
    }
    save_experiments(path, [synthetic], shares)


def _read_safetensors(path: Path, stats: Stats | None, experiment: int) -> Fields:
    """Read a plain or a compact file: the metadata says which it is. Of a run config.json says more."""
    run: Fields = {}
    if path.is_dir():
        run, path = _run_fields(path), path / SET_FILE
    tensors, metadata = read_safetensors(path)
    fields = run | _parse_description(parse_json(metadata.get("synthetic_set", "{}"), path), path)
    fields["info"] = run.get("info", {}) | fields.get("info", {})
    fields["training"] = TrainingSettings.unpack(tensors, metadata.get("training", "{}"), path)
    if "compact" in metadata:
        return fields | decode(tensors, parse_json(metadata["compact"], path), fields.get("stats"), path)
    if not {"images", "targets"} <= tensors.keys():
        raise UserError(f"{path} holds {sorted(tensors)}, expected images and targets")
    return fields | {key: tensors[key] for key in ("images", "targets")}


def _write_safetensors(synthetic: SyntheticSet, path: Path) -> None:
    tensors = {"images": _stored(synthetic.images), "targets": _stored(synthetic.targets)}
    _write_one_file(tensors, synthetic, path)


def _write_one_file(tensors: dict[str, Tensor], synthetic: SyntheticSet, path: Path, **metadata: str) -> None:
    if path.suffix != ".safetensors":
        raise UserError(f"cannot write {path}: expected a name ending in .safetensors")
    more, training = synthetic.training.pack()
    metadata |= dict(synthetic_set=_describe(synthetic), training=training)
    write_safetensors({**tensors, **more}, path, **metadata)


def save_compact(synthetic: SyntheticSet, path: Path | str, how: CompactFlags | None = None) -> None:
    """Write the compact form, without loss where `how` is not given; of k views one image is stored.

    A UserError for a size or rank that the set does not have.
    """
    scale = synthetic.training.targets
    unit = None if scale is None else scale.std
    tensors, facts = encode(synthetic.images, synthetic.targets, how or CompactFlags(), synthetic.views, unit)
    _write_one_file(tensors, synthetic, Path(path), compact=json.dumps(facts))


def _read_png(path: Path, stats: Stats | None, experiment: int) -> Fields:
    """Read the listed images and normalise them with `stats`, else the stored ones."""
    fields = _read_beside(path / "meta.json")
    stats = stats or fields.get("stats")
    if stats is None:
        raise UserError(f"{path / 'meta.json'} gives no mean and std, and none were passed")
    rows = _read_labels(path)
    labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
    pixels = [_read_image(path, name) for name, _ in rows]
    for (name, _), image in zip(rows, pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise UserError(
                f"{path / name} has shape {tuple(image.shape)}, the first image "
                f"{tuple(pixels[0].shape)}; expected equal shapes"
            )
    images = torch.stack(pixels).float() / 255
    stats.check_channels(images.shape[1], path)
    return fields | {"images": normalize(images, stats), "targets": labels}


def _read_labels(path: Path) -> list[tuple[str, int]]:
    """File name and label of each image of a PNG folder."""
    check_regular(path / "labels.csv")
    try:
        with (path / "labels.csv").open(newline="", encoding="utf-8") as file:
            rows = [(row["file"], int(row["label"])) for row in csv.DictReader(file)]
        torch.tensor([label for _, label in rows], dtype=torch.int64)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RuntimeError, csv.Error):
        raise UserError(
            f"{path / 'labels.csv'} is not a table with the columns file and label (an integer)"
        ) from None
    if not rows:
        raise UserError(f"{path / 'labels.csv'} lists no image")
    return rows


def _read_image(folder: Path, name: str) -> Tensor:
    """One 8-bit image of the folder: C×H×W uint8."""
    if Path(name).name != name:
        raise UserError(f"{folder / 'labels.csv'} names {name!r}, expected a file in that folder")
    try:
        with open_picture(folder / name) as image:
            mode, array = image.mode, np.array(image)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise UserError(f"{folder / name} cannot be read ({type(error).__name__})") from None
    if mode not in ("L", "RGB"):
        raise UserError(f"{folder / name} has mode {mode}, expected 8-bit grayscale or RGB")
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def _write_png(synthetic: SyntheticSet, path: Path) -> None:
    """Write the folder, whole or not at all; `path` must be absent or empty."""
    if synthetic.soft:
        raise UserError(
            f"cannot write {path}: a PNG folder cannot hold float targets; use --form pair or safetensors"
        )
    pictures = picture_bytes(synthetic)
    rows = [(f"{i:05d}.png", label) for i, label in enumerate(synthetic.targets.tolist())]
    with _new_folder(path) as folder:
        for (name, _), picture in zip(rows, pictures, strict=True):
            (folder / name).write_bytes(picture)
        with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "label"), *rows])
        _write_beside(synthetic, folder / "meta.json")


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, which is absent or empty, if the block succeeds."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"cannot write {path}: it exists and is not an empty folder; remove it or choose another"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            folder = Path(temporary) / path.name
            folder.mkdir()
            yield folder
            folder.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _read_hf(path: Path, stats: Stats | None, experiment: int) -> Fields:
    """Read a Hub folder; where it says what its values are, parquet's own checksums are not all there is."""
    digest, found = read_json(path / "meta.json").get("fingerprint"), read_parquet(path / PARQUET)
    if digest not in (None, checkpoint.fingerprint(found["images"], found["targets"])):
        raise UserError(f"{path / PARQUET} is damaged: its values are not those that meta.json speaks of")
    return _read_beside(path / "meta.json") | found


def save_hf(
    synthetic: SyntheticSet, path: Path, source: Path | None = None, flags: CardFlags | None = None
) -> None:
    """Write the folder, whole or not at all; `source` and `flags` as for `card.write_card`."""
    with _new_folder(path) as folder:
        (folder / PARQUET).parent.mkdir()
        write_parquet(synthetic, folder / PARQUET)
        (folder / "README.md").write_text(write_card(synthetic, source, flags), encoding="utf-8")
        digest = checkpoint.fingerprint(synthetic.images, synthetic.targets)
        _write_beside(synthetic, folder / "meta.json", fingerprint=digest)


def _read_npz(path: Path, stats: Stats | None, experiment: int) -> Fields:
    """Read an npz set; a column of class indices becomes a vector of them."""
    check_regular(path)
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            names = [next((k for k in (f"{kind}s", kind) if k in file), None) for kind in ("image", "label")]
            if None in names:
                raise UserError(f"{path} holds {sorted(file.files)}, expected images and labels")
            images, labels = (torch.from_numpy(np.ascontiguousarray(file[name])) for name in names)
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise many types on damaged files
        raise UserError(f"{path} is damaged or not an npz file of numbers ({type(error).__name__})") from None
    if images.dim() == 4 and images.shape[1] not in (1, 3) and images.shape[-1] in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    if labels.dim() == 2 and labels.shape[1] == 1:
        whole = not labels.is_floating_point() or bool((labels == labels.round()).all())
        labels = labels[:, 0] if whole else labels
    return {"images": images, "targets": labels} | _read_beside(*_same_name(path))


def _write_npz(synthetic: SyntheticSet, path: Path) -> None:
    if path.suffix != ".npz":
        raise UserError(f"cannot write {path}: expected a name ending in .npz")
    arrays = {
        "images": _stored(synthetic.images.permute(0, 2, 3, 1)).numpy(),
        "labels": _stored(synthetic.targets).numpy(),
    }
    checkpoint.write_atomic(path, lambda file: np.savez(file, **arrays))
    _write_beside(synthetic, *_same_name(path))


FORMS = {
    "pair": Form(_read_pair, _write_pair),
    "res": Form(_read_res, _write_res),
    "safetensors": Form(_read_safetensors, _write_safetensors),
    "compact": Form(_read_safetensors, save_compact),
    "png": Form(_read_png, _write_png),
    "npz": Form(_read_npz, _write_npz),
    "hf": Form(_read_hf, save_hf),
}


def stored_bytes(path: Path, experiment: int = 0) -> tuple[int, int, str]:
    """Bytes of a set's images and of its targets as they are stored, and a compact set's tensors in words.

    Bytes are those of the tensors' values; in a PNG folder, of the listed pictures and of labels.csv.
    """
    form = detect_form(path)
    if form == "png":
        pictures = {name for name, _ in _read_labels(path)}
        return sum((path / n).stat().st_size for n in pictures), (path / "labels.csv").stat().st_size, ""
    if form == "safetensors":
        path = path / SET_FILE if path.is_dir() else path
        tensors, metadata = read_safetensors(path)
        if "compact" in metadata:
            return *count_bytes(tensors), describe(tensors)
    fields = FORMS[form].read(path, None, experiment)
    return fields["images"].nbytes, fields["targets"].nbytes, ""
