"""Networks trained on a prepared set over epochs, each with a run folder beside its checkpoint."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.load import ImageSet
from evaluation.fit import Trainer
from utils import checkpoint, cli
from utils.cli import SEED, DeviceFlags, flag, how
from utils.cost import Cost, DryRunFlags, tensor_bytes
from utils.errors import UserError
from utils.memory import out_of_memory_says
from utils.run_folder import TENSORBOARD, RunFolder, claim_run, forget_run, load_run, save_run
from utils.stop import StopRequest


@dataclass(frozen=True)
class EpochFlags(DeviceFlags, DryRunFlags):
    """Flags of the commands that train a network over epochs and write its checkpoint."""

    data_dir: Path = how(Path("./datasets"), "folder of the prepared tensors")
    seed: int | None = how(None, "seed; default: drawn and printed", **SEED)
    img_size: int | None = flag(None, "side in pixels; default: preset", minimum=4)
    save_dir: Path = how(Path("./teacher_ckpt"), "folder of the checkpoint")
    tensorboard: bool = how(False, TENSORBOARD)
    overwrite: bool = how(False, "train again over a checkpoint of another configuration")
    epochs: int = flag(200, "passes over the training images", minimum=1)
    save_every: int = how(10, "epochs between saves of the run state", minimum=1)


def make_checkpoint(
    path: Path,
    flags: EpochFlags,
    image_set: ImageSet,
    device: torch.device,
    make_trainer: Callable[[Any, ImageSet, torch.device, int], Trainer],
    train: Callable[[Any, ImageSet, Trainer, RunFolder], tuple[nn.Module, dict[str, Any]]],
    program: str,
) -> None:
    """Train a network on `image_set` and write its state dict, unless these flags have made it already.

    `make_trainer` gets flags, images, device and seed; `train` flags, images, this trainer and the run
    folder beside the checkpoint, and returns the network and what else goes into results.json; `program` is
    the command, such as `python -m krr_st.target`. With --dry_run or --cost nothing is written.

    Raises:
        UserError: the folder holds a run with other flags or data, `path` came from elsewhere, or the
            trained weights are not finite.
    """
    if flags.dry_run or flags.cost:
        print(json.dumps(cli.as_json(flags), indent=2))
        if flags.cost:
            print(epoch_cost(make_trainer(flags, image_set, device, flags.seed or 0)))
        return
    folder = path.with_suffix("")
    if path.exists() and not (folder / "config.json").exists() and not flags.overwrite:
        raise UserError(
            f"{path} is there already and was not made by this command; choose another --save_dir, "
            "or pass --overwrite to replace it"
        )
    with claim_run(folder), out_of_memory_says(device, "lower --batch_size"):
        run = RunFolder(
            folder,
            {**cli.identity(flags), "img_size": image_set.size},  # the flags may leave it to the preset
            seed=flags.seed,
            device=device,
            command=cli.command_line(program, flags, seed=None),
            inputs={"data set": image_set.fingerprint},
            overwrite=flags.overwrite,
            tensorboard=flags.tensorboard,
        )
        if run.finished and path.exists():
            forget_run(run.state_path)  # of a start that was killed at its very end
            print(f"{path} is there already, trained with these flags; --overwrite trains it again")
            return
        began = time.perf_counter()
        trainer = make_trainer(flags, image_set, device, run.seed)
        network, results = train(flags, image_set, trainer, run)
        state = {k: v.cpu().contiguous() for k, v in network.state_dict().items()}
        if not all(v.isfinite().all() for v in state.values()):
            raise UserError(f"{path}: the last step left weights that are not finite; lower --lr")
        checkpoint.save(state, path)
        results = {"checkpoint": path, "loss": run.read_log()[-1]["loss"], **results}
        run.finish({**results, "seconds": time.perf_counter() - began})
        print(f"checkpoint: {path}; log: {run.path}")


def epoch_cost(trainer: Trainer, runs: int = 1) -> Cost:
    """What `runs` trainings like this one take, from a few steps of it."""
    return trainer.measure(runs, **_facts(trainer))


def _facts(trainer: Trainer) -> dict[str, Any]:
    return dict(
        disk=lambda: 2 * tensor_bytes(trainer.state_dict()),  # the last save and the one before it
        length=("--epochs", trainer.recipe.epochs),
        shorter="a smaller network",
    )


def train_epochs(
    trainer: Trainer,
    run: RunFolder,
    *,
    save_every: int,
    what: str,
    measure: Callable[[int], dict[str, Any]] = lambda epoch: {},
) -> None:
    """Train to the recipe's last epoch, resuming where `run` stopped; the network is left in eval mode.

    What `measure` gives for an epoch is logged and printed; `what` names this training in messages.
    """
    per_epoch, steps, epochs = trainer.per_epoch, trainer.steps, trainer.recipe.epochs
    parts = {"trainer": trainer}
    if load_run(run.state_path, parts) is not None:
        print(f"{what}: resuming after epoch {trainer.step // per_epoch} of {epochs}")
    start = trainer.step
    run.truncate_log(start)
    began, forecast = time.perf_counter(), trainer.forecast(**_facts(trainer))

    def on_epoch(epoch: int, step: int, rate: float) -> None:
        mean, found = trainer.window.mean(), measure(epoch)
        trainer.model.train()
        run.log(step=step, epoch=epoch, loss=mean, lr=rate, **found)
        shown = [f", {k.replace('_', ' ')} {v:.4g}" for k, v in found.items() if v is not None]
        if shown or epoch % max(1, epochs // 20) == 0:
            left = (time.perf_counter() - began) / (step - start) * (steps - step)
            line = f"{what} epoch {epoch}/{epochs}: loss {mean:.4g}{''.join(shown)}"
            print(f"{line}, {left:.0f} s left", flush=True)
        # A loss that is not finite stops the loop, on a GPU one step late: never save over it.
        if epoch % save_every == 0 and step < steps and math.isfinite(mean):
            save_run(run.state_path, step, parts)

    def on_step(step: int, loss: Tensor, rate: float) -> None:
        forecast.tick(1)
        if step % per_epoch == 0:
            on_epoch(step // per_epoch, step, rate)
        if stop and step < steps:
            if math.isfinite(float(loss)):
                save_run(run.state_path, step, parts)
            stop.leave(f"{what}: after epoch {step / per_epoch:.2f} of {epochs}")

    with StopRequest() as stop:
        trainer.run(what=what, on_step=on_step)
