"""KIP by random features (RFAD): a set from which regression with the NNGP kernel predicts the classes.

The kernel of the infinitely wide network is estimated from a few random networks of finite width,
drawn anew at every step, so that its cost grows linearly with the set and no exact kernel is needed.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillation.base import Distiller
from distillation.problem import Problem
from evaluation.presets import Preset
from evaluation.recipes import half_squared_error
from krr_st.config import KIPFlags
from krr_st.frepo import FRePo, centred
from krr_st.loss import kernel_weights
from models import get_model
from utils.device import place, upload
from utils.optim import AdaBelief
from utils.precision import autocast
from utils.seed import local_seed

WEIGHT_STD, BIAS_STD = 2**0.5, 0.1  # times 1/sqrt(fan-in); as is
RIDGE = 5e-3  # of the mean of the kernel's diagonal


@torch.no_grad()
def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Gaussian weights of standard deviation √2/√fan-in and biases of 0.1, in every layer."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            for parameter, std in ((module.weight, WEIGHT_STD / fan_in**0.5), (module.bias, BIAS_STD)):
                if parameter is not None:  # a bias
                    drawn = torch.randn(parameter.shape, generator=generator) * std
                    parameter.copy_(upload(drawn, parameter.device))


def estimated_kernel(f_a: Sequence[Tensor], f_b: Sequence[Tensor]) -> Tensor:
    """NNGP kernel (a, b) of the network with a linear layer on top, from features of several networks.

    2 Φ_a Φ_bᵀ + 0.01, Φ all N feature vectors (of length d) side by side, over √(N·d): the covariance
    of outputs with Gaussian weights of variance 2/d and biases of 0.01.
    """
    total = sum(a @ b.mT for a, b in zip(f_a, f_b, strict=True))
    return WEIGHT_STD**2 * total / (len(f_a) * f_a[0].shape[1]) + BIAS_STD**2


def published(data_name: str, num_images: int) -> dict[str, bool]:
    """Whether images are whitened, and whether labels are learned."""
    return {"zca": data_name not in ("mnist", "fashionmnist", "digits"), "learn_label": True}


class KIP(Distiller):
    """X_s, and perhaps Y_s, by kernel ridge regression with the estimated NNGP kernel.

    All images of the set go through one learned linear map, identity at the start.

    Sources: Nguyen et al., arXiv 2107.13034 (KIP); Loo et al., "Efficient Dataset Distillation using
    Random Feature Approximation", arXiv 2210.12067 (RFAD).
    """

    parts = ("optimizer", "loader", "learned")
    whiten_normalized = True

    def __init__(self, problem: Problem, flags: KIPFlags) -> None:
        super().__init__(problem, flags)
        self.classes, device = problem.real.num_classes, problem.device
        x_syn, labels = problem.start_by_class(flags.num_images // self.classes, flags.init)
        y_syn = centred(labels, self.classes)
        self.x_syn, self.y_syn = x_syn.clone().requires_grad_(), y_syn.requires_grad_(flags.learn_label)
        groups = [{"params": [self.x_syn]}]
        if flags.learn_label:
            groups.append({"params": [self.y_syn], "lr": flags.outer_lr_y or flags.outer_lr})
        self.learned = nn.ParameterDict().to(device)
        if flags.lr_transform > 0:
            self.learned["transform"] = nn.Parameter(torch.eye(x_syn[0].numel(), device=device))
            groups.append({"params": [self.learned["transform"]], "lr": flags.lr_transform})
        if flags.platt:
            self.learned["temperature"] = nn.Parameter(torch.zeros((), device=device))
            groups.append({"params": [self.learned["temperature"]], "lr": flags.lr_temperature})
        self.optimizer = AdaBelief(groups, lr=flags.outer_lr)
        self.loader = problem.loader(flags.outer_batch_size, self.stream("real batches"))
        self._batches = self.loader.forever()
        with local_seed(0):  # their weights are drawn at every step
            shape = problem.image_set.img_shape
            found = [get_model(flags.train_model, shape, 1) for _ in range(flags.num_models)]
        self.networks = [place(net, device, flags.layout).requires_grad_(False).eval() for net in found]

    @staticmethod
    def network(preset: Preset) -> str:
        """As many blocks as the preset's, of width 256, without norm."""
        return re.sub(r"_\d+", "_256", preset.network).replace("_bn", "_none")

    test_network = staticmethod(FRePo.test_network)

    @classmethod
    def cost(cls, flags: KIPFlags, classes: int) -> float:
        """Through every network: real images forward, the set forward and backward."""
        return flags.num_models * (flags.num_batches * flags.outer_batch_size + 3 * flags.num_images)

    def images(self) -> Tensor:
        """The set's images after the learned map."""
        if "transform" not in self.learned:
            return self.x_syn
        return (self.x_syn.flatten(1) @ self.learned["transform"]).view(self.x_syn.shape)

    def step(self) -> dict[str, Tensor]:
        """One outer step; the loss is that before it."""
        flags, problem = self.flags, self.problem
        batches = [next(self._batches) for _ in range(flags.num_batches)]
        x_real = problem.whiten(torch.cat([x for x, _ in batches]))
        labels = problem.real.labels_at(torch.cat([index for _, index in batches]))
        f_real, f_syn, x = [], [], self.images()
        for network in self.networks:
            draw_weights(network, self.stream("networks"))
            with autocast(flags.precision, x.device):
                with torch.no_grad():
                    parts = [network.embed(part) for part in x_real.split(flags.outer_batch_size)]
                f_real.append(torch.cat(parts).float())
                f_syn.append(network.embed(x).float())
        k_rs, k_ss = estimated_kernel(f_real, f_syn), estimated_kernel(f_syn, f_syn)
        predicted = k_rs @ kernel_weights(k_ss, self.y_syn, RIDGE / len(x)).to(k_rs.dtype)
        loss = self.loss(predicted, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss, grouped = loss.detach(), (group["params"] for group in self.optimizer.param_groups)
        problem.group.average_([*(p.grad for params in grouped for p in params), loss])
        self.optimizer.step()
        return {"loss": loss}

    def loss(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of exp(k)·prediction with --platt, else ½ mean squared error."""
        if "temperature" in self.learned:
            return F.cross_entropy(self.learned["temperature"].exp() * predicted, labels)
        return half_squared_error(predicted, centred(labels, self.classes)) / self.classes
