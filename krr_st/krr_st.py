"""KRR-ST: images and target features from which kernel regression predicts a target model."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from data.augment.mixup import mixup
from data.specs import Stats
from data.synthetic import SyntheticSet
from data.synthetic.views import SetViews
from distillation.base import Distiller
from distillation.problem import Problem
from evaluation.target import Target
from krr_st.config import TrainFlags
from krr_st.held_out import HeldOutLoss
from krr_st.loss import krr_weights, real_kernel
from krr_st.pool import ModelPool, pool_network
from krr_st.views import real_loader, targets_for
from utils.graph import beside, side_stream
from utils.memory import SplitBatches
from utils.optim import make_optimizer, make_schedule, set_gradients
from utils.precision import autocast, compiled
from utils.seed import derive_seed


class KRRST(Distiller):
    """X_s and Y_s by bilevel optimisation, with kernel ridge regression in place of training.

    One step: draw a network f of the pool, and a real batch X_r in random views. With features of
    f, kernel ridge regression on (X_s, Y_s) predicts g(X_r); the mean squared error moves X_s and
    Y_s. Then f itself takes one step of training on them.

    With --views the set is (views of X_s, g of these), a few of them in each step, and X_s alone is
    learned, through the target model, too.

    Source: Lee et al., arXiv 2310.06511, alg. 1.
    """

    parts = ("optimizer", "schedule", "pool", "loader")

    def __init__(self, problem: Problem, flags: TrainFlags) -> None:
        super().__init__(problem, flags)
        x_syn, y_syn = problem.start_with_features(flags.num_images, flags.syn_init, flags.init_images)
        image_set, seed = problem.image_set, derive_seed(problem.seed, "views")
        self.views = flags.draw(flags.num_images, image_set.size, image_set.hflip, seed)
        self.x_syn, self.y_syn = x_syn.clone().requires_grad_(), y_syn.clone()
        self.learned = [self.x_syn]
        if self.views is None:
            self.learned.append(self.y_syn.requires_grad_())
            self._seen = mixup if flags.pool_mixup else None
        else:
            given = self.views, image_set.stats, problem.target, flags.view_batch
            self._seen = functools.partial(seen_in_views, *given)
        self.pool = ModelPool(
            functools.partial(pool_network, problem, flags, problem.target.dim),
            size=flags.num_models,
            max_steps=flags.online_iteration,
            generator=self.stream("pool"),
            reset=flags.pool_reset,
            precision=flags.precision,
            compile=flags.compile,
            cuda_graph=replays(flags, problem.device),
            seen=self._seen,
            draws=None if self._seen is None else self.stream("pool's mixup"),
        )
        self.loader = real_loader(problem, flags, self.stream("real batches"))
        self._batches = self.loader.forever()
        self.targets = targets_for(problem, flags)
        lr, wd = flags.outer_lr, flags.outer_wd
        rates = lr, flags.outer_lr_y or lr
        groups = [{"params": [t], "lr": rate} for t, rate in zip(self.learned, rates, strict=False)]
        self.optimizer = make_optimizer(flags.outer_opt, groups, lr=lr, wd=wd, momentum=0.5)
        self.schedule = make_schedule("linear", self.optimizer, flags.outer_iteration)
        # Here and for the pool without `self`: a cycle would keep the table of views after the run.
        self._gradients = outer_gradients(flags, problem.device)

    @classmethod
    def cost(cls, flags: TrainFlags, classes: int) -> float:
        """Real images through the target model and a network; the set forward, back, and in training.

        Views of the set also go through the target model, forward and back, and forward once more.
        """
        if flags.views > 1:
            return 2 * flags.outer_batch_size + 10 * flags.view_batch
        return 2 * flags.outer_batch_size + 6 * flags.num_images

    @classmethod
    def start_cost(cls, flags: TrainFlags) -> float:
        """Networks of the pool reach half of their largest age on average, that of the held-out loss all."""
        seen = flags.view_batch if flags.views > 1 else flags.num_images
        return pool_cost(flags) * seen * flags.online_iteration * (flags.num_models / 2 + 1)

    def _trained(self, images: int) -> None:
        self.forecast.tick(pool_cost(self.flags) * images)

    def begin(self) -> None:
        """Train each network of the pool to an age of its own."""
        progress = self.problem.group.first
        self.pool.warm_up(self.x_syn.detach(), self.y_syn.detach(), progress, self._trained)

    def monitor(self) -> HeldOutLoss:
        """The loss on held-out images under fixed networks."""
        given = self.problem, self.flags, self.pool, self.x_syn.detach(), self.y_syn.detach()
        seen = None if self.views is None else self._seen
        return HeldOutLoss(*given, seen=seen, tick=self._trained)

    def synthetic(self) -> SyntheticSet:
        """As any, or in all its views; a set that was learned in mixup is trained on in mixup."""
        if self.views is not None:
            stats = self.problem.image_set.stats
            whole = self._with_features(self.views.images(self.x_syn.detach(), stats))
            return replace(whole, stats=stats, views=self.views)
        found = super().synthetic()
        return replace(found, training=replace(found.training, mixup=self.flags.pool_mixup or None))

    def plain(self) -> SyntheticSet:
        """The images alone, without making their views first."""
        return super().plain() if self.views is None else self._with_features(self.x_syn.detach())

    def _with_features(self, x: Tensor) -> SyntheticSet:
        y = torch.cat([self.problem.target(chunk) for chunk in x.split(256)])
        return replace(super().synthetic(), images=x, targets=self.problem.unscaled(y))

    def step(self) -> dict[str, Tensor]:
        """One outer step; the loss is that before it."""
        flags, group, x_syn, y_syn = self.flags, self.problem.group, self.x_syn, self.y_syn
        if self._seen is not None:
            x_syn, y_syn = self._seen(x_syn, y_syn, self.stream("kernel's mixup"))
        slot = self.pool.draw()
        (x, view), index = next(self._batches)
        with autocast(flags.precision, x.device), torch.no_grad():
            y_real = self.targets(x, index, view)  # (b, D)
        gradients = self.pool.replayed(slot, "outer", functools.partial(self._gradients, slot.model))
        loss, *found = gradients(x, y_real, x_syn.detach(), y_syn.detach())
        if self._seen is not None:
            found = torch.autograd.grad((x_syn, y_syn), self.learned, found)
        group.average_([*found, loss])
        set_gradients(self.learned, found)  # maybe copies
        if flags.outer_grad_norm > 0:
            for variable in self.learned:
                nn.utils.clip_grad_norm_(variable, flags.outer_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.pool.update(slot, self.x_syn.detach(), self.y_syn.detach())
        return {"loss": loss}

    def flush(self) -> None:
        """Keep the table of target views on disk up to date, where there is one."""
        self.targets.flush()


def replays(flags: TrainFlags, device: torch.device) -> bool:
    """--cuda_graph, which by default is wherever the pool's optimiser can be recorded."""
    if flags.cuda_graph is not None:
        return flags.cuda_graph
    return device.type == "cuda" and flags.online_opt == "sgd"


