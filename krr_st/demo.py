"""`python -m krr_st.demo` (`make demo`): both families on scikit-learn's handwritten digits.

Every step is an ordinary command of the project, printed as a user would type it. Finished work is
kept: a second run only prints the tables.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from data.augment import denormalize
from data.synthetic import SyntheticSet
from evaluation.equivalent_images import equivalent_images
from evaluation.measure import grouped
from evaluation.transfer import TARGET_ERROR, Measure
from utils import cli
from utils.cli import flag
from utils.commands import run_command
from utils.errors import UserError
from utils.plots import save_grid
from utils.table import format_mean_std, markdown

# The networks of either family.
LABELLED, UNLABELLED = "ConvNetW32", "convnet_32_64_128_bn"
RANDOM = (1, 2, 5, 10)  # real images per class that the ten distilled ones are compared with
DISTILLED = {"dm": "DM", "dm_clom": "DM + CLoM"}
MORE = (1, 5)  # random images with features, in multiples of the synthetic ones


@dataclass(frozen=True)
class DemoFlags:
    """Flags of the demo. The settings were chosen on a held-out part of the training digits."""

    folder: Path = flag(Path("."), "where data, checkpoints and results go")
    Iteration: int = flag(100, "iterations of DM", minimum=1)
    epoch_eval_train: int = flag(200, "epochs of the networks that judge labelled sets", minimum=1)
    num_images: int = flag(20, "synthetic images of KRR-ST", minimum=1, maximum=250)
    epochs: int = flag(25, "epochs of the target model and of CLoM's model", minimum=1)
    outer_iteration: int = flag(300, "outer steps of KRR-ST", minimum=1)
    online_iteration: int = flag(200, "age limit of the pool networks", minimum=1)
    pre_iteration: int = flag(100, "steps of pre-training on each set of features", minimum=1)
    num_test: int = flag(3, "seeds a row", minimum=1)


# Of each step below: what it does -> what follows `python`.


def labelled(flags: DemoFlags) -> dict[str, str]:
    """Ten images with class labels, and random real ones under the same training."""
    shared = (
        f"methods/DC_DSA_DM/main.py --method DM --dataset digits --model {LABELLED} --seed 0 "
        f"--num_exp {flags.num_test} --num_eval 1 --epoch_eval_train {flags.epoch_eval_train}"
    )
    dm = f"{shared} --ipc 1 --Iteration {flags.Iteration} --batch_real 64 --print_every 50"
    clom = (
        f"--CLoM --CLoM_distance cos --models_pool {LABELLED} --alphas 100 --epoch {flags.epochs} "
        "--CLoM_batch_size 256"
    )
    steps = {
        f"Random real images, {count} per class": (
            f"{shared} --ipc {count} --Iteration 0 --save_path condensed/random_{count}"
        )
        for count in RANDOM
    }
    return steps | {
        "One image per class distilled with DM": f"{dm} --save_path condensed/dm",
        "The pre-trained model that guides CLoM": (
            f"train_original_models.py --normalize_data --dataset digits --model {LABELLED} "
            f"--num 1 --epochs {flags.epochs} --save_every {flags.epochs} --batch_size 64 "
            "--lr_decay_step 15 --seed 0 --resume"
        ),
        "The same with DM + CLoM": f"{dm} {clom} --save_path condensed/dm_clom",
    }


@dataclass(frozen=True)
class Row:
    """One pre-training of the second table: its label, what makes its set, the flags that judge it."""

    label: str
    baseline: str = ""  # flags of krr_st.baselines
    judged: str = ""


def rows(flags: DemoFlags) -> dict[str, Row]:
    """Name of an unlabelled row, also of the folder of its set and results -> the row.

    All sets of features have standardised targets. Mixup is for those without blended views, which
    are mixtures with targets of their own.
    """
    count, found = flags.num_images, {"scratch": Row("no pre-training")}
    drawn = "--method random_features --synthetic_data_dir synthetic_data"
    for multiple in MORE:
        name, number = f"random_{multiple * count}", multiple * count
        found[name] = Row(
            f"{number} random real images + target features",
            f"--num_images {number}",
            f"test.py {drawn}/{name} --pre_mixup",
        )
    found["hybrid"] = Row(
        f"{count} random real images in hybrid views",
        f"--num_images {count} --views 50 --blend --hybrid",
        "test.py --method random_features --synthetic_path "
        "synthetic_data/hybrid/digits/random_features.safetensors",
    )
    found["krr_st"] = Row(
        f"{count} KRR-ST images", judged="test.py --method krr_st --synthetic_path results/demo"
    )
    return found


def unlabelled(flags: DemoFlags) -> dict[str, str]:
    """A target model without labels, KRR-ST, and what pre-training on its images gives."""
    data_target = f"--data_name digits --target_model {UNLABELLED} --seed 0"
    steps = {
        "A self-supervised target model, trained without labels": (
            f"-m krr_st.target {data_target} --epochs {flags.epochs} --batch_size 128 "
            f"--projector_dim 512 --min_crop 0.3 --jitter 0.3 --eval_every {flags.epochs}"
        ),
        f"Distillation into {flags.num_images} images (KRR-ST)": (
            f"train.py --recipe best --exp_name demo {data_target} --num_images {flags.num_images} "
            f"--outer_iteration {flags.outer_iteration} --outer_batch_size 128 --outer_lr 1e-2 "
            f"--view_batch 128 --online_iteration {flags.online_iteration} --print_every 25 "
            f"--pre_iteration {flags.pre_iteration} --test_iteration 500"
        ),
    }
    for name, row in rows(flags).items():
        if row.baseline:
            steps[f"A row to compare with: {row.label}"] = (
                f"-m krr_st.baselines --method random_features {data_target} {row.baseline} "
                f"--target_scale std --synthetic_data_dir synthetic_data/{name}"
            )
    for name, row in rows(flags).items():
        command = f"{row.judged} --pre_iteration {flags.pre_iteration}" if row.judged else "test_scratch.py"
        steps[f"Judged on real images: {row.label}"] = (
            f"{command} --source_data_name digits --protocol linear --shots 10_all "
            f"--num_test {flags.num_test} --probe_on both --target_error "
            f"--target_model {UNLABELLED} --log_dir test_log/{name}"
        )
    return steps


def run_step(title: str, command: str, folder: Path) -> None:
    """Print a command and run it in `folder`; a UserError where it fails (it has said why)."""
    print(f"\n# {title}")
    began = time.perf_counter()
    if code := run_command(command, folder):
        raise UserError(f"the demo stopped: this command ended with {code}")
    print(f"({time.perf_counter() - began:.0f} s)", flush=True)


def random_images(curve: dict[int, float], value: float, count: int) -> str:
    """How many random images are as good as `count` images of a value, by `equivalent_images`."""
    equal = equivalent_images(curve, value, count)
    return f"{equal.bound} {equal.images:.0f}".strip()


def labelled_table(folder: Path) -> str:
    """Real and distilled images: accuracy, and the number of random ones that is as good."""

    def accuracies(name: str) -> list[float]:
        (network,) = json.loads((folder / "condensed" / name / "results.json").read_text())["networks"]
        return [100 * value for value in network["accuracies"]]

    curve, lines = {}, []
    for count in RANDOM:
        values = accuracies(f"random_{count}")
        curve[10 * count] = fmean(values)
        lines.append([f"{10 * count} random real images", format_mean_std(values), ""])
    for name, label in DISTILLED.items():
        values = accuracies(name)
        worth = random_images(curve, fmean(values), 10)
        lines.append([f"10 images by {label}", format_mean_std(values), worth])
    return markdown(["a fresh network trained on", "test accuracy", "as good as so many random ones"], lines)


COLUMNS = {
    "error of target features": Measure(TARGET_ERROR, on="outputs"),
    "outputs, 10 labels per class": Measure("linear", "10", "outputs"),
    "body, 10 labels per class": Measure("linear", "10"),
    "outputs, all labels": Measure("linear", on="outputs"),
    "body, all labels": Measure("linear"),
}


def unlabelled_table(flags: DemoFlags) -> str:
    """Pre-trainings by their error of target features and their probes; what the seeds say."""
    error, *_ = COLUMNS
    values, lines = {}, []
    table = rows(flags)
    for name, row in table.items():
        (path,) = (flags.folder / "test_log" / name).glob("digits/*/*/linear/results.json")
        cells = grouped(json.loads(path.read_text())["cells"], Measure.of)
        found = {title: [cell[m.field] for cell in cells[m]] for title, m in COLUMNS.items()}
        values[name] = found
        shown = (format_mean_std(found[title], 3 if title == error else 2) for title in COLUMNS)
        lines.append([row.label, *shown])
    count = flags.num_images
    curve = {number: -fmean(values[f"random_{number}"][error]) for number in (n * count for n in MORE)}
    views, worth = (random_images(curve, -fmean(values[name][error]), count) for name in ("hybrid", "krr_st"))
    ahead = []
    for title in COLUMNS:
        pairs = zip(values["krr_st"][title], values[f"random_{count}"][title], strict=True)
        wins = sum(ours < theirs if title == error else ours > theirs for ours, theirs in pairs)
        ahead.append(f"{title}: {wins} of {flags.num_test}")
    return (
        f"{markdown(['pre-training', *COLUMNS], lines)}\n\n"
        "The error is that of the outputs on unseen images, in variances of the target's features "
        f"(1: predicting their mean); by it the {count} KRR-ST images are worth {worth} random ones, "
        f"{count} random ones in hybrid views {views}.\n"
        f"Seeds on which they beat {count} random ones: {'; '.join(ahead)}."
    )


def draw_digits(folder: Path, path: Path) -> None:
    """Ten real images and what each distillation made of them, a row each."""
    found = []
    for name in ("random_1", *DISTILLED):
        (res,) = (folder / "condensed" / name).glob("res_*.pt")
        synthetic = SyntheticSet.load(res, experiment=0)
        found.append(denormalize(synthetic.images, synthetic.stats))
    save_grid(torch.cat(found), path, columns=10, scale=4)


@cli.command(DemoFlags, prog="python -m krr_st.demo", description=__doc__)
def main(flags: DemoFlags) -> int:
    """Run every step and print the tables."""
    began = time.perf_counter()
    flags.folder.mkdir(parents=True, exist_ok=True)
    steps = {"The embedded images as prepared tensors": "-m data.prepare --data_name digits"}
    for title, command in (steps | labelled(flags) | unlabelled(flags)).items():
        run_step(title, command, flags.folder)
    run, digits = flags.folder / "results" / "demo", flags.folder / "results" / "digits.png"
    draw_digits(flags.folder, digits)
    what = f"mean ± std over {flags.num_test} seeds"
    print(
        f"\nWhat ten labelled images are worth: digits, test accuracy in %, {what}\n\n"
        f"{labelled_table(flags.folder)}\n\n"
        f"What {flags.num_images} unlabelled images are worth: digits, linear probe of frozen "
        f"features, test accuracy in %, {what}\n\n{unlabelled_table(flags)}\n\n"
        f"real images, DM, DM + CLoM: {digits}\n"
        f"KRR-ST images:              {run / 'x_syn.png'}\n"
        f"loss curve:                 {run / 'loss.png'}\n"
        f"total: {time.perf_counter() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
