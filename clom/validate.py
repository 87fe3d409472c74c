"""The driver behind validate.py: what networks trained on a synthetic set reach on real images."""

import itertools
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from clom.config import TrainingFlags, ValidateFlags, result_name
from clom.pool import checkpoint_name, model_folder
from clom.pretrain import in_space
from clom.source import load_data, network_factory, to_space
from data.augment.dsa import check_strategy
from data.load import ImageSet
from data.synthetic import SyntheticSet
from data.synthetic.forms import detect_form
from evaluation.measure import Cell, CellStore, finish, grouped, spread
from evaluation.score import score_network
from models import eval_pool
from utils import checkpoint, cli
from utils.device import resolve_gpus
from utils.errors import UserError
from utils.memory import out_of_memory_says
from utils.table import format_mean_std, markdown


def validate(flags: ValidateFlags) -> int:
    """Train `num_eval` networks of each name, print the table, write results.json.

    Finished networks are kept in results.jsonl and not trained again. A UserError for bad flags, data
    or synthetic set, or one of another size than --ipc says.
    """
    check_strategy(flags.dsa_strategy)
    dsa = flags.dsa_strategy if flags.dsa else "none"
    recipe = flags.recipe().override(dsa=dsa, align_corners=flags.align_corners)
    names = [flags.model] if flags.eval_mode is None else eval_pool(flags.eval_mode, flags.model)
    print(json.dumps(cli.as_json(flags), indent=2))
    device, gpus = resolve_gpus(flags.device, flags.gpu_id, flags.multigpu)
    if len(gpus) > 1:
        print(f"--multigpu {flags.multigpu}: only GPU {gpus[0]} is used, the networks are small")
    if flags.dry_run:
        return 0
    image_set, path = load_data(flags), synthetic_path(flags)
    synthetic = load_synthetic(path, image_set, flags.experiment)
    ipc = len(synthetic) / image_set.num_classes
    if flags.ipc not in (None, ipc):
        raise UserError(f"{path} holds {len(synthetic)} images, {ipc:g} per class; not --ipc {flags.ipc}")
    image_set = in_space(image_set, flags.normalize_data)
    synthetic = to_space(synthetic, image_set.stats)
    recipe = recipe.override(lr=flags.lr or synthetic.training.lr or TrainingFlags.lr)
    networks = {name: network_factory(name, image_set, device) for name in names}
    folder = Path(flags.save_path) / flags.dataset / f"{flags.method}_{flags.model}_ipc{ipc:g}"
    settings = dict(dataset=flags.dataset, data=image_set.fingerprint, size=image_set.size)
    settings |= dict(training=recipe.record(), test_every=flags.save_every, normalized=flags.normalize_data)
    settings |= dict(synthetic_set=checkpoint.fingerprint(synthetic.images, synthetic.targets))
    if synthetic.training:
        settings |= dict(how_to_train=synthetic.training.record())

    def save(name: str, seed: int, epoch: int, model: nn.Module) -> None:
        """Write a state dict; the first network's last one also as a pre-trained model."""
        state = {k: v.cpu() for k, v in model.state_dict().items()}
        checkpoint.save(state, folder / f"{name}_seed{seed}_epoch{epoch}.pth")
        if epoch == recipe.epochs and seed == flags.seed:
            kind = f"{flags.method}_ipc{ipc:g}"
            published = model_folder(flags.pretrained_path, flags.dataset, name, kind)
            checkpoint.save(state, published / checkpoint_name(flags.dataset, name, epoch, kind))

    def score(name: str, seed: int, check: Callable[[], None]) -> dict[str, Any]:
        given, at_test = (networks[name], synthetic, image_set, recipe), partial(save, name, seed)
        tests = dict(test_every=flags.save_every, at_test=at_test if flags.save_model else None)
        return asdict(score_network(*given, seed=seed, device=device, check=check, **tests))

    def shown(cell: Cell) -> str:
        return f"{cell['network']}, seed {cell['seed']}: {cell['final']:.4f} after the last epoch"

    each = itertools.product(names, range(flags.seed, flags.seed + flags.num_eval))
    tasks = [({**settings, "network": name, "seed": seed}, partial(score, name, seed)) for name, seed in each]
    store = CellStore(Path(flags.save_path) / "results.jsonl")
    with out_of_memory_says(device, "lower --batch_size"):
        cells = store.measure_all(tasks, device, shown, again=flags.save_model)
    summary, table = summarize(cells)
    text = (
        f"{table}\ntest accuracy in [0, 1] after {flags.epochs} epochs, {flags.num_eval} seeds, "
        f"augmentation {f'DSA {recipe.dsa}' if flags.dsa else 'none'}; 'best' is the largest over tests "
        f"every {flags.save_every} epochs, chosen on the test set: not a result"
    )
    finish(folder, flags, device, cells, summary, text, synthetic_set=str(path))
    return 0


