"""DC, DSA, DM with and without CLoM beside the published numbers."""

import csv
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_set
from test_cli import fails

import train_original_models
from clom import tables
from clom.config import DistillFlags
from clom.published import PUBLISHED, RANDOM
from clom.tables import (
    VARIANTS,
    TablesFlags,
    Variant,
    cell_key,
    data_facts,
    estimate,
    labelled,
    missing_jobs,
    parse_variant,
    spots,
)
from distillation import loop
from evaluation.measure import CellStore, read_cells

ROOT = Path(__file__).resolve().parents[1]
LOG = Path("test_log/clom")
TINY = [
    "--datasets",
    "CIFAR10",
    "--ipcs",
    "1",
    "--model",
    "ConvNetD1",
    "--Iteration",
    "2",
    "--num_eval",
    "2",
    "--epoch_eval_train",
    "1",
    "--batch_real",
    "2",
    "--models_pool",
    "ConvNetD1",
    "--epoch",
    "1",
    "--CLoM_batch_size",
    "8",
    "--device",
    "cpu",
]


@pytest.fixture
def tiny(workspace):
    data_facts.cache_clear()
    write_set("datasets", "cifar10", size=32, train=30, test=20, classes=10)
    return workspace


def teacher(seed="0"):
    argv = [
        "--normalize_data",
        "--dataset",
        "CIFAR10",
        "--model",
        "ConvNetD1",
        "--epochs",
        "1",
        "--num",
        "1",
        "--seed",
        seed,
        "--device",
        "cpu",
    ]
    assert train_original_models.main(argv) == 0


def cells():
    return read_cells(LOG / "results.jsonl")


def csv_rows():
    return {(r["row"], r["column"]): r for r in csv.DictReader((LOG / "table.csv").open())}


def test_published_numbers_and_their_places():
    assert PUBLISHED["CIFAR10", "DM", "10"] == (48.9, 0.6)
    assert PUBLISHED["CIFAR100", "DSA", "50"] == (42.8, 0.4)
    assert PUBLISHED["SVHN", "DC", "1"] == (31.2, 1.4)
    assert PUBLISHED["tinyimagenet", RANDOM, "50"] == (15.0, 0.4)
    assert ("CIFAR100", "DC", "50") not in PUBLISHED  # nobody printed it
    flags = TablesFlags(datasets=("MNIST", "CIFAR10", "CIFAR100"))
    shown = {(s.dataset, s.row, str(s.ipc)) for s in spots(flags)}
    assert {k for k in PUBLISHED if k[0] in flags.datasets and int(k[2]) <= 50} <= shown


def test_table_without_a_run(workspace, capsys):
    assert tables.main(["--datasets", "CIFAR10", "--ipcs", "10"]) == 0
    printed = capsys.readouterr().out
    assert "– [48.90 ± 0.60]" in printed and "84.8" in printed
    rows = csv_rows()
    assert len(rows) == 1 + 3 * 4 and all(r["n"] == "0" for r in rows.values())
    # Another network or size than the published one: nothing to compare with.
    for other in (
        ["--model", "ConvNetD2"],
        ["--img_size", "16"],
        ["--init", "noise"],
        ["--lr_img", "2"],
        ["--batch_real", "64"],
    ):
        assert tables.main(["--datasets", "CIFAR10", "--ipcs", "10", *other]) == 0
        assert "48.90" not in capsys.readouterr().out


def test_published_rows_are_found_in_any_spelling(workspace, capsys):
    argv = ["--ipcs", "1", "--methods", "DM", "--variants", "none", "--datasets"]
    assert tables.main([*argv, "tinyimagenet"]) == 0
    assert "[3.90 ± 0.20]" in capsys.readouterr().out
    before = (LOG / "table.md").read_bytes()
    assert tables.main([*argv, "TinyImageNet"]) == 0
    assert (LOG / "table.md").read_bytes() == before


