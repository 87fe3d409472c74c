"""Distillation: the outer step by hand, interrupted runs, what a run folder holds."""

import copy
import json
from pathlib import Path

import conftest
import pytest
import torch
from conftest import CPU, NET, SHAPE, make_krrst, make_target, read_log, write_set, write_target

import train
from data.load import load_set
from data.synthetic import SyntheticSet
from distillation import one_set
from distillation.problem import Problem
from krr_st import krr_st as krr_st_module
from krr_st.krr_st import KRRST
from krr_st.loss import krr_loss
from utils import checkpoint
from utils.distributed import Group
from utils.seed import make_generator


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny", train=30, test=8)
    write_target()
    return workspace


def make_distiller(**changes):
    return make_krrst(load_set("tiny", 8, "datasets"), **changes)


class OneBatch:
    """A loader that always gives the same real images."""

    def __init__(self, x):
        self.x = x

    def forever(self):
        while True:
            yield (self.x, torch.zeros(len(self.x))), torch.arange(len(self.x))


def test_steps_lower_the_loss(tiny):
    real = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(5))
    distiller = make_distiller(loader=OneBatch(real), num_models=1, online_iteration=1)
    distiller.pool.update = lambda *args: None  # the same network all along
    losses = [float(distiller.step()["loss"]) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("name", "wd", "optimizer"),
    [
        ("adam", 0.0, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0)),
        ("adam", 0.3, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3)),
        ("sgd", 0.0, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.5)),
    ],
)
def test_one_step_by_hand(tiny, name, wd, optimizer):
    """Loss, gradients, update; then the network's step."""
    real = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(5))
    distiller = make_distiller(loader=OneBatch(real), num_models=1, outer_opt=name, outer_wd=wd)
    net = copy.deepcopy(distiller.pool.slots[0].model).eval()
    x, y = (t.detach().clone().requires_grad_() for t in (distiller.x_syn, distiller.y_syn))
    loss = krr_loss(net.embed(real).detach(), distiller.targets.target(real), net.embed(x), y)
    gradients = torch.autograd.grad(loss, (x, y))
    torch.testing.assert_close(distiller.step()["loss"], loss.detach())
    torch.testing.assert_close((distiller.x_syn.grad, distiller.y_syn.grad), gradients)
    # Adam's first step has no size of its own: where a gradient is all rounding, so is the step.
    x.grad, y.grad = distiller.x_syn.grad, distiller.y_syn.grad
    optimizer([x, y]).step()
    x, y = x.detach(), y.detach()
    torch.testing.assert_close((distiller.x_syn.detach(), distiller.y_syn.detach()), (x, y))
    # The network was trained on the set after its update, in train mode, all of it at once.
    inner = torch.optim.SGD(net.train().parameters(), lr=0.05, momentum=0.9)
    inner.zero_grad()
    (net(x) - y).pow(2).mean().backward()
    inner.step()
    torch.testing.assert_close(distiller.pool.slots[0].model.state_dict(), net.state_dict())
    assert distiller.pool.slots[0].age == 1
    # Shows from the second step on only:
    assert distiller.optimizer.param_groups[0].get("momentum", 0.5) == 0.5


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_step_on_views_by_hand(tiny, hybrid):
    """Each view has the target's features of itself, through which the gradient goes, too."""
    real = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(5))
    more = dict(views=4, blend=True, hybrid=hybrid, view_batch=9, loader=OneBatch(real), num_models=1)
    distiller, target = make_distiller(**more), make_target()
    pool = distiller.pool
    net = copy.deepcopy(pool.slots[0].model).eval()
    x = distiller.x_syn.detach().clone().requires_grad_()
    rows = torch.randint(24, (9,), generator=make_generator(0, "kernel's mixup"))
    seen = distiller.views.images(x, distiller.problem.image_set.stats)[rows]
    loss = krr_loss(net.embed(real).detach(), target(real), net.embed(seen), target(seen))
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(distiller.step()["loss"], loss.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distiller.x_syn.grad, gradient, rtol=1e-3, atol=1e-6)
    assert distiller.y_syn.grad is None
    # The network's step is on other views of the set after its update.
    x = distiller.x_syn.detach()
    rows = torch.randint(24, (9,), generator=make_generator(0, "pool's mixup"))
    seen = distiller.views.images(x, distiller.problem.image_set.stats)[rows]
    inner = torch.optim.SGD(net.train().requires_grad_().parameters(), lr=0.05, momentum=0.9)
    (net(seen) - target(seen)).square().mean().backward()
    inner.step()
    torch.testing.assert_close(pool.slots[0].model.state_dict(), net.state_dict(), rtol=1e-4, atol=1e-5)


