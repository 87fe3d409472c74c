"""FRePo: images and label vectors from which kernel regression on trained features predicts the classes."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from distillation.base import Distiller
from distillation.problem import Problem
from evaluation.recipes import half_squared_error
from krr_st.config import FRePoFlags
from krr_st.loss import krr_predict
from krr_st.pool import ModelPool, pool_network
from utils.device import upload
from utils.memory import SplitBatches
from utils.optim import make_optimizer, make_schedule
from utils.precision import autocast

RIDGE = 1e-6  # of the mean of the kernel's diagonal
ONLINE_BATCH = 1000  # images of the set that train a network of the pool in one step


def centred(labels: Tensor, classes: int) -> Tensor:
    """Class indices (m,) -> one-hot vectors minus 1/C, (m, C) float32."""
    return F.one_hot(labels, classes).float() - 1 / classes


def frepo_loss(f_real: Tensor, y_real: Tensor, f_syn: Tensor, y_syn: Tensor, ridge: float = RIDGE) -> Tensor:
    """Mean over real images of ½·Σ over classes of the squared error of kernel ridge regression.

    λ is `ridge` times the mean of K_ss's diagonal. Features (b, d) and (m, d), labels (b, C) and (m, C).

    Source: Zhou et al., "Dataset Distillation using Neural Feature Regression", arXiv 2206.00719.
    """
    return half_squared_error(krr_predict(f_real, f_syn, y_syn, ridge / len(f_syn)), y_real)


def label_margin(y_syn: Tensor) -> Tensor:
    """Mean over the set (m, C) of -min(largest - second largest entry, 1/C): labels stay separable."""
    top = y_syn.topk(2, dim=1).values
    return -(top[:, 0] - top[:, 1]).clamp(max=1 / y_syn.shape[1]).mean()


def published(data_name: str, num_images: int) -> dict[str, bool]:
    """Published settings: mirrored copies only in the smallest sets of two sources, no ZCA of digits."""
    largest = {"mnist": 0, "fashionmnist": 0, "imagenet": 0, "cifar100": 100, "tinyimagenet": 200}
    mirrored = num_images <= largest.get(data_name, num_images)
    plain = data_name in ("mnist", "fashionmnist", "digits")
    return {"use_flip": mirrored, "zca": not plain, "learn_label": True}


class FRePo(Distiller):
    """X_s and Y_s by bilevel optimisation, with kernel ridge regression in place of training.

    One step: draw a network of the pool, of any age, and a batch of real images. With its features
    kernel ridge regression on (X_s, Y_s) predicts the classes; the error moves X_s and Y_s. Then the
    network takes one step of training on them.

    Source: Zhou et al., arXiv 2206.00719, alg. 1.
    """

    parts = ("optimizer", "schedule", "pool", "loader")
    whiten_normalized = True

    def __init__(self, problem: Problem, flags: FRePoFlags) -> None:
        super().__init__(problem, flags)
        self.classes = problem.real.num_classes
        x_syn, labels = problem.start_by_class(flags.num_images // self.classes, flags.init)
        y_syn = centred(labels, self.classes) / (self.classes / 10) ** 0.5
        self.x_syn, self.y_syn = x_syn.clone().requires_grad_(), y_syn.requires_grad_(flags.learn_label)
        self.pool = ModelPool(
            functools.partial(pool_network, problem, flags, self.classes),
            size=flags.num_models,
            max_steps=flags.online_iteration,
            generator=self.stream("pool"),
            precision=flags.precision,
            criterion=half_squared_error,
        )
        self.loader = problem.loader(flags.outer_batch_size, self.stream("real batches"))
        self._batches = self.loader.forever()
        learned = [self.x_syn, self.y_syn] if flags.learn_label else [self.x_syn]
        self.optimizer = make_optimizer("lamb", learned, lr=flags.outer_lr)
        self.schedule = make_schedule("cosine_to_tenth", self.optimizer, flags.outer_iteration)
        self.mirrored = flags.use_flip and problem.image_set.hflip
        if flags.use_flip and not self.mirrored:
            print(f"{flags.data_name}: a mirrored image means another thing, the set has no mirrored copies")
        self._embed_real = SplitBatches(lambda x, model: model.embed(x))

    @staticmethod
    def test_network(network: str) -> str:
        """Evaluations use the network without BatchNorm."""
        return network.removesuffix("_bn") + "_none" if network.endswith("_bn") else network

    @classmethod
    def cost(cls, flags: FRePoFlags, classes: int) -> float:
        """Real images forward; the set, mirrored, forward and backward; one step of the network."""
        copies = 2 if flags.use_flip else 1
        return flags.outer_batch_size + 3 * (copies * flags.num_images + min(flags.num_images, ONLINE_BATCH))

    def begin(self) -> None:
        """Networks of the pool begin untrained, their counters spread."""
        self.pool.spread_ages()

    def step(self) -> dict[str, Tensor]:
        """One outer step; the loss is that before it."""
        flags, problem = self.flags, self.problem
        slot = self.pool.draw()
        x_real, index = next(self._batches)
        y_real = centred(problem.real.labels_at(index), self.classes)
        x, y = self.x_syn, self.y_syn
        if self.mirrored:
            x, y = torch.cat([x, x.flip(3)]), torch.cat([y, y])
        with autocast(flags.precision, x.device):
            with torch.no_grad():
                f_real = self._embed_real(problem.whiten(x_real), slot.model)  # (b, d)
            f_syn = slot.model.embed(x)  # (m, d)
        loss = frepo_loss(f_real, y_real, f_syn, y)
        if flags.learn_label:
            loss = loss + label_margin(self.y_syn)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss, learned = loss.detach(), self.optimizer.param_groups[0]["params"]
        problem.group.average_([*(p.grad for p in learned), loss])
        self.optimizer.step()
        self.schedule.step()
        x, y = self.x_syn.detach(), self.y_syn.detach()
        if len(x) > ONLINE_BATCH:
            rows = torch.randperm(len(x), generator=self.stream("online batches"))[:ONLINE_BATCH]
            rows = upload(rows, x.device)
            x, y = x[rows], y[rows]
        self.pool.update(slot, x, y)
        return {"loss": loss}
