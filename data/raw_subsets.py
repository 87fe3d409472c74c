"""Ten-class subsets of ImageNet's pictures: ImageFruit, ImageYellow, ImageMeow, ImageSquawk.

Source: Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", 2022; the
labels follow its lists.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.raw import Source, file_source, locate, pictures_below
from data.raw_lists import refuse_download
from utils.errors import UserError

# prepared folder -> (WordNet id, name) of each class, in label order
SUBSETS: dict[str, tuple[tuple[str, str], ...]] = {
    "imagefruit": (
        ("n07753275", "pineapple"), ("n07753592", "banana"), ("n07745940", "strawberry"),
        ("n07747607", "orange"), ("n07749582", "lemon"), ("n07768694", "pomegranate"),
        ("n07753113", "fig"), ("n07720875", "bell pepper"), ("n07718472", "cucumber"),
        ("n07742313", "Granny Smith"),
    ),
    "imageyellow": (
        ("n02206856", "bee"), ("n12057211", "yellow lady's slipper"), ("n07753592", "banana"),
        ("n07749582", "lemon"), ("n12144580", "corn"), ("n04146614", "school bus"),
        ("n03530642", "honeycomb"), ("n02129165", "lion"),
        ("n01773157", "black and gold garden spider"), ("n01531178", "goldfinch"),
    ),
    "imagemeow": (
        ("n02123045", "tabby"), ("n02123159", "tiger cat"), ("n02123394", "Persian cat"),
        ("n02123597", "Siamese cat"), ("n02124075", "Egyptian cat"), ("n02129165", "lion"),
        ("n02129604", "tiger"), ("n02128925", "jaguar"), ("n02128757", "snow leopard"),
        ("n02127052", "lynx"),
    ),
    "imagesquawk": (
        ("n01806143", "peacock"), ("n02007558", "flamingo"), ("n01818515", "macaw"),
        ("n02051845", "pelican"), ("n02056570", "king penguin"), ("n01614925", "bald eagle"),
        ("n01843383", "toucan"), ("n01518878", "ostrich"), ("n01860187", "black swan"),
        ("n01819313", "sulphur-crested cockatoo"),
    ),
}  # fmt: skip


def subset_reader(folder: str) -> Callable[[Path, bool], Source]:
    """The reader of one subset: `train/` and `val/` with a sub-folder for each WordNet id.

    All of ImageNet may lie there; the other classes are left alone.
    """
    classes = SUBSETS[folder]
    marks = [f"{split}/{wnid}" for split in ("train", "val") for wnid, _ in classes]
    help = "sort ImageNet's pictures into train/ and val/ with a folder for each WordNet id"

    def read(raw: Path, download: bool) -> Source:
        if download:
            refuse_download(folder, help)
        root = locate(raw, *marks, what=folder, help=help)

        def split(name: str) -> tuple[list[Path], list[int]]:
            files, labels = [], []
            for label, (wnid, _) in enumerate(classes):
                found = pictures_below(root / name / wnid)
                if not found:
                    raise UserError(f"class folder {root / name / wnid} holds no pictures")
                files += found
                labels += [label] * len(found)
            return files, labels

        names = [name for _, name in classes]
        return file_source(f"ImageNet, {folder}", names, train=split("train"), test=split("val"))

    return read
