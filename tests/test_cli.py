"""The commands as a user types them: one clear line and exit code 2 for every bad input."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_set
from sklearn import datasets

import test as test_command
import test_scratch
import train
from data.synthetic import SyntheticSet
from evaluation.target import Representation
from krr_st import baselines, demo, target
from utils import checkpoint
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NET = "convnet_4_8_bn"
TRAIN = [
    "--data_name",
    "tiny",
    "--img_size",
    "8",
    "--device",
    "cpu",
    "--seed",
    "0",
    "--target_model",
    NET,
    "--train_model",
    NET,
    "--num_images",
    "6",
    "--num_models",
    "2",
    "--online_iteration",
    "3",
    "--outer_iteration",
    "4",
    "--outer_batch_size",
    "16",
    "--print_every",
    "2",
    "--pre_epoch",
    "2",
    "--test_iteration",
    "3",
]
TEST = [
    "--source_data_name",
    "tiny",
    "--img_size",
    "8",
    "--test_model",
    NET,
    "--device",
    "cpu",
    "--num_test",
    "1",
]


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny")
    torch.manual_seed(0)
    state = Representation(NET, (3, 8, 8)).backbone.state_dict()
    checkpoint.save(state, f"teacher_ckpt/barlow_twins_{NET}_tiny.pt")
    return workspace


def fails(capsys, command, argv, *words):
    """Run in-process; one line on stderr that holds all `words`, code 2, no traceback."""
    try:
        code = command.main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert code == 2, error
    assert len(lines) == 1 and lines[0].startswith("error:"), error
    for word in words:
        assert str(word) in lines[0], lines[0]


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.usefixtures("figures")
def test_train_then_test_then_scratch(tiny, capsys):
    assert train.main([*TRAIN, "--exp_name", "a"]) == 0
    run = tiny / "results" / "a"
    x, y = torch.load(run / "x_syn.pt"), torch.load(run / "y_syn.pt")
    assert x.shape == (6, 3, 8, 8) and x.dtype == torch.float32
    assert y.shape == (6, 8)
    for name in ("config.json", "log.jsonl", "results.json", "x_syn.png", "loss.png"):
        assert (run / name).stat().st_size > 0
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 0 and config["flags"]["outer_iteration"] == 4
    assert config["environment"]["torch"] == torch.__version__

    argv = [*TEST, "--method", "krr_st", "--synthetic_path", "results/a", "--pre_epoch", "2"]
    assert test_command.main([*argv, "--protocol", "linear", "--shots", "2_all"]) == 0
    printed = capsys.readouterr().out
    assert "2 labels per class" in printed and "all labels" in printed
    cells = (tiny / "test_log" / "results.jsonl").read_text().splitlines()
    assert [json.loads(c)["shots"] for c in cells] == ["2", "all"]

    assert test_command.main([*argv, "--protocol", "linear", "--shots", "2_all"]) == 0
    assert capsys.readouterr().out.count("(kept)") == 2
    assert (tiny / "test_log" / "results.jsonl").read_text().splitlines() == cells

    assert test_scratch.main([*TEST, "--finetune_iteration", "3", "--num_test", "2"]) == 0
    path = tiny / "test_log" / "tiny" / "scratch" / NET / "finetune" / "results.json"
    result = json.loads(path.read_text())
    values = [c["accuracy"] for c in result["cells"]]
    assert len(values) == 2 and result["summary"][0]["n"] == 2
    assert result["summary"][0]["mean"] == pytest.approx(sum(values) / 2)
    assert result["summary"][0]["std"] == pytest.approx(abs(values[0] - values[1]) / 2)


def test_finetune_cells_do_not_depend_on_what_ran_before(tiny):
    argv = [*TEST, "--finetune_iteration", "5"]
    assert test_scratch.main([*argv, "--num_test", "2", "--log_dir", "both"]) == 0
    assert test_scratch.main([*argv, "--seed", "1", "--log_dir", "second"]) == 0
    both = [json.loads(c) for c in Path("both/results.jsonl").read_text().splitlines()]
    second = json.loads(Path("second/results.jsonl").read_text())
    assert both[1]["seed"] == second["seed"] == 1
    assert both[1]["accuracy"] == second["accuracy"]


def test_baselines(tiny):
    common = ["--data_name", "tiny", "--img_size", "8", "--target_model", NET, "--device", "cpu"]
    for method, shape in {
        "random": (6,),
        "random_features": (6, 8),
        "kmeans": (6,),
        "kmeans_features": (6, 8),
        "herding": (6,),
        "herding_features": (6, 8),
        "high_loss": (6,),
        "high_loss_features": (6, 8),
        "gaussian": (6, 8),
    }.items():
        argv = [*common, "--method", method, "--num_images", "6", "--student", NET]
        assert baselines.main(argv) == 0
        folder = tiny / "synthetic_data" / "tiny" / method
        x, y = torch.load(folder / "x_syn.pt"), torch.load(folder / "y_syn.pt")
        assert x.shape == (6, 3, 8, 8) and y.shape == shape
        assert baselines.main(argv) == 0
        assert torch.equal(torch.load(folder / "x_syn.pt"), x)  # the default seed repeats
    for method in ("random", "herding", "high_loss"):
        labels = torch.load(tiny / "synthetic_data" / "tiny" / method / "y_syn.pt")
        assert sorted(labels.bincount(minlength=4).tolist()) == [1, 1, 2, 2]  # balanced


def test_random_features_are_the_targets_features(tiny):
    common = ["--data_name", "tiny", "--img_size", "8", "--target_model", NET, "--device", "cpu"]
    assert baselines.main([*common, "--method", "random_features", "--num_images", "6"]) == 0
    folder = tiny / "synthetic_data" / "tiny" / "random_features"
    x, y = torch.load(folder / "x_syn.pt"), torch.load(folder / "y_syn.pt")
    model = Representation(NET, (3, 8, 8))
    model.backbone.load_state_dict(torch.load(f"teacher_ckpt/barlow_twins_{NET}_tiny.pt"))
    assert torch.allclose(model.eval()(x), y, atol=1e-6)


def test_views_are_stored_once_with_features_of_each(tiny, capsys):
    common = ["--data_name", "tiny", "--img_size", "8", "--target_model", NET, "--device", "cpu"]
    model = Representation(NET, (3, 8, 8)).eval()
    model.backbone.load_state_dict(torch.load(f"teacher_ckpt/barlow_twins_{NET}_tiny.pt"))
    folder = tiny / "synthetic_data" / "tiny"
    for method in ("random_features", "kmeans_features", "herding_features", "high_loss_features"):
        argv = [*common, "--method", method, "--num_images", "6", "--student", NET]
        assert baselines.main(argv) == 0
        assert baselines.main([*argv, "--views", "5"]) == 0
        plain = SyntheticSet.load(folder / method)
        several = SyntheticSet.load(folder / f"{method}.safetensors")
        assert several.images.shape == (30, 3, 8, 8) and several.targets.shape == (30, 8)
        torch.testing.assert_close(several.images[::5], plain.images, atol=1e-5, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(model(several.images), several.targets, atol=1e-4, rtol=1e-4)
        assert baselines.main([*argv, "--views", "5"]) == 0
        assert torch.equal(SyntheticSet.load(folder / f"{method}.safetensors").images, several.images)
    assert baselines.main([*argv, "--views", "40", "--blend"]) == 0  # more than an image has views
    blends = SyntheticSet.load(folder / f"{method}.safetensors")
    assert len(blends) == 240 and torch.equal(blends.images[::40], several.images[::5])
    with torch.no_grad():
        torch.testing.assert_close(model(blends.images), blends.targets, atol=1e-4, rtol=1e-4)
    capsys.readouterr()
    fails(capsys, baselines, [*common, "--method", "random", "--views", "2"], "--views 2", "labels")
    argv = [*common, "--method", "random_features", "--num_images", "6"]
    fails(capsys, baselines, [*argv, "--views", "19"], "--views 19", "18")
    fails(capsys, baselines, [*argv, "--blend"], "--blend", "--views")
    fails(capsys, baselines, [*argv, "--y_rank", "7"], "--y_rank 7", "6")


def test_a_budget_of_bytes_says_how_many_images(tiny, capsys, monkeypatch):
    common = ["--data_name", "tiny", "--img_size", "8", "--target_model", NET, "--device", "cpu"]
    compact = ["--x_size", "4", "--x_dtype", "uint8", "--y_rank", "3", "--y_dtype", "bf16", "--views", "2"]
    one = 3 * 8 * 8 * 4
    for method, more, each, once, name in (
        ("random", [], one + 8, 0, "random"),
        ("random_features", [], one + 8 * 4, 0, "random_features"),
        ("random", ["--x_dtype", "bf16"], one // 2 + 1, 0, "random.safetensors"),
        ("random_features", compact, 48 + 2 + 2 * 3 * 2, 24 + 4 * 8 * 2, "random_features.safetensors"),
    ):
        for budget, count in ((7 * each + once, 7), (7 * each + once - 1, 6)):
            assert baselines.main([*common, "--method", method, *more, "--bytes", str(budget)]) == 0
            assert f"{count * each + once} bytes" in capsys.readouterr().out
            path = tiny / "synthetic_data" / "tiny" / name
            assert len(SyntheticSet.load(path)) == count * (2 if "--views" in more else 1)
    argv = [*common, "--method", "random_features"]
    fails(capsys, baselines, [*argv, "--bytes", "100"], "--bytes 100", "800")
    fails(capsys, baselines, [*argv, "--bytes", "800000"], "--bytes 800000", "1000", "48")
    fails(capsys, baselines, [*argv, "--bytes", "8000", "--y_variance", "0.5"], "--y_variance", "--y_rank")
    fails(capsys, baselines, [*argv, "--bytes", "800", "--num_images", "3"], "--num_images")

    def full(request):
        raise MemoryError

    monkeypatch.setitem(baselines.BASELINES, "random_features", full)
    fails(capsys, baselines, [*argv, "--bytes", "8000"], "--bytes", "out of memory")


def test_unknown_names_list_the_valid_ones(tiny, capsys):
    fails(capsys, train, ["--data_name", "nothing"], "nothing", "cifar100", "tiny")
    fails(capsys, train, [*TRAIN, "--train_model", "vit"], "vit", "resnet18", "convnet_")
    fails(capsys, train, [*TRAIN, "--test_model", "vit"], "vit", "resnet18")
    fails(capsys, train, [*TRAIN, "--target_model", "vit"], "vit")
    fails(capsys, train, [*TRAIN, "--pool_reset", "never"], "--pool_reset", "paper", "released")
    fails(capsys, test_command, [*TEST, "--method", "magic"], "magic", "krr_st", "frepo")
    fails(capsys, test_command, [*TEST, "--protocol", "guess"], "--protocol", "linear")
    fails(capsys, test_scratch, [*TEST, "--target_data_name", "tiny_mars"], "mars")
    fails(capsys, baselines, ["--method", "magic"], "magic", "random_features")
    fails(capsys, target, ["--data_name", "tiny", "--target_model", "vit"], "vit", "resnet18")
    assert not (tiny / "results").exists()


def test_bad_flags(tiny, capsys):
    fails(capsys, train, [*TRAIN, "--outer_lr", "fast"], "--outer_lr", "float", "fast")
    fails(capsys, train, [*TRAIN, "--outer_lr", "-1"], "--outer_lr", "greater than 0")
    fails(capsys, train, [*TRAIN, "--outer_lr", "nan"], "--outer_lr")
    fails(capsys, train, [*TRAIN, "--num_models", "0"], "--num_models", "at least 1")
    fails(capsys, train, [*TRAIN, "--outer_iteration", "2.5"], "--outer_iteration", "int")
    fails(capsys, train, [*TRAIN, "--learning_rate", "1"], "--learning_rate")
    fails(capsys, train, [*TRAIN, "--device", "tpu9"], "--device", "cpu")
    fails(capsys, train, [*TRAIN, "--num_images", "49"], "--num_images 49", "48", "X_tr_8.pth")
    fails(capsys, test_scratch, [*TEST, "--shots", "ten"], "--shots", "ten")
    fails(capsys, test_scratch, [*TEST, "--shots", "13"], "--shots 13", "12")
    assert not (tiny / "results").exists()


def test_missing_target_prints_the_command_that_makes_it(tiny, capsys):
    Path(f"teacher_ckpt/barlow_twins_{NET}_tiny.pt").unlink()
    with pytest.raises(AssertionError):
        fails(capsys, target, ["--help"])  # --help leaves with 0: the helper can fail
    capsys.readouterr()
    assert train.main(TRAIN) == 2
    line = capsys.readouterr().err
    command = line.split("python -m krr_st.target ", 1)[1].split()
    assert target.main([*command, "--epochs", "1", "--projector_dim", "8", "--seed", "0"]) == 0
    assert train.main(TRAIN) == 0


def _corrupt(path, value):
    checkpoint.save(value, path)


X, Y = Path("datasets/tiny/X_tr_8.pth"), Path("datasets/tiny/Y_tr_8.pth")
IMAGES = torch.zeros(48, 3, 8, 8)
LABELS = torch.arange(48) % 4


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (X, IMAGES.double(), ("float64", "uint8 or float32")),
        (X, IMAGES[:, :2], ("shape (48, 2, 8, 8)", "N x 1/3 x 8 x 8")),
        (X, IMAGES[:, :, :4], ("shape",)),
        (X, IMAGES[0], ("shape",)),
        (X, IMAGES[:0], ("empty",)),
        (X, IMAGES + torch.nan, ("non-finite",)),
        (X, IMAGES + torch.inf, ("non-finite",)),
        (X, IMAGES + 17, ("17", "[0, 1]")),
        (X, [1, 2, 3], ("list", "tensor")),
        (Y, LABELS[:-1], ("(47,)", "(48,)")),
        (Y, LABELS[:, None], ("(48, 1)",)),
        (Y, LABELS.float(), ("float32", "int64")),
        (Y, LABELS - 1, ("-1",)),
        (X, IMAGES[:40].to(torch.uint8), ("(48,)", "(40,)")),
    ],
)
def test_bad_tensors(tiny, capsys, path, value, words):
    _corrupt(path, value)
    named = Y if path is Y or words[0] == "(48,)" else path
    fails(capsys, train, TRAIN, named, *words)
    assert not (tiny / "results").exists()


@pytest.mark.parametrize("keep", [0, 10, 500])
@pytest.mark.parametrize("path", [X, Y])
def test_truncated_tensors(tiny, capsys, path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    fails(capsys, train, TRAIN, path, "truncated" if keep != 10 else "")
    assert not (tiny / "results").exists()


def test_labels_beyond_the_published_count(workspace, capsys):
    write_set("datasets", "cifar10", size=32, classes=11, train=44, test=22)
    fails(capsys, train, ["--data_name", "cifar10"], "Y_tr_32.pth", "10", "0 to 9")


def test_half_a_pair(tiny, capsys):
    X.unlink()
    fails(capsys, train, TRAIN, "datasets/tiny/X_tr_8.pth")


def test_target_checkpoint_that_does_not_fit(tiny, capsys):
    path = Path(f"teacher_ckpt/barlow_twins_{NET}_tiny.pt")
    state = checkpoint.load(path)
    checkpoint.save({k: v for k, v in state.items() if k != "layers.0.block.0.bias"}, path)
    fails(capsys, train, TRAIN, path, "missing layers.0.block.0.bias")
    checkpoint.save({"model": state}, path)
    fails(capsys, train, TRAIN, path, "state dict")
    path.write_text("<html>not found</html>")
    fails(capsys, train, TRAIN, path)
    assert not (tiny / "results").exists()


def test_synthetic_sets_that_do_not_fit(tiny, capsys):
    folder = Path("synthetic_data/tiny/krr_st")
    argv = [*TEST, "--method", "krr_st"]
    fails(capsys, test_command, argv, folder)
    checkpoint.save(torch.zeros(5, 3, 8, 8), folder / "x_syn.pt")
    fails(capsys, test_command, argv, "y_syn.pt")
    checkpoint.save(torch.zeros(4, 8), folder / "y_syn.pt")
    fails(capsys, test_command, argv, folder, "4", "5")
    checkpoint.save(torch.zeros(5, 8), folder / "y_syn.pt")
    fails(capsys, test_command, [*argv, "--img_size", "16"], folder, "(8, 8)", "16 x 16")
    checkpoint.save(torch.zeros(5, 3, 4, 4), folder / "x_syn.pt")
    fails(capsys, test_command, argv, folder, "(4, 4)", "8")
    checkpoint.save(torch.zeros(5, 3, 8, 8), folder / "x_syn.pt")
    checkpoint.save(torch.arange(5), folder / "y_syn.pt")
    fails(capsys, test_command, argv, folder, "float vectors")
    checkpoint.save(torch.full((5, 8), torch.nan), folder / "y_syn.pt")
    fails(capsys, test_command, argv, folder, "non-finite")


def test_unlabelled_target_is_refused(tiny, capsys):
    write_set("datasets", "bare", labelled=False)
    fails(capsys, test_scratch, [*TEST, "--target_data_name", "bare"], "datasets/bare", "labels")


def test_other_flags_in_the_same_folder(tiny, capsys):
    assert train.main([*TRAIN, "--exp_name", "a"]) == 0
    before = listing(tiny), (tiny / "results/a/x_syn.pt").read_bytes()
    capsys.readouterr()
    other = [*TRAIN, "--exp_name", "a", "--outer_lr", "0.5"]
    fails(capsys, train, other, "results/a", "outer_lr 0.001 -> 0.5", "--overwrite")
    assert (listing(tiny), (tiny / "results/a/x_syn.pt").read_bytes()) == before
    assert train.main([*other, "--overwrite"]) == 0
    assert (tiny / "results/a/x_syn.pt").read_bytes() != before[1]


def test_dry_run_writes_nothing(tiny, capsys):
    before = listing(tiny)
    assert train.main([*TRAIN, "--dry_run"]) == 0
    assert '"num_images": 6' in capsys.readouterr().out
    assert listing(tiny) == before


@pytest.mark.parametrize("command", [train, test_command, test_scratch, target, baselines, demo])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0 and "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (train, "method recipe data_name num_images outer_iteration pre_lr views outer_lr device seed"),
        (test_command, "method source_data_name pre_lr device seed"),
        (baselines, "method data_name num_images bytes views device seed"),
    ],
)
def test_help_begins_with_what_matters_most(command, names, capsys):
    """What is made from what, all that decides the result, and last where and how fast."""
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out.split("options:")[1]
    places = [shown.index(f"\n  --{name}") for name in names.split()]
    assert places == sorted(places)


def test_what_a_recipe_turns_on_can_be_turned_off(capsys, workspace):
    argv = ["--recipe", "best", "--data_name", "cifar10", "--dry_run", "--device", "cpu"]
    write_set("datasets", "cifar10", size=32)
    assert train.main([*argv, "--no-blend", "--no-hybrid", "--views", "1"]) == 0
    shown = json.loads(capsys.readouterr().out.split("\ndevice")[0])
    assert (shown["blend"], shown["hybrid"], shown["views"]) == (False, False, 1)


def test_errors_as_a_process(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--no_such_flag"]
    # Scripts work from any folder.
    wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--no_such_flag" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_closed_pipe_ends_a_command_quietly():
    """As `| head -1` does."""
    read, write = os.pipe()
    os.close(read)
    script = (
        "import sys; from utils.errors import entry_point\n"
        "sys.exit(entry_point(lambda argv: print(1, flush=sys.argv[1] == 'now'))())"
    )
    here = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for when in ("now", "at the end"):
        command = [sys.executable, "-c", script, when]
        done = subprocess.run(command, cwd=ROOT, env=here, stdout=write, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 128 + signal.SIGPIPE and done.stderr == b""
    os.close(write)


def test_demo_runs_ordinary_commands(tmp_path, capfd):
    demo.run_step("A title", "train.py --dry_run --data_name digits", tmp_path)
    printed = capfd.readouterr().out
    assert printed.startswith("\n# A title\n$ python train.py --dry_run --data_name digits\n")
    assert '"num_images": 20' in printed and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="ended with 2"):
        demo.run_step("A title", "train.py --no_such_flag", tmp_path)


def test_demo_at_tiny_size(tmp_path, monkeypatch, capsys):
    """On about twenty training images a class."""
    digits = datasets.load_digits()
    digits.images, digits.target = digits.images[:700], digits.target[:700]
    monkeypatch.setattr(datasets, "load_digits", lambda: digits)
    argv = [
        "--folder",
        str(tmp_path),
        "--num_images",
        "5",
        "--epochs",
        "1",
        "--Iteration",
        "1",
        "--epoch_eval_train",
        "1",
        "--outer_iteration",
        "3",
        "--online_iteration",
        "2",
        "--pre_iteration",
        "2",
        "--num_test",
        "1",
    ]
    assert demo.main(argv) == 0
    printed = capsys.readouterr().out
    printed = printed[printed.index("What ten labelled") :]
    table = [line for line in printed.splitlines() if line.startswith("|")]
    titles = [row.split("|")[1].strip() for row in table]
    assert titles[2:8] == [
        "10 random real images",
        "20 random real images",
        "50 random real images",
        "100 random real images",
        "10 images by DM",
        "10 images by DM + CLoM",
    ]
    assert titles[-5:] == [
        "no pre-training",
        "5 random real images + target features",
        "25 random real images + target features",
        "5 random real images in hybrid views",
        "5 KRR-ST images",
    ]
    for row, probes in ((table[2], 1), (table[-1], 5)):
        numbers = [cell.strip() for cell in row.split("|")[2:-1] if cell.strip()]
        assert len([float(n) for n in numbers]) == probes
    for name in ("x_syn.pt", "y_syn.pt", "x_syn.png", "loss.png", "results.json"):
        assert (tmp_path / "results" / "demo" / name).stat().st_size > 0
    assert torch.load(tmp_path / "results/demo/x_syn.pt").shape == (5, 3, 16, 16)
    assert (tmp_path / "results" / "digits.png").stat().st_size > 0


EXCLUSIVE = [
    ("test", "--shots 10 --label_fraction 0.1"),
    ("test_scratch", "--label_fraction 0.1 --shots 10_all"),
    ("test", "--pre_epoch 3 --pre_iteration 3"),
    ("test_kd", "--pre_iteration 3 --pre_epoch 3"),
    ("test", "--synthetic_data_dir there --synthetic_path here"),
    ("train", "--method dm --ipc 2 --num_images 40"),
    ("train", "--method dm --ipc 1 --num_images 40"),  # 1 is the default, and typed
    ("train", "--method dc --exp_name run --save_path here"),
    ("train", "--method dsa --resume --overwrite"),
    ("train", "--method krr_st --pre_epoch 3 --pre_iteration 3"),
    ("train", "--method mtt --pre_iteration 3 --pre_epoch 3"),
    ("data.prepare.__main__", "--check cifar10 --from_folder pictures"),
]


@pytest.mark.parametrize(("module", "flags"), EXCLUSIVE)
def test_flags_that_exclude_each_other(workspace, capsys, module, flags):
    """None of the two silently wins."""
    names = re.findall(r"--(?!method)\w+", flags)
    fails(capsys, importlib.import_module(module), flags.split(), *names, "not allowed with")
    assert listing(workspace) == []


def test_a_folder_of_views_that_nothing_is_looked_up_in(tiny, capsys):
    flags = [*TRAIN, "--target_views", "online", "--views_dir", "views"]
    fails(capsys, train, flags, "--views_dir", "--target_views online")
