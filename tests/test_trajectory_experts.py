"""Expert buffers: written, read back, foreign and malformed ones, resumed, against a plain loop."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, NET, make_target, write_set, write_target

from data.augment import normalize
from data.load import load_set
from evaluation.fit import outputs
from models import get_model
from trajectory import experts
from trajectory.buffers import Experts, expert_files
from trajectory.experts import ExpertFlags, ExpertTraining, resolve
from utils.errors import UserError

TINY = ["--data_name", "tiny", "--img_size", "8", "--train_model", "convnet_4_in", "--device", "cpu"]
TINY += ["--batch_train", "20", "--num_experts", "2", "--train_epochs", "2", "--seed", "0"]
FOLDER = Path("buffers/tiny_8/convnet_4_in_classes_2epochs")


def shapes(model="convnet_4_in", width=4):
    return [p.shape for p in get_model(model, (3, 8, 8), width).parameters()]


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny")
    return workspace


def test_command_writes_the_released_form(tiny, capsys):
    assert experts.main(TINY) == 0
    shown = capsys.readouterr().out
    size = sum(s.numel() for s in shapes()) * 4 * 3
    assert "3 snapshots each" in shown and f"{2 * size / 1e3:.1f} kB on disk" in shown
    assert [p.name for p in expert_files(FOLDER)] == ["replay_buffer_0.pt", "replay_buffer_1.pt"]
    content = torch.load(FOLDER / "replay_buffer_0.pt", weights_only=True)
    assert type(content) is list and len(content) == 1 and len(content[0]) == 3
    assert [p.shape for p in content[0][0]] == shapes()
    assert all(type(p) is torch.Tensor and p.is_contiguous() for p in content[0][0])
    first, last = content[0][0], content[0][-1]
    assert not any(torch.equal(a, b) for a, b in zip(first, last, strict=True) if a.dim() > 1)
    log = [json.loads(line) for line in (FOLDER / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log] == [1, 2] and all(0 <= e["test_accuracy"] <= 1 for e in log)
    read = Experts(FOLDER, shapes(), CPU)
    assert len(read) == 2 and read.last == 2
    assert all(torch.equal(a, b) for a, b in zip(read.snapshot(0, 2), last, strict=True))


def test_missing_ones_alone_are_trained_and_are_the_same(tiny, capsys):
    assert experts.main(TINY) == 0
    before = [torch.load(p, weights_only=True) for p in expert_files(FOLDER)]
    path = FOLDER / "replay_buffer_1.pt"
    path.unlink()
    kept = (FOLDER / "replay_buffer_0.pt").stat().st_mtime_ns
    assert experts.main(TINY) == 0
    assert (FOLDER / "replay_buffer_0.pt").stat().st_mtime_ns == kept
    again = torch.load(path, weights_only=True)
    for a, b in zip(again[0], before[1][0], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    capsys.readouterr()
    assert experts.main(TINY) == 0
    assert "holds the 2 experts of these flags" in capsys.readouterr().out
    (FOLDER / "results.json").unlink()  # as after a kill at the very end
    assert experts.main(TINY) == 0 and (FOLDER / "results.json").exists()
    assert experts.main([*TINY, "--num_experts", "3"]) == 0  # more of the same
    assert len(expert_files(FOLDER)) == 3
    assert experts.main([*TINY, "--lr_teacher", "0.5"]) == 2
    assert "holds a run with other flags (lr_teacher 0.01 -> 0.5)" in capsys.readouterr().err


def test_snapshots_are_those_of_a_plain_loop(tiny):
    """Features as targets, no augmentation, SGD with momentum and decay, by hand."""
    write_target()
    argv = ["--targets", "features", "--target_model", NET, "--snapshot_steps", "2", "--lr_teacher", "0.05"]
    assert experts.main([*TINY, *argv, "--num_experts", "1"]) == 0
    folder = Path("buffers/tiny_8/convnet_4_in_features_2epochs_convnet_4_bn")
    width = make_target().dim
    trajectory = torch.load(folder / "replay_buffer_0.pt", weights_only=True)[0]
    image_set = load_set("tiny", 8, "datasets")
    flags = resolve(ExpertFlags(**json.loads((folder / "config.json").read_text())["flags"]))
    training = ExpertTraining(flags, image_set, CPU)
    y = outputs(make_target(), image_set.train.images, image_set, CPU)
    assert torch.allclose(training.y, y, atol=1e-6)
    seed = experts.derive_seed(0, "expert", 0)
    batches = training.trainer(seed).loader.forever()
    network = get_model("convnet_4_in", (3, 8, 8), width)
    with torch.no_grad():
        for p, saved in zip(network.parameters(), trajectory[0], strict=True):
            p.copy_(saved)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    x_all = normalize(image_set.train.images, image_set.stats)
    assert len(trajectory) == 1 + 6 // 2  # 48 images in batches of 20: three steps per epoch
    for step in range(1, 7):
        x, targets = next(batches)
        assert (x[:, None] - x_all[None]).abs().flatten(2).amax(2).min(1).values.max() < 1e-6
        optimizer.zero_grad()
        F.mse_loss(network(x), targets).backward()
        optimizer.step()
        if step % 2 == 0:
            for p, saved in zip(network.parameters(), trajectory[step // 2], strict=True):
                assert torch.allclose(p, saved, atol=1e-5)


def test_bf16_on_disk_is_read_as_float32(tiny):
    assert experts.main([*TINY, "--dtype", "bf16"]) == 0
    half = Experts(FOLDER, shapes(), CPU).snapshot(0, 1)
    assert torch.load(FOLDER / "replay_buffer_0.pt", weights_only=True)[0][0][0].dtype == torch.bfloat16
    assert experts.main([*TINY, "--overwrite"]) == 0
    whole = Experts(FOLDER, shapes(), CPU).snapshot(0, 1)
    for a, b in zip(half, whole, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b.bfloat16().float())


def released(folder, files=2, each=2, epochs=3):
    """What the released code writes: several trajectories a file, one snapshot per epoch and one more."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: [torch.randn(tuple(s), generator=generator) for s in shapes()]  # noqa: E731
    content = [[[draw() for _ in range(epochs + 1)] for _ in range(each)] for _ in range(files)]
    for n, trajectories in enumerate(content):
        torch.save(trajectories, folder / f"replay_buffer_{n}.pt")
    return content


