"""`meta.json` beside the prepared tensors: where they came from, and each size's own facts.

{"source": ..., "class_names": [...], "sizes": {"32": {"mean": [...], "std": [...], ...}}}
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.specs import Stats, find_row
from data.untrusted import read_json
from utils import checkpoint
from utils.errors import UserError


def read_meta(folder: Path | str) -> dict[str, Any]:
    """The description of a prepared set; an empty "sizes" if there is none; a UserError if it is damaged.

    Mean and std are checked where they are used.
    """
    path, tables = Path(folder) / "meta.json", ("counts", "sha256", "sample")
    meta = read_json(path)
    sizes = meta.setdefault("sizes", {})
    if (
        not isinstance(sizes, dict)
        or not all(isinstance(facts, dict) for facts in sizes.values())
        or not all(isinstance(facts.get(key, {}), dict) for facts in sizes.values() for key in tables)
        or not isinstance(meta.get("class_names") or [], list)
    ):
        raise UserError(f"{path} does not hold a JSON object as data.prepare writes it")
    return meta


def keeps_meaning_mirrored(folder: Path) -> bool:
    """Whether a mirrored picture of a prepared set means the same: its row knows, or its meta.json."""
    spec = find_row(folder.name)
    return bool(read_meta(folder).get("hflip", True)) if spec is None else spec.hflip


def checksum(tensor: Tensor) -> str:
    """SHA-256 over the SHA-256 digests of a tensor's bytes in blocks of 16 MiB, on all cores."""
    content = checkpoint.as_bytes(tensor)
    blocks = [content[start : start + (1 << 24)] for start in range(0, len(content), 1 << 24)]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda block: hashlib.sha256(block).digest(), blocks)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def measure_statistics(images: Tensor) -> Stats:
    """Mean and std in [0, 1] per channel of N×C×H×W uint8 in [0, 255] or float in [0, 1].

    Read in chunks, summed in float64. The std is at least 1e-3, so that constant images stay finite.
    """
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    total = squares = torch.zeros(images.shape[1], dtype=torch.float64)
    pixels = images[0].numel() if len(images) else 1
    for chunk in images.split(max(1, (1 << 18) // pixels)):
        chunk = chunk.double()
        total = total + chunk.sum((0, 2, 3))
        squares = squares + chunk.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return Stats(tuple((mean / scale).tolist()), tuple((std / scale).clamp_min(1e-3).tolist()))


def stored_sizes(folder: Path) -> dict[int, Stats]:
    """The statistics of each size in meta.json, if any (UserError: unusable)."""
    path, sizes = folder / "meta.json", read_meta(folder)["sizes"]
    found = {int(size): Stats.parse(facts, path) for size, facts in sizes.items() if size.isdecimal()}
    return {size: stats for size, stats in found.items() if stats is not None}


def stored_statistics(folder: Path | str, size: int, channels: int) -> Stats | None:
    """The statistics in meta.json, which must fit the images (UserError); None if it has none."""
    path = Path(folder) / "meta.json"
    stats = Stats.parse(read_meta(folder)["sizes"].get(str(size), {}), path)
    if stats is not None:
        stats.check_channels(channels, path)
    return stats


def own_statistics(folder: Path | str, size: int, images: Tensor) -> Stats:
    """Statistics that are not in the tables: from meta.json, else measured and stored there."""
    stats = stored_statistics(folder, size, images.shape[1])
    if stats is not None:
        return stats
    if not len(images):  # nothing stands in for training images that are not read
        raise UserError(
            f"{Path(folder) / 'meta.json'} holds no mean and std at size {size}, and the training "
            "images are not to be read; any command that trains on them (krr_st.kd_teacher) "
            "stores them"
        )
    stats = measure_statistics(images)
    meta = read_meta(folder)
    meta["sizes"].setdefault(str(size), {}).update(mean=list(stats.mean), std=list(stats.std))
    try:
        checkpoint.write_text(Path(folder) / "meta.json", json.dumps(meta, indent=2) + "\n")
    except UserError as error:
        print(f"statistics measured but not stored ({error})")
    return stats
