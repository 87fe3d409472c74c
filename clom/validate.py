"""The driver behind validate.py: what networks trained on a synthetic set reach on real images."""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clom.config import TrainingFlags, ValidateFlags, result_name
from clom.pool import checkpoint_name, model_folder
from clom.pretrain import in_space
from clom.source import load_data, network_factory, to_space
from data.augment import normalize
from data.augment.dsa import check_strategy, no_augmentation, without_flip
from data.load import ImageSet
from data.specs import DC_SPECS
from data.synthetic import SyntheticSet, TrainingSettings
from data.synthetic.forms import detect_form, find_set
from evaluation.measure import Cell, CellStore, finish, grouped, spread
from evaluation.probe import shuffled_classes
from evaluation.ranking import SCORES, scores, titled
from evaluation.recipes import DSA_STRATEGY, Recipe
from evaluation.score import score_network
from models import eval_pool
from utils import checkpoint, cli
from utils.cost import Cost, Forecast
from utils.device import resolve_gpus
from utils.errors import UserError
from utils.memory import out_of_memory_says
from utils.seed import make_generator
from utils.table import format_mean_std, markdown, mean_std


@dataclass(frozen=True, eq=False)
class Training:
    """One way to train networks, and all that their accuracy depends on but network and seed."""

    images: Callable[[int], SyntheticSet | None]  # of a seed; None: all real ones
    recipe: Recipe
    facts: dict[str, Any]
    test_every: int | None = None  # epochs


def validate(flags: ValidateFlags) -> int:
    """Train `num_eval` networks of each name on the set, and on random real images; write results.json.

    Finished networks are kept in results.jsonl and not trained again. A UserError for bad flags, data
    or synthetic set, or one of another size than --ipc says.
    """
    typed = flags.dsa_strategy
    check_strategy(typed)
    flags.recipe()
    names = [flags.model] if flags.eval_mode is None else eval_pool(flags.eval_mode, flags.model)
    if flags.scores and typed is not None and no_augmentation(typed):
        raise UserError(f"--dsa_strategy {typed}: --scores compares with and without DSA")
    if flags.full_accuracy is not None and not flags.scores:
        raise UserError("--full_accuracy has a meaning for --scores alone; add --scores")
    if not (flags.dsa or flags.scores) and typed is not None:
        print("not used without --dsa: --dsa_strategy")
    if flags.full_accuracy is not None and len(names) > 1:
        raise UserError(f"--full_accuracy is that of one network, not of the {len(names)} of --eval_mode")
    print(json.dumps(cli.as_json(flags), indent=2))
    device, gpus = resolve_gpus(flags.device, flags.gpu_id, flags.multigpu)
    if len(gpus) > 1:
        print(f"--multigpu {flags.multigpu}: only GPU {gpus[0]} is used, the networks are small")
    if flags.dry_run and not flags.cost:
        return 0
    image_set, path = load_data(flags), synthetic_path(flags)
    stored = load_synthetic(path, image_set, flags.experiment)
    if stored.made_by and stored.made_by.lower() != flags.method.lower():
        print(f"note: {path} was made by {stored.made_by}, results are filed under --method {flags.method}")
    ipc = len(stored) / image_set.num_classes
    if flags.ipc not in (None, ipc):
        raise UserError(f"{path} holds {len(stored)} images, {ipc:g} per class; not --ipc {flags.ipc}")
    image_set = in_space(image_set, flags.normalize_data)
    if typed is None:
        mirrors = flags.dataset in DC_SPECS or image_set.hflip
        flags = replace(flags, dsa_strategy=DSA_STRATEGY if mirrors else without_flip(DSA_STRATEGY))
    trainings = plan_trainings(flags, image_set, to_space(stored, image_set.stats))
    networks = {name: network_factory(name, image_set, device) for name in names}
    if flags.cost:
        print(trainings_cost(dict.fromkeys(trainings.values()), networks, flags, image_set, device))
        return 0
    folder = Path(flags.save_path) / flags.dataset / f"{flags.method}_{flags.model}_ipc{ipc:g}"

    def save(name: str, seed: int, epoch: int, model: nn.Module) -> None:
        """Write a state dict; the first network's last one also as a pre-trained model."""
        state = {k: v.cpu() for k, v in model.state_dict().items()}
        checkpoint.save(state, folder / f"{name}_seed{seed}_epoch{epoch}.pth")
        if epoch == flags.epochs and seed == flags.seed:
            kind = f"{flags.method}_ipc{ipc:g}"
            published = model_folder(flags.pretrained_path, flags.dataset, name, kind)
            checkpoint.save(state, published / checkpoint_name(flags.dataset, name, epoch, kind))

    def score(training: Training, name: str, seed: int, check: Callable[[], None]) -> dict[str, Any]:
        kept = flags.save_model and training is trainings["own_labels"]
        named = dict(test_every=training.test_every, at_test=partial(save, name, seed) if kept else None)
        given = (networks[name], training.images(seed), image_set, training.recipe)
        return asdict(score_network(*given, seed=seed, device=device, check=check, **named))

    each = list(itertools.product(names, range(flags.seed, flags.seed + flags.num_eval)))
    tasks = {
        training: [
            ({**training.facts, "network": name, "seed": seed}, partial(score, training, name, seed))
            for name, seed in each
        ]
        for training in trainings.values()
    }
    again = [key for key, _ in tasks[trainings["own_labels"]]] if flags.save_model else ()
    store = CellStore(Path(flags.save_path) / "results.jsonl")
    with out_of_memory_says(device, "lower --batch_size"):
        store.measure_all([task for mine in tasks.values() for task in mine], device, shown, again)
    found = {kind: [store.get(key) for key, _ in tasks[own]] for kind, own in trainings.items()}
    summary, table = summarize(found, flags.full_accuracy)
    text = (
        f"{table}\ntest accuracy in [0, 1] after {flags.epochs} epochs, {flags.num_eval} seeds, "
        f"augmentation {f'DSA {flags.dsa_strategy}' if flags.dsa else 'none'}; random images: as many real "
        "ones of each class, others for each seed, trained on alike; 'best' is the largest over tests "
        f"every {flags.save_every} epochs, chosen on the test set: not a result"
    )
    facts = dict(synthetic_set=str(path), fingerprint=checkpoint.fingerprint(stored.images, stored.targets))
    cells = found["own_labels"]
    others = {cell["id"]: cell for mine in found.values() for cell in mine if cell not in cells}
    finish(folder, flags, device, cells, summary, text, **facts, reference_cells=list(others.values()))
    return 0


