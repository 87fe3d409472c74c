"""Raw folders whose split and labels lie in list files: Tiny-ImageNet, CUB, dogs, cars.

Every reader has the signature (raw folder, whether to download) -> Source. None of these can be
fetched by torchvision, so `download` ends in one line that says where to get the archive.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.raw import (
    Source,
    check_not_html,
    file_source,
    locate,
    pictures_below,
    read_lines,
    require_pictures,
)
from utils.errors import UserError


def refuse_download(name: str, help: str) -> None:
    """Stop a `--download` that nobody can serve.

    Raises:
        UserError: always; says how to get the set.
    """
    raise UserError(f"--download cannot fetch {name}; {help}, and give the folder with --raw PATH")


def _find(raw: Path, download: bool, name: str, help: str, *marks: str) -> Path:
    if download:
        refuse_download(name, help)
    return locate(raw, *marks, what=name, help=help)


def read_tinyimagenet(raw: Path, download: bool) -> Source:
    """Tiny-ImageNet-200; classes are the sorted WordNet ids, the validation part is the test split.

    `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG` with `val/val_annotations.txt`, `wnids.txt`.
    The unlabelled `test/` of the release is not used.
    """
    help = "unpack tiny-imagenet-200.zip (cs231n.stanford.edu)"
    root = _find(raw, download, "tinyimagenet", help, "wnids.txt", "train", "val")
    names = sorted(read_lines(root / "wnids.txt"))
    index = {name: label for label, name in enumerate(names)}
    if len(index) != len(names):
        raise UserError(f"{root / 'wnids.txt'} names a class twice")
    files, labels = [], []
    for name in names:
        found = pictures_below(root / "train" / name)
        if not found:
            raise UserError(f"{root / 'train' / name} holds no pictures, but wnids.txt names it")
        files += found
        labels += [index[name]] * len(found)
    listing = root / "val" / "val_annotations.txt"
    rows = [line.split() for line in read_lines(listing)]
    odd = [row for row in rows if len(row) < 2 or row[1] not in index]
    if odd:
        raise UserError(f"{listing}: {' '.join(odd[0])!r} is not 'picture wnid ...' of wnids.txt")
    held_out = [root / "val" / "images" / row[0] for row in rows]
    require_pictures(held_out, listing)
    return file_source(
        "Tiny-ImageNet-200",
        names,
        train=(files, labels),
        test=(held_out, [index[row[1]] for row in rows]),
    )


def read_cub(raw: Path, download: bool) -> Source:
    """CUB-200-2011: `images.txt`, 1-based `image_class_labels.txt`, `train_test_split.txt`."""
    help = "unpack CUB_200_2011.tgz (data.caltech.edu)"
    root = _find(raw, download, "cub2011", help, "images.txt", "images")
    names = _by_id(root / "classes.txt")
    images = _by_id(root / "images.txt")
    classes = _by_id(root / "image_class_labels.txt")
    in_train = _by_id(root / "train_test_split.txt")
    for table, file in ((classes, "image_class_labels.txt"), (in_train, "train_test_split.txt")):
        if table.keys() != images.keys():
            odd = min(table.keys() ^ images.keys())
            raise UserError(f"{root / file} and images.txt do not list the same ids ({odd})")
    order = {identity: label for label, identity in enumerate(sorted(names, key=int))}
    unknown = set(classes.values()) - order.keys()
    if unknown:
        raise UserError(
            f"{root / 'image_class_labels.txt'} names class {min(unknown)}, "
            "which classes.txt does not"
        )
    splits: dict[str, tuple[list[Path], list[int]]] = {"1": ([], []), "0": ([], [])}
    for identity in sorted(images, key=int):
        if in_train[identity] not in splits:
            raise UserError(f"{root / 'train_test_split.txt'}: expected 0 or 1 for id {identity}")
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
    root = _find(raw, download, "dogs", help, "train_list.mat", "test_list.mat", "Images")
    splits, folders = {}, {}
    for split in ("train", "test"):
        path = root / f"{split}_list.mat"
        content = _load_mat(path, "file_list", "labels")
        relative = [str(np.ravel(cell)[0]) for cell in content["file_list"].ravel()]
        labels = content["labels"].ravel().astype(np.int64) - 1
        _check_mat(path, len(relative), labels)
        files = [root / "Images" / name for name in relative]
        require_pictures(files, path)
        splits[split] = (files, labels)
        for file, label in zip(files, labels.tolist(), strict=True):
            if folders.setdefault(label, file.parent.name) != file.parent.name:
                raise UserError(f"{path}: label {label + 1} belongs to two folders ({file})")
    if sorted(folders) != list(range(len(folders))):
        raise UserError(f"{root}: the lists leave out labels between 1 and {max(folders) + 1}")
    names = [folders[label] for label in sorted(folders)]
    return file_source("Stanford Dogs", names, **splits)


def read_cars(raw: Path, download: bool) -> Source:
    """Stanford Cars, in either release; labels are 1-based.

    One list: `cars_annos.mat` with `car_ims/` (its own class names). Devkit:
    `devkit/cars_train_annos.mat`, `devkit/cars_meta.mat`, `cars_test_annos_withlabels.mat` (beside
    or inside devkit/), `cars_train/`, `cars_test/`.
    """
    help = (
        "get cars_annos.mat with car_ims/, or devkit/ with cars_train/, cars_test/ and "
        "cars_test_annos_withlabels.mat"
    )
    if download:
        refuse_download("cars", f"its original site is gone; {help}")
    candidates = [raw, *sorted(p for p in raw.glob("*") if p.is_dir())]
    single = [folder for folder in candidates if (folder / "cars_annos.mat").is_file()]
    if single:
        return _cars_single(single[0])
    root = locate(
        raw, "devkit/cars_train_annos.mat", "devkit/cars_meta.mat", what="cars", help=help
    )
    meta = _load_mat(root / "devkit" / "cars_meta.mat", "class_names")
    names = [str(np.ravel(cell)[0]) for cell in meta["class_names"].ravel()]
    labelled = "cars_test_annos_withlabels.mat"
    test_list = root / "devkit" / labelled
    test_list = test_list if test_list.is_file() else root / labelled
    splits = {}
    for split, path in (("train", root / "devkit" / "cars_train_annos.mat"), ("test", test_list)):
        rows = _load_mat(path, "annotations")["annotations"].ravel()
        files, labels = _annotations(rows, path, "fname", root / f"cars_{split}")
        splits[split] = (files, labels)
    return file_source("Stanford Cars", names, **splits)


def _cars_single(root: Path) -> Source:
    """The release with one list for both splits."""
    path = root / "cars_annos.mat"
    content = _load_mat(path, "annotations", "class_names")
    rows = content["annotations"].ravel()
    files, labels = _annotations(rows, path, "relative_im_path", root)
    held_out = np.array([int(np.ravel(row["test"])[0]) for row in rows], dtype=bool)
    splits = {
        name: ([files[i] for i in np.flatnonzero(chosen)], labels[chosen])
        for name, chosen in (("train", ~held_out), ("test", held_out))
    }
    for name, (chosen, _) in splits.items():
        if not chosen:
            raise UserError(f"{path} has no {name} pictures")
    names = [str(np.ravel(cell)[0]) for cell in content["class_names"].ravel()]
    return file_source("Stanford Cars", names, **splits)


def _annotations(
    rows: np.ndarray, path: Path, field: str, folder: Path
) -> tuple[list[Path], np.ndarray]:
    """Picture files and labels from 0 of a MATLAB struct array."""
    for wanted in (field, "class"):
        if wanted not in (rows.dtype.names or ()):
            raise UserError(f"{path}: the annotations have no field {wanted!r}")
    files = [folder / str(np.ravel(row[field])[0]) for row in rows]
    labels = np.array([int(np.ravel(row["class"])[0]) for row in rows], dtype=np.int64) - 1
    _check_mat(path, len(files), labels)
    require_pictures(files, path)
    return files, labels


def _check_mat(path: Path, count: int, labels: np.ndarray) -> None:
    """Labels must fit the pictures and be 1-based."""
    if len(labels) != count or not count:
        raise UserError(f"{path} has {len(labels)} labels for {count} pictures")
    if labels.min() < 0:
        raise UserError(f"{path} holds label {labels.min() + 1}; expected labels from 1")


def _load_mat(path: Path, *keys: str) -> dict[str, Any]:
    """Read a MATLAB file that must hold `keys`.

    Raises:
        UserError: missing, damaged, or without a key.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise UserError(f"{path} does not exist")
    check_not_html(path)
    try:
        content = loadmat(path)
    except Exception as error:  # scipy raises a dozen types on a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or not a MATLAB file ({reason})") from None
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{path} has no variable {', '.join(missing)}")
    return content
