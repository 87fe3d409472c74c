"""The paper's tables from cells: what belongs where, what is missing, what --run does."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import NET, write_set, write_target

from data.synthetic import SyntheticSet
from distillation.run import resolved
from evaluation.jobs import run_missing
from evaluation.measure import CellStore, read_cells
from evaluation.presets import FULL_TARGETS, PRESETS, Preset
from evaluation.pretraining import load_pretraining
from evaluation.recipes import finetune_recipe, pretrain_recipe
from evaluation.tables import with_published_file
from evaluation.transfer import TestFlags
from krr_st import tables
from krr_st.published import PROBE_CELLS
from krr_st.tables import LAYOUTS, KernelTable, Layout, Sets, TablesFlags, forward_flops
from methods import METHODS
from utils import checkpoint
from utils.errors import UserError

BASE = "convnet_128_256_512_bn"


def cell(method, target, seed, accuracy, **changes):
    base = dict(
        source="cifar100",
        method=method,
        model=BASE,
        target=target,
        protocol="finetune",
        label_fraction=None,
        shots="all",
        seed=seed,
        steps_scale=1.0,
    )
    return {**base, "accuracy": accuracy, **changes}


@pytest.fixture
def log(tmp_path):
    store = CellStore(tmp_path / "results.jsonl")

    def add(*cells):
        for one in cells:
            store.add({k: v for k, v in one.items() if k != "accuracy"}, accuracy=one["accuracy"])
        return tmp_path

    return add


def table_of(layout, **flags):
    """The table of a layout that need not be one of the paper's."""
    table = KernelTable(TablesFlags(**flags))
    table.layout, table.sets = layout, tables.Sets(table.flags, layout.source)
    return table


def collect(layout, cells, **flags):
    """(method, model, target) -> the cells that are shown there; without those that have none."""
    table = table_of(layout, **flags)
    chosen = (place.choose(cells) for place in table.places())
    return {t: mine for t, mine in zip(layout.triples(), chosen, strict=True) if mine}


def test_layouts_are_the_papers():
    one, two, three = LAYOUTS["1"], LAYOUTS["2"], LAYOUTS["3"]
    assert one.targets == ("cifar100", "cifar10", "aircraft", "cars", "cub2011", "dogs", "flowers")
    assert set(one.methods) - {"scratch", "random_features"} == {
        "random",
        "kmeans",
        "dsa",
        "dm",
        "mtt",
        "kip",
        "frepo",
        "krr_st",
    }
    assert set(one.methods) - set(two.methods) == {"kip"}
    assert two.targets[0] == "tinyimagenet"
    assert set(three.methods) == {"scratch", "random_features", "random", "frepo", "krr_st"}
    assert "imagenet" not in three.targets
    assert LAYOUTS["fig3"].models == ("vgg", "alexnet", "mobilenet", "resnet10")
    assert LAYOUTS["4"].methods[0] == "gaussian" and LAYOUTS["4"].targets == ("cifar10",)
    for layout in LAYOUTS.values():
        assert {"krr_st", "scratch", "random_features"} <= set(layout.methods)


def test_cells_find_their_place_and_others_do_not():
    layout = LAYOUTS["1"]
    wrong = [
        cell("krr_st", "cifar10", 5, 1.0, source="tinyimagenet"),
        cell("krr_st", "cifar10", 5, 1.0, model="vgg"),
        cell("krr_st", "cifar10", 5, 1.0, protocol="linear"),
        cell("krr_st", "cifar10", 5, 1.0, shots="10"),
        cell("krr_st", "cifar10", 5, 1.0, label_fraction=0.01),
        cell("krr_st", "svhn", 5, 1.0),
    ]
    right = [cell("krr_st", "cifar10", s, 60.0 + s) for s in (2, 0, 1)]
    later = cell("krr_st", "cifar10", 1, 70.0)  # measured again: the last one counts
    found = collect(layout, [*wrong, *right, later])
    assert list(found) == [("krr_st", "base", "cifar10")]
    assert [c["accuracy"] for c in found["krr_st", "base", "cifar10"]] == [60.0, 70.0, 62.0]


