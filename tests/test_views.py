"""Target views: a table that says what the target model would."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, NET, SHAPE, make_target, write_set, write_target

import train
from data.augment import normalize
from data.augment.crop_flip import count_views
from data.load import load_set
from data.loader import TensorLoader, ViewPipeline
from data.specs import Stats
from distillation.problem import Problem
from krr_st.config import TrainFlags
from krr_st.views import DTYPES, OnlineTargets, TargetViews, mapped_table, plan_views, real_loader
from utils.distributed import Group, _backend, local_gpu
from utils.errors import UserError

STATS = Stats((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
ROOT = Path(__file__).resolve().parents[1]


class Counting:
    """The target model, and how many images it has seen."""

    def __init__(self):
        self.model, self.seen = make_target(), 0

    def __call__(self, x):
        self.seen += len(x)
        with torch.no_grad():
            return self.model(x)


def naive_view(image, top, left, flip, pad):
    """One view of one image, sliced by hand."""
    x = F.pad(image.double() / 255, (pad,) * 4)[:, top : top + 8, left : left + 8]
    x = x.flip(-1) if flip else x
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (STATS.mean, STATS.std))
    return ((x - mean) / std).float()


IMAGES = torch.randint(256, (5, *SHAPE), generator=torch.Generator().manual_seed(3)).to(torch.uint8)


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("filled", [False, True])
def test_every_view_equals_the_target_model(hflip, filled):
    pad, target = 2, Counting()
    views = count_views(pad, hflip)
    assert views == 25 * (2 if hflip else 1)
    table = TargetViews(target, torch.full((5 * views, 4), torch.nan), views)
    if filled:
        table.fill(IMAGES, STATS, pad, CPU)
        assert target.seen == 5 * views
    number = 0
    for flip in [False, True][: 1 + hflip]:
        for top in range(5):
            for left in range(5):
                x = torch.stack([naive_view(i, top, left, flip, pad) for i in IMAGES])
                batch = x, torch.arange(5), torch.full((5,), number)
                torch.testing.assert_close(table(*batch), target.model(x), rtol=1e-5, atol=1e-6)
                number += 1
    assert number == views and not table.table.isnan().any()


def test_a_view_is_computed_once_whatever_is_drawn():
    target = Counting()
    table = TargetViews(target, torch.empty(5 * 50, 4), 50)
    loader = TensorLoader(
        IMAGES,
        None,
        batch_size=4,
        device=CPU,
        generator=torch.Generator().manual_seed(0),
        transform=ViewPipeline(STATS, pad=2, hflip=True),
        drop_last=True,
    ).forever()
    drawn, online = set(), OnlineTargets(target.model)
    for _ in range(200):
        (x, view), index = next(loader)
        batch = x, index, view
        assert torch.equal(table(*batch), online(*batch))
        drawn |= set((index * 50 + view).tolist())
    assert table.known.sum() == len(drawn) and 150 < len(drawn) <= 250
    before = target.seen
    table(*batch)
    assert target.seen == before


def test_values_do_not_depend_on_what_else_is_missing():
    target = make_target()
    x = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(40)

    def by(sizes):
        table = TargetViews(target, torch.empty(40, 4), 1)
        for part in rows.split(sizes):
            table(x[part], part, torch.zeros_like(part))
        return table.table

    assert torch.equal(by([40]), by([1] * 40)) and torch.equal(by([40]), by([3, 17, 20]))


def test_the_last_small_batch_of_a_pass_has_the_tables_values():
    target = make_target()
    x, rows = torch.randn(40, *SHAPE), torch.arange(40)
    table, online = TargetViews(target, torch.empty(40, 4), 1), OnlineTargets(target)
    whole = table(x, rows, torch.zeros_like(rows))
    for size in range(1, 20):
        few = x[:size], rows[:size], torch.zeros_like(rows[:size])
        assert torch.equal(online(*few), whole[:size]), size


def test_a_bf16_table_and_online_agree():
    target = make_target()
    x = torch.randn(20, *SHAPE)
    batch = x, torch.arange(20), torch.zeros(20, dtype=torch.int64)
    table = TargetViews(target, torch.empty(20, 4, dtype=torch.bfloat16), 1)
    online = OnlineTargets(target, torch.bfloat16)
    assert torch.equal(table(*batch), online(*batch)) and online(*batch).dtype == torch.float32
    torch.testing.assert_close(online(*batch), target(x), rtol=2**-8, atol=0)


def test_table_on_disk_goes_on(tmp_path):
    batch = torch.randn(16, *SHAPE), torch.arange(16), torch.zeros(16, dtype=torch.int64)

    def start(**about):
        target = Counting()
        table, known, flush = mapped_table(tmp_path, 16, 4, torch.float32, {"target": "a", **about})
        return target, TargetViews(target, table, 1, known, flush)

    target, first = start()
    wanted = first(*batch)
    target, lost = start()  # the first was killed before it flushed: nothing is taken for known
    lost(*batch)
    assert target.seen == 16
    lost.flush()
    target, again = start()
    assert torch.equal(again(*batch), wanted) and target.seen == 0
    target, other = start(target="b")
    other(*batch)
    assert target.seen == 16
    sums = next(tmp_path.glob("*/sums.pt"))
    sums.write_bytes(b"torn")
    with pytest.raises(UserError, match="is truncated"):
        start()


def test_processes_that_fill_one_table_keep_what_the_others_found(tmp_path):
    def start():
        table, known, flush = mapped_table(tmp_path, 16, 4, torch.float32, {})
        return TargetViews(target, table, 1, known, flush)

    target = Counting()
    tables = [start(), start()]
    x, nothing = torch.randn(16, *SHAPE), torch.zeros(8, dtype=torch.int64)
    for table, part in zip(tables, torch.arange(16).split(8), strict=True):
        table(x[part], part, nothing)
    for table in tables:
        table.flush()
    again = start()
    assert again.known.all() and torch.equal(again.table, OnlineTargets(target)(x, None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_table_on_disk_is_computed_again(tmp_path, capsys, dtype):
    """Whatever was flipped, zeroed or exchanged: what is read is what the target model gives."""
    batch = torch.randn(16, *SHAPE), torch.arange(16), torch.zeros(16, dtype=torch.int64)

    def start():
        target = Counting()
        table, known, flush = mapped_table(tmp_path, 16, 4, dtype, {})
        return target, TargetViews(target, table, 1, known, flush)

    _, first = start()
    wanted = first(*batch)
    first.flush()
    path = next(tmp_path.glob("*/table.bin"))
    whole, width = path.read_bytes(), 4 * dtype.itemsize
    damages = {
        "a bit": (1, lambda raw: raw[: 3 * width] + bytes([raw[3 * width] ^ 1]) + raw[3 * width + 1 :]),
        "a sector": (5, lambda raw: bytes(5 * width) + raw[5 * width :]),
        "rows exchanged": (2, lambda raw: raw[width : 2 * width] + raw[:width] + raw[2 * width :]),
        "everything": (16, lambda raw: bytes(len(raw))),
        "nothing": (0, lambda raw: raw),
    }
    capsys.readouterr()
    for name, (rows, damage) in damages.items():
        path.write_bytes(damage(whole))
        target, again = start()
        printed = capsys.readouterr().out
        assert f"{rows} target views are computed again" in printed if rows else printed == "", name
        assert torch.equal(again(*batch), wanted) and target.seen == (max(rows, 16) if rows else 0), name
        again.flush()
        assert path.read_bytes() == whole, name
    path.write_bytes(whole[:-1])  # another length: nothing of it is taken
    target, again = start()
    assert torch.equal(again(*batch), wanted) and target.seen == 16


def test_no_room_for_a_table(tmp_path):
    with pytest.raises(UserError, match=r"--views_dir .*target views of .* GB"):
        mapped_table(tmp_path, 2**50, 512, torch.float32, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--views_dir"):
        mapped_table(tmp_path / "file", 4, 4, torch.float32, {})


@pytest.mark.parametrize(
    ("mode", "keep", "draws", "free", "kind"),
    [
        ("online", True, 10**9, 10**9, "online"),
        ("auto", False, 10**6, 10**7, "memory"),
        ("auto", False, 10**6, 10**5, "online"),  # does not fit
        ("auto", False, 10, 10**7, "online"),  # hardly a view comes twice
        ("auto", True, 10, 10**5, "file"),
        ("exact", False, 10, 10**7, "memory"),
        ("exact", False, 10, 10**5, "file"),
    ],
)
def test_plan(mode, keep, draws, free, kind):
    found, _ = plan_views(mode, DTYPES["fp32"], rows=1000, dim=128, draws=draws, free=free, keep=keep)
    assert found == kind


# --- as commands ---


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny", train=32, test=8)
    write_target()
    return workspace


def flags(name, *more):
    text = (
        f"--data_name tiny --exp_name {name} --img_size 8 --target_model {NET} --train_model {NET} "
        "--num_images 6 --num_models 2 --online_iteration 4 --outer_iteration 12 --pre_epoch 2 "
        "--outer_batch_size 16 --test_iteration 3 --eval_every 99 --save_every 5 --print_every 4 "
        "--seed 4 --device cpu"
    )
    return [*text.split(), *more]


def synthetic(name):
    folder = Path("results") / name
    return [torch.load(folder / f"{t}_syn.pt", weights_only=True) for t in "xy"]


def test_train_gives_the_same_set_wherever_targets_come_from(tiny, capsys):
    ways = {
        "online": ["--target_views", "online"],
        "memory": ["--target_views", "exact"],
        "file": ["--target_views", "exact", "--views_dir", "cache"],
        "reused": ["--views_dir", "cache"],
    }
    for name, more in ways.items():
        assert train.main(flags(name, *more)) == 0
        assert f"targets: {name.replace('reused', 'file')}" in capsys.readouterr().out
    first = synthetic("online")
    for name in ways:
        assert all(torch.equal(a, b) for a, b in zip(first, synthetic(name), strict=True)), name
    assert len(list(Path("cache").iterdir())) == 1  # one table, used twice
    about = json.loads(next(Path("cache").glob("*/about.json")).read_text())
    assert about["pad"] == 1 and about["rows"] == 32 * 18
    for name in ("online", "exact"):
        assert train.main(flags(f"plain-{name}", "--no-augment", "--target_views", name)) == 0
    plain = [synthetic(f"plain-{name}") for name in ("online", "exact")]
    assert all(torch.equal(a, b) for a, b in zip(*plain, strict=True))
    assert not torch.equal(plain[0][0], first[0])
    assert "(32 views x" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_and_layout(tiny, precision):
    assert train.main(flags("a", "--precision", precision)) == 0
    assert train.main(flags("b", "--precision", precision, "--layout", "contiguous")) == 0
    for a, b in zip(synthetic("a"), synthetic("b"), strict=True):
        assert a.isfinite().all() and a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.2)  # the pool amplifies rounding


def test_tf32_needs_cuda(tiny, capsys):
    assert train.main(flags("a", "--precision", "tf32")) == 2
    assert capsys.readouterr().err.startswith("error: --precision tf32 is a mode of NVIDIA GPUs")


# --- several processes ---


def stand_in(count):
    """An image set of so many images; image i is i in base 256."""
    digits = torch.arange(count)[:, None] // torch.tensor([1, 256, 65536]) % 256
    images = digits.to(torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8).contiguous()
    image_set = load_set("tiny", 8, "datasets")
    return replace(image_set, train=replace(image_set.train, images=images, labels=None))


def shard_loader(image_set, batch_size, rank=0, ranks=1, seed=0):
    """The real batches of one of several processes."""
    problem = Problem(image_set, CPU, 0, Group(rank, ranks))
    flags = TrainFlags(outer_batch_size=batch_size)
    return real_loader(problem, flags, torch.Generator().manual_seed(seed))


def test_shards_of_a_batch_are_the_batch(tiny):
    image_set = stand_in(30)  # batches of 12, 12 and 6

    def batches(rank, ranks):
        loader = shard_loader(image_set, 12, rank, ranks).forever()
        return [next(loader) for _ in range(5)]

    parts = [batches(rank, 3) for rank in range(3)]
    for step, ((x, view), index) in enumerate(batches(0, 1)):
        for rank in range(3):
            (own_x, own_view), own_index = parts[rank][step]
            assert torch.equal(own_x, x[rank::3]) and torch.equal(own_view, view[rank::3])
            assert torch.equal(own_index, index[rank::3])


def test_without_augmentation_real_images_are_themselves(tiny):
    image_set = stand_in(30)
    given = TrainFlags(outer_batch_size=12, augment=False)
    loader = real_loader(Problem(image_set, CPU, 0), given, torch.Generator().manual_seed(0)).forever()
    for (x, view), index in (next(loader) for _ in range(3)):
        assert torch.equal(x, normalize(image_set.train.images[index], image_set.stats))
        assert not view.any()


def test_a_pass_shows_every_image_once(tiny):
    """CIFAR-100 in batches of 1024: 48 of them and one of 848."""
    loader = shard_loader(stand_in(50000), 1024).forever()
    for _ in range(2):
        indices = [next(loader)[1] for _ in range(49)]
        assert [len(index) for index in indices] == [1024] * 48 + [848]
        assert torch.cat(indices).sort().values.tolist() == list(range(50000))


@pytest.mark.parametrize("count", [31, 30, 25])  # last batches of 7, 6 and 1 image
def test_ranks_get_equal_shares_of_the_last_batch(tiny, count):
    def loader(rank, ranks, seed=0):
        return shard_loader(stand_in(count), 12, rank, ranks, seed)

    whole = [12, 12, *([6] if count > 29 else [])]  # what three ranks can share alike
    loaders = [loader(rank, 3) for rank in range(3)]
    streams = [own.forever() for own in loaders]
    alone = loader(0, 1).forever()
    for _ in range(2):
        shown = []
        for size in whole:
            parts = [next(stream) for stream in streams]
            indices = [index for _, index in parts]
            assert [len(index) for index in indices] == [size // 3] * 3
            shown.append(torch.stack(indices, 1).flatten())
        assert torch.cat(shown).unique().numel() == sum(whole)
        order = torch.cat([next(alone)[1] for _ in range(3)])
        assert len(order) == count and torch.equal(torch.cat(shown), order[: sum(whole)])
    # A stream that is restored anywhere in a pass goes on with the same rows.
    for stop in range(4):
        first, other = loader(1, 3, 5), loader(1, 3, 6)
        stream = first.forever()
        for _ in range(stop):
            next(stream)
        other.load_state_dict(first.state_dict())
        for ((x, view), index), ((x2, view2), index2) in zip(
            itertools.islice(stream, 7), other.forever(), strict=False
        ):
            assert torch.equal(x, x2) and torch.equal(view, view2) and torch.equal(index, index2)


def test_a_batch_that_cannot_be_dealt(tiny):
    with pytest.raises(ValueError, match="cannot be dealt to 5 ranks"):
        shard_loader(load_set("tiny", 8, "datasets"), 12, 0, 5)


@pytest.mark.parametrize(("gpus", "backend", "used"), [(1, "gloo", [0, 0]), (2, "nccl", [0, 1])])
def test_processes_that_share_a_gpu(monkeypatch, gpus, backend, used):
    """NCCL refuses two processes on one GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = []
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        found.append(local_gpu(0))
    assert found == used
    assert (_backend(torch.device("cuda:0")), _backend(CPU)) == (backend, "gloo")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_equal_one(tiny):
    assert train.main(flags("one")) == 0
    done = torchrun(*flags("two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("synthetic set:") == 1  # one of them speaks
    for a, b in zip(synthetic("one"), synthetic("two"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    logs = [
        [json.loads(line) for line in (Path("results") / n / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert [e.get("step") for e in logs[0]] == [e.get("step") for e in logs[1]]
    for a, b in zip(*logs, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-3)
