"""The power is cut while files take their names: readers see the old or the new, never a mix."""

import json

import numpy as np
import pytest
import torch
from fault_power import Recorder, contents, replay
from torch import nn

from data.load import load_set
from data.prepare.raw import Source, one_part
from data.prepare.write import write_prepared
from utils import checkpoint
from utils.checkpoint import fingerprint
from utils.errors import UserError
from utils.run_folder import load_run, save_run


def model(value):
    made = nn.Linear(8, 8)
    nn.init.constant_(made.weight, value)
    return made


@pytest.mark.parametrize("saves", [0, 1, 2])
def test_a_state_is_the_last_or_the_one_before(tmp_path, saves, capsys):
    path = tmp_path / "state.pt"
    for step in range(1, saves + 1):
        save_run(path, step, {"model": model(step)})

    def read():
        made = model(0)
        step = load_run(path, {"model": made})
        assert step is None or float(made.weight[0, 0].detach()) == step
        return step

    found = replay(tmp_path, lambda: save_run(path, saves + 1, {"model": model(saves + 1)}), read)
    assert set(found) == {saves or None, saves + 1} and len(found) > bool(saves) + 1  # one renaming, or two


def test_what_was_saved_stays(tmp_path):
    """Once `save` has returned, nothing is open any more: other files may rely on it."""
    path, recorder = tmp_path / "x.pt", Recorder(tmp_path)
    with recorder.recording():
        checkpoint.save(torch.ones(3), path)
    assert recorder.changes and all(change.synced and change.certain for change in recorder.changes)


def test_the_model_of_a_disk_notices_a_missing_sync(tmp_path):
    """Written carelessly, a file is torn in one of the aftermaths."""
    path = tmp_path / "facts.json"
    path.write_text('{"a": 1}')

    def write():
        (tmp_path / "new").write_text('{"a": 2}')
        (tmp_path / "new").replace(path)

    def read():
        try:
            return json.loads(path.read_text())["a"]
        except ValueError:
            return "torn"

    assert set(replay(tmp_path, write, read)) == {1, 2, "torn"}


def source(seed, count, *, test=True, labels=True):
    rng = np.random.default_rng(seed)
    splits = {}
    for split, number in (("train", count), ("test", 5)) if test else (("train", count),):
        images = rng.integers(0, 255, (number, 4, 4, 3), np.uint8)
        splits[split] = one_part(images, np.arange(number) % 2 if labels else None)
    return Source(f"drawn with {seed}", ("a", "b") if labels else None, splits)


@pytest.mark.parametrize("new", [{}, {"test": False}, {"labels": False}])
@pytest.mark.parametrize("old", [{}, {"test": False}, {"labels": False}])
def test_a_prepared_set_is_one_of_two(tmp_path, old, new):
    """Files of both are refused in one line: the set is to be prepared again."""
    folder = tmp_path / "own"

    def prepare(seed, **kind):
        write_prepared(folder, 4, 3, source(seed, 8 + seed, **kind), workers=1)

    def read():
        try:
            found = load_set("own", 4, tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
            return "refused"
        return fingerprint(
            *(t for s in (found.train, found.test) if s for t in (s.images, s.labels) if t is not None)
        )

    prepare(1, **new)
    wanted = {read(), "refused"}
    for path in folder.iterdir():
        path.unlink()
    prepare(0, **old)
    wanted.add(read())
    found = replay(folder, lambda: prepare(1, **new), read)
    assert len(wanted) == 3 and set(found) == wanted and found[0] != "refused"
    assert read() != "refused"  # nothing is open after the end


def test_names_of_the_recorder_are_those_on_the_disk(tmp_path):
    """The last aftermath is what really lies there."""
    (tmp_path / "x.pt").write_bytes(b"old")
    before, recorder = contents(tmp_path), Recorder(tmp_path)
    with recorder.recording():
        checkpoint.save(torch.ones(3), tmp_path / "x.pt")
    assert list(recorder.aftermaths(before))[-1] == contents(tmp_path)
