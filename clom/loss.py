"""CLoM: a contrastive loss by which pre-trained models guide synthetic images.

For a real batch (x_i, y_i), synthetic images (x_j, y_j), distances D and the same-label mask
M[i, j] = [y_i = y_j]:

    CLoM = Σ(D·M) / Σ(D)

The functions are pure. The class `CLoM` is the plug-in for any training loop over images. This file
imports torch alone, so that it can be copied into another project:

    clom = CLoM(model, distance="cos", alpha=100.0, real=(x_real, y_real))
    ...
    loss = loss + clom(x_syn, y_syn)

Source: Lu et al., "Dataset Distillation with Pre-trained Models: A Contrastive Approach",
arXiv 2310.03295.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DISTANCES = ("ce", "cos")
CE_FORMS = ("contrastive", "classification")
# Only reached where all distances vanish; the ratio is then 0.
SMALLEST_SUM = 1e-6
# Of the synthetic images that go through a model in one graph: 64 images of 224 pixels.
PIXELS_AT_ONCE = 64 * 224**2


def clom_cosine(f_real: Tensor, y_real: Tensor, f_syn: Tensor, y_syn: Tensor) -> Tensor:
    """CLoM with D[i, j] = 1 - cos(f_real[i], f_syn[j]), for models of any label space.

    Features (n, D) and int64 labels (n,) of real images, (m, D) and (m,) of synthetic ones -> a scalar
    in [0, 1], differentiable in the features; 0 where no labels agree. A ValueError if shapes do not fit.
    """
    if f_real.dim() != 2 or f_syn.dim() != 2 or f_real.shape[1] != f_syn.shape[1]:
        raise ValueError(f"features {tuple(f_real.shape)}, {tuple(f_syn.shape)}: expected (., D)")
    _check_labels(y_real, len(f_real), "y_real")
    _check_labels(y_syn, len(f_syn), "y_syn")
    cosine = F.normalize(f_real, dim=1) @ F.normalize(f_syn, dim=1).T  # (n, m)
    distance = (1 - cosine).clamp_min(0)  # rounding goes below 0 for equal directions
    same = y_real[:, None] == y_syn[None, :]
    return (distance * same).sum() / distance.sum().clamp_min(SMALLEST_SUM)


def clom_ce(logits_syn: Tensor, y_syn: Tensor, y_real: Tensor) -> Tensor:
    """CLoM with D[i, j] = -log p(y_i | x_j): the definition, for a model of the same label space.

    Logits (m, K) and int64 labels (m,) of the synthetic images, int64 labels (n,) of a real batch,
    all in [0, K) -> a scalar in [0, 1], differentiable in the logits; 0 where no labels agree. A
    ValueError for shapes or labels that do not fit. D depends on i through the label only, so the sums
    run over classes, not over real images.
    """
    classes = _check_logits(logits_syn, y_syn)
    _check_labels(y_real, len(y_real), "y_real", classes)
    surprise = -F.log_softmax(logits_syn, dim=1)  # (m, K): D of a real image of each class
    # Not bincount, which makes the host wait for a GPU.
    count = surprise.new_zeros(classes).index_add_(0, y_real, surprise.new_ones(len(y_real)))
    same = (surprise.gather(1, y_syn[:, None])[:, 0] * count[y_syn]).sum()
    return same / (surprise @ count).sum().clamp_min(SMALLEST_SUM)


def clom_ce_mean(logits_syn: Tensor, y_syn: Tensor) -> Tensor:
    """What the released code computes for `ce`: mean cross-entropy of the synthetic images.

    Logits (m, K) and int64 labels (m,) in [0, K) -> a scalar >= 0, differentiable in the logits. A
    ValueError for shapes or labels that do not fit.
    """
    _check_logits(logits_syn, y_syn)
    return F.cross_entropy(logits_syn, y_syn)


def _check_logits(logits: Tensor, y: Tensor) -> int:
    """Check the logits and labels of synthetic images; returns the number of classes."""
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected (m, K)")
    _check_labels(y, len(logits), "y_syn", logits.shape[1])
    return logits.shape[1]


def _check_labels(y: Tensor, count: int, name: str, classes: int | None = None) -> None:
    if y.shape != (count,) or y.is_floating_point():
        raise ValueError(f"{name} is {tuple(y.shape)} {y.dtype}, expected ({count},) int64")
    # Reading the largest label would make the host wait for a GPU: gather reports it there.
    if classes is not None and y.device.type == "cpu" and count and int(y.max()) >= classes:
        raise ValueError(f"{name} holds label {int(y.max())}, but there are {classes} classes")


class ModelPool:
    """Draws one family of models uniformly, then one of its models.

    `families` are (models, alpha), such as those of one architecture and the weight of CLoM under
    them; the models are put into eval mode and frozen.
    """

    def __init__(self, families: Sequence[tuple[Sequence[nn.Module], float]]) -> None:
        self.families = [(list(models), alpha) for models, alpha in families]
        if not self.families or not all(models for models, _ in self.families):
            raise ValueError("CLoM needs a pre-trained model")
        for model in (m for models, _ in self.families for m in models):
            # Training mode would let BatchNorm statistics drift with every synthetic batch.
            model.eval().requires_grad_(False)

    def draw(self, generator: torch.Generator) -> tuple[nn.Module, float]:
        """A model and its alpha."""
        family = int(torch.randint(len(self.families), (1,), generator=generator))
        models, alpha = self.families[family]
        return models[int(torch.randint(len(models), (1,), generator=generator))], alpha


class GivenReal:
    """Images (N, C, H, W) and int64 labels (N,); each model's features are computed once and kept.

    `part` images go through a model at once; `num_classes` None: up to the largest label. What CLoM
    asks of its real data is `num_classes`, `len()`, and the two methods, whose index is int64 on the CPU.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, part: int = 256, num_classes: int | None = None
    ) -> None:
        if len(images) != len(labels) or not len(images):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        self.images, self.labels, self.part = images, labels, part
        self.num_classes = num_classes or int(labels.max()) + 1
        self._features: dict[nn.Module, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def labels_at(self, index: Tensor) -> Tensor:
        """Labels (n,) of the rows at `index`."""
        return self.labels[index.to(self.labels.device)]

    @torch.no_grad()
    def features(self, model: nn.Module, index: Tensor) -> Tensor:
        """Features (n, D) of the rows at `index` under `model`, without gradient."""
        if model not in self._features:
            self._features[model] = torch.cat([embed(model, x) for x in self.images.split(self.part)])
        return self._features[model][index.to(self.images.device)]


def embed(model: nn.Module, x: Tensor) -> Tensor:
    """Features (B, D) of images: the model's `embed` where it has one, else its output."""
    return getattr(model, "embed", model)(x).flatten(1)


def _in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of images (m, C, H, W); of many a part at a time, computed again for the gradient."""
    part = max(1, PIXELS_AT_ONCE // x[0, 0].numel())
    if len(x) <= part:
        return function(x)
    how = dict(use_reentrant=False, preserve_rng_state=False)  # the models are in eval mode
    return torch.cat([checkpoint(function, images, **how) for images in x.split(part)])


class CLoM:
    """alpha · CLoM of all synthetic images under a model drawn from a pool, as one call.

    Each call draws a model, then `batch_size` real images with replacement, by a CPU generator
    (default: a new one seeded 0). Only `x_syn` gets gradients.

    `models` are a ModelPool with its own weights, or one module or several of equal rank: "cos" asks
    them for features (see `embed`), "ce" takes their output as logits. `real` is (images, labels) in
    the space of the synthetic images, or an object like GivenReal. The contrastive `ce_form` (the
    definition) uses its labels alone, the classification form (the released code) does not need it.
    A ValueError for unknown names, missing real data, or a model whose labels do not fit.
    """

    def __init__(
        self,
        models: ModelPool | nn.Module | Sequence[nn.Module],
        *,
        distance: str = "cos",
        alpha: float = 1.0,
        real: GivenReal | tuple[Tensor, Tensor] | None = None,
        ce_form: str = "contrastive",
        batch_size: int = 8196,
        generator: torch.Generator | None = None,
    ) -> None:
        for what, name, valid in (("distance", distance, DISTANCES), ("ce_form", ce_form, CE_FORMS)):
            if name not in valid:
                raise ValueError(f"unknown {what} {name!r}; valid: {', '.join(valid)}")
        self.distance, self.ce_form, self.batch_size = distance, ce_form, batch_size
        family = [models] if isinstance(models, nn.Module) else models
        self.pool = models if isinstance(models, ModelPool) else ModelPool([(family, alpha)])
        self.real = GivenReal(*real) if isinstance(real, tuple) else real
        if self.real is None and (distance, ce_form) != ("ce", "classification"):
            raise ValueError(f"CLoM with distance {distance} needs real data; pass real=")
        self.generator = generator or torch.Generator().manual_seed(0)

    def __call__(self, x_syn: Tensor, y_syn: Tensor) -> Tensor:
        """Synthetic images (m, C, H, W) and labels (m,) -> alpha · CLoM, a scalar."""
        model, alpha = self.pool.draw(self.generator)
        loss = self._cosine if self.distance == "cos" else self._ce
        return alpha * loss(model, x_syn, y_syn)

    def _draw(self) -> Tensor:
        return torch.randint(len(self.real), (self.batch_size,), generator=self.generator)

    def _ce(self, model: nn.Module, x_syn: Tensor, y_syn: Tensor) -> Tensor:
        logits = _in_parts(model, x_syn)
        if self.real is not None and logits.shape[1] != self.real.num_classes:
            raise ValueError(
                f"CLoM with distance ce: the model knows {logits.shape[1]} classes, the data have "
                f"{self.real.num_classes}; the label spaces must be the same (cos needs no labels; "
                "GivenReal takes num_classes)"
            )
        if self.ce_form == "classification":
            return clom_ce_mean(logits, y_syn)
        return clom_ce(logits, y_syn, self.real.labels_at(self._draw()).to(y_syn.device))

    def _cosine(self, model: nn.Module, x_syn: Tensor, y_syn: Tensor) -> Tensor:
        index = self._draw()
        f_real = self.real.features(model, index).to(x_syn.device)
        y_real = self.real.labels_at(index).to(y_syn.device)
        return clom_cosine(f_real, y_real, _in_parts(partial(embed, model), x_syn), y_syn)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
