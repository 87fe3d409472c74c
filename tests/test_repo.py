"""The project agrees with itself: dependency files, layers, flags."""

import ast
import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "clom",
    "data",
    "distillation",
    "evaluation",
    "krr_st",
    "methods",
    "models",
    "trajectory",
    "utils",
)
SCRIPTS = sorted(ROOT.glob("*.py"))
# What each package may import from: the ones below it.
BELOW = {
    "utils": set(),
    "data": {"utils"},
    "models": {"utils"},
    "evaluation": {"utils", "data", "models"},
    "distillation": {"utils", "data", "models", "evaluation"},
    "krr_st": {"utils", "data", "models", "evaluation", "distillation"},
    "clom": {"utils", "data", "models", "evaluation", "distillation"},
    "trajectory": {"utils", "data", "models", "evaluation", "distillation"},
    "methods": {"utils", "data", "models", "evaluation", "distillation", "krr_st", "clom", "trajectory"},
}


# Commands inside packages: they may use everything, and no package imports them.
COMMANDS = (
    "clom/tables.py",
    "distillation/__main__.py",
    "krr_st/study.py",
    "krr_st/tables.py",
    "utils/report.py",
)


def sources():
    return [p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))]


def imported_packages(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names & set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        above = imported_packages(path) - BELOW[package] - {package}
        assert not above or name in COMMANDS, f"{name} imports {above}"


def test_nothing_imports_a_command():
    modules = {name.removesuffix(".py").replace("/", ".") for name in COMMANDS}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in modules, path
                assert not {f"{node.module}.{a.name}" for a in node.names} & modules, path


def _pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and line[0] != "#")


def _bounds(requirements):
    found = {}
    for text in requirements:
        name, bound = re.match(r"([A-Za-z0-9_-]+)>=([\d.]+)$", text).groups()
        found[name.lower()] = bound
    return found


def _version(text):
    return tuple(int(part) for part in text.split("."))


@pytest.mark.skipif(tomllib is None, reason="tomllib needs Python 3.11")
def test_dependency_files_agree():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert tuple(settings["tool"]["setuptools"]["packages"]) == PACKAGES
    project = settings["project"]
    extras = project["optional-dependencies"].values()
    ranges = _bounds(itertools.chain(project["dependencies"], *extras))
    pins = _pins()
    assert ranges.keys() == pins.keys()
    for name, bound in ranges.items():
        assert _version(pins[name]) >= _version(bound), name
    entries = re.findall(r"^  - (\S+?)(?:\s+#.*)?$", (ROOT / "environment.yml").read_text(), re.M)
    conda = _bounds(e for e in entries if ">=" in e)
    python = conda.pop("python")
    assert project["requires-python"] == f">={python}"
    conda["torch"] = conda.pop("pytorch")  # its name on conda-forge
    assert conda == ranges


def test_files_stay_small():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.exists():
            assert path.stat().st_size < 500_000, name
        assert not name.endswith((".pyc", ".pth", ".pt")), name


def config_classes():
    """The flags of every command and method."""
    import clom.config
    import krr_st.config
    import trajectory.experts
    from methods import METHODS
    from methods.folder import FolderFlags

    found = {
        c
        for module in (clom.config, krr_st.config, trajectory.experts)
        for c in vars(module).values()
        if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__name__.endswith("Flags")
    } | {FolderFlags, *(row.flags for row in METHODS.values())}
    assert len(found) > 10
    return sorted(found, key=lambda c: c.__name__)


def test_every_flag_is_read_somewhere():
    read, prefixes = set(), ()
    for path in sources() + SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "with_flags":
                prefixes += (node.args[1].value,)
    for config in config_classes():
        unread = {f.name for f in dataclasses.fields(config) if not f.name.startswith(prefixes)} - read
        assert not unread, f"{config.__name__}: parsed but never read: {unread}"


def test_every_flag_has_help():
    for config in config_classes():
        for field in dataclasses.fields(config):
            assert len(field.metadata["help"]) > 5, field.name


def test_scripts_are_thin():
    for path in (*SCRIPTS, *(ROOT / "methods/DC_DSA_DM").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 60, path.name


def test_no_unsafe_calls():
    forbidden = ("pickle.load(", "weights_only=False", ".cuda()", "globals()[", "shell=True")
    for path in sources() + SCRIPTS:
        text = path.read_text()
        called = {
            n.func.id
            for n in ast.walk(ast.parse(text))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not called & {"eval", "exec", "exit", "quit"}, path
        if path.name != "checkpoint.py":
            assert "torch.load(" not in text, path
        for word in forbidden:
            assert word not in text, f"{path}: {word}"
