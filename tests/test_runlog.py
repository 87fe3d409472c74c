"""What a command stands on: its run folder, flags, seeds, device and error lines."""

import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from utils import cli
from utils.cli import flag, same_flag
from utils.device import resolve_device
from utils.errors import UserError, entry_point, pick
from utils.progress import LossWindow
from utils.run_folder import RunFolder, environment, write_json
from utils.seed import derive_seed, draw_seed, local_seed, make_generator, resolve_seed

CPU = torch.device("cpu")


def folder(path, *, seed=1, overwrite=False, **flags):
    return RunFolder(path, {"lr": 0.1, **flags}, seed=seed, device=CPU, overwrite=overwrite)


def test_a_new_run(tmp_path):
    run = folder(tmp_path / "a", size=3, extra_path="x")
    assert not run.resumed and not run.finished and run.seed == 1
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["flags"] == {"lr": 0.1, "size": 3, "extra_path": "x"}
    assert config["seed"] == 1 and config["environment"]["device"] == "cpu"
    assert run.read_log() == []


def test_the_same_flags_go_on(tmp_path):
    folder(tmp_path).log(step=1, loss=2.0)
    again = folder(tmp_path)
    assert again.resumed and not again.finished
    assert again.read_log() == [{"step": 1, "loss": 2.0}]
    again.finish({"loss": 1.0})
    assert folder(tmp_path).finished


def test_other_flags_are_refused_and_nothing_changes(tmp_path):
    folder(tmp_path).log(step=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"lr 0\.1 -> 0\.2\); .*--overwrite"):
        folder(tmp_path, lr=0.2)
    with pytest.raises(UserError, match="new None -> 5"):
        folder(tmp_path, new=5)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_overwrite_starts_from_nothing(tmp_path):
    run = folder(tmp_path)
    run.log(step=1)
    for name in ("state.pt", "x_syn.pt", "y_syn.pt", "x_syn.png", "loss.png", "mine.txt"):
        (tmp_path / name).write_text("old")
    run.finish({})
    new = folder(tmp_path, lr=0.2, overwrite=True)
    assert not new.resumed and new.read_log() == []
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "log.jsonl", "mine.txt"}


def test_finish_drops_the_state(tmp_path):
    run = folder(tmp_path)
    run.state_path.write_bytes(b"state")
    run.finish({"loss": math.nan, "path": Path("a/b"), "all": [1, math.inf]})
    assert not run.state_path.exists()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {"loss": None, "path": "a/b", "all": [1, None]}


def test_a_drawn_seed_is_remembered(tmp_path, capsys):
    first = folder(tmp_path, seed=None)
    assert f"--seed {first.seed}" in capsys.readouterr().out
    assert folder(tmp_path, seed=None).seed == first.seed


def test_damaged_config_and_lost_log(tmp_path):
    run = folder(tmp_path)
    run.log(step=1)
    (tmp_path / "log.jsonl").unlink()
    assert folder(tmp_path).read_log() == []
    for content in ("{torn", "[]", "3"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            folder(tmp_path)
    assert not folder(tmp_path, overwrite=True).resumed


def test_log_is_cut_and_torn_lines_are_left_out(tmp_path):
    run = folder(tmp_path)
    for step in (1, 2, 3):
        run.log(step=step, loss=math.nan if step == 2 else 1.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [e["step"] for e in run.read_log()] == [1, 2, 3]
    run.truncate_log(2)
    assert run.read_log() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]
    run.log(step=3)
    assert [e["step"] for e in run.read_log()] == [1, 2, 3]


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {1: (math.nan, -math.inf), "d": CPU})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"1": [None, None], "d": "cpu"} and text.endswith("\n")


def test_environment_says_what_ran():
    facts = environment(CPU)
    assert facts["torch"] == torch.__version__ and facts["device"] == "cpu"
    json.dumps(facts)


def test_loss_window():
    window = LossWindow(3)
    assert math.isnan(window.mean())
    for value in (10.0, 1.0, 2.0, 6.0):
        window.add(torch.tensor(value, requires_grad=True))
    assert window.mean() == 3.0  # of the last three
    other = LossWindow(3)
    other.add(torch.tensor(99.0))
    other.load_state_dict(json.loads(json.dumps(window.state_dict())))
    assert other.mean() == 3.0
    other.add(torch.tensor(4.0))
    assert other.mean() == 4.0
    assert LossWindow(2).state_dict() == {"losses": []}


# ------------------------------------------------------------------ flags


@dataclass(frozen=True)
class Flags:
    count: int = flag(3, "a count of 50 % or so", minimum=1, maximum=10)
    rate: float = flag(0.5, "a rate", above=0)
    name: str | None = flag(None, "a name", choices=("a", "b"))
    path: Path = flag(Path("x"), "a path")
    size: int | None = flag(None, "a size")
    on: bool = flag(False, "a switch")
    threads: int = flag(1, "how fast", minimum=1, also=("jobs", "n"), identity=False)


def parse(*argv):
    return cli.parse(Flags, list(argv), prog="prog", description="what it does")


def test_defaults_and_types():
    assert parse() == Flags()
    flags = parse("--count", "1e1", "--rate", "2", "--name", "b", "--path", "d/e", "--on", "--size", "256.0")
    assert flags == Flags(10, 2.0, "b", Path("d/e"), 256, True)
    assert type(flags.count) is int and type(flags.rate) is float and type(flags.size) is int
    assert cli.as_json(flags)["path"] == "d/e"
    json.dumps(cli.as_json(flags))


