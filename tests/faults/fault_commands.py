"""The commands under test, each at a size that ends within seconds, and what they leave behind."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):  # the soak is started without pytest
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch
from conftest import write_set

from data.meta import own_statistics
from data.synthetic import SyntheticSet
from evaluation.target import Representation
from models import get_model
from utils import checkpoint
from utils.seed import local_seed

NET, SHAPE = "convnet_4_bn", (3, 8, 8)
# Facts about a start of a run, not about what it computed.
CLOCK = {"seconds", "seconds_of_last_start", "steps_in_this_start", "steps_per_second", "environment"}


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        name: for reports.
        script: a module for `python -m`, or a path below the root.
        flags: separated by spaces.
        results: patterns of the files it leaves, relative to its working folder.
        prepare: writes its inputs into an empty folder.
    """

    name: str
    script: str
    flags: str
    results: tuple[str, ...]
    prepare: Callable[[Path], None]

    @property
    def argv(self) -> list[str]:
        """The flags one by one."""
        return self.flags.split()

    def but(self, **flags: object) -> Command:
        """The same with other values of some flags."""
        argv = self.argv
        for name, value in flags.items():
            argv[argv.index(f"--{name}") + 1] = str(value)
        return replace(self, flags=" ".join(argv))

    @property
    def line(self) -> list[str]:
        """As a process is started."""
        where = [str(ROOT / self.script)] if self.script.endswith(".py") else ["-m", self.script]
        return [sys.executable, *where, *self.argv]

    def main(self) -> int:
        """Run in this process and in its working folder."""
        try:
            return module(self.script).main(self.argv)
        except SystemExit as stop:
            return stop.code


def module(script: str) -> ModuleType:
    """The module behind `Command.script`."""
    if "/" not in script:
        name = script.removesuffix(".py")
        package = importlib.util.find_spec(name).submodule_search_locations is not None
        return importlib.import_module(f"{name}.__main__" if package else name)
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def write_tiny(folder: Path, size: int = 8) -> None:
    """A prepared set, its target model, a teacher and a synthetic set, each of a few numbers."""
    prepared = write_set(folder / "datasets", "tiny", train=30, test=8, size=size)
    record_statistics(prepared, size)
    shape = (3, size, size)
    with local_seed(0):
        target = Representation(NET, shape).backbone.state_dict()
        teacher = get_model(NET, shape, 4).state_dict()
        x, y = torch.randn(6, *shape), torch.randn(6, 4)
    checkpoint.save(target, folder / f"teacher_ckpt/barlow_twins_{NET}_tiny.pt")
    checkpoint.save(teacher, folder / "teacher_ckpt/teacher_tiny.pt")
    SyntheticSet(x, y).save(folder / "synthetic_data/tiny/krr_st")
    SyntheticSet(x, torch.arange(6) % 4).save(folder / "synthetic_data/tiny/random")


def record_statistics(folder: Path, size: int) -> None:
    """With statistics on record no command has a reason to write beside the data."""
    own_statistics(folder, size, checkpoint.load(folder / f"X_tr_{size}.pth"))


def write_cifar10(folder: Path) -> None:
    """Thirty images under the name of a listed set, at a size that is nobody's."""
    prepared = write_set(folder / "datasets", "cifar10", train=30, test=20, classes=10)
    record_statistics(prepared, 8)


def write_probe_targets(folder: Path) -> None:
    """The sets of a probe table, one image a class."""
    classes = {
        "cifar10": 10,
        "cifar100": 100,
        "tinyimagenet": 200,
        "aircraft": 100,
        "cub2011": 200,
        "dogs": 120,
        "flowers": 102,
    }
    for name, count in classes.items():
        write_set(folder / "datasets", name, size=32, train=count, test=10, classes=count)