def test_cells_run_are_kept_and_pooled(tiny, capsys):
    teacher()
    capsys.readouterr()
    argv = [*TINY, "--methods", "DM", "--variants", "none", "ce:10", "--num_exp", "2"]
    assert tables.main([*argv, "--run"]) == 0
    printed = capsys.readouterr().out
    assert "[4/4]" in printed and " left" in printed and "†" in printed
    assert len(cells()) == 4 and {c["seed"] for c in cells()} == {0, 1}
    for cell in cells():  # the value is that of main.py's own results
        results = json.loads((LOG / "runs" / cell["folder"] / "results.json").read_text())
        (network,) = results["networks"]
        assert cell["accuracy"] == pytest.approx(100 * network["mean"]) and network["n"] == 2
    mine = [c for c in cells() if c["variant"] == "ce"]
    values = [v for c in mine for v in c["accuracies"]]
    row = csv_rows()["DM + CLoM ce, α 10", "CIFAR10, 1 ipc"]
    assert row["n"] == "4" and row["scaled"] == "True"
    assert float(row["std"]) == pytest.approx(statistics.pstdev(values))
    start = [v for c in cells() if c["variant"] == "none" for v in c["start_accuracies"]]
    assert float(csv_rows()[RANDOM, "CIFAR10, 1 ipc"]["mean"]) == pytest.approx(statistics.fmean(start))
    before = (LOG / "results.jsonl").read_bytes()
    assert tables.main([*argv, "--run"]) == 0
    assert "[1/" not in capsys.readouterr().out
    assert (LOG / "results.jsonl").read_bytes() == before
    # A pre-trained model that was trained again makes other cells; only those are averaged then.
    shutil.rmtree("pretrained_model")
    teacher(seed="1")
    again = [*argv, "--run"]
    again[again.index("--num_exp") + 1] = "1"
    assert tables.main(again) == 0
    assert len(cells()) == 5
    rows = csv_rows()
    assert rows["DM + CLoM ce, α 10", "CIFAR10, 1 ipc"]["n"] == "2"
    assert rows["DM", "CIFAR10, 1 ipc"]["n"] == "4"


def test_a_network_with_batchnorm_is_judged_without(tiny, capsys):
    """As published (`--eval_mode S`); the row of random images is of the same network."""
    argv = [*TINY, "--methods", "DM", "--variants", "none", "--num_exp", "1", "--run"]
    argv[argv.index("ConvNetD1")] = "ConvNetBN"
    assert tables.main(argv) == 0
    assert "accuracy in % of ConvNet after" in (printed := capsys.readouterr().out)
    assert "; distilled with ConvNetBN" in printed
    (cell,) = cells()
    assert len(cell["start_accuracies"]) == 2
    assert csv_rows()[RANDOM, "CIFAR10, 1 ipc"]["n"] == "2"


def test_missing_models_are_said_and_skipped(tiny, capsys):
    argv = [*TINY, "--methods", "DM", "--variants", "none", "cos", "--num_exp", "1", "--run"]
    assert tables.main(argv) == 1
    printed = capsys.readouterr().out
    assert "skipped: looked for 1 x" in printed and "train_original_models.py" in printed
    assert "1 of the missing jobs could not be run; the reasons are above the table" in printed
    assert [c["variant"] for c in cells()] == ["none"]
    assert not list((LOG / "runs").glob("*cos*"))
    argv[argv.index("CIFAR10")] = "SVHN"
    assert tables.main(argv) == 1
    assert "svhn" in capsys.readouterr().out and len(cells()) == 1


def test_interrupted_cell_goes_on(tiny, monkeypatch, capsys):
    argv = [*TINY, "--methods", "DM", "--variants", "none", "--num_exp", "1", "--run", "--save_every", "1"]
    assert tables.main([*argv, "--log_dir", "whole"]) == 0
    save = loop.save_run

    def stop(*args, **options):
        save(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_run", stop)
    assert tables.main(argv) == 130
    assert cells() == []
    monkeypatch.setattr(loop, "save_run", save)
    capsys.readouterr()
    assert tables.main(argv) == 0
    assert "resuming after iteration 1 of 2" in capsys.readouterr().out
    (whole,), (parts,) = read_cells(Path("whole/results.jsonl")), cells()
    assert parts["accuracies"] == whole["accuracies"]


@pytest.mark.slow
def test_two_workers_run_every_cell_once(tiny):
    argv = [*TINY, "--methods", "DM", "--variants", "none", "--num_exp", "4", "--run", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "clom.tables", *argv], env=environment, timeout=160, check=False
    )
    assert done.returncode == 0
    assert sorted(c["seed"] for c in cells()) == [0, 1, 2, 3]


