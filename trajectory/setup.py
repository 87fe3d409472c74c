"""What trajectory matching adds to runs of one set: published settings, experts made on demand."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.augment.dsa import check_strategy
from data.untrusted import read_json
from distillation.one_set import SetSetup
from distillation.run import Method
from models import get_model
from trajectory import experts
from trajectory.base import TrajectoryFlags
from trajectory.buffers import Experts, expert_files, expert_path
from trajectory.experts import ExpertFlags, expert_cost, made_beside, make_experts
from trajectory.published import published
from utils.checkpoint import files_fingerprint
from utils.cost import Cost
from utils.distributed import Group
from utils.errors import UserError
from utils.run_folder import FollowedRun, RunFolder, changed_inputs

ON_DEMAND = 10  # experts, where no number is given
# Values of flags that neither the command line nor the published settings say.
_REST = dict(min_start_epoch=0, lr_y=0.0, ema_decay=0.0, zca=False)


class TrajectorySetup(SetSetup):
    """Runs of MTT and MKDT."""

    knobs = "use --unroll checkpoint or tesla, or lower --batch_syn"

    @classmethod
    def resolve(cls, method: Method, flags: TrajectoryFlags) -> TrajectoryFlags:
        """Fill in presets, the published settings, the folder of the experts.

        Raises:
            UserError: flags that do not fit each other.
        """
        flags = super().resolve(method, flags)
        recipe = method.name.lower() if flags.recipe == "published" else flags.recipe
        settings, origin = published(recipe, flags.data_name, flags.num_images)
        settings = {**_REST, "dsa_strategy": method.distiller.default_dsa, **settings}
        unset = {k: v for k, v in settings.items() if getattr(flags, k, 0) is None}
        print(f"settings: {origin}")
        flags = replace(flags, **unset)
        check_strategy(flags.dsa_strategy)
        first, last = flags.current_max_start_epoch, flags.max_start_epoch
        if (first is None) != (flags.expansion_end_epoch is None):
            raise UserError("--current_max_start_epoch and --expansion_end_epoch: give both or neither")
        if first is not None and first > last:
            if "current_max_start_epoch" not in unset:
                raise UserError(f"--current_max_start_epoch {first} is above --max_start_epoch {last}")
            flags = replace(flags, current_max_start_epoch=last)
        if flags.min_start_epoch >= flags.max_start_epoch:
            raise UserError(
                f"--min_start_epoch {flags.min_start_epoch} is not below --max_start_epoch "
                f"{flags.max_start_epoch}"
            )
        if flags.expert_every is not None and flags.num_experts is None:
            if flags.buffer_dir is not None:
                raise UserError("--expert_every with --buffer_dir needs --num_experts")
            flags = replace(flags, num_experts=ON_DEMAND)
        return replace(flags, buffer_dir=flags.buffer_dir or expert_flags(method, flags).buffer_dir)

    def __init__(self, method: Method, flags: TrajectoryFlags, device: torch.device, group: Group) -> None:
        super().__init__(method, flags, device, group)
        folder, self.missing = Path(flags.buffer_dir), expert_flags(method, flags)
        on_demand = self.missing.buffer_dir == folder
        check_origin(folder, method, flags, super().inputs, on_demand)
        if not on_demand or len(expert_files(folder)) >= self.missing.num_experts:
            self.missing = None
            network = get_model(flags.train_model, self.image_set.img_shape, self.labels.outputs)
            known = Experts(folder, [p.shape for p in network.parameters()], device, flags.num_experts)
            if known.last < (needed := flags.last_epoch):
                raise UserError(
                    f"--buffer_dir {folder} has {known.last} epochs, {needed} are needed: lower "
                    f"--max_start_epoch {flags.max_start_epoch} or --expert_epochs {flags.expert_epochs}"
                )

    @property
    def inputs(self) -> dict[str, str]:
        """Beside those of every run the experts, unless some are still to come."""
        if self.missing is not None or self.flags.expert_every is not None:
            return super().inputs
        used = expert_files(self.flags.buffer_dir)[: self.flags.num_experts]  # each has one or more
        return super().inputs | {"set of experts": files_fingerprint(used)}

    def measure(self) -> Cost:
        """As any; before there are experts, what these take."""
        if self.missing is None:
            return super().measure()
        print("the experts come first; once they are there this measures the distillation")
        return expert_cost(self.missing, self.device)

    def run(self, run: RunFolder | FollowedRun) -> dict[str, Any]:
        """Train missing experts, first or meanwhile, and distil."""
        if self.missing is None:
            return super().run(run)
        count = self.missing.num_experts
        print(f"no --buffer_dir is given: making {count} expert{'s' * (count > 1)}")
        old = (Path(self.missing.buffer_dir) / "config.json").exists()
        missing = replace(self.missing, seed=None if old else run.seed)
        if self.flags.expert_every is None:
            make_experts(missing, self.device)
            return super().run(run)
        # The first one here, with all that is checked before; so that no number is left out, up to the last.
        folder = Path(missing.buffer_dir)
        there = [n for n in range(missing.num_experts) if expert_path(folder, n).exists()]
        make_experts(replace(missing, num_experts=1 + max(there, default=0)), self.device)
        count = self.flags.experts_at(self.flags.outer_iteration - 1)
        with made_beside(replace(missing, num_experts=count), self.device, self.flags.precision):
            return super().run(run)


def expert_flags(method: Method, flags: TrajectoryFlags) -> ExpertFlags:
    """How the experts of a run are trained that names no folder: as published, as long as it needs them."""
    shared = ("data_dir", "data_name", "img_size", "target_model", "target_ckpt")
    shared += ("target_scale", "train_model", "dsa_strategy", "zca")
    wanted = {name: getattr(flags, name) for name in shared if hasattr(flags, name)}
    count = flags.num_experts or ON_DEMAND
    return experts.resolve(
        ExpertFlags(
            **wanted,
            targets=method.labels,
            num_experts=count,
            train_epochs=flags.last_epoch + flags.average_goals,
        )
    )


def check_origin(
    folder: Path, method: Method, flags: TrajectoryFlags, inputs: Mapping[str, str], on_demand: bool
) -> None:
    """Raise a UserError where experts are known to be of another network, other data or targets.

    `inputs` are the fingerprints of this run's data and target model. Experts made `on_demand` learn with
    the augmentation of the run, too. Of foreign experts nothing is known; a damaged config.json is an error.
    """
    config = read_json(folder / "config.json")
    made = config.get("flags")
    if not isinstance(made, dict):
        return
    wanted = {"data_name": flags.data_name, "img_size": flags.img_size, "targets": method.labels}
    wanted["train_model"] = flags.train_model
    if on_demand:
        wanted["dsa_strategy"] = flags.dsa_strategy
    wanted["zca"] = bool(getattr(flags, "zca", False))  # MKDT has no whitening
    if method.labels == "features":
        wanted["target_scale"] = flags.target_scale or "none"
        made = {**made, "target_scale": made.get("target_scale") or "none"}
    more = "; make others with python -m trajectory.experts"
    for name, value in wanted.items():
        if name in made and made[name] != value:
            raise UserError(f"--buffer_dir {folder}: its experts have {name} {made[name]}, not {value}{more}")
    if other := changed_inputs(config, inputs):
        raise UserError(f"--buffer_dir {folder}: its experts began with {other}{more}")
