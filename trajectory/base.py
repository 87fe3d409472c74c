"""What MTT and MKDT share: their flags, the learned step size, one step of matching."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.augment.dsa import diff_augment, no_augmentation, without_flip
from data.loader import TensorLoader
from data.synthetic import SyntheticSet, TrainingSettings
from distillation.base import Distiller
from distillation.problem import Problem
from evaluation.presets import Preset
from models import get_model
from models.layout import arranged
from models.twice import twice_differentiable
from trajectory.buffers import Experts
from trajectory.experts import default_network
from trajectory.match import DISTANCES, UNROLLS, Batch, functional_loss, tensor_weights
from utils.cli import flag
from utils.device import upload
from utils.errors import UserError
from utils.optim import set_gradients
from utils.seed import draw_seed, local_seed

MOMENTUM = 0.5  # of images, targets and step size


def _published(what: str, **limits: Any) -> Any:
    """A flag whose default depends on data set and number of images."""
    return flag(None, f"{what}; default: published", **limits)


@dataclass(frozen=True)
class TrajectoryFlags:
    """Flags of trajectory matching, beside those of a set. An epoch is a snapshot of the experts."""

    outer_iteration: int | None = _published("outer steps", minimum=1)
    buffer_dir: Path | None = flag(
        None,
        "folder of the experts, replay_buffer_0.pt, ... (of python -m trajectory.experts or a released "
        "code); default: made in ./buffers when the run begins",
    )
    num_experts: int | None = flag(
        None, "experts to match; default: all in --buffer_dir, or 10 where they are made", minimum=1
    )
    expert_every: int | None = flag(
        None,
        "outer steps after which one more expert joins: matching begins with the first, which alone chooses "
        "initial images and soft labels, while a second process trains the others; default: all are there "
        "before the first step",
        minimum=1,
    )
    expert_epochs: int | None = _published("epochs from an expert's start to its goal", minimum=1)
    syn_steps: int | None = _published("steps of the student per outer step", minimum=1)
    batch_syn: int | None = flag(
        None, "images per step of the student; default: published, or all", minimum=1
    )
    min_start_epoch: int | None = flag(None, "first epoch to start from; default: published, or 0", minimum=0)
    max_start_epoch: int | None = _published("starts are drawn from the epochs below this one", minimum=1)
    current_max_start_epoch: int | None = flag(
        None,
        "value of --max_start_epoch at the first outer step, from which it rises linearly; default: "
        "published, or no rise",
        minimum=1,
    )
    expansion_end_epoch: int | None = flag(
        None, "outer steps of this rise; default: published, or no rise", minimum=1
    )
    lr_img: float | None = _published("learning rate of the images", above=0)
    lr_y: float | None = flag(
        None, "learning rate of the labels; 0: they are not learned; default: published, or 0", minimum=0
    )
    lr_lr: float | None = _published("learning rate of the student's step size", minimum=0)
    lr_teacher: float | None = _published("initial step size of the student", above=0)
    clamp_lr: float | None = flag(
        None,
        "lower bound of the learned step size; default: none, and a run stops when it reaches 0",
        above=0,
    )
    threshold: float | None = flag(
        None, "skip outer steps with a loss above this value; default: published, or none", above=0
    )
    ema_decay: float | None = flag(
        None,
        "decay of the moving average of images and labels that is written and evaluated; 0: no average; "
        "default: published, or 0",
        minimum=0,
        maximum=0.99999,
    )
    unroll: str = flag(
        "full",
        "how gradients go through the student's steps: full keeps one graph of all steps, checkpoint gives "
        "the same gradient with less memory in more time, tesla takes earlier steps as constant",
        choices=tuple(UNROLLS),
    )
    inner_momentum: float = flag(0.0, "momentum of the student's steps", minimum=0, maximum=0.999)
    inner_wd: float = flag(0.0, "weight decay of the student's steps", minimum=0)
    distance: str = flag(
        "whole",
        "normalise the distance over all parameters together (whole) or in each tensor (layer)",
        choices=tuple(DISTANCES),
    )
    vector_weight: float = flag(1.0, "weight of biases and norms in the distance", minimum=0)
    head_weight: float = flag(1.0, "weight of the head in the distance; 0: match the body alone", minimum=0)
    average_goals: int = flag(
        0, "average each goal with the snapshots up to this many epochs before and after it", minimum=0
    )
    train_momentum: float | None = flag(
        None,
        "momentum that is written with the set, for training on it at the learned step size; default: "
        "--inner_momentum, or the published 0.9 where that is 0",
        minimum=0,
        maximum=0.999,
    )
    dsa_strategy: str | None = flag(
        None, "DSA operations on the student's batches, joined by _, or none; default: the method's"
    )

    @property
    def last_epoch(self) -> int:
        """The last snapshot that is needed of an expert."""
        return self.max_start_epoch - 1 + self.expert_epochs

    def experts_at(self, iteration: int) -> int | None:
        """How many experts there are to match in this iteration, from 0; None: all that are found."""
        if self.expert_every is None:
            return self.num_experts
        return min(self.num_experts, 1 + iteration // self.expert_every)


class Student(nn.Module):
    """The learned step size, how many iterations are done, and how many of them changed nothing."""

    def __init__(self, lr: float, device: torch.device) -> None:
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(lr, device=device))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))


def start_limit(flags: TrajectoryFlags, iteration: int) -> int:
    """Starts of an iteration lie below this epoch; it rises to max_start_epoch.

    Source: Guo et al., "Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory
    Matching" (DATM), arXiv 2310.05773, sec. 3.3.
    """
    first = flags.current_max_start_epoch or flags.max_start_epoch
    share = min(1.0, iteration / flags.expansion_end_epoch) if flags.expansion_end_epoch else 1.0
    limit = first + math.floor((flags.max_start_epoch - first) * share)
    return max(limit, flags.min_start_epoch + 1)


class TrajectoryMatching(Distiller):
    """Images on which a student comes from an expert's snapshot to a later one.

    A subclass says in `start` where images and targets begin, and gives the student's `criterion`
    and `width` of outputs.
    """

    parts = ("optimizer", "student", "experts", "order", "average")
    losses = ("loss", "step_size", "skipped")
    target_momentum = MOMENTUM
    default_dsa = "none"
    criterion: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, problem: Problem, flags: TrajectoryFlags) -> None:
        super().__init__(problem, flags)
        device = problem.device
        with local_seed(0):  # only its form matters: the weights are the experts'
            network = get_model(flags.train_model, problem.image_set.img_shape, self.width)
        network = twice_differentiable(network)
        self.student_network = arranged(network, device, flags.layout)
        shapes = [p.shape for p in network.parameters()]
        self.experts = Experts(flags.buffer_dir, shapes, device, flags.experts_at(0))
        self.strategy = flags.dsa_strategy
        if not problem.image_set.hflip:
            self.strategy = without_flip(self.strategy)
            if self.strategy != flags.dsa_strategy:
                print(f"{flags.data_name}: a mirrored image means another thing, DSA does not flip")
        self.weights = tensor_weights(network, flags.vector_weight, flags.head_weight)
        x, y = self.start()
        self.x_syn, self.y_syn = x.clone().requires_grad_(), y.clone()
        self.student = Student(flags.lr_teacher, device)
        self.inputs, learned = [self.x_syn], [dict(params=[self.x_syn], lr=flags.lr_img)]
        if flags.lr_y:
            self.inputs.append(self.y_syn.requires_grad_())
            learned.append(dict(params=[self.y_syn], lr=flags.lr_y, momentum=self.target_momentum))
        learned.append(dict(params=[self.student.lr], lr=flags.lr_lr))
        self.optimizer = torch.optim.SGD(learned, lr=flags.lr_img, momentum=MOMENTUM)
        self.average = None
        if flags.ema_decay:
            self.average = nn.ParameterList(t.detach().clone() for t in self.inputs)
        self.order = TensorLoader(
            torch.arange(len(self.experts) if flags.expert_every is None else flags.num_experts),
            None,
            batch_size=1,
            device=torch.device("cpu"),
            generator=self.stream("experts"),
        )
        self.loss_fn = functional_loss(network, self.criterion, flags.precision)
        self._turns = self.order.forever()

    @staticmethod
    def network(preset: Preset) -> str:
        """The published ConvNet."""
        return default_network(preset.size)

    @property
    def width(self) -> int:
        """Outputs of the network."""
        raise NotImplementedError

    def start(self) -> tuple[Tensor, Tensor]:
        """Images (m, C, H, W), as networks see them, and targets to begin with."""
        raise NotImplementedError

    def targets(self, y: Tensor) -> Tensor:
        """What the set is labelled with, from `y_syn` or its moving average."""
        return y

    @classmethod
    def cost(cls, flags: TrajectoryFlags, classes: int) -> float:
        """A step of the student and the way back through it; one step more where no graph is kept."""
        batch = min(flags.batch_syn or flags.num_images, flags.num_images)
        return flags.syn_steps * batch * (6.0 if flags.unroll == "full" else 9.0)

    def awaited(self) -> str:
        """The expert that joins in the next iteration, where it is not there yet."""
        wanted = self.flags.experts_at(int(self.student.iteration)) or 0
        missing = wanted > len(self.experts) and not self.experts.holds(wanted)
        return f"expert {wanted} in {self.experts.folder}" if missing else ""

    def wait(self) -> None:
        self.experts.use(self.flags.experts_at(int(self.student.iteration)), wait=True)

    def step(self) -> dict[str, Tensor]:
        """One iteration: from a random snapshot of the next expert towards its later one."""
        flags, student = self.flags, self.student
        if flags.expert_every is not None:
            self.experts.use(flags.experts_at(int(student.iteration)))
        expert = next(int(n) for _, n in self._turns if n < len(self.experts))
        limit = start_limit(flags, int(student.iteration))
        t = int(torch.randint(flags.min_start_epoch, limit, (1,), generator=self.stream("starts")))
        start, goal = self.experts.pair(expert, t, flags.expert_epochs, flags.average_goals)
        # Files hold them contiguous; channels-last convolutions are faster.
        own = self.student_network.parameters()
        start = [torch.empty_like(p).copy_(s) for p, s in zip(own, start, strict=True)]
        loss, of_inputs, of_lr = UNROLLS[flags.unroll](
            self.loss_fn,
            start,
            self.batches(),
            lambda end: DISTANCES[flags.distance](end, start, goal, self.weights),
            self.inputs,
            student.lr,
            flags.inner_momentum,
            flags.inner_wd,
        )
        student.iteration += 1
        used = student.lr.detach().clone()
        if flags.threshold is not None and not float(loss) <= flags.threshold:
            self.skip(loss)
            # A loss that is not finite would stop the run: it counts as one at the threshold.
            loss = loss.nan_to_num(flags.threshold, flags.threshold)
        elif loss.isfinite():  # else the loop stops the run
            set_gradients([*self.inputs, student.lr], [*of_inputs, of_lr])
            self.optimizer.step()
            self.check_step_size(float(used))
            if self.average is not None:
                with torch.no_grad():
                    for mean, tensor in zip(self.average, self.inputs, strict=True):
                        mean.lerp_(tensor, 1 - flags.ema_decay)
        skipped = (student.skipped / student.iteration).to(loss.device)
        return {"loss": loss, "step_size": used, "skipped": skipped}

    def batches(self) -> list[Batch]:
        """The student's mini-batches: the set in random order again and again, each augmented."""
        flags, m, found, rows = self.flags, len(self.x_syn), [], []
        for _ in range(flags.syn_steps):
            if not rows:
                order = torch.randperm(m, generator=self.stream("student's batches"))
                rows = list(upload(order, self.x_syn.device).split(min(flags.batch_syn or m, m)))
            seed = draw_seed(self.stream("augmentation"))
            found.append(functools.partial(self.batch, rows.pop(0), seed))
        return found

    def batch(self, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """One mini-batch, differentiable in the set; the seed gives the augmentation."""
        x = self.x_syn[rows]
        if not no_augmentation(self.strategy):
            x = diff_augment(x, self.strategy, seed=seed)
        return x, self.y_syn[rows]

    def skip(self, loss: Tensor) -> None:
        """Count an iteration that changes nothing; say so at 1, 2, 4, ... of them."""
        count = int(self.student.skipped.add_(1))
        if count & (count - 1) == 0:
            done = int(self.student.iteration)
            print(
                f"step {done}: the loss {float(loss):.3g} is above --threshold {self.flags.threshold:g}; "
                f"{count} of {done} iterations skipped so far",
                flush=True,
            )

    def check_step_size(self, before: float) -> None:
        """Keep the step size above the clamp; a UserError where it is not positive without one."""
        lr, clamp = self.student.lr.detach(), self.flags.clamp_lr
        if clamp is not None:
            lr.clamp_(min=clamp)
        if not 0 < lr.item() < math.inf:
            raise UserError(
                f"the learned step size went from {before:.4g} to {lr.item():.4g}; lower --lr_lr, or "
                "--max_start_epoch, or keep it positive with --clamp_lr"
            )

    def synthetic(self) -> SyntheticSet:
        """The set, its moving average if there is one, with the step size that was learned for it."""
        learned = self.inputs if self.average is None else self.average
        x, *y = (t.detach() for t in learned)
        whitening, momentum = self.problem.whitening, self.flags.train_momentum
        momentum = (self.flags.inner_momentum or 0.9) if momentum is None else momentum
        lr = float(f"{self.student.lr.item():.7g}")  # no digits that float32 does not have
        training = TrainingSettings(lr, self.strategy, whitening, momentum, self.problem.target_scale)
        images = x if whitening is None else whitening.undo(x)
        targets = self.problem.unscaled(self.targets(y[0] if y else self.y_syn))
        return SyntheticSet(images, targets, training=training)
