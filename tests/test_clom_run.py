"""Runs of DC, DSA and DM as folders: they resume where they stopped, and leave nothing behind."""

import json

import pytest
import torch
from conftest import read_log, write_set

from clom.config import DistillFlags
from clom.pool import RealFeatures
from clom.setup import NetworkObserver
from data.load import load_set
from distillation.run import run_method
from methods import find_method
from models import get_network
from utils import checkpoint
from utils.errors import UserError


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny", train=46)
    return workspace


def run(method, **options):
    settings = dict(
        dataset="tiny",
        model="ConvNetD1",
        ipc=1,
        outer_loop=2,
        inner_loop=1,
        Iteration=4,
        eval_interval=2,
        num_eval=1,
        epoch_eval_train=1,
        batch_real=8,
        seed=0,
        device="cpu",
        save_every=1,
        print_every=2,
    )
    flags = DistillFlags(**{"method": method, **settings, **options})
    return run_method(find_method(method), flags)


class _Stopped(Exception):
    pass


def test_interrupted_experiments_equal_uninterrupted_ones(tiny, monkeypatch):
    method = "DM"
    assert run(method, num_exp=2, save_path="whole") == 0
    kind = find_method(method).distiller
    step, calls = kind.step, []

    def fragile(self):
        calls.append(0)
        if len(calls) in (4, 8):  # in the middle of each experiment
            raise _Stopped
        return step(self)

    monkeypatch.setattr(kind, "step", fragile)
    for _ in range(2):
        with pytest.raises(_Stopped):
            run(method, num_exp=2, save_path="parts")
    assert run(method, num_exp=2, save_path="parts", resume=True) == 0
    name = f"res_{method}_tiny_ConvNetD1_1ipc.pt"
    whole, parts = (torch.load(tiny / folder / name) for folder in ("whole", "parts"))
    assert whole["accs_all_exps"] == parts["accs_all_exps"]
    assert len(whole["data"]) == 2
    for a, b in zip(whole["data"], parts["data"], strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert read_log("whole") == read_log("parts")
    assert not (tiny / "parts" / "state.pt").exists()


@pytest.mark.parametrize("method", ["DC", "DM"])
def test_saved_images_are_the_evaluated_ones(tiny, monkeypatch, method):
    """The released code makes one more update between its last evaluation and its save."""
    evaluate, seen = NetworkObserver.evaluate, []

    def record(self, step, distiller):
        accuracies = evaluate(self, step, distiller)
        x_syn = distiller.x_syn.detach().clone()
        seen.append((self.plan.experiment, step, x_syn, accuracies["ConvNetD1"]))
        return accuracies

    monkeypatch.setattr(NetworkObserver, "evaluate", record)
    assert run(method, num_exp=2, num_eval=2, save_path="a") == 0
    assert [entry[:2] for entry in seen] == [(e, step) for e in (0, 1) for step in (0, 2, 4)]
    res = torch.load(tiny / f"a/res_{method}_tiny_ConvNetD1_1ipc.pt")
    last = [(images, accuracies) for _, step, images, accuracies in seen if step == 4]
    for (saved, _), (images, _) in zip(res["data"], last, strict=True):
        assert torch.equal(saved, images)
    assert res["accs_all_exps"]["ConvNetD1"] == last[0][1] + last[1][1]
    assert not torch.equal(seen[1][2], seen[2][2])


def test_experiments_share_the_features_of_real_images(tiny, monkeypatch):
    torch.manual_seed(0)
    path = "pretrained_model/tiny/original/ConvNetD1/index_0"
    facts = {"img_shape": [3, 8, 8], "mean": [0] * 3, "std": [1] * 3, "num_classes": 4}
    checkpoint.write_text(f"{path}/config.json", json.dumps(facts))
    state = get_network("ConvNetD1", 3, 4, (8, 8)).state_dict()
    checkpoint.save(state, f"{path}/tiny_ConvNetD1_original_epoch1.pth")
    rows, embed = [], RealFeatures._embed
    monkeypatch.setattr(RealFeatures, "_embed", lambda *args: rows.append(len(args[-1])) or embed(*args))
    clom = dict(CLoM=True, CLoM_distance="cos", models_pool=("ConvNetD1",), epoch=1)
    assert run("DM", num_exp=2, save_path="a", **clom) == 0
    assert rows == [1, 46]  # one for the width of the features, then all of them


def test_more_experiments_join_the_finished_ones(tiny, capsys):
    assert run("DM", save_path="a") == 0
    first = torch.load(tiny / "a/res_DM_tiny_ConvNetD1_1ipc.pt")["data"][0][0]
    assert run("DM", save_path="a") == 0
    assert "finished run" in capsys.readouterr().out
    assert run("DM", save_path="a", num_exp=2) == 0
    res = torch.load(tiny / "a/res_DM_tiny_ConvNetD1_1ipc.pt")
    assert torch.equal(res["data"][0][0], first)
    assert not torch.equal(res["data"][1][0], first)
    assert len(res["accs_all_exps"]["ConvNetD1"]) == 2
    with pytest.raises(UserError, match="lr_net"):
        run("DM", save_path="a", lr_net=0.5)


def test_no_iteration_evaluates_random_real_images(tiny):
    """The start that a longer run of the same seed has, two images a class."""
    assert run("DM", Iteration=0, ipc=2, num_exp=2, save_path="a") == 0
    res = torch.load(tiny / "a/res_DM_tiny_ConvNetD1_2ipc.pt")
    stored = load_set("tiny", 8, tiny / "datasets", family="dc")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (stored.stats.mean, stored.stats.std))
    real = (stored.train.images.float() / 255 - mean) / std
    for images, labels in res["data"]:
        distance = (images[:, None] - real).abs().amax((2, 3, 4))  # (8, 46)
        assert distance.min(1).values.max() < 1e-5
        assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        nearest = distance.argmin(1)
        assert len(nearest.unique()) == 8
        assert stored.train.labels[nearest].tolist() == labels.tolist()
    assert len(res["accs_all_exps"]["ConvNetD1"]) == 2
    log = [json.loads(line) for line in (tiny / "a/log.jsonl").read_text().splitlines()]
    assert [(e["experiment"], e["iteration"], "loss" in e) for e in log] == [(0, 0, False), (1, 0, False)]
    assert run("DM", Iteration=1, ipc=2, save_path="b") == 0
    longer = [json.loads(line) for line in (tiny / "b/log.jsonl").read_text().splitlines()]
    assert longer[0]["test"] == log[0]["test"]


