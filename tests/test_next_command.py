"""Without a synthetic set, test.py, test_kd.py and validate.py name the command that makes it."""

import shlex
from pathlib import Path

import pytest
from conftest import NET, write_set, write_target
from test_cli import TEST, fails

import test as test_command
import test_kd
import train
import validate
from data.load import load_set
from evaluation.recipes import BASELINES, MATCHING, PRETRAIN
from krr_st import baselines
from methods import METHODS

QUICK = {
    "krr_st": f"--target_model {NET} --train_model {NET} --num_images 6 --num_models 2 --online_iteration 3 "
    "--outer_iteration 2 --outer_batch_size 16 --pre_epoch 1 --test_iteration 1",
    "dm": "--model ConvNetD1 --Iteration 0 --num_eval 1 --epoch_eval_train 0",
}


@pytest.fixture
def tiny(workspace):
    write_set("prepared", "tiny set")
    write_target("tiny set")
    return workspace


def suggested(capsys):
    """The command in the one line of stderr, as words after `python`."""
    (line,) = capsys.readouterr().err.splitlines()
    python, *words = shlex.split(line.split("make it with: ")[1])
    assert python == "python"
    return words


def run(words, more=""):
    module = {"train.py": train, "-m": baselines}[words.pop(0)]
    if module is baselines:
        assert words.pop(0) == "krr_st.baselines"
    return module.main([*words, "--device", "cpu", "--seed", "0", *more.split()])


def flags_of(method, command=test_command):
    flags = [*TEST, "--data_dir", "prepared", "--target_data_name", "tiny set", "--method", method]
    flags[flags.index("tiny")] = "tiny set"
    return [*flags, "--synthetic_data_dir", "my sets", "--seed", "0"]


def test_the_baselines_are_those_that_are_made():
    assert set(BASELINES) == set(baselines.BASELINES) and set(BASELINES) < set(PRETRAIN)


@pytest.mark.parametrize("method", ["krr_st", "dm", "random", "random_features"])
def test_the_command_makes_what_is_missing(tiny, capsys, method):
    """With data, size and folders of the flags that were given; then the same test runs."""
    argv = [*flags_of(method), "--protocol", "knn", "--pre_epoch", "1"]
    assert test_command.main(argv) == 2
    words = suggested(capsys)
    more = QUICK.get(method, f"--num_images 8 --target_model {NET}")
    assert run(words, more) == 0
    assert test_command.main(argv) == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_command(tiny, capsys, method):
    assert test_command.main(flags_of(method)) == 2
    words = suggested(capsys)
    folder = ["--export", f"my sets/tiny set/{method}"]
    kernel = ["--save_dir", "my sets/tiny set", "--exp_name", method]
    assert words[-2:] == folder if method in MATCHING else words[-4:] == kernel
    assert run(words, "--dry_run") == 0


def test_distillation_names_it_too(tiny, capsys):
    load_set("tiny set", 8, "prepared")  # stores its statistics: test_kd.py reads no training images
    argv = flags_of("krr_st")
    assert test_kd.main(argv) == 2
    assert suggested(capsys)[:3] == ["train.py", "--method", "krr_st"]


def test_a_path_that_was_given_is_only_said_to_be_missing(tiny, capsys):
    argv = [*flags_of("krr_st"), "--synthetic_path", "results/typo"]
    argv = [word for word in argv if word not in ("--synthetic_data_dir", "my sets")]
    fails(capsys, test_command, argv, "synthetic set results/typo does not exist")


def test_validate_names_the_run(workspace, capsys):
    write_set("prepared", "cifar10", size=32, train=20, test=10, classes=10)
    argv = "--dataset CIFAR10 --model ConvNetD1 --method DM --data_path prepared --device cpu --epochs 1"
    argv = [*argv.split(), "--num_eval", "1", "--ipc", "2"]
    assert validate.main(argv) == 2
    assert run(suggested(capsys), "--Iteration 0 --num_eval 1 --epoch_eval_train 0") == 0
    assert validate.main(argv) == 0
    assert Path("test_log/validate/CIFAR10/DM_ConvNetD1_ipc2/results.json").exists()