def plan_trainings(flags: ValidateFlags, image_set: ImageSet, synthetic: SyntheticSet) -> dict[str, Training]:
    """What an accuracy is called in `evaluation.ranking` -> the training that gives it; the set's own first.

    `synthetic` is in the space of `image_set`. Random images are as many of each class as the set has
    and are trained on as the set is; all real images as the flags say, but for `full_epochs`.
    """
    classes = synthetic.targets.argmax(1) if synthetic.soft else synthetic.targets
    counts, of_images = classes.bincount().tolist(), replace(synthetic.training, targets=None, mixup=None)
    data = dict(dataset=flags.dataset, data=image_set.fingerprint, size=image_set.size)
    data |= dict(normalized=flags.normalize_data)
    lr, momentum = flags.lr or TrainingFlags.lr, flags.momentum
    plain = flags.recipe().override(
        lr=lr,
        momentum=TrainingFlags.momentum if momentum is None else momentum,
        align_corners=flags.align_corners,
    )
    own, dsa = {"lr": flags.lr or synthetic.training.lr}, flags.dsa_strategy
    if flags.lr is None and momentum is None:  # a learned rate belongs to its momentum
        own["momentum"] = synthetic.training.momentum

    def facts(recipe: Recipe, training: TrainingSettings, **more: Any) -> dict[str, Any]:
        how = dict(how_to_train=training.record()) if training else {}
        return {**data, **more, "training": recipe.record(), **how}

    def on_set(of: SyntheticSet, augmented: bool) -> Training:
        recipe, every = plain.override(**own, dsa=dsa if augmented else "none"), flags.save_every
        which = dict(synthetic_set=checkpoint.fingerprint(of.images, of.targets), test_every=every)
        which |= {} if of is synthetic else dict(trained_on="the set with classes as labels")
        return Training(lambda seed: of, recipe, facts(recipe, of.training, **which), every)

    def on_random(augmented: bool) -> Training:
        recipe = plain.override(**own, dsa=dsa if augmented else "none")
        which = dict(trained_on="random images", per_class=counts)
        images = partial(random_images, image_set, counts, of_images)
        return Training(images, recipe, facts(recipe, of_images, **which))

    def on_all() -> Training:
        share = flags.full_epochs / flags.epochs
        decay = tuple(sorted({max(1, round(share * epoch)) for epoch in plain.decay_epochs}))
        recipe = plain.override(
            epochs=flags.full_epochs, decay_epochs=decay, dsa=dsa if flags.dsa else "none"
        )
        which = facts(recipe, TrainingSettings(), trained_on="all real images")
        return Training(lambda seed: None, recipe, which)

    both = {}
    for name, augmented in (("augmented", True), ("plain", False)):
        both |= {f"set_{name}": on_set(synthetic, augmented), f"random_{name}": on_random(augmented)}
    name = "augmented" if flags.dsa else "plain"
    found = {"own_labels": both[f"set_{name}"], "random": both[f"random_{name}"]}
    if flags.scores:
        hard = replace(synthetic, targets=classes, training=of_images)
        found["hard_labels"] = on_set(hard, flags.dsa) if synthetic.soft else found["own_labels"]
        found |= both if flags.full_accuracy is not None else {**both, "all_real": on_all()}
    return found


