"""Standardised targets: the statistics, what networks learn, what is written, what is measured."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import CPU, NET, make_krrst, make_target, read_log, write_set, write_target
from test_cli import fails

import test as test_command
import train
from data.augment import normalize, to_float
from data.load import load_set
from data.synthetic import SyntheticSet, TrainingSettings
from data.target_scale import TargetScale
from evaluation import transfer
from evaluation.fit import outputs, pretrain
from evaluation.recipes import KD, PRETRAIN
from evaluation.target import load_target
from evaluation.transfer import TestFlags, Transfer
from krr_st import baselines
from krr_st.krr_st import KRRST
from models import get_model
from utils import checkpoint
from utils.errors import UserError
from utils.seed import local_seed, make_generator

RUN = (
    f"--data_name tiny --img_size 8 --device cpu --seed 4 --num_images 6 --train_model {NET} "
    f"--target_model {NET} --outer_iteration 6 --outer_batch_size 16 --num_models 2 "
    "--online_iteration 5 --outer_lr 1e-2 "
    "--eval_every 6 --pre_epoch 3 --test_iteration 3 --print_every 2 --save_every 2"
).split()


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny", train=30, test=8)
    write_target()
    return load_set("tiny", 8, "datasets")


def features(image_set, split="train"):
    return outputs(make_target(), getattr(image_set, split).images, image_set, CPU)


def fresh():
    with local_seed(8):
        return get_model(NET, (3, 8, 8), 4)


# ------------------------------------------------------------------ the map


def test_against_the_formula_in_float64():
    draw = torch.Generator().manual_seed(0)
    t = torch.randn(40, 5, generator=draw) * torch.tensor([1e-3, 1, 30, 2, 5]) + torch.arange(5) * 7
    t[:, 3] = 4.0
    scale, rows = TargetScale.fit(t), t.double()
    for d in range(5):
        column = rows[:, d].tolist()
        mean = sum(column) / 40
        std = 1.0 if d == 3 else (sum((v - mean) ** 2 for v in column) / 40) ** 0.5
        assert float(scale.mean[d]) == pytest.approx(mean, rel=1e-6)
        assert float(scale.std[d]) == pytest.approx(std, rel=1e-6)
        expected = [(v - mean) / std for v in column]
        assert scale(t)[:, d].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert scale(t)[:, [0, 1, 2, 4]].var(0, correction=0).tolist() == pytest.approx([1] * 4, rel=1e-3)
    torch.testing.assert_close(scale.undo(scale(t)), t)


def test_it_is_undone_in_the_last_layer(tiny):
    scale, net, x = TargetScale.fit(features(tiny)), fresh().eval(), torch.randn(5, 3, 8, 8)
    wanted = net(x).detach().double() * scale.std.double() + scale.mean.double()
    scale.undo_in(net.head)
    torch.testing.assert_close(net(x).detach().double(), wanted, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ a set with statistics


def made(image_set, scale=None, **more):
    x = normalize(to_float(image_set.train.images[:6]), image_set.stats)
    training = TrainingSettings(targets=scale, **more)
    return SyntheticSet(x, make_target()(x), image_set.stats, "tiny", training=training)


@pytest.mark.parametrize("form", ["pair", "safetensors"])
def test_forms_keep_the_statistics(tiny, tmp_path, form):
    synthetic = made(tiny, TargetScale.fit(features(tiny)), mixup=True)
    path = tmp_path / {"safetensors": "set.safetensors"}.get(form, "set")
    synthetic.save(path, form)
    again = SyntheticSet.load(path).training
    assert again.record() == synthetic.training.record() and again.mixup is True
    assert torch.equal(again.targets.std, synthetic.training.targets.std)


def test_statistics_that_do_not_fit_are_one_line(tiny, tmp_path):
    scale = TargetScale.fit(features(tiny))
    for bad in (TargetScale(scale.mean[:3], scale.std[:3]), TargetScale(scale.mean, scale.std[:3])):
        with pytest.raises(UserError, match=r"statistics of targets are .*, the targets are vectors of 4"):
            made(tiny, bad)
    with pytest.raises(UserError, match="positive standard deviations"):
        made(tiny, TargetScale(scale.mean, -scale.std))
    with pytest.raises(UserError, match="class indices"):
        dataclasses.replace(made(tiny, scale), targets=torch.arange(6))
    with pytest.raises(UserError, match="mixup of class indices"):
        dataclasses.replace(made(tiny, mixup=True), targets=torch.arange(6))


def test_the_same_as_targets_that_are_scaled_by_hand(tiny):
    """Body features to the bit; outputs once the scale is undone in float64."""
    scale = TargetScale.fit(features(tiny))
    with_statistics, recipe = made(tiny, scale), PRETRAIN["krr_st"].override(steps=5)
    t = with_statistics.targets
    by_hand = dataclasses.replace(
        with_statistics, targets=(t - scale.mean) / scale.std, training=TrainingSettings()
    )
    a = pretrain(fresh(), with_statistics, recipe.fitted(with_statistics.training), make_generator(0)).eval()
    b = pretrain(fresh(), by_hand, recipe, make_generator(0)).eval()
    x = normalize(to_float(tiny.test.images), tiny.stats)
    assert torch.equal(a.embed(x), b.embed(x))
    wanted = b(x).detach().double() * scale.std.double() + scale.mean.double()
    torch.testing.assert_close(a(x).detach().double(), wanted, rtol=1e-5, atol=1e-5)


def measured(name, **more):
    shared = dict(source_data_name="tiny", target_data_name="tiny", img_size=8, test_model=NET, device="cpu")
    how = dict(pre_epoch=5, protocol="linear", probe_on="both", target_error=True, target_model=NET)
    flags = TestFlags(**shared, **how, **more, synthetic_path=Path(name), log_dir=Path("log") / name)
    driver = Transfer(flags)
    return driver, driver.repetition(0, transfer.CellStore(flags.log_dir / "results.jsonl"))


def test_probe_and_error_of_a_set_with_statistics(tiny):
    scale = TargetScale.fit(features(tiny))
    made(tiny, scale).save("scaled")
    made(tiny).save("plain")
    driver, (body, out, error) = measured("scaled")
    assert driver.pretraining.recipe.record() == {
        **measured("plain")[0].pretraining.recipe.record(),
        "target_scale": "std",
    }
    network = driver.backbone(0, (3, 8, 8))
    found = outputs(network, tiny.test.images, tiny, CPU).double()
    gap = (found - features(tiny, "test").double()) / scale.std.double()
    assert error["error"] == pytest.approx(float(gap.square().mean()), rel=1e-4)
    assert body["training"] == out["training"] == {"targets": checkpoint.fingerprint(scale.mean, scale.std)}
    # Without the scale the set is one like any other.
    raw = [cell["accuracy"] for cell in measured("plain")[1][:2]]
    assert [c["accuracy"] for c in measured("scaled", pre_target_scale="none")[1][:2]] == raw


def test_what_cannot_be_had_is_one_line(tiny, capsys):
    made(tiny).save("plain")
    argv = ["--source_data_name", "tiny", "--target_data_name", "tiny", "--img_size", "8", "--device", "cpu"]
    argv += ["--test_model", NET, "--synthetic_path", "plain"]
    fails(capsys, test_command, [*argv, "--pre_target_scale", "std"], "plain", "--target_scale std")
    labels = SyntheticSet(torch.zeros(6, 3, 8, 8), torch.arange(6) % 4)
    labels.save("labels")
    argv = [*argv[:-1], "labels", "--method", "random"]
    fails(capsys, test_command, [*argv, "--pre_mixup"], "labels", "mixup needs target vectors")
    base = ["--data_name", "tiny", "--img_size", "8", "--device", "cpu", "--num_images", "4"]
    fails(capsys, baselines, [*base, "--target_scale", "std"], "--target_scale std", "class labels")
    fails(capsys, baselines, [*base, "--mixup"], "--mixup", "class labels")
    fails(capsys, train, [*base, "--method", "mtt", "--pre_mixup"], "--pre_mixup", "MTT")


def test_baselines_write_the_statistics(tiny, capsys):
    argv = f"--data_name tiny --img_size 8 --device cpu --num_images 5 --target_model {NET}".split()
    argv += ["--method", "random_features"]
    assert baselines.main(argv) == 0
    plain = SyntheticSet.load("synthetic_data/tiny/random_features")
    assert (
        not plain.training and not Path("synthetic_data/tiny/random_features/training.safetensors").exists()
    )
    assert baselines.main([*argv, "--target_scale", "std", "--mixup"]) == 0
    found = SyntheticSet.load("synthetic_data/tiny/random_features")
    assert torch.equal(found.targets, plain.targets) and torch.equal(found.images, plain.images)
    rows = features(tiny).double()
    torch.testing.assert_close(found.training.targets.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.training.targets.std.double(), rows.std(0, correction=0), rtol=1e-5, atol=1e-5
    )
    assert found.training.mixup is True


# ------------------------------------------------------------------ runs


def test_krr_st_learns_standardised_targets(tiny, capsys):
    assert train.main([*RUN, "--target_scale", "std", "--exp_name", "std"]) == 0
    found = SyntheticSet.load("results/std")
    written, by_formula = found.training.targets, features(tiny).double()
    # The run's own target model: folded, in channels-last, it rounds otherwise than the plain one.
    target = load_target(NET, None, tiny, CPU, data_name="tiny", data_dir=Path("datasets"))
    scale = TargetScale.fit(outputs(target, tiny.train.images, tiny, CPU))
    assert torch.equal(written.mean, scale.mean) and torch.equal(written.std, scale.std)
    torch.testing.assert_close(written.mean.double(), by_formula.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(written.std.double(), by_formula.std(0, correction=0), rtol=1e-5, atol=1e-6)
    assert found.training.mixup is None
    assert "linear_accuracy" in {k for e in read_log("results/std") for k in e}


def test_a_step_of_krr_st_in_standardised_space_by_hand(tiny):
    """Start, targets of the real batch and loss, by the formula in float64."""
    scale = TargetScale.fit(features(tiny))
    plain, distiller = make_krrst(tiny), make_krrst(tiny, target_scale=scale)
    mean, std = scale.mean.double(), scale.std.double()
    torch.testing.assert_close(distiller.y_syn.double(), (plain.y_syn.double() - mean) / std)
    y, y_plain = distiller.y_syn.detach().clone(), plain.y_syn.detach()
    written = distiller.synthetic()
    torch.testing.assert_close(written.targets, y_plain, rtol=1e-4, atol=1e-5)
    assert written.training.targets is scale and not plain.synthetic().training
    (x, _), _ = next(make_krrst(tiny).loader.forever())
    real = (make_target()(x).double() - mean) / std
    slot = copy.deepcopy(distiller.pool).draw()
    f_r, f_s = (
        torch.cat([slot.model.embed(v), torch.ones(len(v), 1)], 1).detach().double()
        for v in (x, distiller.x_syn)
    )
    kernel = f_s @ f_s.T
    kernel += 1e-6 * kernel.trace() * torch.eye(len(f_s), dtype=torch.float64)
    wanted = (f_r @ f_s.T @ torch.linalg.inv(kernel) @ y.double() - real).square().mean()
    assert float(distiller.step()["loss"]) == pytest.approx(float(wanted), rel=1e-3)


def test_an_interrupted_run_is_an_uninterrupted_one(tiny, monkeypatch):
    argv = [*RUN, "--target_scale", "std", "--pool_mixup", "--exp_name"]
    assert train.main([*argv, "whole"]) == 0
    step, calls = KRRST.step, []

    def fragile(self):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(KRRST, "step", fragile)
        assert train.main([*argv, "parts"]) == 130
    assert train.main([*argv, "parts"]) == 0
    assert read_log("results/whole") == read_log("results/parts")
    a, b = (SyntheticSet.load(f"results/{name}") for name in ("whole", "parts"))
    assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
    assert a.training.record() == b.training.record()


def test_best_is_krr_st_on_blended_views(tiny, capsys):
    assert train.main([*RUN, "--recipe", "best", "--exp_name", "best"]) == 0
    found = SyntheticSet.load("results/best")
    assert found.training.targets is not None and found.training.mixup is None
    assert found.views.each == 50 and found.views.partners is not None
    assert found.made_by == "KRR_ST"
    assert train.main(["--recipe", "best", "--data_name", "tiny", "--img_size", "8", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    for line in ('"method": "KRR_ST"', '"outer_iteration": 1800', '"target_scale": "std"'):
        assert line in shown


def test_a_flag_that_needs_another_is_told(tiny, capsys):
    """By what was typed: a recipe may set both, or the one that is needed."""
    argv = ["--data_name", "tiny", "--img_size", "8", "--dry_run", "--view_batch", "4"]
    for more, told in (([], True), (["--views", "3"], False), (["--recipe", "best"], False)):
        assert train.main([*argv, *more]) == 0
        printed = capsys.readouterr().out
        assert (
            "not used without --views: --view_batch\n" in printed
        ) is told and '"view_batch": 4' in printed


def test_a_recipe_chooses_the_method_that_has_it(tiny, capsys):
    short = ["--data_name", "tiny", "--img_size", "8", "--dry_run"]
    assert train.main(["--recipe", "datm", *short]) == 0
    assert '"method": "MTT"' in capsys.readouterr().out
    fails(capsys, train, ["--recipe", "datm", "--method", "krr_st", *short], "--recipe", "datm")
    fails(capsys, train, ["--recipe", "magic", *short], "--recipe", "magic")


def test_existing_recipes_keep_their_records():
    for recipe in (*PRETRAIN.values(), *KD.values()):
        assert not recipe.record().keys() & {"mixup", "target_scale"}
        assert recipe.fitted(TrainingSettings()) == recipe