def test_scaled_lengths_are_marked():
    def marked(**changes):
        """The lengths of a cell, and whether it is marked as shortened."""
        *_, spot = spots(flags(**changes))
        return spot.run.Iteration, spot.run.epoch_eval_train, spot.place({}).shortened({})

    assert marked() == (20000, 1000, False)
    assert marked(steps_scale=0.01) == (200, 10, True)
    assert marked(Iteration=0, epoch_eval_train=0) == (0, 0, True)  # the start
    assert marked(Iteration=19999)[2] and not marked(Iteration=20000)[2]
    assert marked(methods=("DC",), datasets=("MNIST",)) == (1000, 1000, False)  # with DC's augmentation
    *_, spot = spots(flags(methods=("DSA",), datasets=("MNIST",)))
    assert "flip" not in spot.run.dsa_strategy


def test_cells_have_the_published_settings():
    """DSA and DM start from real images; DM's rate is 10 from 100 images a class on CIFAR-10."""

    def settings(method, ipc, dataset="CIFAR10", **changes):
        *_, spot = spots(flags(methods=(method,), ipcs=(ipc,), datasets=(dataset,), **changes))
        return spot.run.init, spot.run.lr_img, spot.place(PUBLISHED).published

    assert settings("DSA", 1) == ("real", 0.1, (28.8, 0.7))
    assert settings("DC", 1) == ("noise", 0.1, (28.3, 0.5))
    assert settings("DM", 50) == ("real", 1.0, (63.0, 0.4))
    assert settings("DM", 100) == ("real", 10.0, (67.0, 0.3))
    assert settings("DM", 1000) == ("real", 10.0, (79.8, 0.3))
    assert settings("DM", 100, "CIFAR100")[:2] == ("real", 1.0)
    # What is given wins, and is not compared with a number of other settings.
    assert settings("DSA", 1, init="noise") == ("noise", 0.1, None)
    assert settings("DM", 100, lr_img=1.0) == ("real", 1.0, None)
    assert settings("DM", 10, lr_img=1.0, init="real") == ("real", 1.0, (48.9, 0.6))
    # The images before distillation do not depend on the rate.
    start, *_ = spots(flags(lr_img=2.0))
    assert start.place(PUBLISHED).published == (15.4, 0.3)


def flags(**changes):
    base = dict(datasets=("CIFAR10",), ipcs=(1,), methods=("DM",), variants=("none",))
    return TablesFlags(**{**base, **changes})


def test_identity_of_a_cell(tiny):
    def identity(seed=0, **changes):
        changed = flags(Iteration=2, models_pool=("ConvNetD1",), epoch=1, **changes)
        (spot,) = [s for s in spots(changed) if not s.start]
        return CellStore.identity(cell_key(spot.run, seed))

    teacher()
    base, ce, cos = identity(), identity(variants=("ce",)), identity(variants=("cos",))
    others = [
        identity(seed=1),
        identity(num_eval=3),
        identity(batch_real=3),
        ce,
        cos,
        identity(variants=("ce:10",)),
        identity(variants=("cos",), CLoM_batch_size=9),
    ]
    assert len({base, *others}) == 1 + len(others)
    # What is not used, where files lie and on what it runs make no difference.
    same = [
        identity(CLoM_batch_size=9),
        identity(model_num=7),
        identity(save_every=3),
        identity(source_dataset="CIFAR100"),
        identity(log_dir=Path("other")),
        identity(gpu_id=1),
        identity(num_exp=9),
        identity(data_path=Path("datasets")),
    ]
    assert {base, *same} == {base}
    assert identity(variants=("ce",), source_dataset="CIFAR100") == ce
    assert identity(CLoM_teacher_stats="target") == base
    assert identity(variants=("cos",), CLoM_teacher_stats="target") != cos
    write_set("datasets", "cifar10", size=32, train=30, test=20, classes=10, seed=1)
    data_facts.cache_clear()
    assert identity() != base


def test_what_normalises_an_own_set_is_in_its_cells(workspace):
    write_set("datasets", "mine", size=32, train=30, test=20)

    def key(**meta):
        Path("datasets/mine/meta.json").write_text(json.dumps(meta))
        data_facts.cache_clear()
        (run,) = [s.run for s in spots(flags(datasets=("mine",))) if not s.start]
        return CellStore.identity(cell_key(run, 0))

    at = lambda *mean: {"sizes": {"32": {"mean": mean, "std": (0.2, 0.2, 0.2)}}}  # noqa: E731
    names = list("abcd")
    assert key(**at(0.5, 0.5, 0.5)) == key(**at(0.5, 0.5, 0.5), class_names=names)
    others = [key(**at(0.4, 0.5, 0.5)), key(**at(0.5, 0.5, 0.5), class_names=[*names, "e"])]
    assert len({key(**at(0.5, 0.5, 0.5)), *others}) == 3