def write_pictures(folder: Path) -> None:
    """Two folders of PNG files."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        pixels = torch.randint(256, (9, 9, 3), generator=generator).to(torch.uint8)
        path = folder / "pictures" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)


_TINY = f"--data_name tiny --img_size 8 --device cpu --seed 4 --target_model {NET}"
_DC = "--dataset CIFAR10 --img_size 8 --model ConvNetD1 --device cpu --seed 0"
_MAIN = "methods/DC_DSA_DM/main.py"
_SET = ("config.json", "log.jsonl", "results.json")


def _of(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in (*_SET, *names))


def _distiller(method: str, steps: int) -> Command:
    return Command(
        f"main.py {method}",
        _MAIN,
        f"--method {method} {_DC} --batch_real 2 --num_eval 1 --Iteration {steps} --save_every 1 "
        f"--print_every 2 --eval_interval {steps // 2} --epoch_eval_train 1 --outer_loop 2 "
        "--inner_loop 1 --num_exp 2 --save_path run",
        _of("run", "res_*.pt", "res_*.json", "vis_*.png"),
        write_cifar10,
    )


_ALL = (
    Command(
        "train.py",
        "train.py",
        f"{_TINY} --train_model {NET} --num_images 6 --num_models 2 --online_iteration 3 "
        "--outer_iteration 30 --outer_lr 1e-2 --outer_batch_size 16 --print_every 4 "
        "--save_every 1 --eval_every 10 --pre_epoch 2 --test_iteration 3 --exp_name run",
        _of("results/run", "x_syn.pt", "y_syn.pt", "x_syn.png", "loss.png"),
        write_tiny,
    ),
    Command(
        "krr_st.target",
        "krr_st.target",
        f"{_TINY} --epochs 12 --batch_size 10 --projector_dim 8 --save_every 1 --eval_every 4 "
        "--save_dir made",
        (*_of(f"made/barlow_twins_{NET}_tiny"), f"made/barlow_twins_{NET}_tiny.pt"),
        write_tiny,
    ),
    Command(
        "krr_st.kd_teacher",
        "krr_st.kd_teacher",
        f"--data_name tiny --img_size 8 --device cpu --seed 4 --arch {NET} --epochs 12 "
        "--batch_size 10 --save_every 1 --save_dir made",
        (*_of("made/teacher_tiny"), "made/teacher_tiny.pt"),
        write_tiny,
    ),
    Command(
        "train_original_models.py",
        "train_original_models.py",
        f"--normalize_data {_DC} --num 1 --epochs 8 --lr_decay_step 4 --save_every 2 --resume",
        _of("pretrained_model/CIFAR10/original/ConvNetD1/index_0", "CIFAR10_ConvNetD1_original_epoch8.pth"),
        write_cifar10,
    ),
    _distiller("DM", 12),
    _distiller("DC", 4),
    Command(
        "test.py",
        "test.py",
        f"--source_data_name tiny --img_size 8 --test_model {NET} --device cpu --seed 0 "
        "--num_test 3 --method krr_st --pre_epoch 3 --target_data_name tiny "
        "--finetune_iteration 6",
        ("test_log/results.jsonl", "test_log/tiny/krr_st/*/finetune/results.json"),
        write_tiny,
    ),
    Command(
        "krr_st.tables",
        "krr_st.tables",
        "--table probe_cifar10_1 --methods scratch --run --num_test 1 --device cpu",
        ("test_log/results.jsonl", "test_log/table_probe_cifar10_1.*"),
        write_probe_targets,
    ),
    Command(
        "clom.tables",
        "clom.tables",
        "--run --datasets CIFAR10 --ipcs 1 --img_size 8 --model ConvNetD1 --Iteration 4 "
        "--num_eval 1 --epoch_eval_train 1 --batch_real 2 --device cpu --variants none "
        "--num_exp 1 --save_every 1 --methods DM DC",
        ("test_log/clom/results.jsonl", "test_log/clom/table.*"),
        write_cifar10,
    ),
    Command(
        "data.prepare",
        "data.prepare",
        "--from_folder pictures --data_name own --size 8 --val_fraction 0.2 --workers 1 --overwrite",
        ("datasets/own/[!.]*",),
        write_pictures,
    ),
)
COMMANDS = {command.name: command for command in _ALL}


def content(path: Path) -> Any:
    """What a file says, without clock times and versions; two contents compare with ==."""
    if path.suffix in (".pt", ".pth"):
        return _plain(checkpoint.load(path))
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_plain(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return checkpoint.fingerprint(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in CLOCK}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def results(command: Command, folder: Path) -> dict[str, Any]:
    """Relative path -> content of every file that the command promises.

    Raises:
        AssertionError: one is missing.
    """
    found = {}
    for pattern in command.results:
        paths = sorted(folder.glob(pattern))
        assert paths, f"{command.name}: {folder / pattern} does not exist"
        found |= {str(p.relative_to(folder)): content(p) for p in paths}
    return found


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of files that are not equal, or in one of the two only."""
    return [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
