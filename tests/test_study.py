"""The study on a tiny set: its rows, its equivalence, its restart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import NET, write_set, write_target
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data.augment import normalize, to_float
from data.load import load_set
from distillation.run import resolved
from evaluation import transfer
from evaluation.transfer import Measure
from krr_st import study
from methods import METHODS
from models import get_model
from utils import cli
from utils.errors import UserError
from utils.run_folder import write_json

FLAGS = [
    "--data_name=tiny",
    "--img_size=8",
    "--network=convnet_4_bn",
    "--target_epochs=1",
    "--num_images=4",
    "--curve",
    "4",
    "8",
    "--seeds=1",
    "--outer_iteration=3",
    "--outer_batch_size=16",
    "--num_models=2",
    "--online_iteration=2",
    "--pre_iteration=2",
    "--shots=1",
    "--device=cpu",
]

ROWS = ("random + features", "random + class labels", "krr_st", "curve 8")


@pytest.fixture
def quick(workspace, monkeypatch):
    """Label recipes without their thousand epochs."""
    write_set("datasets", "tiny", train=400, test=40)
    load = transfer.load_pretraining

    def shortened(flags, *rest):
        return load(replace(flags, pre_iteration=2), *rest)

    monkeypatch.setattr(transfer, "load_pretraining", shortened)


def keep_sets(monkeypatch, *names):
    """Leave out the study's other sets."""
    monkeypatch.setattr(study, "SETS", {name: study.SETS[name] for name in names})


@pytest.fixture
def brief(quick, monkeypatch):
    keep_sets(monkeypatch, *ROWS[:2])


@pytest.mark.usefixtures("figures")
def test_study(quick, monkeypatch, capsys):
    assert study.main([*FLAGS, "--levers", "krr_st", "k-means start"]) == 0
    assert "fine-tuning" not in Path("study/tiny/tables.md").read_text()
    argv = [*FLAGS, "--levers", "krr_st", "k-means start", "--finetune_iteration=2"]
    assert study.main(argv) == 0
    out = capsys.readouterr().out
    text = Path("study/tiny/tables.md").read_text()
    assert "fine-tuning tiny" in text
    rows = ["no pre-training", study.TARGET, *study.SETS, "krr_st", "k-means start"]
    for row in rows:
        assert sum(line.startswith(f"| {row} ") for line in text.splitlines()) == 3, row
    assert "few-shot tiny" in text and Path("study/tiny/worth.png").exists()
    assert "the test split of each set (of tiny where" in text and text.strip() in out
    assert json.loads(Path("study/tiny/study.json").read_text())["rows"] == rows
    log = Path("study/tiny/test_log/krr_st/results.jsonl").read_text()
    assert study.main(argv) == 0
    assert Path("study/tiny/tables.md").read_text() == text
    assert Path("study/tiny/test_log/krr_st/results.jsonl").read_text() == log  # nothing again


@pytest.mark.slow
def test_standardised_and_mixed(quick):
    """Sets and runs of their own, every set of features learned so, labels as ever."""
    wanted = ["--target_scale", "std", "--pool_mixup", "--pre_mixup"]
    assert study.main(FLAGS) == 0
    assert study.main([*FLAGS, *wanted]) == 0
    log = {row: Path(f"study/tiny/test_log/{row}/results.jsonl").read_text() for row in ROWS}
    for row, text in log.items():
        first, last = (json.loads(text.splitlines()[n])["pretraining"] for n in (0, -1))
        assert not first.keys() & {"mixup", "target_scale"}
        if row != "random + class labels":
            assert last == {**first, "mixup": True, "target_scale": "std"}, row
        else:
            assert last == first
    assert Path("study/tiny/runs/krr_st-0-std-mixup/training.safetensors").exists()
    plain, scaled = (Path(f"study/tiny/sets/4-0{s}/tiny/random_features") for s in ("", "-std"))
    assert (plain / "y_syn.pt").read_bytes() == (scaled / "y_syn.pt").read_bytes()