def test_other_names_of_a_flag(capsys):
    for name in ("--threads", "--jobs", "--n"):
        assert parse(name, "4") == Flags(threads=4)
    assert parse("--jobs", "4", "--threads", "2").threads == 2  # the last one counts, as ever
    with pytest.raises(SystemExit):
        parse("--jobs", "0")
    error = capsys.readouterr().err
    assert "--jobs" in error and "at least 1" in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--jobs" in capsys.readouterr().out


@dataclass(frozen=True)
class Derived(Flags):
    size: int | None = same_flag(Flags, "size", identity=False, also=("side",))
    pool: int = same_flag(Flags, "threads", default=7, also=())


def test_what_says_which_run_it_is():
    usual = {"count": 3, "rate": 0.5, "name": None, "path": "x", "size": None, "on": False}
    assert cli.identity(Flags()) == cli.identity(Flags(threads=9)) == usual
    assert cli.identity(Flags(rate=1.0)) != usual
    json.dumps(cli.identity(Flags()))
    del usual["size"]  # a flag made from another keeps what is not changed
    assert cli.identity(Derived(size=5, pool=3)) == usual
    derived = cli.parse(Derived, ["--side", "4"], prog="prog", description="")
    assert (derived.size, derived.pool, derived.threads) == (4, 7, 1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--count", "x"], "--count: expected int, got 'x'"),
        (["--count", "1.5"], "expected int"),
        (["--count", "1e400"], "expected int"),
        (["--count", "0"], "--count: must be at least 1, got 0"),
        (["--count", "11"], "must be at most 10"),
        (["--rate", "0"], "--rate: must be greater than 0"),
        (["--rate", "nan"], "expected a finite number"),
        (["--rate", "inf"], "expected a finite number"),
        (["--rate", "fast"], "expected float"),
        (["--name", "c"], "invalid choice: 'c'"),
        (["--unknown", "1"], "--unknown"),
        (["--cou", "4"], "--cou"),  # no abbreviations: a new flag must not change old commands
        (["--count"], "--count"),
        (["stray"], "stray"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error
    assert error.startswith("error: ") and error.count("\n") == 1 and "--help" in error


def test_help_shows_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "50 % or so [3]" in shown
    assert all(f"--{name}" in shown for name in vars(Flags()))


def test_entry_point(capsys):
    def fail(error):
        def main(argv=None):
            raise error

        return entry_point(main)

    assert entry_point(lambda argv: None)([]) == 0
    assert entry_point(lambda argv: 3)([]) == 3
    assert fail(UserError("two\nlines"))([]) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert fail(KeyboardInterrupt())([]) == 130
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        fail(ZeroDivisionError())([])


def test_a_terminal_without_all_signs(monkeypatch):
    """Tables print ± and †; what it lacks is spelt out."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="latin1"))
    assert entry_point(lambda argv: print("1 ± 2†", flush=True))([]) == 0
    assert out.getvalue() == b"1 \xb1 2\\u2020\n"


def test_what_runs_in_one_process_refuses_torchrun(monkeypatch):
    given = dict(prog="python a.py", description="")
    assert cli.parse(Flags, [], **given) == Flags()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^python a\.py runs in one process; start it without torchrun$"):
        cli.parse(Flags, [], **given)
    assert cli.parse(Flags, [], **given, torchrun=True) == Flags()


def test_pick():
    assert pick({"a": 1}, "a", "thing") == 1
    with pytest.raises(UserError, match="unknown thing 'c'; valid: a, b"):
        pick({"b": 1, "a": 2}, "c", "thing")


# ------------------------------------------------------------------ seeds and devices


def test_derived_seeds_are_independent_and_fixed():
    names = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 11), (1, "a"), (0, "a", None)]
    seeds = [derive_seed(*n) for n in names]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(0, "a") == seeds[2]  # whatever was derived before
    assert derive_seed(7, "pool") == 3075581495448056846  # runs of other versions stay repeatable
    first, second = make_generator(0, "a"), make_generator(0, "b")
    assert not torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))


def test_draw_seed_advances():
    generator = make_generator(0)
    seeds = [draw_seed(generator) for _ in range(5)]
    assert len(set(seeds)) == 5 and all(0 <= s < 2**31 for s in seeds)


def test_resolve_seed(capsys):
    assert resolve_seed(0) == 0 and capsys.readouterr().out == ""
    drawn = resolve_seed(None)
    assert f"--seed {drawn}" in capsys.readouterr().out


def test_local_seed_restores_the_global_state():
    before = torch.get_rng_state()
    with local_seed(3):
        first = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ZeroDivisionError), local_seed(3):
        assert torch.equal(torch.rand(3), first)
        raise ZeroDivisionError
    assert torch.equal(before, torch.get_rng_state())
    with local_seed(4):
        assert not torch.equal(torch.rand(3), first)


def test_device_is_said_in_one_line(capsys):
    assert resolve_device("cpu") == CPU
    assert capsys.readouterr().out == "device cpu (--device)\n"


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"), [(False, False, "cpu"), (False, True, "mps"), (True, True, "cuda:1")]
)
def test_best_device_there_is(monkeypatch, capsys, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert str(resolve_device(None, gpu_id=1)) == chosen
    assert capsys.readouterr().out.startswith(f"device {chosen} (")
    if cuda:
        assert str(resolve_device("cuda")) == "cuda:0" and str(resolve_device("cpu")) == "cpu"
        with pytest.raises(UserError, match="GPU 2 does not exist; this machine has 2"):
            resolve_device(None, gpu_id=2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tpu9", "is not a device; expected cpu"),
        ("meta", "not supported"),
        ("cuda", "CUDA is not available"),
        ("cuda:3", "CUDA is not available"),
        ("mps", "no Apple"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, name, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        resolve_device(name)