def test_costs_by_hand_and_their_order(tiny, monkeypatch):
    monkeypatch.setattr(tables, "_network_flops", lambda *a: 1)
    common = dict(Iteration=5, epoch_eval_train=7, num_eval=2, batch_real=4)

    def cost(method, variant="none", ipc=1):
        changed = flags(methods=(method,), variants=(variant,), ipcs=(ipc,), **common)
        (spot,) = [s for s in spots(changed) if not s.start]
        return estimate(spot.run)

    evaluation = 2 * 2 * 3 * 7 * 10
    assert cost("DM") == 5 * (40 + 3 * 10) + evaluation
    assert cost("DM", "cos") == cost("DM") + 5 * 3 * 10
    assert cost("DC") == 5 * (3 * 40 + 6 * 10) + evaluation
    # ipc 10: ten image updates, nine times fifty epochs of the network between them
    assert cost("DC", ipc=10) == 5 * (10 * (120 + 600) + 9 * 50 * 300) + 10 * evaluation
    teacher()
    jobs = missing_jobs(flags(methods=("DC", "DM"), num_exp=2, **common))
    assert [job.name for job in jobs] == [
        f"CIFAR10, 1 ipc: {m}, seed {s}" for m in ("DC", "DM") for s in (0, 1)
    ]


def test_variants_as_typed():
    assert parse_variant("cos") == Variant("cos") and parse_variant("cos").alpha == 1000
    assert parse_variant("ce:1e2").heading == "CLoM ce, α 100"
    assert set(TablesFlags().variants) == set(VARIANTS)
    assert TablesFlags().methods == labelled() and {"DC", "DSA", "DM"} <= set(labelled())


def test_bad_flags(workspace, capsys):
    for bad in ("mse", "ce:high", "none:3", "cos:-1", "cos:inf", "ce:"):
        fails(capsys, tables, ["--variants", bad], "--variants", "cos")
    fails(capsys, tables, ["--methods", "MTT"], "--methods", "DSA")
    fails(capsys, tables, ["--ipcs", "0"], "--ipcs", "at least 1")
    fails(capsys, tables, ["--model", "ViT"], "unknown network 'ViT'")
    fails(capsys, tables, ["--published", "none.json"], "--published none.json")
    hf = ["--models_pool", "hf:some/model", "--variants", "ce", "--run"]
    fails(capsys, tables, hf, "hf:some/model")
    assert not Path("test_log").exists()


def test_flags_mean_what_they_mean_in_main():
    own = {f.name: f for f in dataclasses.fields(TablesFlags)}
    main = {f.name: f for f in dataclasses.fields(DistillFlags)}
    for name in own.keys() & main.keys() - {"num_exp", "seed", "source_dataset"}:
        assert own[name].default == main[name].default
        assert own[name].metadata == main[name].metadata
    files = ("clom/tables.py", "evaluation/slurm.py", "evaluation/tables.py")
    text = "".join((ROOT / name).read_text() for name in files)
    for name in own.keys() - main.keys():
        assert f"flags.{name}" in text, name
    assert all(len(f.metadata["help"]) > 5 for f in own.values())


def test_a_place_takes_only_cells_of_these_flags(tiny):
    wanted = flags(Iteration=2)
    (spot,) = [s for s in spots(wanted) if not s.start]
    key = cell_key(spot.run, 0)
    cell = {**key, "accuracies": [1.0]}
    other = [{**cell, "Iteration": 3}, {**cell, "CLoM": True}, {**cell, "num_eval": 1}, {"seed": 0}]
    assert spot.place({}).choose([*other, cell, *other]) == [cell]


def test_an_unknown_data_set_is_no_empty_table(tiny, capsys):
    fails(capsys, tables, ["--datasets", "CIFAR10", "nope"], "unknown data set 'nope'", "CIFAR100", "cifar10")
    assert not LOG.exists()
    write_set("elsewhere", "nope", classes=2)
    assert tables.main(["--datasets", "nope", "--data_path", "elsewhere", "--log_dir", "other"]) == 0
    # Finished cells are shown where the images are not, too.
    CellStore("other/results.jsonl").add({"dataset": "nope", "seed": 0}, accuracies=[1.0])
    assert tables.main(["--datasets", "nope", "--log_dir", "other"]) == 0