def test_released_buffers_are_read(tmp_path):
    content = released(tmp_path / "b")
    (tmp_path / "b" / "replay_buffer_x.pt").write_text("not one of them")
    read = Experts(tmp_path / "b", shapes(), CPU)
    assert len(read) == 4 and read.last == 3
    start, goal = read.pair(2, 0, 2)
    assert all(torch.equal(a, b) for a, b in zip(start, content[1][0][0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(goal, content[1][0][2], strict=True))
    mean = [sum(parts) / 3 for parts in zip(*content[1][0][1:4], strict=True)]
    assert all(torch.allclose(a, b) for a, b in zip(read.pair(2, 0, 2, radius=1)[1], mean, strict=True))
    assert len(Experts(tmp_path / "b", shapes(), CPU, count=3)) == 3
    with pytest.raises(UserError, match=r"holds 4 trajectories, 5 are needed; see --num_experts"):
        Experts(tmp_path / "b", shapes(), CPU, count=5)
    older = tmp_path / "older"  # the form of torch before 1.6, which cannot be mapped
    older.mkdir()
    torch.save(content[0], older / "replay_buffer_0.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(Experts(older, shapes(), CPU).snapshot(0, 1)[0], content[0][0][1][0])


def good():
    return [[torch.zeros(tuple(s)) for s in shapes()] for _ in range(2)]


@pytest.mark.parametrize(
    "content,message",
    [
        ({"a": 1}, "holds dict, expected a list of trajectories"),
        ([], "holds list of 0"),
        ([7], "trajectory 0 is int"),
        ([good()[:1]], "trajectory 0 is list of 1, expected a list of two or more snapshots"),
        ([[good()[0], 3]], "trajectory 0, snapshot 1 is int"),
        ([[good()[0], ["w"]]], "snapshot 1 is list of 1, expected a list of parameter tensors"),
        ([[good()[0], good()[0][:-1]]], "snapshot 1 holds 5 tensors, the network has 6 parameters"),
        ([[good()[0], [*good()[0][:-1], torch.zeros(5)]]], r"parameter 5 is \(5,\) torch.float32, expected"),
        (
            [[good()[0], [*good()[0][:-1], torch.zeros(4, dtype=torch.int64)]]],
            r"parameter 5 is \(4,\) torch.int64",
        ),
    ],
)
def test_malformed_buffers_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "replay_buffer_0.pt")
    with pytest.raises(UserError, match=message) as error:
        Experts(tmp_path, shapes(), CPU)
    assert "replay_buffer_0.pt" in str(error.value) and "\n" not in str(error.value)


def test_damaged_dangerous_diverged_and_aliased_buffers(tmp_path):
    path = tmp_path / "replay_buffer_0.pt"
    with pytest.raises(UserError, match=r"holds no replay_buffer_0\.pt; make it with"):
        Experts(tmp_path, shapes(), CPU)
    released(tmp_path / "b", files=1)
    path.write_bytes((tmp_path / "b" / "replay_buffer_0.pt").read_bytes()[:3000])
    with pytest.raises(UserError, match="truncated or not a torch file"):
        Experts(tmp_path, shapes(), CPU)
    torch.save([print], path)
    with pytest.raises(UserError, match="loading it would run"):
        Experts(tmp_path, shapes(), CPU)
    live = [torch.ones(tuple(s)) for s in shapes()]
    torch.save([[[p.detach() for p in live] for _ in range(3)]], path)  # what a CPU run of the release saves
    with pytest.raises(UserError, match="saved without copying the weights"):
        Experts(tmp_path, shapes(), CPU).pair(0, 0, 2)
    live[0].fill_(torch.nan)
    torch.save([[live, live]], path)
    with pytest.raises(UserError, match="snapshot 1 holds NaN or infinity"):
        Experts(tmp_path, shapes(), CPU).snapshot(0, 1)


def test_errors_come_before_anything_is_written(tiny, capsys, monkeypatch):
    write_set("datasets", "bare", labelled=False)
    assert experts.main(["--data_name", "bare", *TINY[2:]]) == 2
    assert "has no labels; use --targets features" in capsys.readouterr().err
    assert experts.main([*TINY, "--snapshot_steps", "7"]) == 2
    assert "--snapshot_steps 7 is more than the 6 steps" in capsys.readouterr().err
    assert experts.main([*TINY, "--target_model", NET]) == 2
    assert "a target model gives features; use --targets features" in capsys.readouterr().err
    Path("file").touch()
    assert experts.main([*TINY, "--buffer_dir", "file"]) == 2
    assert "--buffer_dir file is a file; expected a folder" in capsys.readouterr().err
    monkeypatch.setattr(experts.shutil, "disk_usage", lambda path: type("", (), {"free": 10}))
    assert experts.main(TINY) == 2
    assert "are needed, 10 B are free" in capsys.readouterr().err
    assert not expert_files(FOLDER) and not (FOLDER / "config.json").exists()
    released(FOLDER)
    assert experts.main(TINY) == 2
    assert "holds experts of another origin" in capsys.readouterr().err
    assert len(expert_files(FOLDER)) == 2


def test_published_settings():
    made = {t: resolve(ExpertFlags(data_name="cifar10", targets=t)) for t in ("classes", "features")}
    assert made["classes"].train_model == "convnet_128_128_128_in" and made["classes"].train_epochs == 50
    assert made["features"].lr_teacher == 0.1 and made["features"].l2 == 1e-4
    assert made["features"].dsa_strategy == "none"
    assert resolve(ExpertFlags(data_name="tinyimagenet")).train_model == "convnet_128_128_128_128_in"
    count = sum(p.numel() for p in get_model("convnet_128_128_128_in", (3, 32, 32), 10).parameters())
    assert count == 320_010
    assert (
        sum(p.numel() for p in get_model("convnet_128_128_128_in", (3, 32, 32), 512).parameters())
        == 1_348_608
    )