def test_outputs_errors_and_another_student(quick, monkeypatch):
    keep_sets(monkeypatch, *ROWS[:2], "high-loss + features", "random + features, hybrid views")
    short = dict(views=3, blend=True, view_batch=5, outer_iteration=2, num_models=1, online_iteration=2)
    monkeypatch.setitem(study.LEVERS, "best", study.LEVERS["best"] | short)
    argv = [*FLAGS, "--student=convnet_8_bn", "--probe_on=both", "--target_error", "--shots=none"]
    assert study.main([*argv, "--levers=best", "--pre_mixup", "--target_scale=std"]) == 0
    text = Path("study/tiny/tables.md").read_text()
    assert "outputs, 5 % of labels" in text and "error of target features" in text
    cells = [json.loads(x) for x in Path("study/tiny/test_log/best/results.jsonl").read_text().splitlines()]
    assert [c["protocol"] for c in cells] == ["linear"] * 4 + ["target_error"]
    assert {c["model"] for c in cells} == {"convnet_8_bn"} and not cells[0]["pretraining"].get("mixup")
    curve = json.loads(Path("study/tiny/test_log/curve 8/results.jsonl").read_text().splitlines()[-1])
    assert curve["pretraining"]["mixup"] and curve["error"] > 0
    assert Path("study/tiny/worth.png").exists()
    # The same sets under another name, and judged with another network.
    argv += ["--levers=none", "--extra_sets", "again=krr_st=study/tiny/runs/best-{seed}-std"]
    assert study.main([*argv, "--pre_mixup", "--target_scale=std"]) == 0
    assert study.main([*argv, "--pre_mixup", "--target_scale=std", "--test_model=convnet_4_bn"]) == 0
    again = [json.loads(x) for x in Path("study/tiny/test_log/again/results.jsonl").read_text().splitlines()]
    assert [c["model"] for c in again] == ["convnet_8_bn"] * 5 + ["convnet_4_bn"] * 5
    for mine, theirs in zip(again[:5], cells, strict=True):
        assert mine["pretraining"] == theirs["pretraining"]
        assert all(mine.get(name) == theirs.get(name) for name in ("accuracy", "error"))
    assert "networks: convnet_4_bn; mean" in Path("study/tiny/tables.md").read_text()
    again = [*argv[: argv.index("--levers=none")], "--levers=best", "--test_model=convnet_4_bn"]
    assert study.main([*again, "--pre_mixup", "--target_scale=std"]) == 0  # the run is taken as it is


def test_the_target_model_is_a_row(brief):
    """Its features, through its own weights, probed with the labels that each student has."""
    argv = [*FLAGS, "--levers=none", "--probe_on=both", "--target_error", "--fractions=0.05"]
    assert study.main(argv) == 0
    log = Path("study/tiny/test_log") / study.TARGET / "results.jsonl"
    body, by_outputs, one_shot = map(json.loads, log.read_text().splitlines())
    assert body["accuracy"] == by_outputs["accuracy"] and body["protocol"] == one_shot["protocol"] == "linear"
    data = load_set("tiny", 8, Path("datasets"))
    model = get_model("convnet_4_bn", data.img_shape, 1)
    (made,) = Path("study/teacher_ckpt").glob("*.pt")
    model.load_state_dict(torch.load(made, weights_only=True), strict=False)
    with torch.no_grad():
        train, test = (
            model.eval().pooled(normalize(to_float(split.images), data.stats))
            for split in (data.train, data.test)
        )
    for cell, measure in ((body, Measure("linear", fraction=0.05)), (one_shot, Measure("linear", "1"))):
        index = transfer.labelled_indices(data, measure, 0)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-10, max_iter=10**4))
        found = 100 * probe.fit(train[index], data.train.labels[index]).score(test, data.test.labels)
        one_image = 100 / len(data.test)
        assert cell["labelled"] == len(index) and cell["accuracy"] == pytest.approx(found, abs=one_image)
    text = Path("study/tiny/tables.md").read_text()
    assert f"| {study.TARGET} " in text and Path("study/tiny/worth.png").exists()


