"""Sets for the Hub: parquet there and back, what `datasets` makes of it, the card, files from elsewhere."""

import io
import json
import re
import shlex
import socket
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from test_synthetic import STATS, make

from data.specs import Stats
from data.synthetic import SyntheticSet, TrainingSettings
from data.synthetic import parquet as ours
from data.synthetic.__main__ import main
from data.target_scale import TargetScale
from data.whitening import Whitening
from utils.errors import UserError

COLUMNS = {"pixels": [[[[0.5, 1.0]]], [[[2.0, 3.0]]]], "label": [0, 1]}


def bits(tensor):
    """What two tensors with the same bits share, -0.0 and 0.0 apart."""
    return tensor.shape, tensor.dtype, tensor.contiguous().view(-1).numpy().tobytes()


def full(soft, m=6, stats=STATS):
    """A set with every kind of training settings, and values that rounding would change."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, len(stats.mean), 4, 5, generator=generator)
    x[0, 0, 0] = torch.tensor([-0.0, 1e-40, 3e38, 1 / 3, -7.0])
    size, info = x[0].numel(), {"method": "krr_st", "list": [1, 2.5]}
    whitening = Whitening(
        torch.randn(size, generator=generator), torch.randn(size, size, generator=generator)
    )
    y, how = torch.arange(m) % 3, dict(lr=0.0123, momentum=0.5, dsa="color_crop", whitening=whitening)
    if soft:
        y = torch.randn(m, 7, generator=generator)
        how |= dict(targets=TargetScale(y.mean(0), y.std(0)), mixup=True)
    return SyntheticSet(x, y, stats, "toy", info, TrainingSettings(**how))


def same(a, b):
    assert bits(a.images) == bits(b.images) and bits(a.targets) == bits(b.targets)
    assert (a.stats, a.data_name, a.info) == (b.stats, b.data_name, b.info)
    (tensors, text), (others, other) = a.training.pack(), b.training.pack()
    assert json.loads(text) == json.loads(other) and tensors.keys() == others.keys()
    assert all(bits(tensors[key]) == bits(others[key]) for key in tensors)


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("form", ["pair", "compact", "res"])
@pytest.mark.parametrize("soft", [True, False])
def test_there_and_back_bit_for_bit(form, soft, tmp_path):
    if soft and form == "res":
        pytest.skip("res files hold classes")
    before = full(soft, m=230)  # three groups of rows
    source = {"pair": "s", "compact": "s.safetensors", "res": "run/res_dm.pt"}[form]
    before.save(tmp_path / source, form)
    source = source.split("/")[0]  # of a res file, its run folder
    assert convert(tmp_path / source, tmp_path / "hub", "--form", "hf") == 0
    assert convert(tmp_path / "hub", tmp_path / "back", "--form", "pair") == 0
    for path in ("hub", "back"):
        same(
            SyntheticSet.load(tmp_path / path),
            SyntheticSet.load(tmp_path / (source if form != "res" else "run/res_dm.pt")),
        )
    again = SyntheticSet.load(tmp_path / "back")
    assert bits(again.images) == bits(before.images) and bits(again.targets) == bits(before.targets)


@pytest.mark.parametrize("soft", [True, False])
def test_datasets_reads_it_as_the_card_says(soft, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    synthetic = full(soft, stats=STATS if soft else Stats((0.1,), (0.5,)))  # colour, grey
    synthetic.save(tmp_path / "hub", "hf")
    (code, _) = re.findall(r"```python\n(.*?)```", (tmp_path / "hub/README.md").read_text(), re.S)
    found = {}
    exec(code.replace("FOLDER", str(tmp_path / "hub")), found)
    assert bits(found["x"]) == bits(synthetic.images) and bits(found["y"]) == bits(synthetic.targets)
    rows = datasets.load_dataset(str(tmp_path / "hub"), split="train")
    assert rows.features["pixels"].shape == synthetic.images.shape[1:]
    shown = np.stack([np.array(picture).reshape(4, 5, -1) for picture in rows["image"]])
    scale = [np.array(v)[:, None, None] for v in (synthetic.stats.std, synthetic.stats.mean)]
    wanted = (synthetic.images.double().numpy() * scale[0] + scale[1]).clip(0, 1).transpose(0, 2, 3, 1)
    assert shown.dtype == np.uint8 and np.abs(shown / 255 - wanted).max() <= 0.5 / 255 + 1e-6


def test_the_card_tells_the_run(tmp_path):
    make().save(tmp_path / "run")
    command = "python train.py --data_dir '/home/me/my data' --ipc 2"
    flags = {
        "method": "DM",
        "target_model": None,
        "pre_lr": 0.5,
        "pre_mixup": False,
        "data_dir": "/home/me",
        "ipc": 2,
    }
    (tmp_path / "run/config.json").write_text(json.dumps({"seed": 7, "command": command, "flags": flags}))
    numbers = {"loss": 0.25, "networks": [{"network": "ConvNet", "mean": 0.5}]}
    (tmp_path / "run/results.json").write_text(json.dumps(numbers))
    from utils.checkpoint import fingerprint

    own = [
        {
            "synthetic_set": fingerprint(make().images, make().targets),
            "training": {"lr": 0.125, "dsa": "none"},
        }
    ]
    for name, cells in (("own", own), ("other", [{"id": "x"}])):
        record = {"flags": {"method": "herding"}, "cells": cells, "table": f"| a |\n|---|\n| {name} |\nnote"}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    arguments = ["--license", "cc-by-4.0", "--results", tmp_path / "own.json", tmp_path / "other.json"]
    assert convert(tmp_path / "run", tmp_path / "hub", "--form", "hf", *arguments) == 0
    _, front, body = (tmp_path / "hub/README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["license"] == "cc-by-4.0" and facts["pretty_name"] == "6 images from toy by DM"
    assert facts["size_categories"] == ["n<1K"] and "dm" in facts["tags"]
    for line in (
        "| method | DM |",
        "| source | toy |",
        "| seed | 7 |",
        "| loss | 0.25 |",
        "| networks, ConvNet: mean | 0.5 |",
        "| lr | 0.125 |",  # as measured, not as the run's evaluations had it
        "This set:\n\n| a |\n|---|\n| own |\n\nnote",
        "To compare, herding:\n\n| a |\n|---|\n| other |\n\nnote",
        "python test.py --source_data_name toy --synthetic_path FOLDER --method dm",
        "python validate.py --normalize_data --dsa --dataset toy --method DM --synthesis_data_path FOLDER",
        "--method dm --pre_lr 0.5 --no-pre_mixup --out ENCODER",
        "```\npython train.py --data_dir 'my data' --ipc 2\n```",
    ):
        assert line in body, line
    assert "/home/me" not in body and "| dsa |" not in body and "target model" not in body


def test_the_card_of_a_set_with_hostile_facts(tmp_path, capsys):
    name = "a|b`\n---\nlicense: mit\n$(reboot)"
    x = torch.zeros(1, 1, 2, 2)
    SyntheticSet(x, torch.zeros(1, 3), Stats((0.0,), (1.0,)), name, {"method": "{{ 1 / 0 }}"}).save(
        tmp_path / "s"
    )
    assert convert(tmp_path / "s", tmp_path / "hub", "--form", "hf") == 0
    text = (tmp_path / "hub/README.md").read_text()
    facts = yaml.safe_load(text.split("---\n")[1])
    assert facts["license"] == "unknown" and " ".join(name.split()) in facts["pretty_name"]
    (command,) = re.findall(r"python test.py.*?FOLDER", text, re.S)
    assert shlex.split(command)[3] == " ".join(name.split())
    assert r"| source | a\|b` --- license: mit $(reboot) |" in text
    for facts in ({"loss": 10**400}, {"a": [{"b": 10**400}]}):
        (tmp_path / "s/results.json").write_text(json.dumps(facts))
        assert convert(tmp_path / "s", tmp_path / "new", "--form", "hf") == 2
        assert "s/results.json holds numbers" in capsys.readouterr().err and not (tmp_path / "new").exists()


def write_table(path, columns=COLUMNS, **types):
    """A table whose columns are as `read_parquet` expects them, unless `types` say otherwise."""
    known = {
        "pixels": pa.list_(pa.list_(pa.list_(pa.float32()))),
        "label": pa.int64(),
        "target": pa.list_(pa.float32()),
    }
    known |= types
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: pa.array(v, known[k]) for k, v in columns.items()}), path)


X2 = COLUMNS["pixels"]


@pytest.mark.parametrize(
    "columns, types, message",
    [
        ({"pixels": X2}, {}, "expected pixels and either label or target"),
        ({**COLUMNS, "target": [[1.0], [2.0]]}, {}, "expected pixels and either"),
        ({"label": [0, 1]}, {}, "expected pixels and either"),
        ({**COLUMNS, "pixels": [X2[0], [[[1.0, 2.0, 3.0]]]]}, {}, "rows differ in shape"),
        ({**COLUMNS, "pixels": [X2[0], None]}, {}, "rows differ in shape"),
        ({**COLUMNS, "pixels": [X2[0], [[[1.0, None]]]]}, {}, "values of type float"),
        ({**COLUMNS, "label": [0, None]}, {}, "values of type int64"),
        ({**COLUMNS, "label": ["0", "1"]}, {"label": pa.string()}, "values of type string, expected int64"),
        ({"pixels": X2, "target": [[1.0], [1.0, 2.0]]}, {}, "rows differ in shape"),
        ({"pixels": [], "label": []}, {}, "rows differ in shape"),
        ({**COLUMNS, "pixels": [0.0, 1.0]}, {"pixels": pa.float32()}, "damaged or holds no synthetic set"),
        ({**COLUMNS, "pixels": [X2[0], [[[np.nan, 0.0]]]]}, {}, "images hold 1 non-finite"),
        ({**COLUMNS, "label": [0, -1]}, {}, "class index -1"),
    ],
)
def test_tables_that_are_no_sets(columns, types, message, tmp_path):
    write_table(tmp_path / ours.PARQUET, columns, **types)
    with pytest.raises(UserError, match=message) as error:
        SyntheticSet.load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_tables_of_others_and_large_ones(tmp_path, monkeypatch):
    write_table(tmp_path / ours.PARQUET)
    found = SyntheticSet.load(tmp_path)
    assert found.images.tolist() == X2 and found.targets.tolist() == [0, 1] and found.stats is None
    fixed = pa.list_(pa.list_(pa.list_(pa.float32(), 2), 1))
    write_table(tmp_path / ours.PARQUET, pixels=fixed)
    assert SyntheticSet.load(tmp_path).images.tolist() == X2
    monkeypatch.setattr(ours, "LARGEST", 3)
    with pytest.raises(UserError, match="holds more than 12 bytes"):
        SyntheticSet.load(tmp_path)


def test_a_flipped_bit_or_a_torn_file_is_never_another_set(tmp_path):
    before, path = full(True), tmp_path / ours.PARQUET
    before.save(tmp_path, "hf")
    whole, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for place in random.integers(len(whole), size=150):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(random.integers(8))
        path.write_bytes(broken)
        try:
            same(SyntheticSet.load(tmp_path), before)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50
    for end in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="damaged or holds no synthetic set"):
            SyntheticSet.load(tmp_path)
    SyntheticSet(before.images.flip(0), before.targets, STATS).save(tmp_path / "other", "hf")
    path.write_bytes((tmp_path / "other" / ours.PARQUET).read_bytes())  # whole, but not this one
    with pytest.raises(UserError, match="not those that meta"):
        SyntheticSet.load(tmp_path)


def test_what_cannot_be_written_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def says(*words):
        (line,) = capsys.readouterr().err.splitlines()
        assert all(word in line for word in words), line
        assert not (tmp_path / "hub").exists()

    make().save(tmp_path / "s")
    SyntheticSet(make().images, make().targets).save(tmp_path / "bare")
    make(stats=Stats((0.5,) * 2, (0.5,) * 2)).save(tmp_path / "two")
    (tmp_path / "bad.json").write_text('{"cells": []}')
    to = [tmp_path / "hub", "--form", "hf"]
    for arguments, *words in (
        ((tmp_path / "bare", *to), "mean and std", "unknown"),
        ((tmp_path / "two", *to), "1 or 3 channels"),
        ((tmp_path / "s", *to, "--results", tmp_path / "none.json"), "none.json does not exist"),
        ((tmp_path / "s", *to, "--results", tmp_path / "bad.json"), "bad.json", "validate.py"),
        ((tmp_path / "s", tmp_path / "hub", "--form", "pair", "--license", "mit"), "--license", "hf"),
    ):
        assert convert(*arguments) == 2
        says(*words)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert convert(tmp_path / "s", *to) == 2
    says("extra hub", "pip install datasets")
    monkeypatch.undo()
    assert convert(tmp_path / "s", *to) == 0
    before = sorted(p.name for p in (tmp_path / "hub").iterdir())
    assert convert(tmp_path / "s", *to, "--overwrite") == 2  # a folder is never replaced
    assert (
        sorted(p.name for p in (tmp_path / "hub").iterdir()) == before == ["README.md", "data", "meta.json"]
    )
    picture = pq.read_table(tmp_path / "hub" / ours.PARQUET)["image"][0].as_py()
    assert picture["path"] == "00000.png" and Image.open(io.BytesIO(picture["bytes"])).size == (7, 5)
