"""The published settings of each source: what is filled in where no flag says it."""

from dataclasses import dataclass, replace
from pathlib import Path

from data.prepared import default_size, prepared_names
from data.specs import KRR_SPECS
from utils.errors import UserError


@dataclass(frozen=True)
class Preset:
    """Published setting of a source: image side, number of synthetic images, networks."""

    size: int
    num_images: int
    network: str
    target_model: str = "resnet18"


# Table of the paper's sources; the rest are ours.
PRESETS: dict[str, Preset] = {
    "cifar100": Preset(32, 1000, "convnet_128_256_512_bn"),
    "tinyimagenet": Preset(64, 2000, "convnet_64_128_256_512_bn"),
    "imagenet": Preset(64, 1000, "convnet_64_128_256_512_bn"),
    "imagenette": Preset(224, 10, "convnet_32_64_128_256_512_bn", "resnet50"),
    "cifar10": Preset(32, 1000, "convnet_128_256_512_bn"),
    "digits": Preset(16, 20, "convnet_32_64_128_bn"),
}

# Any other source: by the smallest row that is not below its size.
PRESETS_BY_SIZE: dict[int, Preset] = {
    16: Preset(16, 100, "convnet_64_128_256_bn"),
    48: Preset(32, 1000, "convnet_128_256_512_bn"),
    96: Preset(64, 1000, "convnet_64_128_256_512_bn"),
    512: Preset(224, 100, "convnet_32_64_128_256_512_bn"),
}


def resolve_preset(data_name: str, data_dir: Path, img_size: int | None) -> Preset:
    """The preset of a source, at `img_size` if given; a UserError for a size that none covers."""
    known = PRESETS.get(data_name)
    size = img_size or (known.size if known else default_size(data_name, data_dir))
    if known is not None and size == known.size:
        return known
    for limit, row in PRESETS_BY_SIZE.items():
        if size <= limit:
            return replace(known or row, size=size, network=row.network)
    raise UserError(f"images of {size} pixels are too large; the limit is {max(PRESETS_BY_SIZE)}")


# `--target_data_name full` for each source of the paper, in the order of its tables.
_FINE_GRAINED = ("aircraft", "cars", "cub2011", "dogs", "flowers")
FULL_TARGETS: dict[str, tuple[str, ...]] = {
    "cifar100": ("cifar100", "cifar10", *_FINE_GRAINED),
    "tinyimagenet": ("tinyimagenet", "cifar10", *_FINE_GRAINED),
    "imagenet": ("cifar10", "cifar100", *_FINE_GRAINED),
    "imagenette": ("imagenette", *_FINE_GRAINED),
}


def resolve_targets(source: str, joined: str, data_dir: Path) -> tuple[str, ...]:
    """`full` or names joined by `_` -> target names; sources the paper lacks test on themselves.

    A set's own name may hold `_`: the longest one that exists is taken. A UserError for an empty name.
    """
    if joined == "full":
        return FULL_TARGETS.get(source, (source,))
    known, parts, names = {*KRR_SPECS, *prepared_names(data_dir)}, joined.split("_"), []
    while parts:
        end = next((n for n in range(len(parts), 1, -1) if "_".join(parts[:n]) in known), 1)
        names.append("_".join(parts[:end]))
        parts = parts[end:]
    if not all(names):
        raise UserError(f"--target_data_name {joined!r} holds an empty name")
    return tuple(dict.fromkeys(names))
