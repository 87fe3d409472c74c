"""Raw folders whose split and labels lie in list files: Tiny-ImageNet, CUB, dogs, cars.

Torchvision can fetch none of these: `--download` ends in one line that says where to get them.
"""

from pathlib import Path

import numpy as np

from data.prepare.files import load_arrays, read_lines
from data.prepare.folder import pictures_by_class
from data.prepare.raw import Source, file_source, find_folder, locate, require_pictures
from utils.errors import UserError


def read_tinyimagenet(raw: Path, download: bool) -> Source:
    """Tiny-ImageNet-200; classes are the sorted WordNet ids, the validation part is the test split.

    `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG` with `val/val_annotations.txt`, `wnids.txt`.
    The unlabelled `test/` of the release is not used.
    """
    help = "unpack tiny-imagenet-200.zip (cs231n.stanford.edu)"
    root = locate(raw, download, "tinyimagenet", help, "wnids.txt", "train", "val")
    names = sorted(read_lines(root / "wnids.txt"))
    index = {name: label for label, name in enumerate(names)}
    if len(index) != len(names):
        raise UserError(f"{root / 'wnids.txt'} names a class twice")
    listing = root / "val" / "val_annotations.txt"
    rows = [line.split() for line in read_lines(listing)]
    odd = [row for row in rows if len(row) < 2 or row[1] not in index]
    if odd:
        raise UserError(f"{listing}: {' '.join(odd[0])!r} is not 'picture wnid ...' of wnids.txt")
    held_out = [root / "val" / "images" / row[0] for row in rows]
    train = pictures_by_class([root / "train" / name for name in names])
    require_pictures(held_out, listing)
    test = held_out, [index[row[1]] for row in rows]
    return file_source("Tiny-ImageNet-200", names, train=train, test=test)


def read_cub(raw: Path, download: bool) -> Source:
    """CUB-200-2011: `images.txt`, 1-based `image_class_labels.txt`, `train_test_split.txt`."""
    help = "unpack CUB_200_2011.tgz (data.caltech.edu)"
    root = locate(raw, download, "cub2011", help, "images.txt", "images")
    class_list, split_list = root / "image_class_labels.txt", root / "train_test_split.txt"
    names, images = _by_id(root / "classes.txt"), _by_id(root / "images.txt")
    classes, in_train = _by_id(class_list), _by_id(split_list)
    for table, path in ((classes, class_list), (in_train, split_list)):
        if odd := table.keys() ^ images.keys():
            raise UserError(f"{path} and images.txt do not list the same ids ({min(odd)})")
    order = {identity: label for label, identity in enumerate(sorted(names, key=int))}
    if unknown := set(classes.values()) - order.keys():
        raise UserError(f"{class_list} names class {min(unknown)}, which classes.txt does not")
    splits: dict[str, tuple[list[Path], list[int]]] = {"1": ([], []), "0": ([], [])}
    for identity in sorted(images, key=int):
        if in_train[identity] not in splits:
            raise UserError(f"{split_list}: expected 0 or 1 for id {identity}")
        files, labels = splits[in_train[identity]]
        files.append(root / "images" / images[identity])
        labels.append(order[classes[identity]])
    for files, _ in splits.values():
        require_pictures(files, root / "images.txt")
    ordered = [names[identity] for identity in order]
    return file_source("CUB-200-2011", ordered, train=splits["1"], test=splits["0"])


def _by_id(path: Path) -> dict[str, str]:
    """Lines "id value" as a mapping; ids are whole numbers and occur once."""
    table: dict[str, str] = {}
    for line in read_lines(path):
        identity, _, value = line.partition(" ")
        if not identity.isdigit() or not value:
            raise UserError(f"{path}: {line!r} is not 'number value'")
        if identity in table:
            raise UserError(f"{path} lists id {identity} twice")
        table[identity] = value.strip()
    return table