def test_transfer_to_a_second_set(brief):
    """Each target set has its own table and its own curve, from which its worth is read."""
    write_set("datasets", "second", train=400, test=40, seed=1)
    argv = [*FLAGS, "--levers=none", "--shots=none", "--fractions", "0.05", "1", "--target_error"]
    assert study.main([*argv, "--targets=second"]) == 0
    text = Path("study/tiny/tables.md").read_text()
    assert "5 % of labels" in text and "100 % of labels" in text and " 1 % of labels" not in text
    for name in ("tiny", "second"):
        title = "curve" if name == "tiny" else "curve, second"
        table = text.split(f"{title}\n\n")[1].split("\n\n")[0]
        for count, column in ((4, 2), (8, 3)):
            log = Path(f"study/tiny/test_log/curve {count}/results.jsonl").read_text()
            cells = [c for c in map(json.loads, log.splitlines()) if c["target"] == name]
            assert len(cells) == 3
            found = [float(line.split("|")[column]) for line in table.splitlines()[2:]]
            assert found == [round(c.get("accuracy", c.get("error")), 2 + ("error" in c)) for c in cells]
    assert "| 4 images, second " in text


def test_what_is_measured_is_left_and_what_fails_is_said(brief, capsys):
    flags = [*FLAGS, "--levers=none"]
    assert study.main(flags) == 0
    cells = Path("study/tiny/test_log/no pre-training/results.jsonl")
    Path("study/tiny/tables.md").unlink()
    missing = study.jobs(cli.parse(study.StudyFlags, [*flags, "--seeds=2"], prog="study", description=""))
    names = [
        f"tiny: {row}, seed 1" for row in ("no pre-training", study.TARGET, *study.SETS, "curve 4", "curve 8")
    ]
    assert [job.name for job in missing()] == names
    capsys.readouterr()
    assert study.main([*flags, "--extra_sets", "dm=dm=nowhere", "--seeds=2"]) == 1
    out = capsys.readouterr().out
    assert "tiny: dm, seed 0: " in out and "jobs left: 2; " in out
    assert not Path("study/tiny/tables.md").exists()
    assert [json.loads(line)["seed"] for line in cells.read_text().splitlines()] == [0] * 3 + [1] * 3
    assert study.main([*flags, "--seeds=2"]) == 0
    assert "(kept)" not in capsys.readouterr().out
    # The first repetition alone: the other one's cells are there, but not in its tables.
    assert study.main(flags) == 0
    tables = Path("study/tiny/tables.md").read_text().splitlines()
    assert not any("±" in line for line in tables if line.startswith("|"))


def test_sets_of_another_target_model_are_not_used(brief, capsys):
    flags = [*FLAGS, "--levers=none"]
    assert study.main(flags) == 0
    (made,) = Path("study/teacher_ckpt").glob("*.pt")
    state = torch.load(made, weights_only=True)
    torch.save({k: v + 1 if v.is_floating_point() else v for k, v in state.items()}, "other.pt")
    before = sorted(Path("study").rglob("*"))
    assert study.main([*flags, "--target_ckpt=other.pt"]) == 2
    assert "study/tiny holds sets of another target model; give another --folder" in capsys.readouterr().err
    assert sorted(Path("study").rglob("*")) == before
    assert study.main([*flags, f"--target_ckpt={made}"]) == 0
    record = Path("study/tiny/target.json")  # as older versions wrote it
    write_json(record, {"target_ckpt": json.loads(record.read_text())["target model"]})
    assert study.main([*flags, "--target_ckpt=other.pt"]) == 2
    assert study.main([*flags, f"--target_ckpt={made}"]) == 0