def test_the_gradient_stops_at_the_synthetic_set(tiny, monkeypatch):
    made = []
    monkeypatch.setattr(conftest, "make_target", lambda: made.append(make_target()) or made[0])
    distiller = make_distiller(num_models=1)
    before = copy.deepcopy(distiller.pool.slots[0].model.state_dict())
    seen = []
    distiller.pool.update = lambda slot, x, y: seen.append((slot, x, y))
    distiller.step()
    slot, x, y = seen[0]
    assert all(p.grad is None for p in slot.model.parameters())
    assert all(p.grad is None for p in made[0].parameters())
    after = slot.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # running statistics included
    assert not x.requires_grad and not y.requires_grad
    assert distiller.x_syn.grad.norm() > 0 and distiller.y_syn.grad.norm() > 0


def test_each_tensor_is_clipped_on_its_own(tiny):
    free, clipped = make_distiller(), make_distiller(outer_grad_norm=1e-4)
    free.step()
    clipped.step()
    for name in ("x_syn", "y_syn"):
        whole, cut = getattr(free, name).grad, getattr(clipped, name).grad
        assert whole.norm() > 2e-4
        torch.testing.assert_close(cut, whole * (1e-4 / whole.norm()), rtol=1e-2, atol=0)


def test_rate_falls_linearly_to_a_thousandth(tiny):
    distiller = make_distiller(outer_iteration=10)
    rates = []
    for _ in range(10):
        rates.append(distiller.optimizer.param_groups[0]["lr"])
        distiller.step()
    assert rates == pytest.approx([1e-2 * (1 - 0.999 * k / 10) for k in range(10)])
    assert distiller.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_initial_set_in_both_spaces(tiny):
    image_set, target = load_set("tiny", 8, "datasets"), make_target()

    def make(space, seed=0):
        return Problem(image_set, CPU, seed, target=target).start_with_features(30, space)

    (raw, y_raw), (x, y) = make("raw"), make("normalized")
    pixels = image_set.train.images.double() / 255
    order = [int(((pixels - r.double()).abs().amax((1, 2, 3))).argmin()) for r in raw]
    assert sorted(order) == list(range(30)) != order  # real images, drawn without replacement
    torch.testing.assert_close(raw.double(), pixels[order], rtol=0, atol=1e-6)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image_set.stats.mean, image_set.stats.std))
    torch.testing.assert_close(x, (raw - mean) / std)
    assert torch.equal(y, y_raw)  # the targets belong to the normalised images in both
    torch.testing.assert_close(y, target(x))
    assert not torch.equal(make("raw", 1)[0], raw)


# ------------------------------------------------------------------ whole runs

FLAGS = (
    f"--data_name tiny --img_size 8 --device cpu --seed 4 --target_model {NET} --train_model {NET} "
    "--num_images 6 --num_models 2 --online_iteration 3 --outer_iteration 9 --outer_lr 1e-2 "
    "--outer_batch_size 16 --print_every 2 --save_every 4 --eval_every 3 --pre_epoch 2 "
    "--test_iteration 3"
).split()


def run(name, *more):
    return train.main([*FLAGS, "--exp_name", name, *more])


def tensors(name):
    folder = Path("results") / name
    return [torch.load(folder / f"{t}_syn.pt", weights_only=True) for t in "xy"]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def log(name):
    return read_log(Path("results") / name)


def stop_at(monkeypatch, step, error=KeyboardInterrupt):
    """Make the given call of KRRST.step in this process fail."""
    real, calls = KRRST.step, []

    def killed(self):
        calls.append(1)
        if len(calls) == step:
            raise error
        return real(self)

    monkeypatch.setattr(KRRST, "step", killed)


def test_run_folder(tiny):
    assert run("a") == 0
    folder = Path("results/a")
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "log.jsonl",
        "loss.png",
        "results.json",
        "x_start.pt",
        "x_syn.png",
        "x_syn.pt",
        "y_syn.pt",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 4 and config["data_name"] == "tiny"
    assert config["flags"]["test_model"] == NET  # what was resolved, not only what was given
    assert {"git_commit", "torch", "python", "device"} <= config["environment"].keys()
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == results["steps_in_this_start"] == 9 and results["seconds"] > 0
    evaluations = results["linear_evaluations"]
    assert [e["step"] for e in evaluations] == [3, 6, 9]
    assert all(0 <= e["linear_accuracy"] <= 100 for e in evaluations)
    losses = [e for e in log("a") if "loss" in e]
    assert [e["step"] for e in losses] == [2, 4, 6, 8, 9]
    assert losses[-1]["loss"] == results["loss"] and losses[-1]["lr"] == pytest.approx(
        1e-2 * (1 - 0.999 * 8 / 9)
    )
    x, y = tensors("a")
    assert x.shape == (6, *SHAPE) and y.shape == (6, 4) and x.dtype == y.dtype == torch.float32
    assert not x.requires_grad and not y.requires_grad
    stats = SyntheticSet.load(folder).stats
    assert list(stats.mean) == config["mean"] == list(load_set("tiny", 8, "datasets").stats.mean)


