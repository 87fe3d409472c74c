"""What the kernel regression family adds to runs of one set: real batches, several processes."""

from dataclasses import replace
from typing import Any

import torch

from data.specs import Stats, pixel_stats
from distillation.one_set import SetSetup
from distillation.run import Method
from krr_st.config import TrainFlags
from utils.cost import Cost
from utils.distributed import Group
from utils.errors import UserError
from utils.plots import save_lines
from utils.precision import check_compile
from utils.run_folder import Run, RunFolder, read_series


class KernelSetup(SetSetup):
    """Runs of methods that take a batch of real images per step, perhaps dealt to several processes."""

    knobs = "lower --outer_batch_size, --num_images or --num_models, or use --precision bf16"
    several_processes = True

    @classmethod
    def check(cls, flags: Any, device: torch.device) -> None:
        """As any; a learning rate of labels that are not learned is refused."""
        super().check(flags, device)
        if getattr(flags, "learn_label", None) is False and getattr(flags, "outer_lr_y", None):
            raise UserError("--outer_lr_y is the learning rate of labels that --no-learn_label keeps")

    def __init__(self, method: Method, flags: Any, device: torch.device, group: Group) -> None:
        super().__init__(method, flags, device, group)
        batch = min(flags.outer_batch_size, len(self.image_set.train))
        if batch % group.ranks:
            raise UserError(
                f"--outer_batch_size: a batch of {batch} images cannot be dealt to {group.ranks} "
                "processes; use a multiple of their number"
            )


class KRRSTSetup(KernelSetup):
    """Runs of KRR-ST: its raw start, its table of views, the picture of its losses."""

    knobs = (
        "lower --outer_batch_size, --num_images or --num_models, or use --target_views online or "
        "--precision bf16"
    )

    @classmethod
    def check(cls, flags: TrainFlags, device: torch.device) -> None:
        """Raise a UserError for a precision or a compiler that is not to be had here."""
        super().check(flags, device)
        if flags.views_dir is not None and flags.views_dir.is_file():
            raise UserError(f"--views_dir {flags.views_dir} is a file; expected a folder")
        if flags.views_dir is not None and flags.target_views == "online":
            raise UserError("--views_dir keeps looked-up targets; --target_views online looks none up")
        if flags.cuda_graph:
            if device.type != "cuda":
                raise UserError(f"--cuda_graph needs an NVIDIA GPU, the device is {device}")
            if flags.online_opt != "sgd":
                raise UserError("--cuda_graph goes with --online_opt sgd")
        if flags.views > 1 and flags.syn_init == "raw":
            raise UserError("--views needs --syn_init normalized: their targets are features of the views")
        if flags.views > 1 and flags.pool_mixup:
            raise UserError("--pool_mixup: each view has its own target; for mixtures use --blend")
        if flags.views > 1 and flags.outer_lr_y:
            raise UserError("--outer_lr_y: with --views targets are the target model's features, not learned")
        if flags.compile and not flags.dry_run:
            check_compile(device)

    def __init__(self, method: Method, flags: TrainFlags, device: torch.device, group: Group) -> None:
        super().__init__(method, flags, device, group)
        size, hflip = self.image_set.size, self.image_set.hflip
        flags.draw(flags.num_images, size, hflip, seed=0)  # views that cannot be drawn fail now

    @property
    def syn_stats(self) -> Stats:
        """With a raw start there is nothing to undo."""
        if self.flags.syn_init != "raw":
            return self.image_set.stats
        return pixel_stats(self.image_set.img_shape[0])

    @property
    def shorter(self) -> str:
        """Flags that shorten the run."""
        return "--recipe best, " * (self.flags.recipe != "best") + super().shorter

    def measure(self) -> Cost:
        """As any, with targets computed at every step: a table would have to be filled first."""
        self.flags = replace(self.flags, views_dir=None, target_views="online")
        return super().measure()

    def run(self, run: Run) -> dict[str, Any]:
        """As any, with the evaluations under their older name, too."""
        results = super().run(run)
        return {**results, "linear_evaluations": results["evaluations"]}

    def drawn(self, run: RunFolder) -> dict[str, Any]:
        """Draw loss.png; returns where the held-out loss began and ended."""
        series = read_series(run.path / "log.jsonl")
        lines = {"real batches, networks of the pool": series["loss"]}
        found = {}
        if "held_out_loss" in series:
            curve = [e["held_out_loss"] for e in run.read_log() if "held_out_loss" in e]
            found = {"held_out_loss": {"of": str(self.monitor), "start": curve[0], "end": curve[-1]}}
            lines = {str(self.monitor): series["held_out_loss"], **lines}
        title = "Compare steps by the fixed networks alone: those of the pool age and follow the set"
        save_lines({title: lines}, run.path / "loss.png", x_label="outer step", y_label="KRR loss")
        return found
