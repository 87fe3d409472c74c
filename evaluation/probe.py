"""Judging frozen features: linear probe, k-nearest neighbours, few-shot subsets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError


def few_shot_indices(labels: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Indices of `shots` samples of every class that occurs, drawn without replacement, sorted.

    Args:
        labels: (N,) int64 on the CPU.
        shots: samples per class.
        generator: CPU generator.

    Raises:
        UserError: a class has fewer samples.
    """
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    if counts[counts > 0].min() < shots:
        short = int(torch.where(counts > 0, counts, counts.max()).argmin())
        raise UserError(f"--shots {shots} is more than class {short} has ({int(counts[short])} samples)")
    starts = F.pad(counts.cumsum(0), (1, 0))[:-1][counts > 0]
    chosen = by_class[(starts[:, None] + torch.arange(shots)).flatten()]
    return chosen.sort().values


def label_fraction_indices(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Indices of a share of every class's samples, at least one each, sorted.

    Args:
        labels: (N,) int64 on the CPU.
        fraction: in (0, 1].
        generator: CPU generator.
    """
    order = torch.randperm(len(labels), generator=generator)
    chosen = []
    for label in labels.unique():
        mine = order[labels[order] == label]
        chosen.append(mine[: max(1, round(fraction * len(mine)))])
    return torch.cat(chosen).sort().values


def _mean_and_scale(train: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std of each column; constant columns have scale 0."""
    mean, std = train.mean(0), train.std(0, correction=0)
    return mean, torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std, 0.0)


def standardize(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Scale features to mean 0 and std 1 of the training rows; constant columns become 0."""
    mean, scale = _mean_and_scale(train)
    return tuple((f - mean) * scale for f in (train, *others))


def feature_error(predicted: Tensor, features: Tensor, train_features: Tensor) -> float:
    """Mean squared error of predicted features, each dimension in units of its variance.

    Args:
        predicted: (N, D).
        features: (N, D) the true ones.
        train_features: (M, D) of the training images: the variances, 1/M Σ (y - mean)², are
            theirs; dimensions that are constant there are left out.

    Returns:
        The mean over images and dimensions; about 1 for predicting the mean.
    """
    scale = _mean_and_scale(train_features)[1]
    errors = ((predicted - features) * scale).square()
    return float(errors[:, scale > 0].double().mean())


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    num_classes: int,
    *,
    l2: float | None = None,
    max_iter: int = 300,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS over the full batch.

    Minimises mean cross-entropy + l2/2·‖W‖² (the bias is free).

    Args:
        train_features: (N, D) float32, already standardised.
        train_labels: (N,) int64.
        num_classes: K.
        l2: None means 1/N, which is scikit-learn's C = 1.
        max_iter: L-BFGS iterations.

    Returns:
        Weight (K, D) and bias (K,).
    """
    l2 = 1.0 / len(train_features) if l2 is None else l2
    features, labels = train_features, train_labels.to(train_features.device)
    weight = torch.zeros(num_classes, features.shape[1]).to(features).requires_grad_()
    bias = torch.zeros(num_classes).to(features).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


@torch.no_grad()
def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.1,
) -> Tensor:
    """Votes of the k nearest training rows by cosine similarity, weighted by exp(cos / T).

    Args:
        train_features: (N, D); k is cut to N.
        train_labels: (N,) int64.
        features: (M, D) to classify.
        num_classes: K.
        k: neighbours.
        temperature: T.

    Returns:
        (M, K) scores.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
        arXiv 1805.01978, sec. 3.4.
    """
    bank = F.normalize(train_features, dim=1)
    labels = train_labels.to(bank.device)
    scores = []
    for chunk in F.normalize(features, dim=1).split(1024):
        similarity, index = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), num_classes).to(chunk)
        scores.append(votes.scatter_add_(1, labels[index], (similarity / temperature).exp()))
    return torch.cat(scores)
