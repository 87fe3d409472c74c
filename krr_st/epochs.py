"""Networks learnt from a prepared set over epochs, each with a run folder beside its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.loader import TensorLoader
from evaluation.fit import LossFn, fit
from krr_st.config import EpochFlags
from utils import checkpoint, cli
from utils.errors import UserError
from utils.memory import out_of_memory_says
from utils.optim import make_schedule
from utils.resume import has_state, load_run, save_run
from utils.runlog import LossWindow, RunFolder, claim_run
from utils.stop import StopRequest


def make_checkpoint(
    path: Path,
    flags: EpochFlags,
    size: int,
    device: torch.device,
    train: Callable[[RunFolder], tuple[nn.Module, dict[str, Any]]],
) -> None:
    """Train a network and write its state dict, unless these flags have made it already.

    Args:
        path: the checkpoint; the run folder beside it bears its name without the suffix.
        flags: of the command.
        size: side of the images, which the flags may leave to the preset.
        device: recorded with the run.
        train: trains in that folder; returns the network and what else goes into results.json.

    Raises:
        UserError: the folder holds a run with other flags, `path` came from elsewhere, or the
            trained weights are not finite.
    """
    folder = path.with_suffix("")
    if path.exists() and not (folder / "config.json").exists() and not flags.overwrite:
        raise UserError(
            f"{path} is there already and was not made by this command; choose another --save_dir, "
            "or pass --overwrite to replace it"
        )
    with claim_run(folder), out_of_memory_says(device, "lower --batch_size"):
        _make(path, folder, flags, size, device, train)


def _make(
    path: Path,
    folder: Path,
    flags: EpochFlags,
    size: int,
    device: torch.device,
    train: Callable[[RunFolder], tuple[nn.Module, dict[str, Any]]],
) -> None:
    run = RunFolder(
        folder, {**cli.as_json(flags), "img_size": size}, seed=flags.seed, device=device,
        overwrite=flags.overwrite, tensorboard=flags.tensorboard,
    )  # fmt: skip
    if run.finished and path.exists():
        print(f"{path} is there already, trained with these flags; --overwrite trains it again")
        return
    began = time.perf_counter()
    network, results = train(run)
    state = {k: v.cpu().contiguous() for k, v in network.state_dict().items()}
    if not all(v.isfinite().all() for v in state.values()):
        raise UserError(f"{path}: the last step left weights that are not finite; lower --lr")
    checkpoint.save(state, path)
    loss = run.read_log()[-1]["loss"]
    seconds = time.perf_counter() - began
    run.finish({"checkpoint": path, "loss": loss, **results, "seconds": seconds})
    print(f"checkpoint: {path}; log: {run.path}")


def train_epochs(
    network: nn.Module,
    loader: TensorLoader,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    epochs: int,
    warmup_epochs: float = 0.0,
    save_every: int,
    run: RunFolder,
    what: str,
    measure: Callable[[int], dict[str, Any]] = lambda epoch: {},
) -> None:
    """Train to the last epoch under a cosine to 0, going on where `run` stopped.

    Args:
        network: on its device; left in eval mode.
        loader: its endless stream leaves out incomplete batches.
        loss_fn: as in `evaluation.fit.fit`.
        optimizer: over the network's parameters, at the peak learning rate.
        epochs: passes over the loader's images.
        warmup_epochs: linear warm-up before the cosine.
        save_every: epochs between saves of the run state.
        run: folder of the log and the state.
        what: the name of this training, for messages.
        measure: what to log for an epoch beside loss and rate; accuracies in % are printed.
    """
    per_epoch = len(loader.images) // loader.batch_size
    steps = epochs * per_epoch
    schedule = make_schedule("cosine", optimizer, steps, round(warmup_epochs * per_epoch))
    window = LossWindow(per_epoch)
    parts = {
        "network": network, "optimizer": optimizer, "schedule": schedule, "loader": loader,
        "losses": window,
    }  # fmt: skip
    start = 0
    if has_state(run.state_path):
        start, _ = load_run(run.state_path, parts)
        print(f"going on after epoch {start // per_epoch} of {epochs}")
    run.truncate_log(start)
    began = time.perf_counter()

    def leave(step: int, loss: Tensor) -> None:
        if math.isfinite(float(loss)):
            save_run(run.state_path, step, parts)
        stop.leave(f"after epoch {step / per_epoch:.2f} of {epochs}")

    def on_step(step: int, loss: Tensor, rate: float) -> None:
        window.add(loss)
        if step % per_epoch:
            if stop:
                leave(step, loss)
            return
        epoch, mean = step // per_epoch, window.mean()
        found = measure(epoch)
        network.train()
        run.log(step=step, epoch=epoch, loss=mean, lr=rate, **found)
        shown = [f", {k.replace('_', ' ')} {v:.2f} %" for k, v in found.items() if v is not None]
        if shown or epoch % max(1, epochs // 20) == 0:
            left = (time.perf_counter() - began) / (step - start) * (steps - step)
            line = f"epoch {epoch}/{epochs}: loss {mean:.4g}{''.join(shown)}"
            print(f"{line}, {left:.0f} s left", flush=True)
        # A loss that is not finite stops `fit`, on a GPU one step late: it must not be saved over.
        if epoch % save_every == 0 and step < steps and math.isfinite(mean):
            save_run(run.state_path, step, parts)
        if stop and step < steps:
            leave(step, loss)

    with StopRequest() as stop:
        fit(
            network, loader.forever(), loss_fn, optimizer, schedule,
            steps=steps, start=start, what=what, on_step=on_step,
        )  # fmt: skip
