"""Saves: whole or not at all, the one before kept, a damaged one noticed, one process a folder."""

import errno
import os
import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from evaluation.measure import CellStore, read_cells
from utils import checkpoint
from utils.checkpoint import in_use, is_left_over
from utils.errors import UserError
from utils.run_folder import RunFolder, claim_run, forget_run, load_run, previous_path, read_state, save_run


def model(value):
    made = nn.Linear(40, 40)
    nn.init.constant_(made.weight, value)
    return made


@pytest.fixture
def saved(tmp_path):
    """State after step 2, with that after step 1 beside it."""
    path = tmp_path / "state.pt"
    for step in (1, 2):
        save_run(path, step, {"model": model(step)}, experiment=3)
    return path


def loaded(path):
    made = model(0)
    step = load_run(path, {"model": made})
    assert float(made.weight[0, 0].detach()) == step
    return step


def test_the_save_before_stays(saved):
    assert loaded(saved) == 2 and previous_path(saved).name == "state.prev.pt"
    assert checkpoint.load(previous_path(saved))["step"] == 1
    assert sorted(p.name for p in saved.parent.iterdir()) == ["state.prev.pt", "state.pt"]
    forget_run(saved)
    assert read_state(saved) is None and list(saved.parent.iterdir()) == []


def test_a_state_of_another_experiment_is_left_alone(saved, tmp_path):
    made = model(7)
    assert load_run(saved, {"model": made}, experiment=4) is None
    assert load_run(tmp_path / "nothing.pt", {"model": made}) is None
    assert float(made.weight[0, 0].detach()) == 7
    assert load_run(saved, {"model": made}, experiment=3) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: bytes(len(raw)),
        lambda raw: raw[len(raw) // 2 :],
        lambda raw: raw[:3000] + bytes([raw[3000] ^ 1]) + raw[3001:],
        lambda raw: b"<html>",
    ],
)
def test_a_damaged_save_is_noticed_and_the_one_before_taken(saved, capsys, damage):
    saved.write_bytes(damage(saved.read_bytes()))
    assert loaded(saved) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("warning: run state ") and "state.prev.pt" in printed
    assert str(saved) in printed and printed.count("\n") == 1


def test_no_flipped_bit_goes_unnoticed(saved, capsys):
    """Whatever bit: the state that comes back is one that was saved, never a third one."""
    raw, rng = saved.read_bytes(), random.Random(5)
    steps = set()
    for _ in range(200):
        at = rng.randrange(len(raw))
        saved.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
        steps.add(loaded(saved))
    assert steps == {1, 2}  # 2: the bit was one that nobody reads


def test_both_damaged(saved):
    saved.write_bytes(b"torn")
    previous_path(saved).write_bytes(b"torn too")
    with pytest.raises(UserError, match=r"state\.prev\.pt"):
        read_state(saved)
    previous_path(saved).unlink()
    with pytest.raises(UserError, match=r"state\.pt .*delete it or pass --overwrite"):
        read_state(saved)


def test_killed_between_the_two_renames(saved, capsys):
    saved.unlink()
    assert read_state(saved)["step"] == loaded(saved) == 1
    assert capsys.readouterr().out == ""  # nothing is damaged


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "replace", "mkstemp"])
def test_a_disk_that_fails_leaves_the_last_save(saved, monkeypatch, reason, where):
    def fail(*args, **kwargs):
        raise OSError(reason, os.strerror(reason))

    owner = {"fsync": os, "replace": Path, "mkstemp": checkpoint.tempfile}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, fail)
        with pytest.raises(
            UserError, match=rf"cannot write .*/state\.pt: {re.escape(os.strerror(reason))}"
        ) as caught:
            save_run(saved, 3, {"model": model(3)}, noise=torch.full((3,), 3.0))
    assert "\n" not in str(caught.value) and loaded(saved) == 2
    assert sorted(p.name for p in saved.parent.iterdir()) == ["state.prev.pt", "state.pt"]


def test_the_disk_fills_in_the_middle_of_a_tensor(saved, monkeypatch):
    """Torch reports that as a RuntimeError of its own."""

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 2000

        def write(self, content):
            self.left -= len(content)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = torch.save
    monkeypatch.setattr(torch, "save", lambda value, file: real(value, Full(file)))
    with pytest.raises(UserError, match=r"cannot write .*state\.pt"):
        save_run(saved, 3, {"model": model(3)}, noise=torch.full((3,), 3.0))
    monkeypatch.undo()
    assert loaded(saved) == 2 and len(list(saved.parent.iterdir())) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_cell_that_does_not_fit_on_the_disk(tmp_path):
    path = tmp_path / "results.jsonl"
    store = CellStore(path)
    store.add({"a": 1}, accuracy=2.0)
    full = CellStore(path.with_name("full.jsonl"))
    full.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*full\.jsonl: No space left"):
        full.add({"a": 2}, accuracy=3.0)
    assert [cell["accuracy"] for cell in read_cells(path)] == [2.0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(saved):
    saved.parent.chmod(0o555)
    try:
        with pytest.raises(UserError, match="cannot write"):
            save_run(saved, 3, {"model": model(3)})
        assert loaded(saved) == 2
    finally:
        saved.parent.chmod(0o755)


# ------------------------------------------------------------------ what killed writers leave


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    left = [".state.pt.abcdefg1", "..state.pt.abcdefg1.x_y_z_12"]
    kept = [".state.pt.mine", ".other.pt.abcdefg1", "state.pt.abcdefg1", ".state.pt.ABCDEFG1"]
    for name in (*left, *kept):
        (tmp_path / name).write_bytes(b"half")
    checkpoint.save(1, tmp_path / "state.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "state.pt"])


def test_a_file_that_is_being_written_is_left_alone(tmp_path):
    path = tmp_path / "table.md"
    with checkpoint.atomic_path(path) as mine:
        mine.write_text("first")
        assert not is_left_over(mine)
        checkpoint.write_text(path, "second")  # another process writes the same file
        assert mine.exists()
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["table.md"]
    with in_use(path):
        assert not is_left_over(path)
    assert is_left_over(path) and not is_left_over(tmp_path / "nothing")


# ------------------------------------------------------------------ one process a folder


def test_a_folder_in_use_is_refused(tmp_path, holder):
    run = tmp_path / "a"
    with pytest.raises(UserError, match=rf"a is in use by .*process {holder.pid} on"), claim_run(run):
        pass
    with claim_run(tmp_path / "other"):
        pass
    holder.kill()
    holder.join()
    with claim_run(run):  # its owner is dead: taken over at once
        pass
    (tmp_path / "alias").symlink_to("a")
    with claim_run(run), pytest.raises(UserError, match="in use"), claim_run(tmp_path / "alias"):
        pass


# ------------------------------------------------------------------ garbage in a run folder


def test_garbage_in_the_log_is_left_out(tmp_path):
    make = lambda: RunFolder(tmp_path, {"a": 1}, seed=1, device=torch.device("cpu"))  # noqa: E731
    make().log(step=1, loss=2.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write("\n{torn\n" + "[" * 100000 + "\n")
    run = make()
    assert run.read_log() == [{"step": 1, "loss": 2.0}]
    run.truncate_log(1)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
