"""The driver behind train_original_models.py: the pre-trained models that CLoM asks."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from clom.config import OriginalFlags, given_seed, parse_epochs
from clom.inputs import load_data, network_factory
from clom.teachers import checkpoint_name, index_folders, model_folder, pixel_stats
from clom.training import Trainer, Training, share_correct
from data.load import ImageSet
from data.loader import ImagePipeline, TensorLoader
from utils import checkpoint, cli
from utils.device import resolve_gpus
from utils.memory import out_of_memory_says
from utils.resume import has_state, load_run, save_run
from utils.runlog import RunFolder, claim_run, run_claims
from utils.seed import derive_seed, make_generator, resolve_seed
from utils.stop import StopRequest

# Flags that may differ between two starts.
FREE_FLAGS = ("device", "gpu", "dry_run", "resume", "num", "seed", "random_seed", "save_every",
              "data_path", "pretrained_path", "tensorboard")  # fmt: skip


def train_originals(flags: OriginalFlags) -> int:
    """Train `num` networks on the real images, each in the next free index folder.

    Raises:
        UserError: bad flags or data (nothing is written then), or a non-finite loss.
    """
    decay = parse_epochs(flags.lr_decay_step, "lr_decay_step")
    training = Training(
        flags.epochs, flags.lr, flags.momentum, flags.weight_decay, flags.batch_size, decay
    )
    print(json.dumps(cli.as_json(flags), indent=2))
    device, gpus = resolve_gpus(flags.device, flags.gpu, flags.multigpu)
    if flags.dry_run:
        return 0
    image_set = in_space(load_data(flags), flags.normalize_data)
    if not flags.normalize_data:
        print("images stay in [0, 1]; the published command has --normalize_data")
    new_network = network_factory(flags.model, image_set, device)
    seed = resolve_seed(given_seed(flags))
    folder = model_folder(flags.pretrained_path, flags.dataset, flags.model)
    identity = {k: v for k, v in cli.as_json(flags).items() if k not in FREE_FLAGS}
    earlier = earlier_folders(folder, identity)
    unfinished = [place for place in earlier if not (place / "results.json").exists()]
    finished = len(earlier) - len(unfinished) if flags.resume else 0
    if finished:
        print(f"{min(finished, flags.num)} of {flags.num} networks are there already")
    for number in range(flags.num - finished):
        with ExitStack() as held, out_of_memory_says(device, "lower --batch_size"):
            place = unfinished[number] if number < len(unfinished) else next_index(folder)
            held.enter_context(claim_run(place))
            run = RunFolder(
                place, identity, device=device, tensorboard=flags.tensorboard,
                seed=None if number < len(unfinished) else derive_seed(seed, place.name) % 2**31,
                extra={"data_name": flags.dataset, "mean": image_set.stats.mean,
                       "std": image_set.stats.std, "img_shape": image_set.img_shape,
                       "num_classes": image_set.num_classes},
            )  # fmt: skip
            model = new_network(derive_seed(run.seed, "network"))
            train_one(model, image_set, training, run, flags, device, gpus)
    return 0


def in_space(image_set: ImageSet, normalized: bool) -> ImageSet:
    """The set with its own statistics, or with those that leave pixels in [0, 1]."""
    if normalized:
        return image_set
    return replace(image_set, stats=pixel_stats(image_set.channels))


def next_index(folder: Path) -> Path:
    """The first index_{i} that does not exist."""
    taken = {path.name for path in index_folders(folder)}
    return next(folder / n for i in range(len(taken) + 1) if (n := f"index_{i}") not in taken)


def earlier_folders(folder: Path, identity: dict) -> list[Path]:
    """Index folders of the same flags that no other process is training in."""
    found, claims = [], run_claims(folder)
    for place in index_folders(folder):
        try:
            flags = json.loads((place / "config.json").read_text())["flags"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if flags == json.loads(json.dumps(identity)) and not claims.held_elsewhere(place.name):
            found.append(place)
    return found


def train_one(
    model: nn.Module,
    image_set: ImageSet,
    training: Training,
    run: RunFolder,
    flags: OriginalFlags,
    device: torch.device,
    gpus: tuple[int, ...] = (),
) -> None:
    """Train one network; state dicts every `save_every` epochs and at the end, tests with them."""
    loader = TensorLoader(
        image_set.train.images, image_set.train.labels, batch_size=training.batch_size,
        device=device, generator=make_generator(run.seed, "batches"),
        transform=ImagePipeline(image_set.stats),
    )  # fmt: skip
    parallel = nn.DataParallel(model, list(gpus)) if len(gpus) > 1 else model
    trainer = Trainer(parallel, loader, training)
    if has_state(run.state_path):
        epoch, _ = load_run(run.state_path, {"trainer": trainer})
        print(f"{run.path.name}: going on after epoch {epoch} of {training.epochs}")
    run.truncate_log(trainer.epoch)
    began = time.perf_counter()

    def after(epoch: int, loss: float) -> None:
        last = epoch == training.epochs
        if epoch % flags.save_every == 0 or last:
            save(epoch, loss)
        elif stop:
            save_run(run.state_path, epoch, {"trainer": trainer})
        if stop and not last:
            stop.leave(f"{run.path.name} after epoch {epoch} of {training.epochs}")

    def save(epoch: int, loss: float) -> None:
        name = checkpoint_name(flags.dataset, flags.model, epoch)
        checkpoint.save({k: v.cpu() for k, v in model.state_dict().items()}, run.path / name)
        accuracy = share_correct(model, image_set, device)
        rate = trainer.optimizer.param_groups[0]["lr"]
        run.log(step=epoch, loss=loss, test_accuracy=accuracy, next_lr=rate)
        save_run(run.state_path, epoch, {"trainer": trainer})
        print(f"{run.path.name} epoch {epoch}: loss {loss:.4g}, test {accuracy:.4f}", flush=True)

    with StopRequest() as stop:
        trainer.run(range(1, training.epochs), after, what=run.path.name, progress=True)
    last = [e for e in run.read_log() if "test_accuracy" in e][-1]
    run.finish(
        {"epochs": training.epochs, "test_accuracy": last["test_accuracy"],
         "seconds_of_last_start": time.perf_counter() - began}
    )  # fmt: skip