def trainings_cost(
    trainings: Iterable[Training],
    networks: Mapping[str, Callable[[int], nn.Module]],
    flags: ValidateFlags,
    image_set: ImageSet,
    device: torch.device,
) -> Cost:
    """What all networks take, one after another, from the first steps of one."""
    found = [(training.recipe, training.images(flags.seed)) for training in trainings]
    counts = [len(image_set.train if images is None else images) for _, images in found]
    work = sum(recipe.work_on(count) for (recipe, _), count in zip(found, counts, strict=True))
    forecast = Forecast(work * len(networks) * flags.num_eval, device)
    (recipe, images), new_network = found[0], next(iter(networks.values()))
    tick = partial(forecast.tick, 3 * min(recipe.batch_size, counts[0]))
    given = (new_network, images, image_set, recipe)
    return forecast.trial(lambda: score_network(*given, seed=flags.seed, device=device, check=tick))


def random_images(
    image_set: ImageSet, counts: Sequence[int], training: TrainingSettings, seed: int
) -> SyntheticSet:
    """Training images drawn from `seed`, `counts` of each class (all of it where it has fewer), as a set."""
    train, generator = image_set.train, make_generator(seed, "random images")
    classes = zip(shuffled_classes(train.labels, generator), counts, strict=False)
    index = torch.cat([mine[:count] for mine, count in classes])
    images = normalize(train.images[index], image_set.stats)
    return SyntheticSet(images, train.labels[index], image_set.stats, training=training)


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
    return find_set(path) or path


def set_command(flags: ValidateFlags) -> str:
    """The command that makes the set that the flags name, where `synthetic_path` looks for it."""
    named = dict(method=flags.method.lower(), data_name=flags.dataset, model=flags.model, ipc=flags.ipc or 1)
    return cli.typed("python train.py", **named, img_size=flags.img_size, data_path=flags.data_path)


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
        if targets.shape[1] != classes or not synthetic.probabilities:
            raise UserError(
                f"{path} holds target vectors {tuple(targets.shape)}; expected class indices or "
                f"probabilities of {classes} classes (for features use test.py)"
            )
    elif int(targets.max()) >= classes:
        raise UserError(f"{path} holds class {int(targets.max())}, {image_set.name} has {classes} classes")
    return replace(synthetic, stats=synthetic.stats or image_set.stats)


def shown(cell: Cell) -> str:
    """A finished cell in one line."""
    on = f" on {cell['trained_on']}" if "trained_on" in cell else ""
    dsa = "" if no_augmentation(cell["training"]["dsa"]) else ", DSA"
    return f"{cell['network']}{on}{dsa}, seed {cell['seed']}: {cell['final']:.4f} after the last epoch"


def summarize(
    found: Mapping[str, list[Cell]], full_accuracy: float | None
) -> tuple[list[dict[str, Any]], str]:
    """Mean and population std over seeds and the scores of each network, in [0, 1], and the table of them.

    `found` are the cells of each training by its name in `evaluation.ranking`.
    """
    summary, rows, notes, ranked = [], [], [], {}
    by_network = {kind: grouped(cells, lambda cell: cell["network"]) for kind, cells in found.items()}
    for name, own in by_network["own_labels"].items():
        values = {kind: [cell["final"] for cell in cells[name]] for kind, cells in by_network.items()}
        if full_accuracy is not None:
            values["all_real"] = [full_accuracy] * len(own)
        ranked, best = scores(values), [cell["best"] for cell in own]
        (random, std), (best_mean, best_std) = mean_std(values["random"]), mean_std(best)
        chosen = {"best_on_test_mean": best_mean, "best_on_test_std": best_std}
        more = {"random_mean": random, "random_std": std, **chosen, **ranked}
        summary.append({"network": name, **spread(own, "final"), **more})
        columns = [values["own_labels"], values["random"], best]
        columns = [format_mean_std(column, 4) for column in columns]
        for kind, score in ranked.items():
            columns.append(f"{score['score']:.4f}" + f" ± {score['std']:.4f}" * (len(own) > 1))
            used = ", ".join(f"{k} {score[k]:.4f}".replace("_", " ") for k in SCORES[kind][1])
            notes.append(f"{name}: {titled(kind)} {score['score']:.4f}, from the accuracies {used}")
        rows.append([name, *columns, str(len(own))])
    header = ["network", "last epoch", "random images", "best (on test)", *map(titled, ranked), "n"]
    return summary, "\n".join([markdown(header, rows), *notes])
