"""The corpus of the DC family's commands, of data.prepare and of data.synthetic."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from fault_corpus import Case
from fault_damage import (
    JSON_FILE,
    PAYLOADS,
    POSTSCRIPT,
    TORCH_FILE,
    Payload,
    cut,
    pipe,
    png_bytes,
    store,
    write,
)
from fault_inputs import bad_flags, over, state_dicts, tensors

from data.synthetic.parquet import PARQUET

_DC = "--dataset CIFAR10 --img_size 8 --model ConvNetD1 --device cpu"
MAIN = "methods/DC_DSA_DM/main.py"


def res(**changes: object) -> dict:
    """What a res file holds, with one thing changed."""
    return {"data": [[torch.zeros(10, 3, 8, 8), torch.arange(10)]], "accs_all_exps": {}} | changes


def validate_cases() -> Iterator[Case]:
    """validate.py: every form of a synthetic set."""
    flags = f"--normalize_data {_DC} --epochs 1 --num_eval 1 --synthesis_data_path"
    x, y = res()["data"][0]
    bad = {
        "no data": store({"accs_all_exps": {}}),
        "data of text": store(res(data="x")),
        "empty data": store(res(data=[])),
        "a lone tensor": store(res(data=[x])),
        "three in a pair": store(res(data=[[x, y, y]])),
        "labels beyond": store(res(data=[[x, y + 1]])),
        "labels below": store(res(data=[[x, y - 1]])),
        "labels short": store(res(data=[[x, y[:-1]]])),
        "labels between classes": store(res(data=[[x, y + 0.5]])),
        "NaN": store(res(data=[[x / 0, y]])),
        "grey": store(res(data=[[x[:, :1], y]])),
        "other size": store(res(data=[[x[..., :4, :4], y]])),
        "text for images": store(res(data=[["x", y]])),
        "no images": store(res(data=[[x[:0], y[:0]]])),
        "scores of text": store(res(accs_all_exps={"a": ["high"]})),
        "scores in a list": store(res(accs_all_exps=[1])),
        "features": store(res(data=[[x, torch.randn(10, 10)]])),
        "complex": store(res(data=[[x + 0j, y]])),
        "sparse": store(res(data=[[x.to_sparse(), y]])),
        "nested": store(res(data=[[[x], [y]]])),
    }
    yield from over(
        "validate.py", f"{flags} res_a.pt", "res_a.pt", TORCH_FILE | bad, guards="--synthesis_data_path"
    )
    yield from over("validate.py", f"{flags} res_a.pt", "res_a.json", JSON_FILE)
    header = (1 << 60).to_bytes(8, "little") + b"{}"
    lying = json.dumps({"images": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 10**9]}})
    shapes = json.dumps({"images": {"dtype": "F32", "shape": [2**40] * 3, "data_offsets": [0, 4]}})
    yield from over(
        "validate.py",
        f"{flags} set.safetensors",
        "set.safetensors",
        {
            "empty": write(b""),
            "text": write("hello"),
            "half": cut(0.5),
            "end": cut(0.99),
            "header as long as the sky": write(header),
            "offsets beyond": write(len(lying).to_bytes(8, "little") + lying.encode()),
            "shapes beyond": write(len(shapes).to_bytes(8, "little") + shapes.encode()),
            "a pickle": lambda path: path.write_bytes(pickle.dumps(PAYLOADS["system"]())),
            "code": TORCH_FILE["code, system"],
            "folder": TORCH_FILE["folder"],
            "link to nothing": TORCH_FILE["link to nothing"],
        },
        guards="--synthesis_data_path",
    )
    yield from over(
        "validate.py",
        f"{flags} png",
        "png/00003.png",
        {
            "empty": write(b""),
            "text": write("hello"),
            "half": cut(0.5),
            "folder": TORCH_FILE["folder"],
            "bomb": write(png_bytes(60000, 60000)),
            "other size": write(png_bytes(4, 4)),
            "code, PostScript": POSTSCRIPT,
            "pipe": pipe,
            "link to nothing": TORCH_FILE["link to nothing"],
        },
        words=("00003.png", "png/"),
    )
    yield from over(
        "validate.py",
        f"{flags} hub",
        f"hub/{PARQUET}",
        {
            "empty": write(b""),
            "text": write("hello"),
            "half": cut(0.5),
            "end": cut(0.99),
            "a pickle": lambda path: path.write_bytes(pickle.dumps(PAYLOADS["system"]())),
            "code": TORCH_FILE["code, system"],
            "pipe": pipe,
            "folder": TORCH_FILE["folder"],
            "link to nothing": TORCH_FILE["link to nothing"],
        },
        words=("hub",),
    )
    yield from over("validate.py", f"{flags} hub", "hub/meta.json", JSON_FILE, skip=("list",))
    labels = "file,label\n00000.png,0\n"
    yield from over(
        "validate.py",
        f"{flags} png",
        "png/labels.csv",
        {
            "empty": write(""),
            "no header": write("00000.png,0\n"),
            "words": write(labels + "00001.png,cat\n"),
            "half a label": write(labels + "00001.png,0.5\n"),
            "negative": write(labels + "00001.png,-1\n"),
            "beyond": write(labels + "00001.png,10\n"),
            "missing picture": write(labels + "gone.png,1\n"),
            "outside": write(labels + "../file,1\n"),
            "root": write(labels + "/etc/passwd,1\n"),
            "binary": write(bytes(range(256))),
            "no label": write("file,label\n00000.png\n"),
            "pipe": pipe,
            "huge": write(labels + f"00001.png,{10**30}\n"),
            "NUL": write(labels + "\0,1\n"),
            "folder": TORCH_FILE["folder"],
        },
        words=("labels.csv", "png"),
    )
    yield from over("validate.py", f"{flags} png", "png/meta.json", JSON_FILE, skip=("list",))
    yield from bad_flags(
        "validate.py",
        f"{flags} res_a.pt",
        ("--model", "Transformer"),
        ("--ipc", "0"),
        ("--dataset", "MARS"),
        ("--lr_decay_step", "ten"),
        ("--lr_decay_step", "-5"),
        ("--experiment", "1"),
        ("--experiment", "-1"),
        ("--eval_mode", "Z"),
        ("--dsa_strategy color_magic", "magic"),
        ("--momentum", "2"),
        ("--img_size", "0"),
        ("--data_path", "file"),
        ("--synthesis_data_path", "empty"),
        ("--synthesis_data_path", "nowhere"),
        ("--save_path", "file"),
        ("--seed", "-1"),
    )


def distill_cases() -> Iterator[Case]:
    """main.py, train_original_models.py, clom.tables."""
    flags = f"{_DC} --ipc 1 --Iteration 1 --num_eval 1 --epoch_eval_train 1 --batch_real 2 --seed 0"
    clom = f"{flags} --CLoM --models_pool ConvNetD1 --epoch 1 --pretrained_path pretrained_model"
    own = "pretrained_model/CIFAR10/original/ConvNetD1/index_0"
    x, y = "datasets/cifar10/X_tr_8.pth", "datasets/cifar10/Y_tr_8.pth"
    yield from tensors(MAIN, f"{flags} --data_path datasets", x, y)
    yield from state_dicts(MAIN, clom, f"{own}/*.pth", "--pretrained_path")
    facts = {
        "text for a shape": write('{"img_shape": "big"}'),
        "no statistics": write('{"img_shape": [3, 8, 8]}'),
        "classes of text": write(
            '{"img_shape": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "num_classes": "ten"}'
        ),
    }
    yield from over(MAIN, clom, f"{own}/config.json", JSON_FILE | facts)
    yield from bad_flags(
        MAIN,
        flags,
        ("--method", "MTT"),
        ("--ipc", "0"),
        ("--ipc", "99999 --init real"),
        ("--init", "zeros"),
        ("--dsa_strategy color_magic --method DSA", "magic"),
        ("--lr_img", "nan"),
        ("--lr_img", "-1"),
        ("--dis_metric", "euclid"),
        ("--num_exp", "0"),
        ("--dataset", "MARS"),
        ("--model", "ConvNetX9"),
        ("--eval_mode", "Q"),
        ("--save_path", "file"),
        ("--data_path", "file"),
        ("--inner_loop", "-1"),
        ("--CLoM --models_pool vit", "vit"),
        ("--CLoM --alphas 1 2 3", "--alphas"),
        ("--CLoM --alphas -1", "--alphas"),
        ("--CLoM --pretrained_path empty", "empty"),
        ("--CLoM --model_num 0", "--model_num"),
        ("--CLoM --CLoM_distance l2", "l2"),
        ("--CLoM --CLoM_distance cos --models_pool hf:./empty", "./empty"),
        ("--resume --save_path empty", "empty"),
    )
    models = f"--normalize_data {_DC} --epochs 1 --num 1"
    yield from tensors("train_original_models.py", f"{models} --data_path datasets", x, y)
    yield from bad_flags(
        "train_original_models.py",
        models,
        ("--num", "0"),
        ("--lr", "0"),
        ("--lr", "inf"),
        ("--lr_decay_step", "a,b"),
        ("--epochs", "-1"),
        ("--momentum", "nan"),
        ("--pretrained_path", "file"),
        ("--batch_size", "0"),
        ("--random_seed", "-1"),
        ("--model", "Nothing"),
        ("--dataset ␣", "data set"),
    )
    yield from bad_flags(
        "clom.tables",
        "",
        ("--variants", "none:5"),
        ("--variants", "cos:nan"),
        ("--variants", "magic"),
        ("--ipcs", "0"),
        ("--ipcs", "one"),
        ("--methods", "MTT"),
        ("--num_exp", "0"),
        ("--steps_scale", "0"),
        ("--log_dir", "file"),
        ("--published", "nowhere"),
        ("--model", "Nothing"),
        ("--init", "zeros"),
    )


def synthetic_cases() -> Iterator[Case]:
    """data.synthetic inspect and convert."""
    bad = ("nowhere", "empty", "file", "datasets", "pictures/class0/0.png")
    for path in bad:
        yield Case("data.synthetic", f"inspect {path}", "no set", words=(path,))
    yield from over("data.synthetic", "inspect res_a.pt", "res_a.pt", TORCH_FILE)
    yield from bad_flags(
        "data.synthetic",
        "inspect res_a.pt",
        ("--data_name", "mars"),
        ("--family", "mtt"),
        ("--experiment", "1"),
        ("--experiment", "-1"),
        ("--experiment", "x"),
        ("--out", "empty"),
        ("--out", "file/x.png"),
        ("--data_name", "imagenette"),
    )
    for argv, word in (
        ("convert res_a.pt file --form png", "file"),
        ("convert res_a.pt x.pt --form tar", "--form"),
        ("convert res_a.pt new", "--form"),
        ("convert res_a.pt png --form png", "png"),
        ("convert res_a.pt hub --form hf", "hub"),
        ("convert res_a.pt new --form hf --results png/meta.json", "png/meta.json"),
        ("convert res_a.pt new --form pair --license mit", "--license"),
        ("convert synthetic_data/tiny/krr_st new --form png", "float targets"),
        ("convert synthetic_data/tiny/krr_st new.pt --form res", "float"),
        ("convert res_a.pt new.txt --form safetensors", "safetensors"),
        ("convert res_a.pt x_syn.pt --form res", "res file"),
        ("convert res_a.pt", "dst"),
        ("convert", "src"),
        ("", "command"),
        ("explode res_a.pt", "explode"),
        ("convert nowhere new --form pair", "nowhere"),
    ):
        yield Case("data.synthetic", argv, "command line", words=(word,))


def archive(kind: str) -> object:
    """A tar or zip file whose member would land outside of the folder it is unpacked in."""

    def damage(path: Path) -> None:
        payload = io.BytesIO()
        if kind == "zip":
            with zipfile.ZipFile(payload, "w") as packed:
                packed.writestr("../PAYLOAD_RAN", "x")
        else:
            with tarfile.open(fileobj=payload, mode="w:gz") as packed:
                packed.addfile(tarfile.TarInfo("../PAYLOAD_RAN"), io.BytesIO())
        path.write_bytes(payload.getvalue())

    return damage


def imagenet(**changes: object) -> object:
    """Ten batches of down-sampled ImageNet in `empty`, the first of them changed."""

    def damage(path: Path) -> None:
        good = {"data": np.zeros((2, 48), np.uint8), "labels": [1, 2]}
        for number in range(1, 11):
            batch = good | changes if number == 1 else good
            (path / f"train_data_batch_{number}").write_bytes(pickle.dumps(batch, protocol=2))

    return damage


def _npz(train_labels: list[int], **arrays: object) -> object:
    """PathMNIST in `empty`, with another training part."""
    images = np.zeros((2, 4, 4, 3), np.uint8)
    good = {"train_images": images, "test_images": images, "test_labels": [0, 1]}
    arrays = good | arrays | {"train_labels": train_labels}
    return lambda path: np.savez(path / "pathmnist.npz", **arrays)


def _zeros(path: Path) -> None:
    """A thousand times larger once it is unpacked."""
    with zipfile.ZipFile(path / "pathmnist.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("test_images.npy", bytes(100 << 20))


def prepare_cases() -> Iterator[Case]:
    """data.prepare, raw sets and --check."""
    own = "--from_folder pictures --data_name own --size 8 --workers 1"
    yield from over(
        "data.prepare",
        own,
        "pictures/class0/0.png",
        {
            "empty": write(b""),
            "text": write("hello"),
            "half": cut(0.5),
            "bomb": write(png_bytes(60000, 60000)),
            "link to nothing": TORCH_FILE["link to nothing"],
            "code": TORCH_FILE["code, bare"],
            "zeros": write(bytes(500)),
            "code, PostScript": POSTSCRIPT,
            "pipe": pipe,
        },
        guards="--from_folder",
    )
    yield from bad_flags(
        "data.prepare",
        own,
        ("--val_fraction", "1"),
        ("--val_fraction", "nan"),
        ("--workers", "0"),
        ("--size", "0"),
        ("--size", "100000"),
        ("--data_name", "a/b"),
        ("--data_name", ".."),
        ("--data_name", "raw"),
        ("--from_folder", "empty"),
        ("--from_folder", "file"),
        ("--from_folder", "nowhere"),
        ("--raw", "empty"),
        ("--data_dir", "file"),
        ("--data_name", "␣"),
    )
    yield Case("data.prepare", "", "no flags", words=("--data_name",))
    yield Case("data.prepare", "--data_name mars", "flag", words=("mars",))
    yield Case("data.prepare", "--check mars", "flag", words=("mars",))
    yield Case("data.prepare", "--data_name dogs --download", "flag", words=("--download",))
    for name in (
        "imagenet",
        "cub2011",
        "dogs",
        "cars",
        "tinyimagenet",
        "pathmnist",
        "cifar10",
        "svhn",
        "mnist",
        "flowers",
        "aircraft",
        "imagenette",
    ):
        raw = f"--data_name {name} --raw empty --overwrite"
        yield Case("data.prepare", raw, "nothing there", words=("empty",))
    for kind in ("zip", "tar"):
        yield Case(
            "data.prepare",
            "--data_name cub2011 --raw file",
            f"{kind} with ..",
            "file",
            archive(kind),
            guards="--raw",
        )
    big = "--data_name imagenet --raw empty --size 8 --overwrite"
    batches = {
        "code": imagenet(x=PAYLOADS["system"]()),
        "eval": imagenet(x=PAYLOADS["eval"]()),
        "exec": imagenet(labels=PAYLOADS["exec"]()),
        "floats": imagenet(data=np.zeros((2, 48))),
        "labels from 0": imagenet(labels=[0, 1]),
        "labels beyond": imagenet(labels=[1, 1001]),
        "too few labels": imagenet(labels=[1]),
        "not a square": imagenet(data=np.zeros((2, 47), np.uint8)),
        "one axis": imagenet(data=np.zeros(48, np.uint8)),
        "no rows": imagenet(data=np.zeros((0, 48), np.uint8)),
        "text": imagenet(data="x"),
        "labels of text": imagenet(labels=["a", "b"]),
        "objects": imagenet(data=np.array([None, 1])),
        "code, bytes as objects": imagenet(data=Payload(np.ndarray, (1,), "O", b"8 bytes.")),
        "a foreign buffer": imagenet(data=Payload(np.ndarray, (9, 9), "u1", b"8 bytes.")),
    }
    yield from over("data.prepare", big, "empty", batches, guards="--raw", words=("train_data_batch_1",))
    arrays = {
        "no labels": _npz([]),
        "labels beyond": _npz([0, 99]),
        "labels below": _npz([-1, 0]),
        "one label short": _npz([0]),
        "floats": _npz([0, 1], train_images=np.zeros((2, 4, 4, 3))),
        "grey": _npz([0, 1], train_images=np.zeros((2, 4, 4), np.uint8)),
        "code": _npz([0], train_images=np.array([PAYLOADS["system"]()], object)),
        "text": lambda path: (path / "pathmnist.npz").write_text("hello"),
        "bomb": _zeros,
    }
    medical = "--data_name pathmnist --raw empty --size 8 --workers 1"
    yield from over("data.prepare", medical, "empty", arrays, guards="--raw", words=("pathmnist", "labels"))
    text = {"variants.txt": "a", "images_variant_trainval.txt": "1 a", "images_variant_test.txt": "2 a"}
    for name in text:

        def aircraft(path: Path, odd: str = name) -> None:
            data = path / "fgvc-aircraft-2013b/data"
            (data / "images").mkdir(parents=True)
            for file, content in text.items():
                pipe(data / file) if file == odd else (data / file).write_text(content)

        flags = "--data_name aircraft --raw empty --size 8"
        yield Case("data.prepare", flags, f"{name} is a pipe", "empty", aircraft, (name,))

    def legacy_mnist(path: Path) -> None:
        (path / "MNIST/processed").mkdir(parents=True)
        for file in ("training.pt", "test.pt"):
            torch.save(PAYLOADS["system"](), path / "MNIST/processed" / file)

    flags = "--data_name mnist --raw empty --size 28"
    yield Case(
        "data.prepare", flags, "code in MNIST's files of before", "empty", legacy_mnist, ("MNIST",), "--raw"
    )
    for name, inner in {"batches": "cifar-10-batches-py", "archive": "cifar-10-python.tar.gz"}.items():

        def evil(path: Path, inner: str = inner) -> None:
            folder = path / "cifar-10-batches-py"
            folder.mkdir()
            for file in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
                (folder / file).write_bytes(pickle.dumps(PAYLOADS["system"](), protocol=2))
            if inner != folder.name:
                archive("tar")(path / inner)

        yield Case(
            "data.prepare",
            "--data_name cifar10 --raw empty --size 8 --overwrite",
            f"code in {name}",
            "empty",
            evil,
            guards="--raw",
        )
    yield from over("data.prepare", "--check tiny", "datasets/tiny/X_tr_8.pth", TORCH_FILE)
    facts = {
        f"mean {mean}": write(f'{{"sizes": {{"8": {{"mean": {mean}, "std": [1, 1, 1]}}}}}}')
        for mean in ('"abc"', '"123"', f"[1{400 * '0'}, 0, 0]", "5")
    }
    facts |= {"sums of text": write('{"sizes": {"8": {"sha256": "abc"}}}'), "pipe": pipe}
    yield from over("data.prepare", "--check tiny", "datasets/tiny/meta.json", JSON_FILE | facts)
