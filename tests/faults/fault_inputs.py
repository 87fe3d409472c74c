"""The corpus of KRR-ST's commands and of synthetic sets; each group is a list of cases."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from fault_commands import COMMANDS, NET, write_cifar10, write_pictures, write_tiny
from fault_corpus import Case
from fault_damage import JSON_FILE, PAYLOADS, TORCH_FILE, store, write

from data.specs import Stats
from data.synthetic import SyntheticSet
from krr_st.krr_st import KRRST
from models import get_network
from utils import checkpoint
from utils.seed import local_seed

RUN = "results/run"
SHORT = COMMANDS["train.py"].but(outer_iteration=4, print_every=2, eval_every=4)
IMAGES, LABELS = torch.zeros(30, 3, 8, 8), torch.arange(30) % 4
_STATS = Stats((0.4,) * 3, (0.3,) * 3)


def write_template(folder: Path) -> None:
    """Good inputs for every command; a case damages one of them."""
    write_tiny(folder)
    write_cifar10(folder)
    write_pictures(folder)
    with local_seed(0):
        x, y = torch.randn(10, 3, 8, 8), torch.arange(10)
        network = get_network("ConvNetD1", 3, 10, (8, 8))
    for name, form in (
        ("set.safetensors", "safetensors"),
        ("png", "png"),
        ("res_a.pt", "res"),
        ("hub", "hf"),
    ):
        SyntheticSet(x, y, _STATS).save(folder / name, form)
    place = folder / "pretrained_model/CIFAR10/original/ConvNetD1/index_0"
    checkpoint.save(network.state_dict(), place / "CIFAR10_ConvNetD1_original_epoch1.pth")
    facts = {"img_shape": [3, 8, 8], "num_classes": 10, "mean": [0.4] * 3, "std": [0.3] * 3}
    (place / "config.json").write_text(json.dumps(facts))
    (folder / "published.json").write_text("{}")
    (folder / "file").write_text("not a folder")
    (folder / "empty").mkdir()
    stop_a_run(folder)


def stop_a_run(folder: Path) -> None:
    """Leave a run of SHORT after its second step, with one save."""
    steps, real = [], KRRST.step

    def step(self: KRRST) -> dict[str, torch.Tensor]:
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(1)
        return real(self)

    before = Path.cwd()
    os.chdir(folder)
    KRRST.step = step
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert SHORT.main() == 130
    finally:
        KRRST.step = real
        os.chdir(before)
    (folder / RUN / "state.prev.pt").unlink()


def over(
    script: str,
    flags: str,
    path: str,
    damages: dict,
    *,
    guards: str | None = None,
    words: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
) -> list[Case]:
    """One case a damage of one file."""
    return [
        Case(script, flags, name, path, damage, words, guards if "code" in name else None)
        for name, damage in damages.items()
        if name not in skip
    ]


def bad_flags(script: str, flags: str, *pairs: tuple[str, str]) -> list[Case]:
    """One case a (flag, value), or (flag and value, word); the line names one of the two."""
    cases = []
    for flag, value in pairs:
        given = flag if " " in flag else f"{flag} {value}"
        words = (flag.split()[0], value)
        cases.append(Case(script, f"{flags} {given}".strip(), "flag", words=words))
    return cases


LINKS = ("link to nothing", "link to itself")  # where a file may be absent
TRAIN = SHORT.flags + " --exp_name new"
GOING_ON = SHORT.flags


def tensors(script: str, flags: str, x: str, y: str) -> list[Case]:
    """Prepared tensors of a set of 30 images."""
    bad_x = {
        "float64": store(IMAGES.double()),
        "half floats": store(IMAGES.half()),
        "complex": store(IMAGES.to(torch.complex64)),
        "sparse": store(IMAGES.to_sparse()),
        "bool": store(IMAGES.bool()),
        "NaN": store(IMAGES + torch.nan),
        "infinite": store(IMAGES - torch.inf),
        "too large": store(IMAGES + 2),
        "negative": store(IMAGES - 1),
        "no images": store(IMAGES[:0]),
        "two channels": store(IMAGES[:, :2]),
        "three axes": store(IMAGES[0]),
        "not square": store(IMAGES[..., :4]),
        "other size": store(IMAGES[..., :4, :4]),
        "five axes": store(IMAGES[None]),
        "scalar": store(torch.tensor(1.0)),
        "dictionary": store({"images": IMAGES}),
    }
    bad_y = {
        "float": store(LABELS.float()),
        "negative": store(LABELS - 1),
        "one short": store(LABELS[:-1]),
        "one more": store(torch.cat([LABELS, LABELS[:1]])),
        "two axes": store(LABELS[:, None]),
        "bool": store(LABELS.bool()),
        "complex": store(LABELS.to(torch.complex64)),
        "empty": store(LABELS[:0]),
        "strings": store(["a", "b"]),
        "sparse": store(LABELS.to_sparse()),
    }
    return [
        *over(script, flags, x, TORCH_FILE | bad_x, guards="--data_dir"),
        *over(
            script,
            flags,
            y,
            TORCH_FILE | bad_y,
            guards="--data_dir",
            words=(Path(y).name, "no training labels", "labels in each split"),
            skip=LINKS if "_te_" in y else (),
        ),
    ]


def state_dicts(script: str, flags: str, path: str, guards: str) -> list[Case]:
    """Checkpoints of a network."""
    bad = {
        "no weights": store({}),
        "a missing key": store({"layers.0.block.0.bias": torch.ones(4)}),
        "numbers for names": store({1: torch.ones(2)}),
        "not tensors": store({"layers.0.block.0.weight": [1.0]}),
        "wrapped": store({"state_dict": {"a": torch.ones(1)}}),
        "wrong shapes": lambda p: torch.save({k: torch.zeros(1, 1) for k in torch.load(p)}, p),
    }
    return over(script, flags, path, TORCH_FILE | bad, guards=guards)


def train_cases() -> Iterator[Case]:
    """train.py."""
    yield from tensors("train.py", TRAIN, "datasets/tiny/X_tr_8.pth", "datasets/tiny/Y_tr_8.pth")
    yield from over("train.py", TRAIN, "datasets/tiny/meta.json", JSON_FILE)
    no_stats = {
        "std of zero": '{"sizes": {"8": {"mean": [0, 0, 0], "std": [0, 1, 1]}}}',
        "two channels": '{"sizes": {"8": {"mean": [0, 0], "std": [1, 1]}}}',
        "words": '{"sizes": {"8": {"mean": "dark", "std": "none"}}}',
        "sizes of text": '{"sizes": "8"}',
        "size of text": '{"sizes": {"8": "small"}}',
        "NaN": '{"sizes": {"8": {"mean": [NaN, 0, 0], "std": [1, 1, 1]}}}',
        "infinite": '{"sizes": {"8": {"mean": [0, 0, 0], "std": [Infinity, 1, 1]}}}',
        "too few names": '{"class_names": ["a"], "sizes": {}}',
        "names of text": '{"class_names": 7, "sizes": {}}',
    }
    yield from over(
        "train.py",
        TRAIN,
        "datasets/tiny/meta.json",
        {k: write(v) for k, v in no_stats.items()},
        words=("meta.json",),
    )
    ckpt = f"teacher_ckpt/barlow_twins_{NET}_tiny.pt"
    yield from state_dicts("train.py", f"{TRAIN} --target_ckpt {ckpt}", ckpt, "--target_ckpt")
    states = {
        "no parts": store({"step": 4}),
        "other parts": store({"step": 4, "parts": {}}),
        "step of text": store({"step": "four", "parts": {"distiller": {}}, "named": {}}),
        "parts of text": store({"step": 4, "parts": "distiller", "named": {}}),
    }
    yield from over(
        "train.py",
        GOING_ON,
        f"{RUN}/state.pt",
        TORCH_FILE | states,
        guards="--save_dir",
        skip=LINKS,  # no state at all: the run starts anew
    )
    yield from over("train.py", GOING_ON, f"{RUN}/config.json", JSON_FILE, words=(RUN,))
    yield from bad_flags(
        "train.py",
        TRAIN,
        ("--outer_lr", "nan"),
        ("--outer_lr", "-1"),
        ("--outer_lr", "1e999"),
        ("--outer_lr", "fast"),
        ("--ridge", "0"),
        ("--num_images", "0"),
        ("--num_images", "31"),
        ("--num_images", "1e30"),
        ("--num_models", "-3"),
        ("--save_every", "0"),
        ("--save_every", "soon"),
        ("--save_every", "-5s"),
        ("--save_every", "1.5s"),
        ("--syn_init", "noise"),
        ("--pool_reset", "never"),
        ("--train_model", "vit"),
        ("--train_model", "convnet_0_bn"),
        ("--train_model", "convnet_-4_bn"),
        ("--train_model", "convnet_4_8_16_32_64_bn"),
        ("--test_model", "resnet-18"),
        ("--target_model", "hf:"),
        ("--target_model torchvision:nothing", "nothing"),
        ("--target_model", "hf:./empty"),
        ("--target_model npm:left", "npm"),
        ("--device", "tpu"),
        ("--device", "cuda:99"),
        ("--data_name", "mars"),
        ("--data_name", "../tiny"),
        ("--data_name", "/etc"),
        ("--img_size", "9"),
        ("--img_size", "3"),
        ("--img_size", "100000"),
        ("--data_dir", "nowhere"),
        ("--data_dir", "file"),
        ("--target_ckpt", "nowhere.pt"),
        ("--target_ckpt", "."),
        ("--save_dir", "file"),
        ("--seed", "-1"),
        ("--seed", "1.5"),
        ("--precision", "fp8"),
        ("--target_views", "maybe"),
        ("--unknown", "1"),
        ("--outer_batch_size", "0"),
        ("--views_dir", "file"),
    )
    yield Case("train.py", f"{TRAIN} --data_name ␣", "flag", words=("data set",))
    yield Case("train.py", f"{TRAIN} stray", "flag", words=("stray",))
    yield Case("train.py", f"{GOING_ON} --outer_lr 0.5", "another run's folder", words=(RUN,))


_VIT = dict(model_type="vit", image_size=8, patch_size=4, hidden_size=8, intermediate_size=8)
_VIT |= dict(num_hidden_layers=1, num_attention_heads=1)


def hugging_face_cases() -> Iterator[Case]:
    """Folders for --target_model hf: and weights for torchvision:."""
    flags = f"{TRAIN} --target_model hf:./model"

    def make(**files: str) -> object:
        def damage(path: Path) -> None:
            path.mkdir()
            for name, text in files.items():
                (path / name.replace("_json", ".json").replace("_py", ".py")).write_text(text)

        return damage

    evil = {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Config"}}
    code = f"open('{Path('PAYLOAD_RAN')}', 'w')\n"
    configs = {
        "no config": make(),
        "torn": make(config_json="{"),
        "list": make(config_json="[]"),
        "no weights": make(config_json='{"model_type": "vit"}'),
        "unknown kind": make(config_json='{"model_type": "zzz"}'),
        "code of its own": make(config_json=json.dumps(evil), evil_py=code),
    }
    vit = json.dumps(_VIT)
    configs["pipe"] = lambda path: path.mkdir() or os.mkfifo(path / "config.json")
    configs["weights that are code"] = lambda path: (
        make(config_json=vit)(path),
        torch.save(PAYLOADS["system"](), path / "pytorch_model.bin"),
    )
    for name, damage in configs.items():

        def place(path: Path, damage: object = damage) -> None:
            damage(path.parent / "model")

        yield Case("train.py", flags, name, "file", place, ("hf:./model", "model/config.json"))
    yield from over(
        "train.py",
        f"{TRAIN} --target_model torchvision:resnet18 --target_ckpt weights.pt",
        "file",
        {
            name: lambda path, d=damage: d(path.rename(path.with_name("weights.pt")))
            for name, damage in TORCH_FILE.items()
            if name.startswith("code") or name in ("text", "number")
        },
        guards="--target_ckpt",
        words=("weights.pt",),
    )


def synthetic_sets(script: str, flags: str, folder: str, guards: str) -> Iterator[Case]:
    """A pair in `folder` that `flags` point to."""
    x, y = torch.randn(6, 3, 8, 8), torch.randn(6, 4)
    bad_x = {
        "whole numbers": store(x.int()),
        "complex": store(x.to(torch.complex64)),
        "sparse": store(x.to_sparse()),
        "NaN": store(x * torch.nan),
        "infinite": store(x / 0),
        "none": store(x[:0]),
        "three axes": store(x[0]),
        "one more": store(torch.cat([x, x[:1]])),
    }
    bad_y = {
        "NaN": store(y * torch.nan),
        "one short": store(y[:-1]),
        "width 0": store(y[:, :0]),
        "three axes": store(y[None]),
        "bool": store(y.bool()),
        "complex": store(y + 0j),
        "negative": store(torch.arange(6) - 1),
        "half a class": store(torch.arange(6) + 0.5),
    }
    yield from over(script, flags, f"{folder}/x_syn.pt", TORCH_FILE | bad_x, guards=guards, words=(folder,))
    yield from over(script, flags, f"{folder}/y_syn.pt", TORCH_FILE | bad_y, guards=guards, words=(folder,))


def evaluation_cases() -> Iterator[Case]:
    """test.py, test_scratch.py, test_kd.py, krr_st.baselines, krr_st.tables."""
    shared = f"--source_data_name tiny --img_size 8 --test_model {NET} --device cpu --num_test 1"
    test = f"{shared} --target_data_name tiny --method krr_st --pre_epoch 1 --finetune_iteration 1"
    named = f"{test} --synthetic_path synthetic_data/tiny/krr_st"
    yield from synthetic_sets("test.py", test, "synthetic_data/tiny/krr_st", "--synthetic_data_dir")
    yield from over(
        "test.py",
        named,
        "synthetic_data/tiny/krr_st/y_syn.pt",
        {k: v for k, v in TORCH_FILE.items() if "code" in k},
        guards="--synthetic_path",
    )
    yield from over("test.py", test, "synthetic_data/tiny/krr_st/x_syn.json", JSON_FILE)
    yield from bad_flags(
        "test.py",
        test,
        ("--method", "magic"),
        ("--shots", "0"),
        ("--shots", "-1"),
        ("--shots", "all_ten"),
        ("--shots 1 --label_fraction 0.5", "--label_fraction"),
        ("--pre_iteration 3", "--pre_epoch"),
        ("--shots", "_"),
        ("--label_fraction", "0"),
        ("--label_fraction", "1.1"),
        ("--label_fraction", "nan"),
        ("--protocol", "guess"),
        ("--target_data_name", "mars"),
        ("--target_data_name", "tiny_"),
        ("--synthetic_path", "nowhere"),
        ("--synthetic_path", "empty"),
        ("--synthetic_path", "file"),
        ("--pre_dsa color_magic", "magic"),
        ("--dropout", "1"),
        ("--steps_scale", "0"),
        ("--steps_scale", "-inf"),
        ("--num_test", "0"),
        ("--log_dir", "file"),
        ("--test_model", "base_"),
        ("--finetune_momentum", "1"),
        ("--pre_schedule", "never"),
    )
    yield Case(
        "test.py",
        test.replace("krr_st", "random") + " --synthetic_path synthetic_data/tiny/krr_st",
        "features for labels",
        words=("random",),
    )
    yield from bad_flags(
        "test_scratch.py",
        f"{shared} --target_data_name tiny --finetune_iteration 1",
        ("--shots", "ten"),
        ("--shots", "1000"),
        ("--finetune_lr", "0"),
        ("--method", "krr_st"),
        ("--img_size", "16"),
    )
    kd = f"{shared} --target_data_name tiny --method krr_st --teacher_arch {NET} --pre_epoch 1"
    kd += " --kd_epoch 1 --teacher_ckpt teacher_ckpt/teacher_tiny.pt"
    yield from state_dicts("test_kd.py", kd, "teacher_ckpt/teacher_tiny.pt", "--teacher_ckpt")
    yield from bad_flags(
        "test_kd.py",
        kd,
        ("--teacher_arch", "vit"),
        ("--kd_lr", "-1"),
        ("--kd_bn", "both"),
        ("--teacher_ckpt", "nowhere"),
        ("--method", "mystery"),
    )
    base = f"--data_name tiny --img_size 8 --target_model {NET} --device cpu --num_images 4"
    ckpt = f"teacher_ckpt/barlow_twins_{NET}_tiny.pt"
    yield from over(
        "krr_st.baselines",
        f"{base} --method random_features --target_ckpt {ckpt}",
        ckpt,
        TORCH_FILE,
        guards="--target_ckpt",
    )
    yield from bad_flags(
        "krr_st.baselines",
        f"{base} --method random_features",
        ("--method", "best"),
        ("--num_images", "31"),
        ("--kmeans_space", "hyper"),
        ("--synthetic_data_dir", "file"),
        ("--target_model", "vit"),
    )
    published = {
        "text for a number": write('{"1": {"krr_st": {"cifar10": "high"}}}'),
        "no columns": write('{"1": {"krr_st": 5}}'),
        "no rows": write('{"1": []}'),
        "NaN": write('{"1": {"krr_st": {"cifar10": [NaN, 1]}}}'),
    }
    for script in ("krr_st.tables", "clom.tables"):
        # An empty list and a number are caught by their kind, as all others.
        yield from over(
            script,
            "--published published.json",
            "published.json",
            JSON_FILE | published,
            words=("published.json",),
        )
    yield from bad_flags(
        "krr_st.tables",
        "",
        ("--table", "7"),
        ("--table", "../1"),
        ("--num_test", "0"),
        ("--log_dir", "file"),
        ("--published", "nowhere"),
        ("--seed", "x"),
    )


def target_cases() -> Iterator[Case]:
    """krr_st.target and krr_st.kd_teacher."""
    target = f"--data_name tiny --img_size 8 --device cpu --target_model {NET} --epochs 1"
    target += " --save_dir made --projector_dim 4"
    yield from tensors("krr_st.target", target, "datasets/tiny/X_tr_8.pth", "datasets/tiny/Y_te_8.pth")
    yield from bad_flags(
        "krr_st.target",
        target,
        ("--opt", "magic"),
        ("--min_crop", "0"),
        ("--min_crop", "2"),
        ("--jitter", "9"),
        ("--degrees", "-1"),
        ("--projector_layers", "0"),
        ("--epochs", "0"),
        ("--batch_size", "1"),
        ("--target_model", "hf:x"),
        ("--save_dir", "file"),
        ("--lr", "inf"),
        ("--warmup_epochs", "-1"),
    )
    teacher = f"--data_name tiny --img_size 8 --device cpu --arch {NET} --epochs 1 --save_dir made"
    yield from bad_flags(
        "krr_st.kd_teacher",
        teacher,
        ("--arch", "vit"),
        ("--momentum", "1"),
        ("--lr", "0"),
        ("--data_name", "mars"),
        ("--batch_size", "1"),
    )
    yield Case(
        "krr_st.kd_teacher",
        teacher,
        "images without labels",
        "datasets/tiny/Y_tr_8.pth",
        lambda path: [path.unlink(), path.with_name("Y_te_8.pth").unlink()],
        ("has no labels", "expected both"),
    )
