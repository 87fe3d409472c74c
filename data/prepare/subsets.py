"""Ten-class subsets of ImageNet's pictures: ImageWoof, and Fruit, Yellow, Meow and Squawk.

Source of the last four: Cazenavette et al., "Dataset Distillation by Matching Training Trajectories",
2022; the labels follow its lists.
"""

from pathlib import Path

from data.prepare.folder import pictures_by_class, read_folder
from data.prepare.raw import Source, file_source, locate

# WordNet id and name of each class, in label order, by the name of the prepared folder.
_CLASSES = {
    "imagefruit": (
        "n07753275 pineapple; n07753592 banana; n07745940 strawberry; n07747607 orange; "
        "n07749582 lemon; n07768694 pomegranate; n07753113 fig; n07720875 bell pepper; "
        "n07718472 cucumber; n07742313 Granny Smith"
    ),
    "imageyellow": (
        "n02206856 bee; n12057211 yellow lady's slipper; n07753592 banana; n07749582 lemon; "
        "n12144580 corn; n04146614 school bus; n03530642 honeycomb; n02129165 lion; "
        "n01773157 black and gold garden spider; n01531178 goldfinch"
    ),
    "imagemeow": (
        "n02123045 tabby; n02123159 tiger cat; n02123394 Persian cat; n02123597 Siamese cat; "
        "n02124075 Egyptian cat; n02129165 lion; n02129604 tiger; n02128925 jaguar; "
        "n02128757 snow leopard; n02127052 lynx"
    ),
    "imagesquawk": (
        "n01806143 peacock; n02007558 flamingo; n01818515 macaw; n02051845 pelican; "
        "n02056570 king penguin; n01614925 bald eagle; n01843383 toucan; n01518878 ostrich; "
        "n01860187 black swan; n01819313 sulphur-crested cockatoo"
    ),
}
SUBSETS = {
    folder: [tuple(row.split(" ", 1)) for row in classes.split("; ")] for folder, classes in _CLASSES.items()
}


def read_subset(folder: str, raw: Path, download: bool) -> Source:
    """One subset: `train/` and `val/` with WordNet ids as sub-folders, others ignored."""
    wnids, names = zip(*SUBSETS[folder], strict=True)
    help = "sort ImageNet's pictures into train/ and val/ with a folder for each WordNet id"
    marks = [f"{split}/{wnid}" for split in ("train", "val") for wnid in wnids]
    root = locate(raw, download, folder, help, *marks)
    train, test = (pictures_by_class([root / split / w for w in wnids]) for split in ("train", "val"))
    return file_source(f"ImageNet, {folder}", names, train=train, test=test)


def read_imagewoof(raw: Path, download: bool) -> Source:
    """ImageWoof, which torchvision lacks: `train/` and `val/` with WordNet ids as sub-folders."""
    help = "unpack imagewoof2-320.tgz (github.com/fastai/imagenette)"
    return read_folder(locate(raw, download, "imagewoof", help, "train", "val"))
