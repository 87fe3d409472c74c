"""Damaged saves and full disks: a whole run gets over both, bit for bit."""

import random

import pytest
import torch
from fault_commands import COMMANDS
from fault_kills import OUTPUT, Forked, uninterrupted
from fault_saves import recover_damaged, small_disk, survive_small_disk

from distillation import loop
from utils.errors import UserError

SEED = 11
SHORT = {
    "train.py": COMMANDS["train.py"].but(
        outer_iteration=8, eval_every=8, print_every=4, train_model="convnet_32_bn"
    ),
    "main.py DM": COMMANDS["main.py DM"].but(Iteration=8, num_exp=1),
}


@pytest.fixture(scope="module", params=SHORT)
def whole(request, tmp_path_factory):
    """A command, what it leaves, its changes to files."""
    command = SHORT[request.param]
    wanted, changes, _ = uninterrupted(command, tmp_path_factory.mktemp("whole"))
    return command, wanted, changes


def test_a_damaged_save_loses_nothing_of_the_result(whole, tmp_path):
    command, wanted, changes = whole
    rng = random.Random(SEED)
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        recover_damaged(command, folder, changes, wanted, rng)


def test_a_disk_that_is_too_small(whole, tmp_path):
    command, wanted, changes = whole
    survive_small_disk(command, tmp_path, changes, wanted, random.Random(SEED))


def test_data_prepare_on_a_full_disk(tmp_path):
    """Nothing of the set is there then: half a set would be taken for a whole one."""
    command = COMMANDS["data.prepare"]
    command.prepare(tmp_path)
    assert Forked(command, tmp_path, small_disk(3000)).wait() == 2
    printed = (tmp_path / OUTPUT).read_text()
    assert "cannot write datasets/own" in printed and "Traceback" not in printed
    assert not (tmp_path / "datasets/own").exists()
    assert Forked(command, tmp_path).wait() == 0


def test_the_harness_sees_a_save_that_is_not_kept(tmp_path, monkeypatch):
    """A full disk that takes the last save with it has to show."""

    def in_place(path, step, parts, **tensors):
        state = {"step": step, "parts": {k: v.state_dict() for k, v in parts.items()}}
        try:
            if path.exists():
                path.with_name("state.prev.pt").write_bytes(path.read_bytes())
            with path.open("wb") as file:
                torch.save({**state, "named": tensors}, file)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {path}: {error}") from None

    monkeypatch.setattr(loop, "save_run", in_place)
    with pytest.raises(AssertionError, match="is not the last save"):
        survive_small_disk(SHORT["train.py"], tmp_path, 160, {}, random.Random(SEED))