def test_a_diverging_run_stops_and_says_where(tiny):
    with pytest.raises(UserError, match=r"experiment 0, iteration \d+: .* loss is nan"):
        run("DC", lr_img=1e30, Iteration=20)


def test_a_start_that_cannot_be_writes_nothing(tiny):
    with pytest.raises(UserError, match="class 2 has 11 training images"):
        run("DM", ipc=12, save_path="a")
    assert not (tiny / "a").exists()
    (tiny / "b").write_text("mine")
    with pytest.raises(UserError, match="b is a file; expected a folder for the run"):
        run("DM", save_path="b")
    assert (tiny / "b").read_text() == "mine"


def test_a_moved_run_is_the_same_run(tiny, capsys):
    assert run("DM", save_path="a") == 0
    (tiny / "a").rename(tiny / "moved")
    assert run("DM", save_path=tiny / "moved") == 0
    assert "finished run" in capsys.readouterr().out


def test_overwriting_leaves_nothing_of_the_old_run(tiny):
    (tiny / "a").mkdir()
    (tiny / "a" / "exp0_notes.pt").write_text("mine")
    assert run("DM", save_path="a", num_exp=2) == 0
    assert len(list((tiny / "a").glob("vis_*"))) == 6
    assert run("DM", save_path="a", lr_img=0.5, overwrite=True, eval_interval=4) == 0
    assert sorted(p.name for p in (tiny / "a").iterdir()) == [
        "config.json",
        "curves.png",
        "exp0_notes.pt",
        "exp0_res_DM_tiny_ConvNetD1_1ipc.pt",
        "log.jsonl",
        "res_DM_tiny_ConvNetD1_1ipc.json",
        "res_DM_tiny_ConvNetD1_1ipc.pt",
        "results.json",
        "vis_DM_tiny_ConvNetD1_1ipc_exp0_iter0.png",
        "vis_DM_tiny_ConvNetD1_1ipc_exp0_iter4.png",
        "x_start.pt",
    ]
