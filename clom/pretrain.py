"""The driver behind train_original_models.py: the pre-trained models that CLoM asks."""

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from clom.config import OriginalFlags
from clom.pool import checkpoint_name, index_folders, model_folder
from clom.source import load_data, network_factory
from data.load import ImageSet
from data.specs import pixel_stats
from evaluation.epochs import epoch_cost, train_epochs
from evaluation.fit import Trainer, real_loader
from evaluation.recipes import Recipe
from evaluation.score import share_correct
from utils import checkpoint, cli
from utils.device import resolve_gpus
from utils.errors import UserError
from utils.memory import out_of_memory_says
from utils.run_folder import InUse, RunFolder, changed_inputs, claim_run, is_claimed
from utils.seed import derive_seed, make_generator, resolve_seed


def train_originals(flags: OriginalFlags) -> int:
    """Train `num` networks on the real images, each in the next free index folder.

    A UserError for bad flags or data (nothing is written then), or a non-finite loss.
    """
    recipe = flags.recipe()
    print(json.dumps(cli.as_json(flags), indent=2))
    device, gpus = resolve_gpus(flags.device, flags.gpu_id, flags.multigpu)
    if flags.dry_run and not flags.cost:
        return 0
    image_set = in_space(load_data(flags), flags.normalize_data)
    if not flags.normalize_data:
        print("images stay in [0, 1]; the published command has --normalize_data")
    new_network = network_factory(flags.model, image_set, device)
    if flags.cost:
        trainer = original_trainer(new_network(0), recipe, image_set, device, 0)
        print(epoch_cost(trainer, flags.num))
        return 0
    seed = resolve_seed(flags.seed)
    folder = model_folder(flags.pretrained_path, flags.dataset, flags.model)
    identity = cli.identity(flags)
    inputs = {"data set": image_set.fingerprint}
    earlier = earlier_runs(folder, identity)
    left = [place for place in earlier if not (place / "results.json").exists()]
    finished = len(earlier) - len(left) if flags.resume else 0
    unfinished = [p for p in left if flags.seed is None or earlier[p].get("seed") == network_seed(seed, p)]
    for place in earlier if flags.resume else unfinished[: flags.num]:
        if other := changed_inputs(earlier[place], inputs):
            raise UserError(
                f"{place} holds a network of these flags that began with {other}; put back what was "
                "there, or delete this folder to train on what is there now"
            )
    if finished:
        print(f"{min(finished, flags.num)} of {flags.num} networks are there already")
    facts = dict(data_name=flags.dataset, mean=image_set.stats.mean, std=image_set.stats.std)
    facts |= dict(img_shape=image_set.img_shape, num_classes=image_set.num_classes)
    for _ in range(flags.num - finished):
        with (
            claim_place(folder, unfinished) as (place, begun),
            out_of_memory_says(device, "lower --batch_size"),
        ):
            run = RunFolder(
                place,
                identity,
                device=device,
                tensorboard=flags.tensorboard,
                seed=None if begun else network_seed(seed, place),
                extra=facts,
                inputs=inputs,
            )
            model = new_network(derive_seed(run.seed, "network"))
            trainer = original_trainer(model, recipe, image_set, device, run.seed, gpus)
            train_one(trainer, image_set, run, flags)
    return 0


def original_trainer(
    model: nn.Module,
    recipe: Recipe,
    image_set: ImageSet,
    device: torch.device,
    seed: int,
    gpus: Sequence[int] = (),
) -> Trainer:
    """A network before its first step on the real images, on several GPUs where these are given."""
    loader = real_loader(recipe, image_set, device, make_generator(seed, "batches"))
    if len(gpus) < 2:
        return Trainer(model, loader, recipe)
    parallel = nn.DataParallel(model, list(gpus))  # in the loss alone: a run resumes on any number of them
    return Trainer(model, loader, recipe, loss_fn=lambda _, x, y: F.cross_entropy(parallel(x), y))


def in_space(image_set: ImageSet, normalized: bool) -> ImageSet:
    """The set with its own statistics, or with those that leave pixels in [0, 1]."""
    return image_set if normalized else replace(image_set, stats=pixel_stats(image_set.img_shape[0]))


def network_seed(seed: int, place: Path) -> int:
    """That of the network in an index folder."""
    return derive_seed(seed, place.name) % 2**31


@contextlib.contextmanager
def claim_place(folder: Path, unfinished: list[Path]) -> Iterator[tuple[Path, bool]]:
    """A place that no other process has, and whether its network was begun.

    The next of `unfinished`, which is taken off the list, or the first index_{i} that does not exist.
    """
    busy = set()
    while True:
        begun = bool(unfinished)
        place = unfinished.pop(0) if begun else next_index(folder, busy)
        with contextlib.ExitStack() as claim:
            try:
                claim.enter_context(claim_run(place))
            except InUse:  # since it was looked for
                busy.add(place.name)
                continue
            yield place, begun
            return


def next_index(folder: Path, busy: Collection[str] = ()) -> Path:
    """The first index_{i} that neither exists nor is one of `busy`."""
    taken = {path.name for path in index_folders(folder)} | {*busy}
    return next(folder / n for i in range(len(taken) + 1) if (n := f"index_{i}") not in taken)


def earlier_runs(folder: Path, identity: dict) -> dict[Path, dict]:
    """Index folders of the same flags, that no other process is training in, and their config.json."""
    found = {}
    for place in index_folders(folder):
        try:
            config = json.loads((place / "config.json").read_text())
            flags = config["flags"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if flags == json.loads(json.dumps(identity)) and not is_claimed(place):
            found[place] = config
    return found


def train_one(trainer: Trainer, image_set: ImageSet, run: RunFolder, flags: OriginalFlags) -> None:
    """Train one network; state dicts and tests every `save_every` epochs and at the end."""
    model = trainer.model

    def measure(epoch: int) -> dict[str, float]:
        if epoch % flags.save_every and epoch != flags.epochs:
            return {}
        name = checkpoint_name(flags.dataset, flags.model, epoch)
        checkpoint.save({k: v.cpu() for k, v in model.state_dict().items()}, run.path / name)
        return {"test_accuracy": share_correct(model.eval(), image_set, trainer.loader.device)}

    train_epochs(trainer, run, save_every=flags.save_every, what=run.path.name, measure=measure)
    run.finish({"epochs": flags.epochs, "test_accuracy": run.read_log()[-1]["test_accuracy"]})