def test_probe_tables_need_their_own_pretraining():
    layout = LAYOUTS["probe_cifar10_1"]
    recipe = {"epochs": 20, "wd": 1e-4}
    base = dict(source="cifar10", protocol="probe", label_fraction=0.01)
    short = cell("krr_st", "cifar10", 0, 42.0, pretraining=recipe, **base)
    long = cell("krr_st", "cifar10", 0, 50.0, pretraining={"epochs": 1000}, **base)
    decayed = cell("krr_st", "cifar10", 1, 51.0, pretraining={"epochs": 20, "wd": 1e-3}, **base)
    untrained = cell("scratch", "cifar10", 0, 34.0, **base)
    found = collect(layout, [short, long, decayed, untrained])
    assert {k: v[0]["accuracy"] for k, v in found.items()} == {
        ("krr_st", "base", "cifar10"): 42.0,
        ("scratch", "base", "cifar10"): 34.0,
    }


def test_cells_of_other_settings_do_not_count():
    layout = Layout("cifar100", ("krr_st",), ("base",), ("dogs",))
    pretraining = pretrain_recipe("krr_st", "cifar100", BASE).record()
    finetuning = finetune_recipe("dogs", BASE, 32).record()
    good = dict(pretraining=pretraining, finetuning=finetuning, size=32, dropout=0.0)
    others = dict(
        size=64, dropout=0.9, finetuning={**finetuning, "lr": 1e-9}, pretraining={**pretraining, "epochs": 1}
    )
    right = cell("krr_st", "dogs", 0, 60.0, **good)
    wrong = [cell("krr_st", "dogs", 0, 10.0, **{**good, name: value}) for name, value in others.items()]
    assert collect(layout, wrong) == {}
    (found,) = collect(layout, [right, *wrong]).values()
    assert found == [right]
    # What a set says of its training, and the steps of one of views, is the method's recipe, too.
    said = {**pretraining, "lr": 0.05, "target_scale": "std", "mixup": True}
    views = {**pretraining, "epochs": 0, "steps": 4000}
    for more in (dict(pretraining=said, training={"lr": 0.05}), dict(pretraining=views)):
        (found,) = collect(layout, [cell("krr_st", "dogs", 0, 61.0, **{**good, **more})]).values()
        assert [c["accuracy"] for c in found] == [61.0]


def test_published_numbers_of_the_probe():
    published = KernelTable(TablesFlags()).published
    assert published["probe_cifar10_1", "random_features", "cifar10"] == (38.25, 0.69)
    assert published["probe_cifar100_5", "krr_st", "flowers"] == (4.85, 0.75)
    assert published["probe_tinyimagenet_5", "mkdt", "tinyimagenet"] == (13.47, 0.35)
    assert published["probe_tinyimagenet_1", "krr_st", "cifar100"] == (8.49, None)
    assert len(published) == 5 * 3 * 7 + 3 + 7 + 3 * 3
    tables_of_all = {name: KernelTable(TablesFlags(table=name)).places() for name in LAYOUTS}
    shown = {(name, p.row, p.column) for name, ps in tables_of_all.items() for p in ps}
    assert published.keys() <= shown
    with_number = [p for ps in tables_of_all.values() for p in ps if p.published is not None]
    assert len(with_number) == len(published)