def synthetic_path(flags: ValidateFlags) -> Path:
    """The set to read; the one res file in a run folder. A UserError if the default is not unique."""
    path = flags.synthesis_data_path
    if path is None:
        name = result_name(flags.method, flags.dataset, flags.model, flags.ipc or 1)
        folder = Path("./condensed") / flags.dataset / flags.method
        found = sorted(folder.glob(f"*/{name}"))
        if len(found) != 1:
            shown = ", ".join(map(str, found)) or "none"
            way = "" if found else f", or make it with: {set_command(flags)}"
            raise UserError(
                f"looked for {folder}/*/{name} and found {shown}; give --synthesis_data_path{way}"
            )
        return found[0]
    if any((path / mark).exists() for mark in ("x_syn.pt", "labels.csv")):
        return path
    found = sorted(path.glob("res_*.pt"))
    return found[0] if len(found) == 1 else path


def set_command(flags: ValidateFlags) -> str:
    """The command that makes the set that the flags name, where `synthetic_path` looks for it."""
    command = ["train.py", "--method", flags.method.lower(), "--data_name", flags.dataset]
    command += ["--model", flags.model, "--ipc", str(flags.ipc or 1)]
    for name in ("img_size", "data_path"):
        if getattr(flags, name) is not None:
            command += [f"--{name}", str(getattr(flags, name))]
    return shlex.join(["python", *command])


def load_synthetic(path: Path, image_set: ImageSet, experiment: int = 0) -> SyntheticSet:
    """Read a set of any form and check that it fits the data set.

    A set without stored statistics is taken to be in the data set's normalised space. A UserError where
    it cannot be read, or its channels, size, labels or targets do not fit.
    """
    bare = detect_form(path) == "png" and not (path / "meta.json").exists()
    stats = image_set.stats if bare else None
    synthetic = SyntheticSet.load(path, experiment=experiment, stats=stats)
    shape, targets, classes = tuple(synthetic.images.shape[1:]), synthetic.targets, image_set.num_classes
    if shape != image_set.img_shape:
        theirs = f"{image_set.name} has {image_set.img_shape}"
        raise UserError(f"{path} holds images of {shape} (C, H, W), {theirs}; see --dataset and --img_size")
    if synthetic.soft:
        sums = targets.sum(1)
        if targets.shape[1] != classes or targets.min() < 0 or (sums - 1).abs().max() > 1e-3:
            raise UserError(
                f"{path} holds target vectors {tuple(targets.shape)}; expected class indices or "
                f"probabilities of {classes} classes (for features use test.py)"
            )
    elif int(targets.max()) >= classes:
        raise UserError(f"{path} holds class {int(targets.max())}, {image_set.name} has {classes} classes")
    return replace(synthetic, stats=synthetic.stats or image_set.stats)


def summarize(cells: list[Cell]) -> tuple[list[dict[str, Any]], str]:
    """Mean and population std over seeds for each network, in [0, 1], and the table of them."""
    summary, rows = [], []
    for name, own in grouped(cells, lambda cell: cell["network"]).items():
        best = spread(own, "best")
        chosen = {"best_on_test_mean": best["mean"], "best_on_test_std": best["std"]}
        summary.append({"network": name, **spread(own, "final"), **chosen})
        shown = [format_mean_std([cell[field] for cell in own], 4) for field in ("final", "best")]
        rows.append([name, *shown, str(len(own))])
    return summary, markdown(["network", "last epoch", "best (on test)", "n"], rows)
