"""DD-Ranking's scores: the formulas, and what validate.py computes them from."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, write_set
from test_cli import fails

import validate
from clom import validate as validate_driver
from clom.config import ValidateFlags
from clom.source import load_data, network_factory
from clom.validate import plan_trainings, random_images
from data.augment import normalize
from data.synthetic import SyntheticSet, TrainingSettings
from evaluation.ranking import augmentation_robust_score, label_robust_score, scores
from evaluation.recipes import sgd_by_epochs
from evaluation.score import score_network
from utils import cli

FLAGS = shlex.split(
    "--normalize_data --dataset CIFAR10 --img_size 8 --model ConvNetD1 --device cpu --epochs 3 --num_eval 2 "
    "--lr_decay_step 2 --synthesis_data_path soft --dsa"
)
LINES = Path("test_log/validate/results.jsonl")


def by_formula(gain):
    """The definition, in float64."""
    e = np.exp(np.float64(1))
    return (np.exp(np.float64(gain)) - 1 / e) / (e - 1 / e)


def test_formulas():
    for full, hard, own, random in np.random.default_rng(0).random((20, 4)):
        label = by_formula(0.5 * (own - random) - 0.5 * (full - hard))
        assert label_robust_score(full, hard, own, random) == pytest.approx(label, rel=1e-12)
        robust = by_formula(0.5 * (full - hard) + 0.5 * (own - random))  # four other accuracies
        assert augmentation_robust_score(full, hard, own, random) == pytest.approx(robust, rel=1e-12)
    assert label_robust_score(0.0, 1.0, 1.0, 0.0) == 1 and augmentation_robust_score(1, 0, 1, 0) == 1
    assert label_robust_score(1.0, 0.0, 0.0, 1.0) == 0 and augmentation_robust_score(0, 1, 0, 1) == 0
    assert label_robust_score(0.8, 0.8, 0.3, 0.3) == pytest.approx(1 / (1 + np.e))  # no gain, no loss


def test_score_of_the_means_and_spread_over_seeds():
    given = dict(all_real=[0.9, 0.8], hard_labels=[0.5, 0.2], own_labels=[0.6, 0.4], random=[0.3, 0.3])
    (found,) = scores({**given, "set_plain": [0.1, 0.2]}).values()  # one score lacks accuracies
    each = [by_formula(0.5 * (w - r) - 0.5 * (f - h)) for f, h, w, r in zip(*given.values(), strict=True)]
    assert found["score"] == pytest.approx(by_formula(0.5 * 0.2 - 0.5 * 0.5))
    assert found["std"] == pytest.approx(np.std(each)) and found["weight"] == 0.5
    assert [found[k] for k in given] == pytest.approx([0.85, 0.35, 0.5, 0.3])


def test_a_learned_rate_goes_with_its_momentum(workspace):
    write_set("datasets", "cifar10", size=8, train=40, test=10, classes=10)
    learned = TrainingSettings(lr=0.05, momentum=0.3)
    synthetic = SyntheticSet(torch.zeros(10, 3, 8, 8), torch.arange(10), training=learned)
    for more, wanted in (
        ([], (0.05, 0.3)),
        (["--lr", "0.02"], (0.02, 0.9)),
        (["--momentum", "0"], (0.05, 0.0)),
        (["--lr", "0.02", "--momentum", "0.5"], (0.02, 0.5)),
    ):
        flags = cli.parse(ValidateFlags, [*FLAGS, *more], prog="", description="")
        found = plan_trainings(flags, load_data(flags), synthetic)
        assert {(t.recipe.lr, t.recipe.momentum) for name, t in found.items() if name == "own_labels"} == {
            wanted
        }


@pytest.fixture
def soft(workspace):
    """A set of vectors whose classes are 0 three times, 1 never and the others once."""
    write_set("datasets", "cifar10", size=8, train=40, test=30, classes=10)
    generator = torch.Generator().manual_seed(3)
    classes = torch.tensor([0, 0, 0, 2, 3, 4, 5, 6, 7, 8, 9])
    y = torch.rand(11, 10, generator=generator)
    y[range(11), classes] += 1
    x = torch.randn(11, 3, 8, 8, generator=generator)
    SyntheticSet(x, y / y.sum(1, keepdim=True)).save("soft")
    SyntheticSet(x, classes).save("hard")
    return classes


def run(*more):
    """The first network's summary, and how many cells are kept."""
    assert validate.main([*FLAGS, *more]) == 0
    results = json.loads(Path("test_log/validate/CIFAR10/DC_ConvNetD1_ipc1.1/results.json").read_text())
    return results["summary"][0], results, len(LINES.read_text().splitlines())


