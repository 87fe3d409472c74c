"""`python -m krr_st.demo` (`make demo`): the whole pipeline on scikit-learn's handwritten digits.

Every step is an ordinary command of the project, printed as a user would type it. What is finished
already is kept, so a second run only prints the table.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from utils import cli
from utils.cli import flag
from utils.errors import UserError, entry_point
from utils.table import markdown

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "convnet_32_64_128_bn"
ROWS = {
    "scratch": "no pre-training",
    "random_features": "random real images + target features",
    "krr_st": "KRR-ST",
}


@dataclass(frozen=True)
class DemoFlags:
    """Flags of the demo. The settings were chosen on a validation part of the training digits."""

    folder: Path = flag(Path("."), "where data, checkpoints and results go")
    num_images: int = flag(20, "synthetic images", minimum=1)
    epochs: int = flag(25, "epochs of the target model", minimum=1)
    outer_iteration: int = flag(1000, "outer steps of the distillation", minimum=1)
    online_iteration: int = flag(200, "age limit of the pool networks", minimum=1)
    pre_epoch: int = flag(300, "epochs of pre-training on the synthetic set", minimum=1)
    num_test: int = flag(3, "seeds a row", minimum=1)


def commands(flags: DemoFlags) -> list[tuple[str, list[str]]]:
    """(what it does, argv after `python`) for each step."""
    data_target = f"--data_name digits --target_model {NETWORK} --seed 0"
    shared = (
        f"--source_data_name digits --protocol linear --shots 10_all --num_test {flags.num_test}"
    )
    pretraining = f"--pre_epoch {flags.pre_epoch}"
    steps = {
        "The embedded images as prepared tensors": "-m data.prepare --data_name digits",
        "A self-supervised target model, trained without labels": (
            f"-m krr_st.target {data_target} --epochs {flags.epochs} --batch_size 128 "
            "--projector_dim 512 --min_crop 0.3 --jitter 0.3 --eval_every 20"
        ),
        f"Distillation into {flags.num_images} images (KRR-ST)": (
            f"train.py --exp_name demo {data_target} --num_images {flags.num_images} "
            f"--outer_iteration {flags.outer_iteration} --outer_batch_size 128 --outer_lr 1e-2 "
            f"--num_models 5 --online_iteration {flags.online_iteration} "
            f"{pretraining} --test_iteration 500"
        ),
        "The row to beat: random real images with target features": (
            f"-m krr_st.baselines --method random_features {data_target} "
            f"--num_images {flags.num_images}"
        ),
        "Linear probes: no pre-training": f"test_scratch.py {shared}",
        "Linear probes: random real images": (
            f"test.py --method random_features {shared} {pretraining}"
        ),
        "Linear probes: KRR-ST": (
            f"test.py --method krr_st --synthetic_path results/demo {shared} {pretraining}"
        ),
    }
    return [(title, shlex.split(command)) for title, command in steps.items()]


def run_step(title: str, argv: list[str], folder: Path) -> None:
    """Print the command and run it in `folder`.

    Raises:
        UserError: it failed (its own message stands above).
    """
    print(f"\n# {title}\n$ python {shlex.join(argv)}", flush=True)
    script = argv if argv[0] == "-m" else [str(ROOT / argv[0]), *argv[1:]]
    began = time.perf_counter()
    process = subprocess.run([sys.executable, *script], cwd=folder, env=_environment(), check=False)
    if process.returncode:
        raise UserError(f"the demo stopped: this command ended with {process.returncode}")
    print(f"({time.perf_counter() - began:.0f} s)", flush=True)


def _environment() -> dict[str, str]:
    """The process's environment with the project importable from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def final_table(folder: Path) -> str:
    """One row a method from the results files of the test commands."""
    rows = []
    for method, label in ROWS.items():
        path = folder / "test_log" / "digits" / method / NETWORK / "linear" / "results.json"
        summary = {s["shots"]: s for s in json.loads(path.read_text())["summary"]}
        cells = [f"{summary[k]['mean']:.2f} ± {summary[k]['std']:.2f}" for k in ("10", "all")]
        rows.append([label, *cells])
    return markdown(["pre-training", "10 labels a class", "all labels"], rows)


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Run every step and print the table."""
    flags = cli.parse(DemoFlags, argv, prog="python -m krr_st.demo", description=__doc__)
    began = time.perf_counter()
    flags.folder.mkdir(parents=True, exist_ok=True)
    for title, command in commands(flags):
        run_step(title, command, flags.folder)
    picture = flags.folder / "results" / "demo"
    print(
        f"\nWhat {flags.num_images} images are worth: digits, linear probe on frozen features, "
        f"test accuracy in %, mean ± std over {flags.num_test} seeds\n\n"
        f"{final_table(flags.folder)}\n\n"
        f"distilled images: {picture / 'x_syn.png'}\n"
        f"loss curve:       {picture / 'loss.png'}\n"
        f"total: {time.perf_counter() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