def outer_gradients(flags: TrainFlags, device: torch.device) -> Callable[..., list[Tensor]]:
    """A function (network, real images, their targets, X_s, Y_s) -> loss, its gradients on X_s and Y_s."""
    embed = compiled(lambda x, model: model.embed(x), flags.compile)
    embed_real = SplitBatches(compiled(lambda x, model: model.embed(x), flags.compile))
    side = side_stream(device)

    def gradients(model: nn.Module, x: Tensor, y_real: Tensor, x_syn: Tensor, y_syn: Tensor) -> list[Tensor]:
        x_syn, y_syn = x_syn.detach().requires_grad_(), y_syn.detach().requires_grad_()
        with autocast(flags.precision, x.device):
            f_syn = embed(x_syn, model)  # (m, d)
        # The solve is many small kernels: they run next to the real batch's.
        weights = beside(side, functools.partial(krr_weights, f_syn, y_syn, flags.ridge))
        with autocast(flags.precision, x.device), torch.no_grad():
            f_real = embed_real(x, model)  # (b, d)
        k_rs = real_kernel(f_real, f_syn)
        loss = mse_loss(k_rs @ weights().to(k_rs.dtype), y_real)
        return [loss.detach(), *torch.autograd.grad(loss, (x_syn, y_syn))]

    return gradients


def pool_cost(flags: TrainFlags) -> float:
    """Of an image in the training of a pool network, as in `cost`; views go through the target model, too."""
    return 4.0 if flags.views > 1 else 3.0


def seen_in_views(
    views: SetViews,
    stats: Stats,
    target: Target,
    count: int,
    x_syn: Tensor,
    y_syn: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """`count` random views of X_s (m, C, H, W), and the features of them; differentiable in X_s."""
    x = views.images(x_syn, stats, torch.randint(len(views), (count,), generator=generator))
    return x, target.differentiable(x) if x.requires_grad else target(x)