def test_sets_of_other_flags_or_data_are_not_used(brief, capsys):
    flags = [*FLAGS, "--levers=krr_st"]
    assert study.main(flags) == 0
    before = sorted(Path("study").rglob("*"))
    for changed, said in (
        (
            "--outer_iteration=4",
            "study/tiny/runs/krr_st-0 holds a run with other flags (outer_iteration 3 -> 4)",
        ),
        ("--num_images=5", "krr_st-0 holds a run with other flags (num_images 4 -> 5)"),
        ("--target_epochs=2", "study/tiny holds sets of another --target_epochs"),
    ):
        assert study.main([*flags, changed]) == 2
        assert said in capsys.readouterr().err
    write_set("datasets", "tiny", train=400, test=48)
    assert study.main(flags) == 2
    assert "study/tiny holds sets of another data set" in capsys.readouterr().err
    assert sorted(Path("study").rglob("*")) == before


def test_paths_of_extra_sets(quick):
    flags = dict(data_name="tiny", img_size=8, extra_sets=("a=dm=sets/{name}/{seed}",), levers=("none",))
    (row,) = [row for row in study.Study(study.StudyFlags(**flags)).rows if row.name == "a"]
    assert row.folder(3) == Path("sets/{name}/3")


def test_validation_needs_labels(workspace, capsys):
    write_set("datasets", "bare", labelled=False)
    assert study.main([*FLAGS, "--data_name=bare", "--validation"]) == 2
    assert "--data_name bare: has no labels" in capsys.readouterr().err


def test_validation_never_reads_the_test_split(quick):
    (Path("datasets/tiny/X_te_8.pth")).write_bytes(b"not to be read")
    whole = torch.load("datasets/tiny/X_tr_8.pth", weights_only=True)
    flags = study.StudyFlags(data_name="tiny", img_size=8)
    write_json("datasets/tiny/meta.json", {"hflip": False})
    assert study.validation_set(flags) == "tiny_val"
    source, held_out = (load_set(name, 8, splits=("train",)) for name in ("tiny", "tiny_val"))
    assert (held_out.stats, held_out.hflip) == (source.stats, False)
    parts = [torch.load(f"datasets/tiny_val/X_{s}_8.pth", weights_only=True) for s in ("tr", "te")]
    assert [len(p) for p in parts] == [320, 80]
    joined = sorted(torch.cat(parts).flatten(1).tolist())
    assert joined == sorted(whole.flatten(1).tolist())  # every image once
    assert study.validation_set(flags) == "tiny_val"
    torch.save(whole.flip(0), "datasets/tiny/X_tr_8.pth")
    with pytest.raises(UserError, match="datasets/tiny_val was made from another tiny; remove it"):
        study.validation_set(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--curve", "4"], "--curve needs two"),
        (["--levers", "magic"], "unknown lever 'magic'"),
        (["--extra_sets", "dm"], "--extra_sets dm: expected NAME=METHOD=PATH"),
        (["--extra_sets", "dm=magic=sets/dm"], "unknown method in --extra_sets 'magic'"),
        (["--target_ckpt", "none.pt"], "--target_ckpt none.pt does not exist"),
    ],
)
def test_bad_flags(quick, capsys, flags, message):
    assert study.main([*FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_finished_run_stays_when_it_is_judged_otherwise(workspace, monkeypatch):
    """The flags of pre-training say how a set is judged, and a folder may be judged again."""
    write_set("datasets", "tiny", train=400, test=40)
    write_target()

    def made(**more):
        given = dict(data_name="tiny", network=NET, student=NET, num_images=4, img_size=8, seeds=1)
        given |= dict(levers=("krr_st",), outer_iteration=3, device="cpu")
        given |= dict(target_ckpt=Path(f"teacher_ckpt/barlow_twins_{NET}_tiny.pt"))
        return study.Study(study.StudyFlags(**given | more))

    first, ran = made(), []
    monkeypatch.setattr(study, "run_method", lambda method, flags: ran.append(flags))
    first.distil("krr_st", 0)
    folder = first.run_folder("krr_st", 0)
    flags = cli.identity(resolved(METHODS["krr_st"], ran[0]))
    write_json(folder / "config.json", {"flags": flags})
    write_json(folder / "results.json", {})
    made(pre_mixup=True, pre_iteration=7).distil("krr_st", 0)
    assert len(ran) == 1
    with pytest.raises(UserError, match="outer_iteration"):
        made(outer_iteration=4).distil("krr_st", 0)
