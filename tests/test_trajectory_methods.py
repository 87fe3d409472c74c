"""MTT and MKDT as runs: files, resume, learned step size and labels, ranges, what is refused."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import CPU, NET, make_target, read_log, resolved, write_set, write_target
from test_cli import fails

import test as judged
import train
from data.augment import normalize
from data.load import load_set
from data.real_data import RealImages
from data.synthetic import SyntheticSet
from data.whitening import Whitening
from distillation.problem import Problem
from evaluation.fit import outputs
from methods import METHODS
from models import get_model
from trajectory import experts, setup
from trajectory.base import start_limit
from trajectory.buffers import Experts
from trajectory.experts import ExpertFlags
from trajectory.mkdt import MKDT, MKDTFlags
from trajectory.mtt import MTT, MTTFlags
from trajectory.published import published
from utils.device import LAYOUTS
from utils.run_folder import claim_run

STUDENT = "convnet_4_in"
SHARED = [
    "--data_name",
    "tiny",
    "--img_size",
    "8",
    "--train_model",
    STUDENT,
    "--device",
    "cpu",
    "--seed",
    "0",
]
SHORT = ["--outer_iteration", "4", "--print_every", "1", "--syn_steps", "3", "--expert_epochs", "1"]
SHORT += ["--max_start_epoch", "2", "--num_experts", "2", "--pre_epoch", "2", "--save_every", "1"]
SHORT += ["--lr_lr", "1e-6", "--lr_img", "10"]
RUNS = {
    "mtt": ["--method", "mtt", "--num_images", "8", *SHARED, *SHORT],
    "mkdt": ["--method", "mkdt", "--num_images", "6", *SHARED, *SHORT, "--target_model", NET],
}
RUNS["mkdt"] += ["--test_iteration", "2"]
RUNS["mkdt std"] = [*RUNS["mkdt"], "--target_scale", "std", "--lr_y", "1"]
RUNS["datm"] = [*RUNS["mtt"], "--lr_y", "1", "--ema_decay", "0.9", "--batch_syn", "5"]


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny")
    write_target()
    return workspace


def pair(name):
    return [torch.load(f"results/{name}/{k}_syn.pt", weights_only=True) for k in "xy"]


def log(name):
    return read_log(f"results/{name}")


@contextlib.contextmanager
def interrupted(monkeypatch, method, at):
    """Ctrl-C in an outer step of the block, counted from 1."""
    step, calls = method.step, []

    def fragile(self):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(method, "step", fragile)
        yield


@pytest.mark.parametrize("kind", ["mkdt std", "datm"])  # the plain ones: test_methods.py
def test_run_from_nothing_and_interrupted_one_is_the_same(tiny, kind, monkeypatch, capsys):
    argv = RUNS[kind]
    assert train.main([*argv, "--exp_name", "whole"]) == 0
    shown = capsys.readouterr().out
    assert "making 2 experts" in shown and "training 2 experts" in shown
    with interrupted(monkeypatch, METHODS[argv[1]].distiller, at=3):
        assert train.main([*argv, "--exp_name", "parts"]) == 130
    assert train.main([*argv, "--exp_name", "parts"]) == 0
    shown = capsys.readouterr().out
    assert "resuming after step 2 of 4" in shown and "training 2 experts" not in shown
    for a, b in zip(pair("whole"), pair("parts"), strict=True):
        assert torch.equal(a, b)
    wanted, found = log("whole"), log("parts")
    assert wanted == found
    sizes = [e["step_size"] for e in wanted if "step_size" in e]
    assert len(sizes) == 4 and len(set(sizes)) == 4 and all(0 < s < 1 for s in sizes)
    x, y = pair("whole")
    if kind == "mtt":
        assert y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    elif kind == "datm":
        assert y.shape == (8, 4) and torch.allclose(y.sum(1), torch.ones(8)) and (y >= 0).all()
        judge = "--source_data_name tiny --target_data_name tiny --img_size 8 --device cpu --protocol linear "
        judge += (
            f"--method mtt --synthetic_path results/whole --pre_epoch 2 --num_test 1 --test_model {STUDENT}"
        )
        assert judged.main(judge.split()) == 0  # soft labels are labels
    else:
        assert y.shape == (6, make_target().dim)
    assert x.isfinite().all() and Path("results/whole/x_syn.png").exists()


def test_experts_from_a_second_process_give_the_set_of_those_made_before(tiny, monkeypatch, capsys):
    argv = [*RUNS["mkdt"], "--num_experts", "3", "--expert_every", "2", "--outer_iteration", "6"]
    assert train.main([*argv, "--exp_name", "beside"]) == 0
    assert "a second process trains the others" in capsys.readouterr().out
    (folder,) = (p for p in Path("buffers/tiny_8").glob("convnet*") if p.is_dir())
    assert len(list(folder.glob("replay_buffer_*.pt"))) == 3
    seen, real_pair = [], Experts.pair

    def noted(self, expert, *more):
        seen.append(expert)
        return real_pair(self, expert, *more)

    monkeypatch.setattr(Experts, "pair", noted)
    assert train.main([*argv, "--exp_name", "before"]) == 0
    assert "second process" not in capsys.readouterr().out
    assert seen[:2] == [0, 0] and set(seen[:4]) == {0, 1} and set(seen) <= {0, 1, 2}
    for a, b in zip(pair("beside"), pair("before"), strict=True):
        assert torch.equal(a, b)


def made_before(flags, device, precision):
    """In place of the second process."""
    experts.make_experts(flags, device)
    return contextlib.nullcontext()


def test_what_happens_while_an_expert_is_awaited(tiny, monkeypatch, capsys):
    """The run is saved before it waits: nothing is lost by a signal, or where the expert never comes."""
    argv = [*RUNS["mkdt"], "--num_experts", "3", "--expert_every", "2", "--outer_iteration", "6"]
    argv[argv.index("--save_every") + 1] = "100"
    monkeypatch.setattr(setup, "made_beside", made_before)
    assert train.main([*argv, "--exp_name", "whole"]) == 0
    (lost,) = Path("buffers").rglob("replay_buffer_1.pt")
    lost.unlink()  # it is made again before the first step: no other stands in for it
    monkeypatch.setattr(setup, "made_beside", lambda *_: contextlib.nullcontext())
    assert train.main([*argv, "--exp_name", "gap"]) == 0
    for a, b in zip(pair("whole"), pair("gap"), strict=True):
        assert torch.equal(a, b)
    shutil.rmtree("buffers")

    @contextlib.contextmanager
    def endless(flags, *more):
        with claim_run(flags.buffer_dir):
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            yield

    monkeypatch.setattr(setup, "made_beside", endless)
    assert train.main([*argv, "--exp_name", "parts"]) == 143
    shown = capsys.readouterr()
    assert "waiting for expert 2 in" in shown.out and "after step 2 of 6 by SIGTERM" in shown.err
    monkeypatch.setattr(setup, "made_beside", lambda *_: contextlib.nullcontext())
    assert train.main([*argv, "--exp_name", "parts"]) == 2
    shown = capsys.readouterr()
    assert "resuming after step 2" in shown.out and "holds 1 trajectories, 2 are needed" in shown.err
    monkeypatch.setattr(setup, "made_beside", made_before)
    assert train.main([*argv, "--exp_name", "parts"]) == 0
    for a, b in zip(pair("whole"), pair("parts"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_an_interrupted_run_with_a_second_process_is_the_same(tiny, monkeypatch):
    argv = [*RUNS["mkdt"], "--num_experts", "3", "--expert_every", "2", "--outer_iteration", "6"]
    assert train.main([*argv, "--exp_name", "beside"]) == 0
    shutil.rmtree("buffers")
    with interrupted(monkeypatch, MKDT, at=4):
        assert train.main([*argv, "--exp_name", "parts"]) == 130
    assert train.main([*argv, "--exp_name", "parts"]) == 0
    assert log("beside") == log("parts")
    for a, b in zip(pair("beside"), pair("parts"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_what_ends_the_second_process_is_in_the_message(tiny, monkeypatch, capsys):
    argv = [*RUNS["mkdt"], "--num_experts", "3", "--expert_every", "2", "--outer_iteration", "6"]
    made = setup.made_beside

    def broken(flags, *more):  # it refuses the flags
        return made(dataclasses.replace(flags, lr_teacher=0.7), *more)

    monkeypatch.setattr(setup, "made_beside", broken)
    assert train.main([*argv, "--exp_name", "parts"]) == 2
    error = capsys.readouterr().err
    assert "; the process that trains them: error: " in error
    assert "lr_teacher" in error and error.count("\n") == 1
    monkeypatch.setattr(setup, "made_beside", made)
    assert train.main([*argv, "--exp_name", "parts"]) == 0


def test_an_expert_that_nobody_trains_is_one_line(tiny, capsys):
    make_experts(targets="features")
    argv = [*RUNS["mkdt"], "--buffer_dir", "experts", "--expert_every", "1", "--exp_name", "short"]
    at = argv.index("--num_experts")
    del argv[at : at + 2]
    assert train.main(argv) == 2
    assert "--expert_every with --buffer_dir needs --num_experts" in capsys.readouterr().err
    assert train.main([*argv, "--num_experts", "4"]) == 2
    assert "experts holds 3 trajectories, 4 are needed; see --num_experts" in capsys.readouterr().err
    assert not Path("results/short").exists()
    shutil.rmtree("experts")
    Path("buffers").mkdir(exist_ok=True)
    Path("buffers/tiny_8").write_text("")  # where the second process wants a folder
    argv = [*RUNS["mkdt"], "--expert_every", "1", "--exp_name", "none"]
    assert train.main(argv) == 2
    assert "buffers/tiny_8" in capsys.readouterr().err


def make_experts(*more, targets="classes"):
    argv = ["--targets", targets, "--train_epochs", "3", "--num_experts", "3", "--batch_train", "16"]
    argv += ["--target_model", NET] if targets == "features" else []
    assert experts.main([*SHARED, *argv, "--lr_teacher", "0.05", "--buffer_dir", "experts", *more]) == 0
    return Path("experts")


def make_mtt(whitening=None, **changes):
    settings = dict(
        img_size=8,
        num_images=8,
        train_model=STUDENT,
        buffer_dir=Path("experts"),
        syn_steps=4,
        expert_epochs=1,
        min_start_epoch=0,
        max_start_epoch=3,
        lr_img=1.0,
        lr_y=0.0,
        lr_lr=0.0,
        lr_teacher=0.05,
        dsa_strategy="none",
    )
    image_set = load_set("tiny", 8, "datasets")
    given = dict(target=make_target(), real=RealImages.from_set(image_set, CPU), whitening=whitening)
    problem = Problem(image_set, CPU, 0, **given)
    if "init" in changes:
        return MKDT(problem, MKDTFlags(**{**settings, **changes}))
    return MTT(problem, MTTFlags(**{**settings, **changes}))


def test_matching_one_segment_again_and_again_lowers_the_loss(tiny):
    make_experts()
    settings = dict(num_experts=1, max_start_epoch=1, lr_img=20.0, lr_lr=1e-5)
    losses = {}
    for unroll in ("full", "checkpoint", "tesla"):
        mtt = make_mtt(unroll=unroll, **settings)
        losses[unroll] = [float(mtt.step()["loss"]) for _ in range(15)]
        assert losses[unroll][-1] < 0.8 * losses[unroll][0]
    assert losses["full"] == pytest.approx(losses["checkpoint"], rel=1e-3)
    assert losses["tesla"] != pytest.approx(losses["full"], rel=1e-5)
    own = make_mtt(unroll="checkpoint", inner_momentum=0.9, inner_wd=1e-3, distance="layer", **settings)
    found = [float(own.step()["loss"]) for _ in range(15)]
    assert found[-1] < found[0]


def test_the_student_has_the_layout_of_the_flag(tiny):
    make_experts()
    for name, kind in LAYOUTS.items():
        weights = [w for w in make_mtt(layout=name).student_network.parameters() if w.dim() == 4]
        assert weights and all(w.is_contiguous(memory_format=kind) for w in weights)


def test_every_expert_takes_its_turn(tiny):
    make_experts()
    mtt, seen = make_mtt(), []
    real_pair = mtt.experts.pair
    mtt.experts.pair = lambda expert, t, *more: seen.append((expert, t)) or real_pair(expert, t, *more)
    for _ in range(12):
        mtt.step()
    assert all(sorted(e for e, _ in seen[i : i + 3]) == [0, 1, 2] for i in range(0, 12, 3))
    assert {t for _, t in seen} == {0, 1, 2}
    single = make_mtt(num_experts=1)
    assert len(single.experts) == 1


def test_loss_above_the_threshold_changes_nothing(tiny, capsys):
    make_experts()
    mtt = make_mtt(threshold=1e-6, lr_lr=1.0)
    before = mtt.x_syn.detach().clone()
    found = [mtt.step() for _ in range(5)]
    assert torch.equal(mtt.x_syn, before) and mtt.student.lr.item() == pytest.approx(0.05)
    assert int(mtt.student.skipped) == 5 and float(found[-1]["skipped"]) == 1
    shown = capsys.readouterr().out
    assert "above --threshold 1e-06; 4 of 4 iterations skipped so far" in shown and "5 of 5" not in shown
    exploding = make_mtt(threshold=1.0, lr_teacher=1e30)
    assert float(exploding.step()["loss"]) <= 1.0 and int(exploding.student.skipped) == 1
    assert not torch.isfinite(make_mtt(lr_teacher=1e30).step()["loss"])  # the loop stops there


def test_step_size_stays_positive_or_the_run_stops(tiny, capsys):
    write_set("datasets", "tiny")
    argv = [*RUNS["mtt"], "--exp_name", "own"]
    assert train.main([*argv, "--lr_lr", "1e6", "--lr_teacher", "3"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"distilling, step \d: the learned step size went from 3 to -\S+; lower --lr_lr", error)
    mtt_flags = ["--lr_lr", "1e6", "--lr_teacher", "3", "--clamp_lr", "1e-3", "--overwrite"]
    assert train.main([*argv, *mtt_flags]) == 0
    assert min(e["step_size"] for e in log("own") if "step_size" in e) == pytest.approx(1e-3)


def test_range_of_starts_grows():
    flags = dict(min_start_epoch=2, current_max_start_epoch=10, max_start_epoch=20, expansion_end_epoch=100)
    grows = MTTFlags(**flags)
    assert [start_limit(grows, i) for i in (0, 9, 10, 50, 100, 5000)] == [10, 10, 11, 15, 20, 20]
    fixed = MTTFlags(**{**flags, "current_max_start_epoch": None, "expansion_end_epoch": None})
    assert start_limit(fixed, 0) == 20


def test_soft_labels_start_from_images_that_experts_recognise(tiny):
    make_experts()
    mtt = make_mtt(lr_y=1.0)
    image_set = load_set("tiny", 8, "datasets")
    real = RealImages.from_set(image_set, CPU)
    network = get_model(STUDENT, (3, 8, 8), 4)
    everything = real.at(torch.arange(len(real)))
    logits = []
    for path in sorted(Path("experts").glob("replay_buffer_*.pt")):
        with torch.no_grad():
            last = torch.load(path, weights_only=True)[0][-1]
            for p, saved in zip(network.parameters(), last, strict=True):
                p.copy_(saved)
            logits.append(network(everything))
    right = torch.stack(logits).argmax(2) == real.labels  # (experts, N)
    for n, (x, y) in enumerate(zip(mtt.x_syn.detach(), mtt.y_syn.detach(), strict=True)):
        row = int((everything - x).abs().flatten(1).amax(1).argmin())
        assert torch.equal(everything[row], x) and real.labels[row] == n // 2
        votes = right[:, row]
        chosen = torch.stack(logits)[votes if votes.any() else slice(None), row]
        assert torch.allclose(y, chosen.mean(0), atol=1e-5)


def test_mkdt_starts_from_the_images_that_experts_fit_worst(tiny):
    make_experts(targets="features")
    mkdt = make_mtt(init="high_loss", lr_y=1.0, lr_lr=1e-3)
    image_set, target = load_set("tiny", 8, "datasets"), make_target()
    y = outputs(target, image_set.train.images, image_set, CPU)
    network, errors = get_model(STUDENT, (3, 8, 8), target.dim), 0
    for path in sorted(Path("experts").glob("replay_buffer_*.pt")):
        first = torch.load(path, weights_only=True)[0][1]
        with torch.no_grad():
            for p, saved in zip(network.parameters(), first, strict=True):
                p.copy_(saved)
            errors = errors + ((outputs(network, image_set.train.images, image_set, CPU) - y) ** 2).mean(1)
    worst = errors.argsort(descending=True)[:8]
    assert torch.allclose(mkdt.y_syn.detach(), y[worst], atol=1e-5)
    learned = (mkdt.x_syn, mkdt.y_syn, mkdt.student.lr)
    before = [t.detach().clone() for t in learned]
    mkdt.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, learned, strict=True))
    random = make_mtt(init="random", lr_y=1.0)
    assert not torch.allclose(random.y_syn, y[worst])


def test_zca_and_the_set_says_how_to_train_on_it(tiny, capsys):
    argv = [*RUNS["mtt"], "--zca", "--dsa_strategy", "flip_crop", "--lr_lr", "1e-7"]
    assert train.main([*argv, "--exp_name", "white"]) == 0
    shown = capsys.readouterr().out
    assert Path("buffers/tiny_8/convnet_4_in_classes_2epochs_zca/replay_buffer_1.pt").exists()
    synthetic = SyntheticSet.load("results/white")
    training, last = synthetic.training, log("white")[-2]["step_size"]
    assert (training.momentum, training.dsa) == (0.9, "flip_crop")
    assert training.lr == pytest.approx(last, rel=0.2) and training.lr != last  # one step later
    assert f"lr {training.lr}," in shown and "dsa flip_crop" in shown  # in the run's own evaluation
    image_set = load_set("tiny", 8, "datasets")
    fitted = Whitening.fit(image_set.train.images, image_set.stats, CPU)
    assert torch.equal(training.whitening.matrix, fitted.matrix)
    shutil.rmtree("results/white")
    assert train.main([*argv, "--exp_name", "white", "--no-zca"]) == 0
    assert SyntheticSet.load("results/white").training.whitening is None
    assert train.main([*argv, "--exp_name", "own", "--inner_momentum", "0.5", "--pre_lr", "0.3"]) == 0
    assert SyntheticSet.load("results/own").training.momentum == 0.5
    assert "lr 0.3," in capsys.readouterr().out  # flags go before what the set says


def test_a_whitened_set_starts_from_real_images_and_is_written_in_normalised_space(tiny):
    make_experts("--zca")
    image_set = load_set("tiny", 8, "datasets")
    whitening = Whitening.fit(image_set.train.images, image_set.stats, CPU)
    real = normalize(image_set.train.images, image_set.stats)
    for settings in ({}, {"lr_y": 1.0}):
        mtt = make_mtt(whitening=whitening, **settings)
        for x in mtt.synthetic().images:
            row = int((real - x).abs().flatten(1).amax(1).argmin())
            assert torch.allclose(real[row], x, atol=1e-3)
            assert (mtt.x_syn - whitening(real[row : row + 1])).abs().flatten(1).amax(1).min() < 1e-4


def test_standardised_targets(tiny, capsys):
    """What experts learn, where the set begins, what is written, which experts are refused."""
    image_set = load_set("tiny", 8, "datasets")
    rows = outputs(make_target(), image_set.train.images, image_set, CPU).double()
    mean, std = rows.mean(0), rows.std(0, correction=0)
    folder = make_experts("--target_scale", "std", targets="features")
    made = dict(data_name="tiny", img_size=8, train_model=STUDENT, targets="features", target_model=NET)
    flags = experts.resolve(ExpertFlags(**made, target_scale="std"))
    assert str(flags.buffer_dir).endswith(f"_features_20epochs_std_{NET}")
    learned = experts.ExpertTraining(flags, image_set, CPU).y
    torch.testing.assert_close(learned.double(), (rows - mean) / std, rtol=1e-4, atol=1e-4)

    argv = [*RUNS["mkdt"], "--buffer_dir", str(folder), "--exp_name", "std"]
    fails(capsys, train, argv, "target_scale std, not none")
    fixed = ["--lr_y", "0", "--init", "random"]
    assert train.main([*argv, "--target_scale", "std", *fixed]) == 0
    synthetic = SyntheticSet.load("results/std")
    torch.testing.assert_close(synthetic.training.targets.std.double(), std, rtol=1e-5, atol=1e-6)
    assert synthetic.training.lr is not None
    gaps = (synthetic.targets[:, None].double() - rows[None]).abs().amax(2).min(1).values
    assert gaps.max() < 1e-4  # each is the target model's feature of a training image
    shutil.rmtree("experts")
    make_experts(targets="features")
    fails(capsys, train, [*argv, "--target_scale", "std", "--overwrite"], "target_scale none, not std")
    fails(capsys, experts, ["--data_name", "tiny", "--target_scale", "std"], "--targets features")


def test_experts_with_zca_learn_whitened_images(tiny):
    image_set = load_set("tiny", 8, "datasets")
    flags = ExpertFlags(data_name="tiny", img_size=8, train_model=STUDENT, dsa_strategy="none", zca=True)
    training = experts.ExpertTraining(experts.resolve(flags), image_set, CPU)
    x, _ = next(training.trainer(0).loader.forever())
    whitening = Whitening.fit(image_set.train.images, image_set.stats, CPU)
    wanted = whitening(normalize(image_set.train.images, image_set.stats))
    assert (x[:, None] - wanted[None]).abs().flatten(2).amax(2).min(1).values.max() < 1e-5


def test_published_settings():
    row, origin = published("mtt", "cifar10", 100)
    assert (row["syn_steps"], row["expert_epochs"], row["max_start_epoch"]) == (30, 2, 20)
    assert (row["lr_img"], row["lr_lr"], row["lr_teacher"], row["zca"]) == (100.0, 1e-5, 0.001, True)
    assert "batch_syn" not in row and "100 images of cifar10" in origin
    assert published("mtt", "cifar100", 6000)[0]["batch_syn"] == 125
    assert published("mtt", "cifar100", 50)[0]["syn_steps"] == 20  # the smallest there is
    datm = published("datm", "cifar10", 100)[0]
    assert (datm["current_max_start_epoch"], datm["max_start_epoch"], datm["expansion_end_epoch"]) == (
        10,
        20,
        1000,
    )
    assert published("datm", "cifar10", 10)[0]["threshold"] == 1.1 and datm["outer_iteration"] == 10000
    mkdt = published("mkdt", "cifar10", 2500)[0]
    assert (mkdt["lr_img"], mkdt["max_start_epoch"], mkdt["lr_y"], mkdt["batch_syn"]) == (1e4, 5, 1.0, 256)
    assert published("mkdt", "tinyimagenet", 2000)[0]["outer_iteration"] == 10000
    assert published("mtt", "leaves", 40)[1] == "the defaults of mtt's code"


def test_what_does_not_fit_is_refused_before_a_run_folder(tiny, capsys):
    make_experts()

    own = ["--buffer_dir", "experts"]

    def refused(*argv, kind="mtt"):
        assert train.main([*RUNS[kind], "--exp_name", "bad", *argv]) == 2
        assert not Path("results/bad/config.json").exists()
        return capsys.readouterr().err

    assert "has 3 epochs, 4 are needed: lower --max_start_epoch 4" in refused(*own, "--max_start_epoch", "4")
    assert "holds 3 trajectories, 5 are needed; see --num_experts" in refused(*own, "--num_experts", "5")
    assert "its experts have targets classes, not features" in refused(*own, kind="mkdt")
    make_experts("--zca", "--buffer_dir", "white", targets="features")
    assert "its experts have zca True, not False" in refused("--buffer_dir", "white", kind="mkdt")
    assert "holds no replay_buffer_0.pt" in refused("--buffer_dir", "nowhere")
    assert "--min_start_epoch 2 is not below --max_start_epoch 2" in refused("--min_start_epoch", "2")
    assert "unknown DSA operation 'blur'" in refused("--dsa_strategy", "blur")
    rise = ["--current_max_start_epoch", "9"]
    assert "--expansion_end_epoch: give both or neither" in refused(*own, *rise)
    assert "--current_max_start_epoch and" in refused(*own, "--expansion_end_epoch", "5")
    above = "--current_max_start_epoch 9 is above --max_start_epoch 2"
    assert above in refused(*own, *rise, "--expansion_end_epoch", "5")
    other = "its experts have train_model convnet_4_in, not convnet_4_bn"  # of the same shapes
    assert other in refused(*own, "--train_model", "convnet_4_bn")
    write_set("datasets", "one", classes=1)
    assert "one has one class; --method MTT needs two" in refused("--data_name", "one")
    Path("experts/config.json").write_text('{"flags": ')
    assert f"{Path('experts/config.json')} does not hold readable JSON" in refused(*own)
    Path("experts/config.json").unlink()  # of another origin: only the shapes speak
    assert "parameter 0 is (4, 3, 3, 3)" in refused(*own, "--train_model", "convnet_8_in")
    write_set("datasets", "bare", labelled=False)
    assert "has no labels" in refused("--data_name", "bare")


def test_a_published_rise_ends_where_the_flags_say(tiny, monkeypatch):
    settings = dict(published("datm", "cifar10", 100)[0])
    monkeypatch.setattr("trajectory.setup.published", lambda *_: (settings, "a table"))
    given = dict(data_name="tiny", img_size=8, train_model=STUDENT, num_images=8)
    found = resolved("mtt", **given, max_start_epoch=5, expert_epochs=1)
    assert found.current_max_start_epoch == 5 and settings["current_max_start_epoch"] == 10
    assert {start_limit(found, i) for i in range(0, 2000, 100)} == {5}


def test_experts_of_another_target_model_are_refused(tiny, capsys):
    argv = [*RUNS["mkdt"], "--exp_name"]
    assert train.main([*argv, "first"]) == 0
    state = torch.load(f"teacher_ckpt/barlow_twins_{NET}_tiny.pt", weights_only=True)
    torch.save({k: v + 0.1 if v.is_floating_point() else v for k, v in state.items()}, "other.pt")
    capsys.readouterr()
    assert train.main([*argv, "second", "--target_ckpt", "other.pt"]) == 2
    assert "its experts began with another target model; make others" in capsys.readouterr().err
    assert not Path("results/second/config.json").exists()
    more = ["second", "--target_ckpt", "other.pt", "--num_experts", "4"]  # two are there, two are not
    assert train.main([*argv, *more]) == 2
    assert "its experts began with another target model; make others" in capsys.readouterr().err
    for count in ("2", "4"):
        more = ["second", "--dsa_strategy", "flip", "--num_experts", count]
        assert train.main([*argv, *more]) == 2
        assert "its experts have dsa_strategy none, not flip; make others" in capsys.readouterr().err
    assert not Path("results/second/config.json").exists()
    write_set("datasets", "tiny", seed=1)
    assert train.main([*argv, "second"]) == 2
    assert "its experts began with another data set" in capsys.readouterr().err


def test_experts_that_moved_nothing_that_counts_are_one_line(tiny, capsys):
    folder = make_experts()
    for path in folder.glob("*.pt"):
        (trajectory,) = torch.load(path, weights_only=True)
        still = [
            [q if q.dim() == 1 else p for p, q in zip(trajectory[0], s, strict=True)] for s in trajectory
        ]
        torch.save([still], path)
    for form in ("whole", "layer"):
        more = ["--buffer_dir", "experts", "--vector_weight", "0", "--distance", form, "--exp_name", form]
        assert train.main([*RUNS["mtt"], *more]) == 2
        assert "step 1: the expert moved no tensor that counts; raise --vector" in capsys.readouterr().err


def test_state_of_other_experts_is_refused(tiny):
    make_experts()
    state = make_mtt().state_dict()
    make_experts("--overwrite", "--seed", "1")
    with pytest.raises(ValueError, match="are not those of before"):
        make_mtt().load_state_dict(state)
    assert len(Experts("experts", [p.shape for p in get_model(STUDENT, (3, 8, 8), 4).parameters()], CPU)) == 3
