"""Judging frozen features: linear probe, k-nearest neighbours, few-shot subsets."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.fit import accuracy
from utils.errors import UserError, pick


def shuffled_classes(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Indices of every class's samples, each class in random order."""
    order = torch.randperm(len(labels), generator=generator)
    return order[labels[order].argsort(stable=True)].split(labels.bincount().tolist())


def labelled_subset(
    labels: Tensor, generator: torch.Generator, shots: int | None = None, fraction: float = 1.0
) -> Tensor:
    """Sorted indices of random samples of every class in `labels` (N,), a `fraction` but at least one.

    With `shots`, that many instead; a UserError if a class has fewer.
    """
    classes = shuffled_classes(labels, generator)
    fewest, label = min((len(mine), label) for label, mine in enumerate(classes) if len(mine))
    if shots is not None and fewest < shots:
        raise UserError(f"--shots {shots} is more than class {label} has ({fewest} samples)")
    parts = [mine[: shots or max(1, round(fraction * len(mine)))] for mine in classes]
    return torch.cat(parts).sort().values


def _mean_and_scale(train: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std of each column; constant columns have scale 0."""
    mean, std = train.mean(0), train.std(0, correction=0)
    return mean, torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std, 0.0)


def standardize(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Scale features to mean 0 and std 1 of the training rows; constant columns become 0."""
    mean, scale = _mean_and_scale(train)
    return tuple((f - mean) * scale for f in (train, *others))


def feature_error(predicted: Tensor, features: Tensor, train_features: Tensor) -> float:
    """Mean squared error of predicted features (N, D), each dimension in units of its variance.

    That is the variance over the training images (M, D); dimensions constant there are left out.
    """
    scale = _mean_and_scale(train_features)[1]
    errors = ((predicted - features) * scale).square()
    return float(errors[:, scale > 0].cpu().double().mean())


def linear_probe(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS over the full batch.

    Minimises mean cross-entropy + ‖W‖²/2N (the bias is free; scikit-learn's C = 1) over standardised
    features (N, D) and labels (N,). Returns weight (K, D) and bias (K,).
    """
    labels = labels.to(features.device)
    weight = torch.zeros(num_classes, features.shape[1]).to(features).requires_grad_()
    bias = torch.zeros(num_classes).to(features).requires_grad_()
    limits = dict(max_iter=300, history_size=20, tolerance_grad=1e-6, tolerance_change=1e-10)
    optimizer = torch.optim.LBFGS([weight, bias], line_search_fn="strong_wolfe", **limits)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + 0.5 * (1.0 / len(features)) * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


@torch.no_grad()
def knn_scores(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, k: int = 20, temperature: float = 0.1
) -> Tensor:
    """Votes (M, K) of the k nearest training rows (of N) by cosine similarity, weighted by exp(cos / T).

    Source: Wu et al., arXiv 1805.01978, sec. 3.4.
    """
    bank, labels = F.normalize(train, dim=1), labels.to(train.device)
    scores = []
    for chunk in F.normalize(test, dim=1).split(1024):
        similarity, index = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), num_classes).to(chunk)
        scores.append(votes.scatter_add_(1, labels[index], (similarity / temperature).exp()))
    return torch.cat(scores)


def _linear_scores(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    train, test = standardize(train, test)
    return F.linear(test, *linear_probe(train, labels, num_classes))


# (train features, their labels, test features, classes) -> test scores
FROZEN: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "linear": _linear_scores,
    "probe": _linear_scores,
    "knn": knn_scores,
}


def frozen_accuracy(
    protocol: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int
) -> float:
    """Test accuracy in % of a classifier of FROZEN; each split is its features (N, D) and labels (N,)."""
    score = pick(FROZEN, protocol, "protocol")
    return accuracy(score(*train, test[0], num_classes), test[1])
