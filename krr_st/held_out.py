"""A loss that compares step with step: held-out images under fixed networks.

The training loss may rise while the set improves, as the pool's networks age and follow the set.
"""

import torch
from torch import Tensor

from distillation.problem import Problem
from evaluation.fit import outputs
from krr_st.config import TrainFlags
from krr_st.loss import krr_loss
from krr_st.pool import ModelPool, Seen, Tick, no_tick
from utils.seed import draw_seed, make_generator

IMAGES = 256  # the loss is a mean over images and target dimensions: few are enough
MEASUREMENTS = 8  # in a run, after the one of its start


class HeldOutLoss:
    """KRR loss of a synthetic set on fixed real images, under each of a few fixed networks.

    The images are of the test split, or the training split if there is none. The networks are one of
    the pool's kind at the ages 0, T/4, T/2 and T, trained on the initial set, and the same again in
    a resumed run. With `seen` the loss is that of what it makes of the set, always by the same draws.
    """

    def __init__(
        self,
        problem: Problem,
        flags: TrainFlags,
        pool: ModelPool,
        x_syn: Tensor,
        y_syn: Tensor,
        *,
        seen: Seen | None = None,
        tick: Tick = no_tick,
    ) -> None:
        image_set, device = problem.image_set, problem.device
        generator = make_generator(problem.seed, "held-out loss")
        split = image_set.test or image_set.train
        images = split.images[torch.randperm(len(split), generator=generator)[:IMAGES]]
        self.ages = sorted({pool.max_steps * k // 4 for k in (0, 1, 2, 4)})
        self.where = f"{len(images)} {'training' if split is image_set.train else 'held-out'} images"
        self.ridge, steps = flags.ridge, flags.outer_iteration
        self._due = {round(k * steps / MEASUREMENTS) for k in range(MEASUREMENTS + 1)}
        self._networks = pool.aged_copies(draw_seed(generator), self.ages, x_syn, y_syn, tick)
        self._y_real = outputs(problem.target, images, image_set, device).float()
        self._seen, self._draws = seen, draw_seed(generator)
        self._f_real = [outputs(net.embed, images, image_set, device) for net in self._networks]

    def due(self, step: int) -> bool:
        """At the start, on the way and at the end."""
        return step in self._due

    @torch.no_grad()
    def __call__(self, x_syn: Tensor, y_syn: Tensor) -> list[float]:
        """The loss of a set under each network, youngest first."""
        if self._seen is not None:
            x_syn, y_syn = self._seen(x_syn, y_syn, torch.Generator().manual_seed(self._draws))
        return [
            float(krr_loss(f_real, self._y_real, net.embed(x_syn), y_syn, self.ridge))
            for net, f_real in zip(self._networks, self._f_real, strict=True)
        ]

    def __str__(self) -> str:
        return f"{self.where}, fixed networks of ages {', '.join(map(str, self.ages))}"