def test_looking_at_a_run_does_not_change_it(tiny):
    assert run("a") == run("rare", "--eval_every", "9", "--save_every", "9", "--print_every", "9") == 0
    assert same("a", "rare")


def test_a_set_of_views_is_written_whole(tiny):
    assert run("v", "--views", "5", "--blend", "--view_batch", "7") == 0
    folder, target = Path("results/v"), make_target()
    x, y = tensors("v")
    whole = SyntheticSet.load(folder)
    assert x.shape == (6, *SHAPE) and whole.images.shape == (30, *SHAPE) and whole.views.each == 5
    torch.testing.assert_close(whole.plain().images, x)
    torch.testing.assert_close(whole.plain().targets, y)
    torch.testing.assert_close(whole.targets, target(whole.images), atol=1e-5, rtol=1e-4)
    assert torch.load(folder / "x_start.pt").shape == x.shape  # the images alone
    left = folder / "state.prev.pt"
    left.write_bytes(b"of a start that was killed at its very end")
    assert run("v", "--views", "5", "--blend", "--view_batch", "7") == 0 and not left.exists()
    for flags in (["--syn_init", "raw"], ["--pool_mixup"], ["--views", "99"], ["--outer_lr_y", "1"]):
        assert run("no", "--views", "5", *flags) == 2
    assert run("no", "--blend") == 2 and not Path("results/no").exists()


