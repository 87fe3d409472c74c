"""What untrusted files, odd folders and odd numbers meet: one clear line, nothing run, nothing lost."""

import errno
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NET, make_krrst, write_set, write_target
from torch import nn

import train
from data.load import load_set
from data.prepare.sources import SOURCES
from models.foundation import load_hf
from utils import checkpoint
from utils.cli import LARGEST
from utils.errors import UserError
from utils.run_folder import RunFolder, load_run, save_run

CPU = torch.device("cpu")


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny", train=30, test=8)
    write_target("tiny")
    return workspace


FLAGS = (
    f"--data_name tiny --img_size 8 --device cpu --seed 4 --target_model {NET} --train_model {NET} "
    "--num_images 6 --num_models 2 --online_iteration 3 --outer_iteration 4 --outer_batch_size 16 "
    "--pre_epoch 2 --test_iteration 3 --exp_name a"
).split()


def refused(capsys, *more):
    assert train.main([*FLAGS, *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("kind", ["meta", "nested", "quantized", "sparse"])
def test_tensors_without_plain_values(tmp_path, kind):
    made = {
        "meta": lambda: torch.empty(3, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "sparse": lambda: torch.eye(3).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }[kind]()
    torch.save({"a": [torch.ones(2), made]}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"x.pt .*({kind}|not a torch file|refused)"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match=r"pipe.pt is a device; expected a file"):
        checkpoint.load(tmp_path / "pipe.pt")


def test_an_archive_that_unpacks_to_more_is_not_unpacked(tmp_path):
    torch.save(torch.zeros(1000, 1000), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, \
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:  # fmt: skip
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 20000
    with pytest.raises(UserError, match=r"bomb.pt is damaged .*compressed"):
        checkpoint.load(tmp_path / "bomb.pt")


def test_numpy_floats_of_old_files(tmp_path):
    torch.save({"accs": [np.float32(0.5), np.float64(0.25)]}, tmp_path / "res.pt")
    assert checkpoint.load(tmp_path / "res.pt")["accs"] == [0.5, 0.25]


def test_other_numbers_of_numpy_in_old_files(tmp_path):
    kinds = (np.float16, np.int64, np.int32, np.uint8, np.bool_, np.complex64)
    torch.save({"accs": [kind(1) for kind in kinds]}, tmp_path / "res.pt")
    assert checkpoint.load(tmp_path / "res.pt")["accs"] == [1] * len(kinds)


def test_what_numpy_holds_besides_is_said(tmp_path):
    torch.save({"when": np.datetime64("2024-01-01")}, tmp_path / "res.pt")
    with pytest.raises(
        UserError, match=r"res.pt is refused: loading it would run numpy.*DateTime64"
    ) as caught:
        checkpoint.load(tmp_path / "res.pt")
    assert "weights_only" not in str(caught.value)


def test_a_folder_of_a_model_with_code_or_pipes(tmp_path):
    facts = dict(model_type="vit", image_size=8, patch_size=4, hidden_size=8, intermediate_size=8)
    facts |= dict(num_hidden_layers=1, num_attention_heads=1)
    (tmp_path / "config.json").write_text(json.dumps(facts))
    torch.save({"weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_hf(str(tmp_path))
    assert "weights_only" not in str(caught.value) and "tensors" in str(caught.value)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config.json is not a regular file"):
        load_hf(str(tmp_path))


@pytest.mark.parametrize("name", ["variants.txt", "images_variant_test.txt"])
def test_a_pipe_among_the_lists_of_a_raw_set(tmp_path, name):
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    (data / "images").mkdir(parents=True)
    os.mkfifo(data / name)
    with pytest.raises(UserError, match=rf"{name} is not a regular file"):
        SOURCES["aircraft"](tmp_path, False)


def test_advice_to_run_what_files_hold_is_not_passed_on(tmp_path):
    (tmp_path / "MNIST/processed").mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save(print, tmp_path / "MNIST/processed" / name)
    with pytest.raises(UserError, match=r"raw MNIST in .* is damaged .*more than tensors") as caught:
        SOURCES["mnist"](tmp_path, False)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_at_the_start(tiny, capsys, monkeypatch, reason):
    """One line; the lock that could not be written, or is there empty, keeps nobody out."""
    real = os.open

    def full(path, flags, *args, **named):
        if str(path).endswith(".lock"):
            open(path, "w").close()
            raise OSError(reason, os.strerror(reason), str(path))
        return real(path, flags, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        line = refused(capsys)
    assert line.startswith("error: cannot write ") and os.strerror(reason) in line
    assert Path("results/.locks/a.lock").read_bytes() == b"" and not Path("results/a").exists()
    assert train.main(FLAGS) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(tmp_path, bad):
    state = nn.Linear(2, 2).state_dict()
    state["weight"][0, 0] = bad
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w.pt holds NaN or infinity in weight"):
        checkpoint.load_state(tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_of_another_kind_of_number(dtype):
    state = {k: v.to(dtype) for k, v in nn.Linear(2, 2).state_dict().items()}
    with pytest.raises(UserError, match=rf"weight is {dtype}, expected torch.float32"):
        checkpoint.apply_state(nn.Linear(2, 2), state, origin="w.pt")


@pytest.mark.parametrize("step", [-1, "four", 1.5, None])
def test_steps_that_are_none(tmp_path, step):
    model = nn.Linear(2, 2)
    save_run(tmp_path / "state.pt", step, {"model": model})
    with pytest.raises(UserError, match="does not fit this run"):
        load_run(tmp_path / "state.pt", {"model": model})


@pytest.mark.parametrize("change", [lambda x: x[:1, :1, :1, :1], lambda x: x * torch.nan, lambda x: x[:3]])
def test_saved_images_that_do_not_fit(tiny, change):
    distiller = make_krrst(load_set("tiny", 8, tiny / "datasets"))
    state = distiller.state_dict()
    with pytest.raises(ValueError, match="x_syn"):
        distiller.load_state_dict({**state, "x_syn": change(state["x_syn"])})


@pytest.mark.parametrize("name", ["x_syn.pt", "set.safetensors", "training.safetensors"])
def test_a_set_without_its_run_is_not_overwritten(tiny, capsys, name):
    """Nor read as a part of the run's own."""
    Path("results/a").mkdir(parents=True)
    Path("results/a", name).write_bytes(b"another's")
    assert f"results/a holds {name} without the run that made it" in refused(capsys)
    assert Path("results/a", name).read_bytes() == b"another's"
    assert train.main([*FLAGS, "--overwrite"]) == 0
    assert len(torch.load("results/a/x_syn.pt")) == 6


@pytest.mark.parametrize("content", ["{torn", "[]", '{"flags": NaN}', "{}"])
def test_a_damaged_configuration_is_called_damaged(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json is damaged"):
        RunFolder(tmp_path, {}, seed=0, device=CPU)


def test_a_log_with_odd_steps(tmp_path):
    run = RunFolder(tmp_path, {}, seed=0, device=CPU)
    lines = [b'{"step": "x"}', b"\xff\xfe", b'{"step": 1, "loss": 2}', b'{"step": null}', b"{}"]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    run.truncate_log(1)
    assert [json.loads(s) for s in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 2}
    ]


@pytest.mark.parametrize("flag", ["--online_iteration", "--print_every", "--pre_epoch", "--test_iteration"])
def test_numbers_beyond_counting(tiny, capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        train.main([*FLAGS, flag, "100000000000000000000000"])
    assert stopped.value.code == 2
    assert f"{flag}: must be at most {LARGEST}" in capsys.readouterr().err


def test_a_name_too_long_for_the_disk(tiny, capsys):
    line = refused(capsys, "--exp_name", "x" * 300)
    assert "too long" in line


def test_the_home_folder_however_it_is_given(tiny, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny))
    assert train.main([*FLAGS, "--save_dir=~/mine"]) == 0
    assert (tiny / "mine/a/x_syn.pt").exists()


def test_a_config_cannot_name_an_attention_kernel(tmp_path, monkeypatch):
    from transformers import AutoModel

    seen = {}

    def stop(*args, **options):
        seen.update(options)
        raise OSError("seen enough")

    monkeypatch.setattr(AutoModel, "from_pretrained", stop)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"attn_implementation": "someone/kernel"}')
    with pytest.raises(UserError):
        load_hf(str(tmp_path / "model"))
    assert seen["attn_implementation"] == "eager" and seen["trust_remote_code"] is False