def read_dogs(raw: Path, download: bool) -> Source:
    """Stanford Dogs: `train_list.mat`, `test_list.mat` (1-based labels) and `Images/`."""
    help = "unpack images.tar and lists.tar of Stanford Dogs (vision.stanford.edu) into one folder"
    root = locate(raw, download, "dogs", help, "train_list.mat", "test_list.mat", "Images")
    splits, folders = {}, {}
    for split in ("train", "test"):
        path = root / f"{split}_list.mat"
        listed, numbers = load_arrays(path, "file_list", "labels")
        files = [root / "Images" / name for name in _texts(listed)]
        splits[split] = files, labels = _checked(path, files, numbers.ravel())
        for file, label in zip(files, labels, strict=True):
            if folders.setdefault(label, file.parent.name) != file.parent.name:
                raise UserError(f"{path}: label {label + 1} belongs to two folders ({file})")
    if sorted(folders) != list(range(len(folders))):
        raise UserError(f"{root}: the lists leave out labels between 1 and {max(folders) + 1}")
    return file_source("Stanford Dogs", [folders[label] for label in sorted(folders)], **splits)


def read_cars(raw: Path, download: bool) -> Source:
    """Stanford Cars, in either release; labels are 1-based.

    One list for both splits: `cars_annos.mat` with `car_ims/`. Devkit: `devkit/cars_train_annos.mat`,
    `devkit/cars_meta.mat`, `cars_test_annos_withlabels.mat` (beside or inside devkit/), `cars_train/`,
    `cars_test/`.
    """
    single = None if download else find_folder(raw, "cars_annos.mat")
    splits = {}
    if single is not None:
        path = single / "cars_annos.mat"
        rows, names = load_arrays(path, "annotations", "class_names")
        rows = rows.ravel()
        files, labels = _annotated(rows, path, "relative_im_path", single, "test")
        held_out = np.array([_first(row["test"]) for row in rows], dtype=bool)
        for split, chosen in (("train", ~held_out), ("test", held_out)):
            if not chosen.any():
                raise UserError(f"{path} has no {split} pictures")
            picked = np.flatnonzero(chosen)
            splits[split] = [files[i] for i in picked], [labels[i] for i in picked]
        return file_source("Stanford Cars", _texts(names), **splits)
    help = (
        "its original site is gone: get cars_annos.mat with car_ims/, or devkit/ with "
        "cars_train/, cars_test/ and cars_test_annos_withlabels.mat"
    )
    root = locate(raw, download, "cars", help, "devkit/cars_train_annos.mat", "devkit/cars_meta.mat")
    (names,) = load_arrays(root / "devkit/cars_meta.mat", "class_names")
    inside, beside = (root / folder / "cars_test_annos_withlabels.mat" for folder in ("devkit", ""))
    lists = {"train": root / "devkit/cars_train_annos.mat", "test": inside if inside.is_file() else beside}
    for split, path in lists.items():
        (rows,) = load_arrays(path, "annotations")
        splits[split] = _annotated(rows.ravel(), path, "fname", root / f"cars_{split}")
    return file_source("Stanford Cars", _texts(names), **splits)


def _annotated(
    rows: np.ndarray, path: Path, field: str, folder: Path, *more: str
) -> tuple[list[Path], list[int]]:
    """Picture files and labels from 0 of a MATLAB struct array, which has `more` fields."""
    for wanted in (field, "class", *more):
        if wanted not in (rows.dtype.names or ()):
            raise UserError(f"{path}: the annotations have no field {wanted!r}")
    files = [folder / str(_first(row[field])) for row in rows]
    return _checked(path, files, [_first(row["class"]) for row in rows])


def _checked(path: Path, files: list[Path], numbers: np.ndarray | list) -> tuple[list[Path], list[int]]:
    """The files, which must exist, and their 1-based class numbers as labels from 0."""
    labels = [int(number) - 1 for number in numbers]
    if len(labels) != len(files) or not files:
        raise UserError(f"{path} has {len(labels)} labels for {len(files)} pictures")
    if min(labels) < 0:
        raise UserError(f"{path} holds label {min(labels) + 1}; expected labels from 1")
    require_pictures(files, path)
    return files, labels


def _first(cell: np.ndarray) -> np.generic:
    """The value in a MATLAB cell, which is an array of one element."""
    return np.ravel(cell)[0]


def _texts(cells: np.ndarray) -> list[str]:
    return [str(_first(cell)) for cell in cells.ravel()]