@pytest.mark.parametrize(  # saved after steps 4 and 8, and for the evaluations after 3 and 6
    ("step", "reset", "more"),
    [
        (3, "paper", []),
        (5, "released", []),
        (7, "paper", ["--views", "4", "--blend", "--hybrid", "--view_batch", "7", "--target_scale", "std"]),
        (9, "released", []),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(tiny, monkeypatch, capsys, step, reset, more):
    flags = ["--pool_reset", reset, "--outer_opt", "adam" if reset == "paper" else "sgd", *more]
    assert run("whole", *flags) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run("stopped", *flags) == 130
    assert Path("results/stopped/state.pt").exists() == (step > 4)
    capsys.readouterr()
    assert run("stopped", *flags) == 0
    saved = max(s for s in (0, 3, 4, 6, 8) if s < step)
    assert (f"resuming after step {saved} of 9" in capsys.readouterr().out) == (saved > 0)
    assert same("whole", "stopped")
    assert log("whole") == log("stopped")
    first, second = (json.loads(Path(f"results/{n}/results.json").read_text()) for n in ("whole", "stopped"))
    assert first["linear_evaluations"] == second["linear_evaluations"]
    assert second["loss"] == first["loss"] and second["steps_in_this_start"] == 9 - saved


def test_killed_between_the_last_save_and_the_results(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(one_set, "save_grid", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("a")
    assert run("a") == run("whole") == 0
    first, second = (json.loads(Path(f"results/{n}/results.json").read_text()) for n in ("a", "whole"))
    assert same("a", "whole") and first["loss"] == second["loss"] is not None


def test_finished_run_is_left_alone(tiny, capsys):
    assert run("a") == 0
    stamp = Path("results/a/x_syn.pt").stat().st_mtime_ns
    assert run("a") == 0
    assert "finished run" in capsys.readouterr().out
    assert Path("results/a/x_syn.pt").stat().st_mtime_ns == stamp


def test_a_drawn_seed_is_kept_on_resuming(tiny, monkeypatch, capsys):
    at = FLAGS.index("--seed")
    flags = FLAGS[:at] + FLAGS[at + 2 :]
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert train.main([*flags, "--exp_name", "drawn"]) == 130
    assert "pass --seed" in capsys.readouterr().out
    assert train.main([*flags, "--exp_name", "drawn"]) == 0
    seed = json.loads(Path("results/drawn/config.json").read_text())["seed"]
    assert run("given", "--seed", str(seed)) == 0
    assert same("drawn", "given")


def test_processes_average_what_the_optimiser_gets(tiny, monkeypatch):
    """The gradient comes back channels-last: its copy in the images' layout has to be of the mean."""
    distiller = make_distiller()
    monkeypatch.setattr(Group, "average_", lambda self, tensors: [t.fill_(3.0) for t in tensors])
    distiller.step()
    assert all(t.grad.eq(3.0).all() for t in distiller.learned)


def test_loss_that_is_not_finite_keeps_the_last_save(tiny, monkeypatch, capsys):
    real, calls = krr_st_module.real_kernel, []

    def poisoned(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(krr_st_module, "real_kernel", poisoned)
    assert run("a") == 2
    error = capsys.readouterr().err.strip()
    assert "loss is nan at step 6" in error.splitlines()[-1]
    assert all(torch.isfinite(t).all() for t in tensors("a"))
    assert not Path("results/a/results.json").exists()
    state = checkpoint.load("results/a/state.pt")
    assert state["step"] == 4
    monkeypatch.setattr(krr_st_module, "real_kernel", real)
    assert run("a") == run("whole") == 0  # the fault gone, the run ends as if it had never been
    assert same("a", "whole")


def test_unlabelled_set(tiny, capsys):
    write_set("datasets", "bare", train=30, test=0, labelled=False)
    checkpoint.save(make_target().backbone.state_dict(), "bare.pt")
    flags = ["--data_name", "bare", "--target_ckpt", "bare.pt"]
    assert run("bare", *flags) == 0
    assert "bare lacks labels: linear evaluation is skipped" in capsys.readouterr().out
    assert json.loads(Path("results/bare/results.json").read_text())["linear_evaluations"] == []
    (write_set("datasets", "half") / "Y_te_8.pth").unlink()
    assert run("half", "--data_name", "half", "--target_ckpt", "bare.pt") == 0
    assert "half lacks labels: linear evaluation is skipped" in capsys.readouterr().out


def test_a_listed_set_without_labels(tiny, capsys):
    """Distillation without labels needs none; half a labelled set is still refused."""
    folder = write_set("datasets", "cifar10", train=30, classes=10, labelled=False)
    checkpoint.save(make_target().backbone.state_dict(), "listed.pt")
    flags = ["--data_name", "cifar10", "--target_ckpt", "listed.pt"]
    assert run("listed", *flags) == 0
    assert "cifar10 lacks labels: linear evaluation is skipped" in capsys.readouterr().out
    assert train.main(["--method", "dm", *flags[:2], "--num_images", "10", "--img_size", "8"]) == 2
    assert "datasets/cifar10" in capsys.readouterr().err
    checkpoint.save(torch.arange(24) % 10, folder / "Y_te_8.pth")
    assert run("half", *flags) == 2
    assert "Y_tr_8.pth does not exist, but its images" in capsys.readouterr().err


def test_labels_change_nothing_but_the_evaluation(tiny):
    assert run("labelled") == 0
    for path in Path("datasets/tiny").glob("Y_*"):
        path.unlink()
    assert run("unlabelled") == 0
    assert same("labelled", "unlabelled")


def test_without_test_split_the_training_images_stand_in(tiny, capsys):
    for path in Path("datasets/tiny").glob("*_te_*"):
        path.unlink()
    assert run("a") == 0
    assert "tiny has no test split: evaluations use the training images" in capsys.readouterr().out


def test_raw_start_is_recorded(tiny):
    assert run("raw", "--syn_init", "raw") == 0 == run("normalized")
    assert not same("raw", "normalized")
    config = json.loads(Path("results/raw/config.json").read_text())
    assert config["mean"] == [0.0] * 3 and config["std"] == [1.0] * 3  # its pixels need no undoing


def test_overwrite_leaves_nothing_of_the_old_run(tiny, monkeypatch):
    assert run("a", "--views", "5", "--blend") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run("a", "--outer_lr", "0.5", "--overwrite") == 130
    names = {p.name for p in Path("results/a").iterdir()}
    assert names == {"config.json", "log.jsonl", "x_start.pt"}  # no file of other flags beside this config
    assert run("a", "--outer_lr", "0.5") == 0


def test_resumed_from_a_foreign_state(tiny, capsys):
    assert run("a") == 0
    Path("results/a/results.json").unlink()
    for content in ({"step": 4}, {"step": 4, "parts": {"distiller": {}}}, [1, 2]):
        checkpoint.save(content, "results/a/state.pt")
        assert run("a") == 2
        assert "does not fit this run" in capsys.readouterr().err.splitlines()[-1]
    Path("results/a/state.pt").write_bytes(b"torn")
    assert run("a") == 2
    assert "results/a/state.pt" in capsys.readouterr().err.splitlines()[-1]
