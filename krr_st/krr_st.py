"""KRR-ST: images and target features from which kernel regression predicts a target model."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from data.augment.crop_flip import default_padding
from data.augment.mixup import mixup
from data.loader import TensorLoader, ViewPipeline
from data.synthetic import SyntheticSet
from distillation.base import Distiller
from distillation.problem import Problem
from krr_st.config import TrainFlags
from krr_st.held_out import HeldOutLoss
from krr_st.loss import krr_loss
from krr_st.pool import ModelPool, pool_network
from krr_st.views import RealBatch, targets_for
from utils.memory import SplitBatches
from utils.optim import make_optimizer, make_schedule
from utils.precision import autocast, compiled


class KRRST(Distiller):
    """X_s and Y_s by bilevel optimisation, with kernel ridge regression in place of training.

    One step: draw a network f of the pool, and a real batch X_r in random views. With features of
    f, kernel ridge regression on (X_s, Y_s) predicts g(X_r); the mean squared error moves X_s and
    Y_s. Then f itself takes one step of training on them.

    Source: Lee et al., arXiv 2310.06511, alg. 1.
    """

    parts = ("optimizer", "schedule", "pool", "loader")

    def __init__(self, problem: Problem, flags: TrainFlags) -> None:
        super().__init__(problem, flags)
        x_syn, y_syn = problem.start_with_features(flags.num_images, flags.syn_init, flags.init_images)
        self.x_syn, self.y_syn = x_syn.clone().requires_grad_(), y_syn.clone().requires_grad_()
        self.pool = ModelPool(
            functools.partial(pool_network, problem, flags, problem.target.dim),
            size=flags.num_models,
            max_steps=flags.online_iteration,
            generator=self.stream("pool"),
            reset=flags.pool_reset,
            precision=flags.precision,
            compile=flags.compile,
            cuda_graph=flags.cuda_graph,
            mix=self.stream("pool's mixup") if flags.pool_mixup else None,
        )
        self.loader = real_loader(problem, flags.outer_batch_size, self.stream("real batches"))
        self.targets = targets_for(problem, flags)
        lr, wd = flags.outer_lr, flags.outer_wd
        groups = [{"params": [self.x_syn]}, {"params": [self.y_syn], "lr": flags.outer_lr_y or lr}]
        self.optimizer = make_optimizer(flags.outer_opt, groups, lr=lr, wd=wd, momentum=0.5)
        self.schedule = make_schedule("linear", self.optimizer, flags.outer_iteration)
        # Here and for the pool without `self`: a cycle would keep the table of views after the run.
        self._gradients = outer_gradients(flags, [self.x_syn, self.y_syn])
        self._batches = None

    @classmethod
    def cost(cls, flags: TrainFlags, classes: int) -> float:
        """Real images through the target model and a network; the set forward, back, and in training."""
        return 2 * flags.outer_batch_size + 6 * flags.num_images

    @classmethod
    def start_cost(cls, flags: TrainFlags) -> float:
        """Networks of the pool reach half of their largest age on average, that of the held-out loss all."""
        return 3.0 * flags.num_images * flags.online_iteration * (flags.num_models / 2 + 1)

    def begin(self) -> None:
        """Train each network of the pool to an age of its own."""
        progress = self.problem.group.first
        self.pool.warm_up(self.x_syn.detach(), self.y_syn.detach(), progress, self.forecast.tick)

    def monitor(self) -> HeldOutLoss:
        """The loss on held-out images under fixed networks."""
        tick = self.forecast.tick
        return HeldOutLoss(
            self.problem, self.flags, self.pool, self.x_syn.detach(), self.y_syn.detach(), tick=tick
        )

    def synthetic(self) -> SyntheticSet:
        """As any; a set that was learned in mixup is trained on in mixup."""
        found = super().synthetic()
        return replace(found, training=replace(found.training, mixup=self.flags.pool_mixup or None))

    def step(self) -> dict[str, Tensor]:
        """One outer step; the loss is that before it."""
        flags, group, x_syn, y_syn = self.flags, self.problem.group, self.x_syn, self.y_syn
        if flags.pool_mixup:
            x_syn, y_syn = mixup(x_syn, y_syn, self.stream("kernel's mixup"))
        if self._batches is None:
            self._batches = self.loader.forever()
        slot = self.pool.draw()
        (x, view), index = next(self._batches)
        with autocast(flags.precision, x.device), torch.no_grad():
            y_real = self.targets(RealBatch(x, index, view))  # (b, D)
        gradients = functools.partial(self._gradients, slot.model, x_syn, y_syn)
        loss, self.x_syn.grad, self.y_syn.grad = self.pool.replayed(slot, "outer", gradients)(x, y_real)
        group.average_([self.x_syn.grad, self.y_syn.grad, loss])
        if flags.outer_grad_norm > 0:
            for variable in (self.x_syn, self.y_syn):
                nn.utils.clip_grad_norm_(variable, flags.outer_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.pool.update(slot, self.x_syn.detach(), self.y_syn.detach())
        return {"loss": loss}

    def flush(self) -> None:
        """Keep the table of target views on disk up to date, where there is one."""
        self.targets.flush()


def outer_gradients(flags: TrainFlags, learned: list[Tensor]) -> Callable[..., list[Tensor]]:
    """A function (network, X_s, Y_s, real images, their targets) -> loss, and its gradients on `learned`."""
    embed = compiled(lambda x, model: model.embed(x), flags.compile)
    embed_real = SplitBatches(compiled(lambda x, model: model.embed(x), flags.compile))

    def gradients(model: nn.Module, x_syn: Tensor, y_syn: Tensor, x: Tensor, y_real: Tensor) -> list[Tensor]:
        with autocast(flags.precision, x.device):
            with torch.no_grad():
                f_real = embed_real(x, model)  # (b, d)
            f_syn = embed(x_syn, model)  # (m, d)
        loss = krr_loss(f_real, y_real, f_syn, y_syn, flags.ridge)
        return [loss.detach(), *torch.autograd.grad(loss, learned)]

    return gradients


def real_loader(problem: Problem, batch_size: int, generator: torch.Generator) -> TensorLoader:
    """Endless batches of the training images, crop, flip, normalise: ((x, views), index).

    `batch_size` is that over all processes; `generator` draws order and views. The last, smaller
    batch of each pass is kept, as in the released code.
    """
    image_set = problem.image_set
    pad, hflip = default_padding(image_set.size), image_set.hflip
    views = ViewPipeline(image_set.stats, pad=pad, hflip=hflip, shard=problem.group)
    return problem.loader(batch_size, generator, views)
