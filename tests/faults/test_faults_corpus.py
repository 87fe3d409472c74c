"""Malformed inputs: one line that names the culprit, exit code 2, nothing written, no code run.

The short version takes all files that hide code and a sample of the rest; the soak takes all.
"""

import ast
import dataclasses
import os
import random
import shutil
import typing
from pathlib import Path

import fault_inputs as krr
import fault_inputs_more as more
import pytest
from fault_commands import ROOT
from fault_corpus import Case, problem, restore, run
from fault_damage import PAYLOADS, payload

import clom.config
import clom.tables
import evaluation.kd
import evaluation.pretraining
import evaluation.transfer
import krr_st.config
import krr_st.tables
from data.prepare.__main__ import PrepareFlags

SEED, SHARE = 7, 0.2
GROUPS = (
    krr.train_cases,
    krr.evaluation_cases,
    krr.target_cases,
    more.validate_cases,
    more.distill_cases,
    more.synthetic_cases,
    more.prepare_cases,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("corpus")
    (base / "good").mkdir()
    krr.write_template(base / "good")
    shutil.copytree(base / "good", base / "work", symlinks=True)
    return base / "good", base / "work"


def every_case():
    return [case for group in (*GROUPS, krr.hugging_face_cases) for case in group()]


@pytest.mark.parametrize("group", GROUPS)
def test_malformed_inputs_are_refused(folders, group):
    rng = random.Random(SEED)
    chosen = [c for c in group() if "code" in c.name or rng.random() < SHARE]
    answers = {str(case): problem(case, *folders) for case in chosen}
    wrong = {case: answer for case, answer in answers.items() if answer is not None}
    print(f"{len(answers)} malformed inputs refused, drawn with seed {SEED}")
    assert wrong == {}


@pytest.mark.slow
def test_all_malformed_inputs_are_refused(folders):
    answers = {str(case): problem(case, *folders) for case in every_case()}
    assert {case: answer for case, answer in answers.items() if answer is not None} == {}


def test_the_corpus_is_large_and_its_cases_are_distinct():
    cases = every_case()
    assert len({case.identity for case in cases}) == len(cases) > 800
    print(f"{len(cases)} distinct malformed inputs")


def configs():
    for module in (
        krr_st.config,
        krr_st.tables,
        clom.config,
        clom.tables,
        evaluation.pretraining,
        evaluation.transfer,
        evaluation.kd,
    ):
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield value
    yield PrepareFlags


# Read as lines of JSON or written only.
NOTHING_TO_UNPICKLE = {"--log_dir", "--save_path", "--published", "--views_dir"}


def test_every_path_flag_meets_a_file_that_hides_code():
    paths = {
        f"--{field.name}"
        for config in configs()
        if dataclasses.is_dataclass(config)
        for field in dataclasses.fields(config)
        if Path in (hint := typing.get_type_hints(config)[field.name], *typing.get_args(hint))
    }
    guarded = {case.guards for case in every_case() if "code" in case.name}
    assert {"--target_ckpt", "--synthesis_data_path", "--raw"} <= paths
    assert paths - NOTHING_TO_UNPICKLE - guarded == {"--data_path"} - guarded
    # --data_path is that family's --data_dir: the same reader, met by main.py's tensors.
    assert any("--data_path" in case.flags and "code" in case.name for case in every_case())


@pytest.mark.parametrize("kind", PAYLOADS)
def test_the_payloads_would_run(workspace, kind):
    import torch

    for form in ("zip", "legacy", "nested"):
        payload(kind, form)(Path("evil.pt"))
        if kind != "getattr":
            torch.load("evil.pt", weights_only=False)
            marker = Path("PAYLOAD_RAN")
            assert marker.exists()
            marker.rmdir() if marker.is_dir() else marker.unlink()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("raise RuntimeError('torn')", "RuntimeError: torn"),
        ("return 0", "exit code 0"),
        ("print('error: a', file=sys.stderr); return 2", "expected one of"),
        ("print('error: f\\nmore', file=sys.stderr); return 2", "expected one line"),
        ("warnings.warn('careful'); print('error: f', file=sys.stderr); return 2", "careful"),
        ("open('half', 'w'); print('error: f', file=sys.stderr); return 2", "written: ['half']"),
        ("open('PAYLOAD_RAN', 'w'); print('error: f', file=sys.stderr); return 2", "payload ran"),
        ("print('error: f', file=sys.stderr); return 2", None),
    ],
)
def test_the_harness_sees_a_bad_answer(tmp_path, monkeypatch, command, answer):
    """Otherwise the corpus would prove nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"answering_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        f"import sys, warnings\n\ndef main(argv):\n    {command.replace('; ', chr(10) + '    ')}\n"
    )
    for folder in ("good", "work"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "f").write_text("x")
    os.utime(tmp_path / "good/f", ns=(1, 1))
    restore(tmp_path / "good", tmp_path / "work")
    case = Case(name, "", "anything", "f", lambda path: path.write_text("damaged"))
    found = problem(case, tmp_path / "good", tmp_path / "work")
    assert found is None if answer is None else answer in found
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["f"]
    assert (tmp_path / "work/f").read_text() == "x"


def test_a_good_input_is_not_refused(folders):
    """The template itself is sound: every refusal comes from the damage."""
    _, work = folders
    before = Path.cwd()
    os.chdir(work)
    try:
        for script, flags in (
            ("train.py", krr.GOING_ON),
            ("data.synthetic", "inspect set.safetensors"),
            ("data.synthetic", "inspect png"),
            ("data.prepare", "--check tiny"),
            (
                "validate.py",
                "--normalize_data --dataset CIFAR10 --img_size 8 --model ConvNetD1 "
                "--device cpu --epochs 1 --num_eval 1 --synthesis_data_path res_a.pt",
            ),
        ):
            assert run(Case(script, flags, "good")) == (0, [])
    finally:
        os.chdir(before)
        restore(*folders)


FORBIDDEN = {"eval", "exec", "compile", "system", "popen", "extractall", "unpack_archive"}


def test_no_source_runs_text_or_unpickles():
    """No eval, exec or shell; torch.load and Unpickler are called in one guarded place each."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("methods/*/*.py")]:
        if path.parent.name in ("tests", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            last = called.split(".")[-1]
            module_eval = last == "eval" and "." in called  # nn.Module.eval
            known = called in ("re.compile", "torch.compile")
            shell = any(k.arg == "shell" for k in node.keywords)
            loads = called in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler")
            if shell or loads or (last in FORBIDDEN and not module_eval and not known):
                found.append(f"{path.relative_to(ROOT)}: {called}")
    assert found == ["utils/checkpoint.py: torch.load"]