def test_validate_reports_scores_and_what_they_are_computed_from(soft, capsys):
    plain, results, count = run()
    assert count == 4 and "label_robust_score" not in plain  # random images are always measured
    assert {cell["trained_on"] for cell in results["reference_cells"]} == {"random images"}
    row, results, count = run("--scores", "--full_epochs", "2")
    assert count == 12 and {k: row[k] for k in plain} == plain
    own, *_ = {cell["synthetic_set"] for cell in results["cells"]}
    finals = {}
    for cell in results["cells"] + results["reference_cells"]:
        on = cell.get("trained_on") or "set"
        if cell.get("synthetic_set", own) != own:
            assert on == "the set with classes as labels"
            on = "hard"
        finals.setdefault((on, cell["training"]["dsa"] != "none"), []).append(cell["final"])
    assert len(finals) == 6 and all(len(values) == 2 for values in finals.values())
    mean = {key: np.mean(values) for key, values in finals.items()}
    random, random_plain = mean["random images", True], mean["random images", False]
    label, robust = row["label_robust_score"], row["augmentation_robust_score"]
    gain = mean["set", True] - random - (mean["all real images", True] - mean["hard", True])
    assert label["score"] == pytest.approx(by_formula(gain / 2))
    gain = mean["set", True] - random + mean["set", False] - random_plain
    assert robust["score"] == pytest.approx(by_formula(gain / 2))
    assert label["hard_labels"] == mean["hard", True] and row["random_mean"] == random
    assert "label-robust score" in capsys.readouterr().out
    (whole,) = {
        cell["training"]["epochs"] for cell in results["reference_cells"] if "per_class" not in cell
    } - {3}
    assert whole == 2

    kept = LINES.read_text().splitlines(keepends=True)
    LINES.write_text("".join(kept[:6]) + kept[6][:40])  # killed while writing
    again, _, _ = run("--scores", "--full_epochs", "2")
    assert again == row
    known, _, count = run("--scores", "--full_accuracy", "0.9")
    assert count == 13  # the torn line, and no other network
    found = known["label_robust_score"]
    gain = found["own_labels"] - found["random"] - (0.9 - found["hard_labels"])
    assert found["all_real"] == 0.9 and found["score"] == pytest.approx(by_formula(gain / 2))
    assert found["hard_labels"] == label["hard_labels"] and known["mean"] == row["mean"]
    classes, _, _ = run("--synthesis_data_path", "hard")  # the same images as a set with classes
    assert classes["mean"] == label["hard_labels"] and classes["random_mean"] == random


def test_random_images_and_all_real_images(soft):
    image_set = load_data(ValidateFlags(dataset="CIFAR10", img_size=8))
    counts = soft.bincount().tolist()
    drawn = [random_images(image_set, counts, TrainingSettings(), seed) for seed in (0, 0, 1)]
    real = normalize(image_set.train.images, image_set.stats).flatten(1)
    for one in drawn:
        assert torch.equal(one.targets.bincount(), soft.bincount())
        same = (one.images.flatten(1)[:, None] == real).all(2)
        assert (same.sum(1) == 1).all() and same.sum(0).max() == 1  # real images, none twice
        assert torch.equal(image_set.train.labels[same.long().argmax(1)], one.targets)
    assert torch.equal(drawn[0].images, drawn[1].images)
    assert not torch.equal(drawn[0].images, drawn[2].images)
    few = random_images(image_set, [9] * 10, TrainingSettings(), 0)  # 4 of each class are there
    assert len(few) == 40

    recipe = sgd_by_epochs(3, 0.05, 0.9, 5e-4, 16, (2,)).override(dsa="crop_flip")
    as_set = SyntheticSet(real.view(-1, 3, 8, 8), image_set.train.labels)
    network = network_factory("ConvNetD1", image_set, CPU)
    found = [score_network(network, s, image_set, recipe, seed=1, device=CPU) for s in (as_set, None)]
    assert found[0].final == found[1].final and found[0].loss == pytest.approx(found[1].loss, rel=1e-6)


def test_flags_that_do_not_fit_scores(soft, capsys):
    fails(capsys, validate, [*FLAGS, "--scores", "--dsa_strategy", "none"], "--dsa_strategy none", "--scores")
    several = [*FLAGS, "--scores", "--eval_mode", "P", "--full_accuracy", "0.9"]
    fails(capsys, validate, several, "--full_accuracy", "3", "--eval_mode")
    fails(capsys, validate, [*FLAGS, "--full_accuracy", "0.9"], "--full_accuracy", "--scores")
    assert not Path("test_log").exists()


@pytest.mark.parametrize(
    "dataset, hflip, flips", [("cifar10", False, True), ("own", True, True), ("own", False, False)]
)
def test_dsa_does_not_flip_an_own_set_whose_mirror_images_mean_something_else(
    workspace, monkeypatch, dataset, hflip, flips
):
    """As in distillation; listed sets keep what is published."""
    folder = write_set("datasets", dataset, size=8, train=40, test=10, classes=10)
    (folder / "meta.json").write_text(json.dumps({"hflip": hflip}))
    SyntheticSet(torch.zeros(10, 3, 8, 8), torch.arange(10)).save("set")
    seen, plan = [], validate_driver.plan_trainings
    monkeypatch.setattr(validate_driver, "plan_trainings", lambda *args: seen.append(plan(*args)) or seen[-1])
    argv = [*FLAGS, "--dataset", dataset, "--synthesis_data_path", "set", "--ipc", "1", "--dsa", "--cost"]
    assert validate.main(argv) == 0
    assert ("flip" in seen[0]["own_labels"].recipe.dsa) == flips
    assert validate.main([*argv, "--dsa_strategy", "flip_color"]) == 0
    assert seen[1]["own_labels"].recipe.dsa == "flip_color"
