"""test_kd.py and its teacher; the script at the top bears the plainer name."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import CPU, write_set
from test_cli import fails
from torch import nn

import test_kd
from data.augment.dsa import diff_augment
from data.load import load_set
from data.specs import Stats
from data.synthetic import SyntheticSet, save_compact
from data.synthetic.compact import CompactFlags
from data.synthetic.views import ViewFlags
from evaluation import epochs, kd
from evaluation.fit import Trainer
from evaluation.recipes import DSA_STRATEGY, KD, PRETRAIN, kd_loss, pretrain_recipe
from evaluation.transfer import TestFlags, Transfer
from krr_st import kd_teacher
from models import get_model
from utils import checkpoint
from utils.errors import UserError
from utils.seed import derive_seed, draw_seed, local_seed, make_generator

NET = "convnet_4_8_bn"
ARGV = [
    "--source_data_name",
    "tiny",
    "--target_data_name",
    "goal",
    "--img_size",
    "8",
    "--device",
    "cpu",
    "--test_model",
    NET,
    "--teacher_arch",
    NET,
    "--num_test",
    "2",
    "--kd_epoch",
    "3",
    "--pre_epoch",
    "2",
]
CELLS, RESULTS = "test_log/results.jsonl", f"test_log/tiny/krr_st/{NET}/kd/results.json"


@pytest.fixture
def goal(workspace):
    """A synthetic set of `tiny`, a teacher of `goal`, and no readable training file of `goal`."""
    folder = write_set("datasets", "goal")
    load_set("goal", 8)  # stores the statistics in meta.json
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator) for shape in ((6, 3, 8, 8), (6, 5)))
    SyntheticSet(x, y).save(Path("synthetic_data/tiny/krr_st"))
    torch.manual_seed(0)
    checkpoint.save(get_model(NET, (3, 8, 8), 4).state_dict(), "teacher_ckpt/teacher_goal.pt")
    for name in ("X_tr_8.pth", "Y_tr_8.pth"):
        (folder / name).write_bytes(b"poison: reading this fails")
    return workspace


def cells():
    return [json.loads(line) for line in Path(CELLS).read_text().splitlines()]


def test_kd_loss_is_the_cross_entropy_of_the_distributions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator).double() * 4
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        s, t = (torch.tensor(v, dtype=torch.float64) for v in (s, t))
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        expected += -float((p * q.log()).sum()) / 5
    assert float(kd_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)
    student.requires_grad_(), teacher.requires_grad_()
    kd_loss(student, teacher).backward()
    gradient = (student.softmax(1) - teacher.softmax(1)).detach() / 5
    assert torch.allclose(student.grad, gradient, atol=1e-12) and teacher.grad is None
    extreme = torch.tensor([[1e4, -1e4]])
    assert torch.isfinite(kd_loss(extreme, -extreme))


def test_recipes():
    assert KD.keys() == PRETRAIN.keys() | {"gaussian", "scratch"}
    for method, recipe in KD.items():
        assert (recipe.loss, recipe.optimizer, recipe.wd) == ("cross_entropy", "adam", 0)
        assert (recipe.schedule, recipe.epochs, recipe.batch_size) == ("cosine", 1000, 512)
        assert not recipe.steps and not recipe.warmup
        noise = (1e-3, "none")
        assert (recipe.lr, recipe.dsa) == (noise if method == "gaussian" else (1e-4, DSA_STRATEGY))
    assert KD["krr_st"].steps_on(2000) == 4000
    for method, other in (("frepo", 500), ("kip", 500), ("krr_st", 256), ("dsa", 256)):
        wide = method in ("frepo", "kip")
        for source, model in (
            ("tinyimagenet", "mobilenet"),
            ("tinyimagenet", "vgg"),
            ("cifar100", "mobilenet"),
        ):
            odd = wide and (source, model) == ("tinyimagenet", "mobilenet")
            found = [pretrain_recipe(method, source, model, kd=kd).batch_size for kd in (0, 1)]
            assert found == ([256, 128] if odd else [other, other])


def test_published_batch_of_mobilenet_is_the_commands(workspace):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 64, 64, generator=generator), torch.ones(2, 200)
    SyntheticSet(x, y).save(Path("synthetic_data/tinyimagenet/frepo"))
    write_set("datasets", "goal", size=64, train=8, test=8)
    torch.manual_seed(0)
    checkpoint.save(get_model(NET, (3, 64, 64), 4).state_dict(), "teacher_ckpt/teacher_goal.pt")
    load_set("goal", 64)  # stores the statistics in meta.json
    flags = {"method": "frepo", "test_model": "mobilenet", "target_data_name": "goal", "device": "cpu"}
    distillation = kd.Distillation(kd.KdFlags(**flags, teacher_arch=NET))
    assert distillation.pretraining.recipe.batch_size == 128
    assert Transfer(TestFlags(**flags)).pretraining.recipe.batch_size == 256


def test_the_whole_command(goal, capsys):
    assert test_kd.main(ARGV) == 0
    printed = capsys.readouterr().out
    assert "running statistics (headline)" in printed and "statistics of the test batch" in printed
    found, result = cells(), json.loads(Path(RESULTS).read_text())
    assert [cell["seed"] for cell in found] == [0, 1]
    for cell in found:
        assert cell["accuracy"] == cell["accuracy_running"] and cell["kd_bn"] == "running"
        assert {cell["target"], cell["protocol"]} == {"goal", "kd"}
    (row,) = result["summary"]
    for suffix in ("running", "batch"):
        first, second = (cell[f"accuracy_{suffix}"] for cell in found)
        assert row[f"mean_{suffix}"] == pytest.approx((first + second) / 2)
        assert row[f"std_{suffix}"] == pytest.approx(abs(first - second) / 2)
    assert row["mean"] == row["mean_running"] and row["n"] == 2


def test_a_restart_keeps_finished_cells(goal, capsys, monkeypatch):
    assert test_kd.main([*ARGV, "--num_test", "1"]) == 0
    before = Path(CELLS).read_text()
    capsys.readouterr()
    assert test_kd.main([*ARGV, "--log_dir", "elsewhere"]) == 0
    assert test_kd.main(ARGV) == 0
    assert capsys.readouterr().out.count("(kept)") == 1
    both = [json.loads(line) for line in Path("elsewhere/results.jsonl").read_text().splitlines()]
    for again, whole in zip(cells(), both, strict=True):  # interrupted or not: the same numbers
        assert again["accuracy_running"] == whole["accuracy_running"]
        assert again["accuracy_batch"] == whole["accuracy_batch"]
    assert Path(CELLS).read_text().startswith(before)

    assert test_kd.main([*ARGV, "--kd_bn", "batch"]) == 0  # the teacher differs: other cells
    result = json.loads(Path(RESULTS).read_text())
    assert len(cells()) == 4 and result["cells"] == cells()[2:]
    assert all(cell["accuracy"] == cell["accuracy_batch"] for cell in cells()[2:])
    assert result["summary"][0]["mean"] == result["summary"][0]["mean_batch"]
    monkeypatch.setattr(kd.Distillation, "distil", None)  # training again would fail
    assert test_kd.main([*ARGV, "--kd_bn", "batch"]) == test_kd.main(ARGV) == 0


def test_batch_mode_keeps_the_teacher_in_train_mode(goal, monkeypatch):
    """As released: it labels by the batch's statistics while its running statistics drift."""
    calls, shared = recorded(monkeypatch), []
    real = kd.Distillation
    monkeypatch.setattr(test_kd, "Distillation", lambda flags: shared.append(real(flags)) or shared[-1])
    argv = [*ARGV, "--num_test", "1", "--kd_batch_size", "4", "--kd_bn"]
    assert test_kd.main([*argv, "batch"]) == test_kd.main([*argv, "running"]) == 0
    teacher = get_model(NET, (3, 8, 8), 4)
    state = torch.load("teacher_ckpt/teacher_goal.pt")
    teacher.load_state_dict(state)
    teacher.train()
    for x, logits in calls[0][3]:
        assert torch.allclose(teacher(x), logits, atol=1e-6)
    drifted, kept = (one.teacher.state_dict() for one in shared)
    assert not torch.equal(drifted["layers.0.block.1.running_mean"], state["layers.0.block.1.running_mean"])
    for key, value in teacher.state_dict().items():
        assert torch.allclose(drifted[key], value, atol=1e-6)
        assert torch.equal(kept[key], state[key])
    assert not torch.allclose(calls[0][3][0][1], calls[1][3][0][1], atol=1e-3)


