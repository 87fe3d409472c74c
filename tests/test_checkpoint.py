"""Files: read without running code, written whole or not at all, refused with what is wrong."""

import errno
import os
import pickle
import re
import signal
import stat
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from data.meta import checksum
from utils import checkpoint
from utils.errors import UserError, entry_point
from utils.plots import save_grid, save_lines
from utils.run_folder import load_run, save_run


class Payload:
    """What an attacker would put into a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("function", "name"), [(os.mkdir, "mkdir"), (exec, "exec")])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, function, name, legacy):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    argument = str(trace) if name == "mkdir" else f"import os; os.mkdir({str(trace)!r})"
    content = {"weight": torch.zeros(2), "x": Payload(function, argument)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=rf"target checkpoint .*evil\.pt is refused.*{name}"):
        checkpoint.load(path, what="target checkpoint")
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the file does what it says
    assert trace.exists()


def test_code_in_a_bare_pickle_is_not_run(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Payload(os.mkdir, str(trace)), protocol=2))
    with pytest.raises(UserError, match=r"evil\.pt"):
        checkpoint.load(path)
    assert not trace.exists()


def test_other_classes_are_named(tmp_path):
    torch.save({"a": stat, "model": nn.Linear(1, 1)}["model"], tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear"):
        checkpoint.load(tmp_path / "m.pt")


def test_damaged_files_are_named(tmp_path):
    good = tmp_path / "good.pt"
    checkpoint.save({"w": torch.randn(500)}, good)
    raw = good.read_bytes()
    for number, content in enumerate(
        [
            b"",
            b"\x00" * 100,
            b"<html><body>404 not found</body></html>",
            b"hello",
            raw[:100],
            raw[: len(raw) // 2],
            raw[:-30],
        ]
    ):
        path = tmp_path / f"bad{number}.pt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"image tensor .*bad{number}\.pt") as caught:
            checkpoint.load(path, what="image tensor")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match="is a folder"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path / "none.pt")


def test_what_is_wrong_with_the_disk_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    checkpoint.save(torch.zeros(2), tmp_path / "a.pt")

    def failing(*args, **kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(UserError, match=r"file \S+a\.pt cannot be read: too many open files"):
        checkpoint.load(tmp_path / "a.pt")


def test_a_signal_while_a_file_is_read_is_no_damaged_file(tmp_path, monkeypatch):
    checkpoint.save(torch.zeros(2), tmp_path / "a.pt")
    real = torch.load

    def signalled(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", signalled)
    assert entry_point(lambda argv: checkpoint.load(tmp_path / "a.pt"))() == 143


LOAD_WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from utils import checkpoint
from utils.errors import UserError
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (16 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    checkpoint.load(sys.argv[1], what="tensor file", mmap=sys.argv[2] == "mmap")
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["read", "mmap"])
def test_a_file_larger_than_the_memory_is_not_called_truncated(tmp_path, how):
    torch.save(torch.zeros(16 << 20), tmp_path / "large.pt")
    command = [sys.executable, "-c", LOAD_WITH_LITTLE_MEMORY, str(tmp_path / "large.pt"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    line = r"tensor file \S+large\.pt does not fit into the memory \((\d+) bytes were asked for\)"
    assert int(re.match(line, done.stdout)[1]) >= 4 << 24, done


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_plain_content_comes_back(tmp_path, mmap, legacy):
    content = {"w": torch.arange(6.0).view(2, 3), "n": [1, 2.5, "x", None, True], "t": (1, 2)}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
    loaded = checkpoint.load(tmp_path / "c.pt", mmap=mmap)
    assert torch.equal(loaded["w"], content["w"])
    assert loaded["n"] == content["n"] and loaded["t"] == content["t"]


def test_numpy_scalars_of_old_result_files_load(tmp_path):
    torch.save({"accuracy": np.float64(12.25), "data": torch.ones(2)}, tmp_path / "res.pt")
    assert checkpoint.load(tmp_path / "res.pt")["accuracy"] == 12.25


def test_load_tensor_and_state_check_the_kind(tmp_path):
    path = tmp_path / "x.pt"
    for content in ([torch.ones(2)], {"a": 1}, 3.0, torch.eye(2).to_sparse()):
        checkpoint.save(content, path)
        with pytest.raises(UserError, match=r"x\.pt"):
            checkpoint.load_tensor(path)
    for content in ({"a": 1}, {1: torch.ones(1)}, {"model": {"w": torch.ones(1)}}, torch.ones(2)):
        checkpoint.save(content, path)
        with pytest.raises(UserError, match="not a state dict"):
            checkpoint.load_state(path)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("disk full"), UserError),
        (OSError(28, "No space left"), UserError),
        (ValueError("other"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failing_writer_leaves_the_old_file(tmp_path, error, raised):
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise error

    with pytest.raises(raised):
        checkpoint.write_atomic(path, write)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]  # no temporary file is left


def test_a_file_that_does_not_fit_is_said_in_plain_words(tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*x\.pt: File too large"):
            checkpoint.save(torch.zeros(400_000, dtype=torch.uint8), tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_written_files_are_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "folder" / "t.txt"
    checkpoint.write_text(path, "größer")
    assert path.read_bytes() == "größer".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    checkpoint.write_text(path, "short")
    assert path.read_text() == "short"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/x\.pt"):
        checkpoint.save(1, tmp_path / "file" / "x.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(1, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def net(classes=2):
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, classes))


def test_apply_state_copies_everything_but_the_head():
    source, model = net(5), net(2)
    head = model[1].weight.detach().clone()
    checkpoint.apply_state(model, source.state_dict(), origin="x", skip=("1.",))
    assert torch.equal(model[0].weight, source[0].weight)
    assert torch.equal(model[1].weight, head)
    with pytest.raises(UserError, match=r"x does not fit .*1\.weight is \(5, 4\), expected \(2, 4"):
        checkpoint.apply_state(model, source.state_dict(), origin="x")


def test_apply_state_names_every_mismatch_and_changes_nothing():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in model.state_dict().items()}
    state["extra"] = state.pop("0.bias")
    state["1.bias"] = torch.zeros(1)
    with pytest.raises(UserError) as caught:
        checkpoint.apply_state(model, state, origin="file.pt")
    for part in ("missing 0.bias", "unexpected extra", "1.bias is (1,), expected (2,)"):
        assert part in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="and 12 more"):
        checkpoint.apply_state(model, {f"k{i}": torch.ones(1) for i in range(16)}, origin="f")


def test_fingerprint_sees_values_shapes_and_types():
    x = torch.arange(6.0)
    prints = [
        checkpoint.fingerprint(*t)
        for t in ((x,), (x.view(2, 3),), (x.double(),), (x + 1,), (x, x), (x[:3], x[3:]), (-x,))
    ]
    assert len(set(prints)) == len(prints)
    assert checkpoint.fingerprint(x.view(2, 3).T.contiguous().T) == prints[1]


def test_a_single_value_of_any_stride_has_a_fingerprint():
    """As of a saved part of the labels, which keeps its stride."""
    labels = torch.arange(4)[::2][:1]
    assert labels.stride() == (2,) and checkpoint.fingerprint(labels) == checkpoint.fingerprint(
        torch.tensor([0])
    )
    assert checksum(labels) == checksum(torch.tensor([0]))


def test_save_run_and_load_run(tmp_path):
    model, path = nn.Linear(2, 2), tmp_path / "state.pt"
    save_run(path, 7, {"model": model}, experiment=2)
    other = nn.Linear(2, 2)
    assert load_run(path, {"model": other}, experiment=1) is None
    assert not torch.equal(model.weight, other.weight)
    assert load_run(path, {"model": other}, experiment=2) == 7
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize(
    "content", [{}, [], 3, {"parts": {}, "step": 1}, {"parts": {"model": {}}, "step": 1}]
)
def test_foreign_run_states_are_refused(tmp_path, content):
    path = tmp_path / "state.pt"
    checkpoint.save(content, path)
    with pytest.raises(UserError, match=r"state\.pt does not fit this run .*--overwrite"):
        load_run(path, {"model": nn.Linear(2, 2)})


@pytest.mark.usefixtures("figures")
def test_pictures(tmp_path):
    from PIL import Image

    images = torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    save_grid(images, tmp_path / "grid.png", columns=3, scale=2)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (8 + 4, 3 * 8 + 4 * 2, 3)
    assert [int(picture[6, 6 + 10 * i, 0]) for i in range(3)] == [0, 128, 255]
    lines = {"a": ([1, 2], [1.0, 0.1]), "b": ([1], [0.5])}
    save_lines({"t": lines, "u": lines}, tmp_path / "c.png", x_label="x", y_label="loss")
    assert Image.open(tmp_path / "c.png").size[0] > 100
    for low, high in ((0.3, 0.9), (0.301, 0.311), (0.05, 0.6), (1e-5, 2.5e-5), (11.2, 1200.0)):
        falls = {"run 1": ([1.0, 2.0], [high, low])}
        for panels in ({"loss": falls}, dict.fromkeys("tu", falls)):  # words stay within the picture
            save_lines(panels, tmp_path / "c.png", x_label="step", y_label="KRR loss")
            picture = np.asarray(Image.open(tmp_path / "c.png").convert("L"))
            assert all((edge == 255).all() for edge in (picture[0], picture[-1], *picture.T[[0, -1]]))
    with pytest.raises(UserError, match=r"cannot draw images of shape \(0, 3, 4, 4\)"):
        save_grid(torch.zeros(0, 3, 4, 4), tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_an_archive_that_says_to_span_two_disks_is_damaged(tmp_path):
    """Python's own `is_zipfile` raises on such an end, which one flipped bit can make."""
    path = tmp_path / "t.pt"
    torch.save(torch.zeros(2), path)
    raw = path.read_bytes()
    end = raw.rindex(b"PK\5\6")
    locator = struct.pack("<4sLQL", b"PK\6\7", 1, 0, 2)  # the disk, the offset, how many disks
    before = raw[: end - len(locator)] if raw[end - len(locator) :].startswith(b"PK\6\7") else raw[:end]
    path.write_bytes(before + locator + raw[end:])
    with pytest.raises(UserError, match=r"file .*t\.pt is damaged \(zipfiles that span multiple disks"):
        checkpoint.load(path)
    with pytest.raises(UserError, match=r"t\.pt is damaged"):
        checkpoint.files_fingerprint([path])