def test_published_rows_stand_beside_ours(log, capsys):
    base = dict(source="cifar10", protocol="probe", label_fraction=0.01)
    folder = log(
        cell("krr_st", "cifar10", 0, 42.14, pretraining={"epochs": 20}, **base),
        cell("mkdt", "cifar100", 0, 11.0, pretraining={"epochs": 20}, **base),
    )
    assert tables.main(["--table", "probe_cifar10_1", "--log_dir", str(folder)]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = {row[0].strip(): [text.strip() for text in row[1:]] for row in rows}
    assert rows["krr_st"][0] == "42.14 [22.14 ± 1.30, +20.00]"
    assert rows["mkdt"][:2] == ["– [41.42 ± 0.42]", "11.00 [10.97 ± 0.85, +0.03]"]
    recipe = pretrain_recipe("mkdt", "cifar10", BASE)  # of MKDT's pretrain_mse.py
    assert (recipe.loss, recipe.lr, recipe.momentum, recipe.wd) == ("mse", 0.1, 0.9, 1e-4)
    assert (recipe.epochs, recipe.batch_size, recipe.dsa) == (20, 256, "none")


def test_batchnorm_modes_of_table_4_are_not_mixed(log, capsys):
    base = dict(source="tinyimagenet", model="vgg", protocol="kd")
    folder = log(
        *(cell("gaussian", "cifar10", s, 10.0 + s, kd_bn="running", **base) for s in (0, 1)),
        *(cell("gaussian", "cifar10", s, 20.0, kd_bn="batch", **base) for s in (1, 2)),
    )
    for argv, mode, shown in (
        ([], "running", "10.50 ± 0.50"),
        (["--kd_bn", "batch"], "batch", "20.00 ± 0.00"),
    ):
        assert tables.main(["--table", "4", "--log_dir", str(folder), *argv]) == 0
        printed = capsys.readouterr().out
        assert f" {shown} |" in printed and f"BatchNorm: {mode} statistics" in printed
        records = csv.DictReader((folder / "table_4.csv").open())
        assert [r["n"] for r in records if r["n"] != "0"] == ["2"]


def test_table_4_measures_what_it_prints(tmp_path, monkeypatch):
    asked = []
    stand_in = SimpleNamespace(run=lambda: 0)
    monkeypatch.setattr(tables, "Distillation", lambda flags: asked.append(flags) or stand_in)
    table = KernelTable(TablesFlags(table="4", log_dir=tmp_path, synthetic_data_dir=tmp_path))
    for method in ("scratch", "random_features"):
        table.run_job(method, "vgg", ("cifar10",))
    assert [(f.method, f.kd_bn) for f in asked] == [("scratch", "running"), ("random_features", "running")]
    place = tmp_path / "tinyimagenet/random_features"
    checkpoint.save(torch.zeros(4, 3, 64, 64), place / "x_syn.pt")
    checkpoint.save(torch.zeros(4, 5), place / "y_syn.pt")
    sets = table.present_sets()
    # Plain noise trains nothing ahead: a set of it beside the others is not its cells'.
    shutil.copytree(place, tmp_path / "tinyimagenet/gaussian")
    assert table.present_sets() == sets
    assert sets.keys() == {"scratch", "random_features"} and len(set(sets.values())) == 1
    other = KernelTable(TablesFlags(table="2", synthetic_data_dir=tmp_path))
    assert "scratch" not in other.present_sets()


def test_published_file_of_the_user(tmp_path):
    path = tmp_path / "published.json"
    path.write_text(json.dumps({"1": {"krr_st": {"cifar10": [80.5, 0.2], "dogs": 12.0}}}))
    published = KernelTable(TablesFlags(published=path)).published
    assert published.items() > PROBE_CELLS.items()
    assert published["1", "krr_st", "cifar10"] == (80.5, 0.2)
    assert published["1", "krr_st", "dogs"] == (12.0, None)
    for bad in ("{", "[1]", '{"1": {"krr_st": {"cifar10": "high"}}}'):
        path.write_text(bad)
        with pytest.raises(UserError, match="--published"):
            with_published_file(PROBE_CELLS, path)
    with pytest.raises(UserError, match="cannot be read"):
        with_published_file(PROBE_CELLS, tmp_path / "no.json")


def test_table_files(log, capsys, tmp_path):
    folder = log(
        *(cell("krr_st", "cifar10", s, a) for s, a in enumerate((80.0, 81.0, 82.0))),
        cell("scratch", "dogs", 0, 5.0, steps_scale=0.01),
    )
    own = tmp_path / "published.json"
    own.write_text(json.dumps({"1": {"krr_st": {"cifar10": [80.5, 0.2]}}}))
    argv = ["--table", "1", "--log_dir", str(folder), "--published", str(own)]
    assert tables.main(argv) == 0
    printed = capsys.readouterr().out
    assert "81.00 ± 0.82 [80.50 ± 0.20, +0.50]" in printed  # population std of 80, 81, 82
    assert "5.00†" in printed
    records = list(csv.DictReader((folder / "table_1.csv").open()))
    assert len(records) == len(LAYOUTS["1"].methods) * 7
    filled = {(r["row"], r["column"]): r for r in records if r["n"] != "0"}
    assert set(filled) == {("krr_st", "cifar10"), ("scratch", "dogs")}
    assert float(filled["krr_st", "cifar10"]["difference"]) == pytest.approx(0.5)
    latex = (folder / "table_1.tex").read_text()
    assert latex.count("\\\\") == 1 + len(LAYOUTS["1"].methods)
    assert "krr\\_st" in latex and "$\\pm$" in latex and "–" not in latex
    assert (folder / "table_1.md").read_text().count("–") > 50


@pytest.mark.usefixtures("figures")
def test_figure_3_is_a_picture(log):
    folder = log(
        *(
            cell(m, "dogs", 0, a, source="tinyimagenet", model=n)
            for n in ("vgg", "resnet10")
            for m, a in (("scratch", 20.0), ("krr_st", 25.0))
        )
    )
    assert tables.main(["--table", "fig3", "--log_dir", str(folder)]) == 0
    from PIL import Image

    with Image.open(folder / "table_fig3.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_rows_that_are_asked_for(log, capsys):
    folder = log(*(cell(method, "cifar100", 0, 50.0) for method in ("scratch", "krr_st")))
    assert tables.main([f"--log_dir={folder}", "--methods", "krr_st", "random"]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert rows[2:] == ["random", "krr_st"]  # in the table's order
    table = KernelTable(TablesFlags(log_dir=folder, methods=("krr_st",)))
    assert {method for method, *_ in table.layout.triples()} == {"krr_st"}
    assert tables.main([f"--log_dir={folder}", "--methods", "mkdt"]) == 2
    assert "unknown row in --methods 'mkdt'; valid: dm" in capsys.readouterr().err


def test_unknown_table(capsys):
    assert tables.main(["--table", "7"]) == 2
    assert "fig3" in capsys.readouterr().err


def test_jobs_that_cannot_run_are_no_success(workspace, capsys):
    """Nothing is prepared here: every job of the table fails, and the command says so."""
    argv = ["--table", "probe_cifar10_1", "--device", "cpu", "--num_test", "1"]
    assert tables.main([*argv, "--run"]) == 1
    printed = capsys.readouterr().out
    assert "2 of the missing jobs could not be run" in printed
    assert "cifar10: target model" in printed  # which the other rows wait for
    assert tables.main(argv) == 0  # a look at what is there


def test_flops_against_a_count_by_hand():
    # conv 3->4 and 4->8 (3x3) on 8x8 and 4x4 maps, then 8·2·2 -> 10; two operations each.
    by_hand = 2 * (8 * 8 * 4 * 27 + 4 * 4 * 8 * 36 + 32 * 10)
    assert forward_flops("convnet_4_8_none", 8) == by_hand


LAYOUT = Layout("cifar100", ("scratch", "krr_st"), ("base", "vgg"), ("cifar10", "dogs"))


def run_all(table):
    return run_missing(table.missing_jobs)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a function (method, model, targets) in the place of the real commands."""

    def put(function):
        monkeypatch.setattr(KernelTable, "run_job", lambda self, *job: function(*job))
        monkeypatch.setattr(KernelTable, "set_job", lambda self, method: None)

    return put


def test_missing_jobs_are_estimated_and_skip_what_is_done(log, stand_in):
    folder = log(*(cell("scratch", "cifar10", s, 1.0) for s in range(3)))
    ran = {}
    stand_in(lambda method, model, targets: ran.update({(method, model): targets}))
    table = table_of(LAYOUT, log_dir=folder, num_test=3)
    cost = {job.name.split(": ")[1]: job.cost for job in table.missing_jobs()}
    # By hand: 3 seeds x (3 passes x 5000 steps of 256 images on dogs, and its test images).
    assert cost[f"scratch, {BASE}"] == 3 * (3 * 5000 * 256 + 10000) * forward_flops(BASE, 32)
    pretraining = 3 * 3 * 4 * 1000 * 256 * forward_flops("vgg", 32)
    assert cost["krr_st, vgg"] - cost["scratch, vgg"] == pytest.approx(pretraining)
    run_all(table)
    assert ran["scratch", "base"] == ["dogs"]
    assert ran["krr_st", "vgg"] == ["cifar10", "dogs"]


def test_costs_of_distillation_and_probe():
    def cost(table, method, model, targets, seeds, scale=1.0):
        flags = TablesFlags(table=table, num_test=seeds, steps_scale=scale)
        return KernelTable(flags).cost(method, model, targets)

    kd = "4"
    unit = forward_flops("vgg", 64)
    # 1000 epochs of 2000 images in steps of 512, after as many in steps of 256, scaled together.
    by_hand = 3 * 0.01 * 1000 * (4 * 512 + 8 * 256) + 20000
    assert cost(kd, "krr_st", "vgg", ("cifar10",), 1, 0.01) == pytest.approx(by_hand * unit)
    gaussian = 3 * 0.01 * 1000 * 4 * 512 + 20000
    assert cost(kd, "gaussian", "vgg", ("cifar10",), 2, 0.01) == 2 * gaussian * unit
    probe = "probe_cifar10_1"
    untrained = cost(probe, "scratch", "base", ("cifar10", "dogs"), 1)
    assert untrained == 120000 * forward_flops(BASE, 32)
    twenty_epochs = 3 * 20 * 4 * 256 * forward_flops(BASE, 32)  # not the 1000 of the other tables
    assert cost(probe, "krr_st", "base", ("cifar10", "dogs"), 1) == untrained + twenty_epochs


def test_shortened_cells_do_not_stand_for_whole_ones(log, stand_in):
    stand_in(lambda *job: None)
    folder = log(*(cell("scratch", t, 0, 1.0, steps_scale=0.1) for t in ("cifar10", "dogs")))
    names = [j.name for j in table_of(LAYOUT, log_dir=folder, num_test=1).missing_jobs()]
    assert len(names) == 4
    short = table_of(LAYOUT, log_dir=folder, num_test=1, steps_scale=0.1)
    assert len(short.missing_jobs()) == 3
    whole = cell("scratch", "dogs", 1, 2.0)
    later = cell("scratch", "dogs", 1, 3.0, steps_scale=0.1)
    found = collect(LAYOUT, [cell("scratch", "dogs", 0, 1.0, steps_scale=0.1), whole, later])
    assert found["scratch", "base", "dogs"] == [whole]


def test_seeds_of_different_sets_are_not_averaged():
    old = [cell("krr_st", "dogs", s, 1.0, synthetic_set="old") for s in range(3)]
    new = [cell("krr_st", "dogs", s, 2.0, synthetic_set="new") for s in range(2)]
    assert collect(LAYOUT, [*old, *new])["krr_st", "base", "dogs"] == new
    assert collect(LAYOUT, [*new, *old])["krr_st", "base", "dogs"] == old


def test_a_replaced_set_is_measured_again(log, tmp_path):
    layout = Layout("cifar100", ("scratch", "krr_st"), ("base",), ("dogs",))
    flags = dict(log_dir=tmp_path, num_test=1, synthetic_data_dir=tmp_path / "sets")
    place = tmp_path / "sets/cifar100/krr_st"

    def write(value):
        checkpoint.save(torch.full((4, 3, 32, 32), value), place / "x_syn.pt")
        checkpoint.save(torch.zeros(4, 5), place / "y_syn.pt")

    def measure():  # as test.py files it
        test = TestFlags(source_data_name="cifar100", method="krr_st", synthetic_data_dir=tmp_path / "sets")
        settings = load_pretraining(test, 32, BASE).record()
        log(cell("krr_st", "dogs", 0, 1.0, synthetic_set=settings["synthetic_set"]))

    def missing():
        return [job.name.split(": ")[1].split(",")[0] for job in table_of(layout, **flags).missing_jobs()]

    log(cell("scratch", "dogs", 0, 1.0))
    write(0.0)
    assert missing() == ["krr_st"]
    measure()
    assert missing() == []
    write(1.0)
    assert missing() == ["krr_st"]
    measure()
    assert missing() == []
    write(0.0)  # back again: what is known of it is shown, though other cells are later
    assert missing() == []
    cells = read_cells(tmp_path / "results.jsonl")
    (one,) = collect(layout, cells, **flags)["krr_st", "base", "dogs"]
    assert one["synthetic_set"] == cells[1]["synthetic_set"] != cells[2]["synthetic_set"]
    shutil.rmtree(place)  # what was measured counts where no set says otherwise
    assert missing() == []


def test_interrupted_run_goes_on_without_repeating_or_losing(log, stand_in, capsys):
    folder = log()
    table = table_of(LAYOUT, log_dir=folder, num_test=1)
    ran, stop_after = [], 2

    def run_job(method, model, targets):
        if len(ran) == stop_after:
            raise KeyboardInterrupt
        ran.append((method, model))
        for target in targets:
            log(cell(method, target, 0, 50.0, model=BASE if model == "base" else model))

    stand_in(run_job)
    with pytest.raises(KeyboardInterrupt):
        run_all(table)
    stop_after = None
    run_all(table)
    assert len(ran) == len(set(ran)) == 4
    assert " left" in capsys.readouterr().out
    found = collect(LAYOUT, [json.loads(x) for x in (folder / "results.jsonl").open()])
    assert set(found) == set(LAYOUT.triples()) and len(found) == 8
    assert table.missing_jobs() == []


def test_a_job_that_cannot_run_does_not_stop_the_others(log, stand_in):
    table = table_of(LAYOUT, log_dir=log(), num_test=1)
    ran = []

    def run_job(method, model, targets):
        ran.append(method)
        if method == "krr_st":
            raise UserError("no synthetic set")

    stand_in(run_job)
    skipped = run_all(table)
    assert len(ran) == 4 and len(skipped) == 2 and "no synthetic set" in skipped[0]


def test_targets_that_are_not_prepared_do_not_stop_the_others(small_source, capsys):
    layout = Layout("cifar10", ("scratch",), ("base",), ("cifar10", "cars"), "probe", 0.5)
    table = table_of(layout, log_dir=Path("log"), num_test=1, steps_scale=1e-5, device="cpu")
    (said,) = run_all(table)
    assert "not prepared, not measured: cars; the first is made by: python -m data.prepare" in said
    assert [cell["target"] for cell in read_cells("log/results.jsonl")] == ["cifar10"]


def test_every_method_of_every_table_has_a_recipe():
    for layout in LAYOUTS.values():
        for method in layout.methods:
            if method not in ("scratch", "gaussian"):
                assert pretrain_recipe(method, layout.source, "base").lr > 0


def test_full_targets_are_known_sets():
    from data.specs import KRR_SPECS

    assert {t for row in FULL_TARGETS.values() for t in row} <= set(KRR_SPECS)
    assert torch.get_num_threads() == 1  # see conftest


# ------------------------------------------------------------------ sets that are missing


@pytest.fixture
def small_source(workspace, monkeypatch):
    """cifar10 at 8 pixels with the smallest networks."""
    write_set("datasets", "cifar10", train=60, test=20, classes=10)
    monkeypatch.setitem(PRESETS, "cifar10", Preset(8, 20, NET, NET))
    return workspace


@pytest.mark.slow
def test_rows_from_nothing(small_source, capsys):
    """The target model first, then the sets, then the measurements; a second call has nothing to do."""
    methods = ("scratch", "random", "random_features", "high_loss_features", "frepo", "dm", "krr_st")
    layout = Layout("cifar10", methods, ("base",), ("cifar10",), "probe", 0.5, 1)
    table = table_of(layout, log_dir=Path("log"), num_test=1, steps_scale=1e-5, device="cpu")
    assert run_all(table) == []
    printed = capsys.readouterr().out
    order = [line.split("] ")[1].split(" (")[0] for line in printed.splitlines() if line.startswith("[")]
    measured = [f"cifar10 probe 50 % of labels: {method}, {NET}" for method in methods]
    made = [f"cifar10: set of {method}" for method in methods[1:]]
    assert sorted(order) == sorted([*measured, *made, "cifar10: target model"])
    for method in methods[1:]:
        if method not in ("random", "frepo", "dm"):
            assert order.index("cifar10: target model") < order.index(f"cifar10: set of {method}")
        assert order.index(f"cifar10: set of {method}") < order.index(measured[methods.index(method)])
    assert printed.count("operations)") == len(order)
    assert len(collect(layout, read_cells("log/results.jsonl"), log_dir=Path("log"))) == len(methods)
    assert table.missing_jobs() == []
    frepo = SyntheticSet.load("synthetic_data/cifar10/frepo")
    assert frepo.training.whitening is not None and frepo.info["steps_scale"] == 1e-5
    assert SyntheticSet.load("synthetic_data/cifar10/dm").targets.bincount().tolist() == [2] * 10


@pytest.mark.slow
def test_the_other_rows_from_nothing(small_source, monkeypatch):
    """Methods whose sets take longer, experts included; published rates are too high for eight pixels."""
    small = {"lr_img": 1e-6, "lr_lr": 0.0, "lr_y": 0.0, "lr_teacher": 1e-4}
    for name in ("mtt", "mkdt"):
        row = METHODS[name]
        published = lambda data, count, row=row: {**row.published(data, count), **small}  # noqa: E731
        monkeypatch.setitem(METHODS, name, replace(row, published=published))
    methods = ("kip", "dsa", "mtt", "mkdt")
    layout = Layout("cifar10", methods, ("base",), ("cifar10",), "probe", 0.5, 1)
    table = table_of(layout, log_dir=Path("log"), num_test=1, steps_scale=1e-5, device="cpu")
    assert run_all(table) == [] and table.missing_jobs() == []
    assert {cell["method"] for cell in read_cells("log/results.jsonl")} == set(methods)
    assert SyntheticSet.load("synthetic_data/cifar10/mtt").training.lr > 0


def test_a_set_of_a_shortened_distillation_does_not_stand_for_a_whole_one(small_source):
    sets = KernelTable(TablesFlags(table="probe_cifar10_1", steps_scale=0.5)).sets
    assert sets.is_missing("frepo")
    for scale, missing in ((0.1, True), (0.5, False), (1.0, False)):
        made = SyntheticSet(torch.zeros(2, 3, 8, 8), torch.zeros(2, 10), info={"steps_scale": scale})
        made.save(sets.path("frepo"))
        assert sets.is_missing("frepo") == missing
    (sets.path("frepo") / "y_syn.pt").write_bytes(b"")
    assert not sets.is_missing("frepo")  # damaged: its measurement says so
    made.save(sets.path("kip").with_suffix(".safetensors"), "safetensors")
    assert not sets.is_missing("kip")  # in one file, where test.py finds it, too


def test_a_shortened_set_in_one_file_is_replaced_in_its_place(small_source):
    sets = KernelTable(TablesFlags(table="probe_cifar10_1", steps_scale=1e-5, device="cpu")).sets
    place = sets.path("dm").with_suffix(".safetensors")
    place.parent.mkdir(parents=True)
    short = SyntheticSet(torch.zeros(10, 3, 8, 8), torch.arange(10), info={"steps_scale": 1e-9})
    short.save(place, "safetensors")
    assert sets.is_missing("dm")
    sets.distil(METHODS["dm"])
    assert not sets.is_missing("dm") and sets.path("dm") == place
    assert SyntheticSet.load(place).made_by == "DM"


@pytest.mark.parametrize("method", ["krr_st", "frepo", "kip", "dm", "dsa", "mtt"])
def test_costs_grow_with_the_length(small_source, method):
    write_target("cifar10")

    def cost(scale):
        flags = TablesFlags(table="probe_cifar10_1", steps_scale=scale, device="cpu")
        return KernelTable(flags).sets.job(method).cost

    assert cost(0.2) == pytest.approx(2 * cost(0.1)) and cost(0.1) > 0


def test_methods_with_labels_start_as_published(workspace):
    sets = Sets(TablesFlags(table="1"), "cifar100")
    starts = {name: METHODS[name] for name in ("dc", "dsa", "dm")}
    found = {name: resolved(row, sets.run_flags(row)).init for name, row in starts.items()}
    assert found == {"dc": "noise", "dsa": "real", "dm": "real"}