def recorded(monkeypatch):
    """Of every distillation: (model, optimizer, steps, [(images, teacher's logits)], rates)."""
    calls, real_loss = [], kd.kd_loss

    class Recorded(Trainer):
        def __init__(self, *args, loss_fn, **options):
            def watched(model, x, y):
                rates.append(self.optimizer.param_groups[0]["lr"])
                seen.append([x.clone()])
                return loss_fn(model, x, y)

            seen, rates = [], []
            super().__init__(*args, loss_fn=watched, **options)
            calls.append((self.model, self.optimizer, self.steps, seen, rates))

    def spy(student_logits, teacher_logits):
        calls[-1][3][-1].append(teacher_logits.clone())
        return real_loss(student_logits, teacher_logits)

    monkeypatch.setattr(kd, "Trainer", Recorded)
    monkeypatch.setattr(kd, "kd_loss", spy)
    return calls


def test_student_sees_synthetic_images_under_dsa_and_the_teachers_logits(goal, monkeypatch):
    calls = recorded(monkeypatch)
    assert test_kd.main([*ARGV, "--num_test", "1", "--kd_batch_size", "4"]) == 0
    _, optimizer, steps, seen, rates = calls[0]
    recipe = KD["krr_st"].override(epochs=3, batch_size=4)
    written = {
        "loss": "cross_entropy",
        "optimizer": "adam",
        "lr": 1e-4,
        "wd": 0.0,
        "schedule": "cosine",
        "batch_size": 4,
        "epochs": 3,
        "steps": 0,
        "warmup": 0,
        "dsa": DSA_STRATEGY,
        "momentum": 0.9,
        "rate_by_epoch": True,
    }
    assert cells()[0]["distillation"] == written == recipe.record()
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["lr"] == 1e-4
    assert optimizer.param_groups[0]["lr"] < 1e-8  # the cosine has ended
    by_epoch = [1e-4 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert rates == pytest.approx([rate for rate in by_epoch for _ in range(2)], rel=1e-12)
    assert steps == 6 and [len(x) for x, _ in seen] == [4, 2] * 3
    teacher = get_model(NET, (3, 8, 8), 4)
    teacher.load_state_dict(torch.load("teacher_ckpt/teacher_goal.pt"))
    for x, logits in seen:
        assert torch.allclose(teacher.eval()(x), logits, atol=1e-6)
    # Every image once per pass, in an order drawn anew, under DSA.
    images = torch.load("synthetic_data/tiny/krr_st/x_syn.pt")
    draws = make_generator(0, "distillation")
    orders = torch.Generator().manual_seed(draw_seed(draws))
    plain = [part for _ in range(3) for part in torch.randperm(6, generator=orders).split(4)]
    for (x, _), index in zip(seen, plain, strict=True):
        assert torch.equal(x, diff_augment(images[index], DSA_STRATEGY, generator=draws, align_corners=True))
        assert not torch.equal(x, images[index])


def test_gaussian_draws_fresh_noise_and_needs_no_synthetic_set(goal, monkeypatch):
    calls = recorded(monkeypatch)
    argv = [*ARGV, "--method", "gaussian", "--num_test", "1", "--synthetic_data_dir", "nowhere"]
    assert test_kd.main(argv) == 0
    model, optimizer, steps, seen, _ = calls[0]
    assert optimizer.defaults["lr"] == 1e-3 and steps == 3
    assert [x.shape for x, _ in seen] == [(100, 3, 8, 8)] * 3  # m of the preset at this size
    generator = make_generator(0, "distillation")
    draw_seed(generator)  # of the order, which noise does not have
    for x, _ in seen:  # plain noise, fresh at every step
        assert torch.equal(x, torch.randn(100, 3, 8, 8, generator=generator))
    assert model.training is False
    (cell,) = cells()
    assert "pretraining" not in cell and "synthetic_set" not in cell
    images = torch.empty(1).expand(5000, 3, 8, 8)
    plain = KD["gaussian"].loader(images, None, CPU, generator, kd.noise).forever()
    first, second = next(plain)[0], next(plain)[0]
    assert len(first) == 512 and float((first * second).mean().abs()) < 0.02
    assert float(first.mean().abs()) < 0.02 and float(first.std()) == pytest.approx(1, abs=0.02)


def test_the_teacher_sees_whole_batches(goal, monkeypatch):
    """Its statistics would be those of parts otherwise, where a student without BatchNorm is split."""
    monkeypatch.setattr("models.layout.CPU_PIXELS", 2 * 8 * 8)
    calls = recorded(monkeypatch)
    argv = [*ARGV, "--test_model", "convnet_4_8_none", "--num_test", "1", "--kd_batch_size", "4"]
    assert test_kd.main([*argv, "--kd_bn", "batch"]) == 0
    assert [len(x) for x, _ in calls[0][3]] == [4, 2] * 3


def test_a_set_of_views_is_distilled_on_as_long_as_its_images_alone(goal, monkeypatch):
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    views = ViewFlags(4, True).draw(6, 8, True, 2)
    stats = Stats((0.5,) * 3, (0.25,) * 3)
    whole = SyntheticSet(views.images(x, stats), torch.randn(24, 5), stats, views=views)
    save_compact(whole, Path("views.safetensors"), CompactFlags())
    calls = recorded(monkeypatch)
    argv = [*ARGV, "--num_test", "1", "--kd_batch_size", "4", "--synthetic_path", "views.safetensors"]
    assert test_kd.main(argv) == 0
    ((_, _, steps, seen, rates),) = calls
    assert steps == len(seen) == 3 * 2  # three passes over six images, four at a time
    assert len(set(rates)) == 6  # the rate moves with each step: a pass over all views is longer than the run


def test_gaussian_student_starts_untrained(goal, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("gaussian pre-trained something")

    monkeypatch.setattr("evaluation.pretraining.pretrain", forbidden)
    argv = [*ARGV, "--method", "gaussian", "--num_test", "1"]
    assert test_kd.main(argv) == 0
    with pytest.raises(AssertionError):
        test_kd.main([*ARGV, "--num_test", "1"])


def test_scratch_differs_from_random_features_by_its_pre_training(goal, monkeypatch, capsys):
    argv = [*ARGV, "--num_test", "1", "--method", "scratch"]
    assert test_kd.main(argv) == 2
    assert "synthetic_data/tiny/random_features" in capsys.readouterr().err
    x, y = torch.randn(6, 3, 8, 8), torch.randn(6, 5)
    SyntheticSet(x, y).save(Path("synthetic_data/tiny/random_features"))
    shared = kd.Distillation(
        kd.KdFlags(
            source_data_name="tiny",
            target_data_name="goal",
            img_size=8,
            device="cpu",
            test_model=NET,
            teacher_arch=NET,
            method="scratch",
        )
    )
    student = shared.student(3).state_dict()
    with local_seed(derive_seed(3, "network")):
        untrained = get_model(NET, (3, 8, 8), 1)
    for key, value in untrained.state_dict().items():
        assert key.startswith("fc.") or torch.equal(student[key], value)
    calls = recorded(monkeypatch)
    assert test_kd.main(argv) == 0
    assert test_kd.main([*argv, "--method", "random_features", "--pre_epoch", "1"]) == 0
    (_, *_, without, _), (_, *_, pretrained, _) = calls
    for (a, _), (b, _) in zip(without, pretrained, strict=True):
        assert torch.equal(a, b)  # the same images under the same augmentation
    scratch, features = cells()
    assert scratch["synthetic_set"] == features["synthetic_set"]
    assert "pretraining" not in scratch and "pretraining" in features


def test_student_keeps_the_pre_trained_backbone_and_gets_a_fresh_head(goal):
    flags = kd.KdFlags(
        source_data_name="tiny",
        target_data_name="goal",
        img_size=8,
        device="cpu",
        test_model=NET,
        teacher_arch=NET,
        pre_epoch=2,
    )
    shared = kd.Distillation(flags)
    backbone = shared.backbone(3, (3, 8, 8)).state_dict()
    student = shared.student(3).state_dict()
    assert student["fc.weight"].shape == (4, 32) and backbone["fc.weight"].shape == (5, 32)
    assert all(torch.equal(student[k], backbone[k]) for k in student if not k.startswith("fc."))
    assert not any(p.requires_grad for p in shared.teacher.parameters())
    assert not shared.teacher.training


def test_batch_statistics_leave_the_running_ones_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    model[1].running_mean.fill_(3.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(8, 3, 2, 2)
    with torch.no_grad(), kd.batch_statistics(model):
        got = model(x)
        assert not model[2].training
    inner = model[0](x)
    mean, var = inner.mean((0, 2, 3), keepdim=True), inner.var((0, 2, 3), False, keepdim=True)
    assert torch.allclose(got, (inner - mean) / (var + 1e-5).sqrt(), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[1].training and model[1].track_running_stats
    with pytest.raises(ZeroDivisionError), kd.batch_statistics(model):
        raise ZeroDivisionError
    assert not model[1].training and model[1].track_running_stats
    assert not torch.allclose(model(x), got)


def test_teacher_then_kd_end_to_end(workspace, capsys):
    write_set("datasets", "goal")
    SyntheticSet(torch.randn(6, 3, 8, 8), torch.arange(6) % 4).save(Path("synthetic_data/tiny/random"))
    argv = [*ARGV[:-4], "--num_test", "1", "--method", "random", "--steps_scale", "0.003"]
    load_set("goal", 8)
    assert test_kd.main(argv) == 2
    command = capsys.readouterr().err.split("python -m krr_st.kd_teacher ", 1)[1].split()
    small = ["--epochs", "6", "--seed", "0", "--device", "cpu", "--batch_size", "16"]
    assert kd_teacher.main([*command, *small]) == 0
    folder = Path("teacher_ckpt/teacher_goal")
    result = json.loads((folder / "results.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[0]["loss"] and result["test_accuracy"] > 40
    assert "accuracy" not in log[0] and not (folder / "state.pt").exists()
    assert log[0]["lr"] == pytest.approx(0.1, rel=0.1) and log[-1]["lr"] < 0.01
    assert kd_teacher.main([*command, *small]) == 0
    assert "there already" in capsys.readouterr().out
    assert test_kd.main(argv) == 0
    assert cells()[0]["teacher_accuracy"] == pytest.approx(result["test_accuracy"])


def test_teacher_goes_on_where_it_stopped(workspace, monkeypatch):
    write_set("datasets", "goal")
    argv = [
        "--data_name",
        "goal",
        "--arch",
        NET,
        "--epochs",
        "4",
        "--batch_size",
        "16",
        "--seed",
        "0",
        "--device",
        "cpu",
        "--save_every",
        "1",
    ]
    assert kd_teacher.main(argv) == 0
    saves, real = [], epochs.save_run

    def killed(*args, **kwargs):
        real(*args, **kwargs)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "save_run", killed)
        assert kd_teacher.main([*argv, "--save_dir", "stopped"]) == 130
    assert kd_teacher.main([*argv, "--save_dir", "stopped"]) == 0
    whole, again = (torch.load(f"{d}/teacher_goal.pt") for d in ("teacher_ckpt", "stopped"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_errors_are_one_line(goal, capsys):
    def fails(argv, *words):
        assert test_kd.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert all(word in line for word in words), line

    fails([*ARGV, "--method", "magic"], "magic", "gaussian", "krr_st")
    fails([*ARGV, "--test_model", "vit"], "vit", "resnet18")
    fails([*ARGV, "--target_data_name", "mars"], "mars", "goal")
    fails([*ARGV, "--teacher_arch", "resnet10"], "teacher_goal.pt", "does not fit")
    fails(
        [*ARGV, "--teacher_ckpt", "mine.pt"],
        "mine.pt",
        "krr_st.kd_teacher --data_name goal --img_size 8 --arch convnet_4_8_bn",
        "teacher_goal.pt",
    )
    Path("datasets/goal/Y_te_8.pth").unlink()
    fails(ARGV, "datasets/goal", "no labels")
    Path("datasets/goal/X_te_8.pth").unlink()
    fails(ARGV, "X_te_8.pth", "does not exist")
    assert not Path("test_log").exists()


def test_load_without_training_images(goal):
    target = load_set("goal", 8, splits=("test",))
    assert len(target.train) == 0 and len(target.test) == 24 and target.num_classes == 4
    assert target.img_shape == (3, 8, 8)
    Path("datasets/goal/meta.json").unlink()
    with pytest.raises(UserError, match="no mean and std at size 8"):
        load_set("goal", 8, splits=("test",))
    with pytest.raises(UserError, match="X_tr_8"):
        load_set("goal", 8)
    write_set("datasets", "cifar10", size=32, train=0, test=10, classes=10)
    assert load_set("cifar10", 32, splits=("test",)).stats.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("command", [test_kd, kd_teacher])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0 and "--data_dir" in capsys.readouterr().out
    assert kd.KdFlags().teacher_arch == kd_teacher.KdTeacherFlags().arch == "resnet18"


def test_noise_is_no_set(goal, capsys):
    argv = [*ARGV, "--method", "gaussian", "--synthetic_path", "sets/nothing"]
    fails(capsys, test_kd, argv, "--synthetic_path", "fresh noise")
