"""Frozen features: the probe against scikit-learn, k-NN against a loop, subsets by counting."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluation.probe import frozen_accuracy, knn_scores, labelled_subset, linear_probe, standardize
from utils.errors import UserError

LABELS = torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 0, 1, 4, 4, 4, 0])  # class 3 does not occur


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(count=90, dim=5, classes=3, spread=1.5, seed=0):
    g = generator(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, dim, generator=generator(9))
    return centres[labels] + spread * torch.randn(count, dim, generator=g), labels


@pytest.mark.parametrize("classes", [3, 4])
def test_linear_probe_is_scikit_learns_logistic_regression(classes):
    x, y = blobs(classes=classes)
    test, _ = blobs(40, classes=classes, seed=1)
    x, test = standardize(x, test)
    weight, bias = linear_probe(x, y, classes)
    theirs = LogisticRegression(C=1.0, max_iter=5000, tol=1e-9).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=2e-3)
    centred = bias - bias.mean()  # a common shift of all biases changes nothing
    np.testing.assert_allclose(centred, theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3)
    ours = (test @ weight.T + bias).softmax(1)
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba(test.numpy()), atol=1e-3)
    assert not weight.requires_grad and not bias.requires_grad


def test_linear_probe_works_where_gradients_are_off_and_a_class_is_missing():
    x, y = blobs()
    with torch.no_grad():
        weight, bias = linear_probe(x, y, 5)
    assert weight.shape == (5, 5) and bias.shape == (5,)
    assert (x @ weight.T + bias).argmax(1).max() < 3


def naive_knn(bank, labels, queries, classes, k, temperature):
    scores = np.zeros((len(queries), classes))
    for i, q in enumerate(queries.tolist()):
        near = []
        for row, label in zip(bank.tolist(), labels.tolist(), strict=True):
            cosine = sum(a * b for a, b in zip(q, row, strict=True))
            cosine /= math.sqrt(sum(a * a for a in q)) * math.sqrt(sum(b * b for b in row))
            near.append((cosine, label))
        for cosine, label in sorted(near, reverse=True)[:k]:
            scores[i, label] += math.exp(cosine / temperature)
    return scores


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (20, 0.5), (1000, 0.1)])
def test_knn_is_the_loop(k, temperature):
    bank, labels = blobs(30)
    queries, _ = blobs(11, seed=1)
    bank, queries = bank.double(), queries.double()
    ours = knn_scores(bank, labels, queries, 4, k=k, temperature=temperature)
    expected = naive_knn(bank, labels, queries, 4, k, temperature)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-8)


def test_knn_defaults_and_chunks():
    bank, labels = blobs(60)
    queries, _ = blobs(1030, seed=1)  # more than one chunk
    ours = knn_scores(bank, labels, queries, 3)
    assert ours.shape == (1030, 3)
    expected = naive_knn(bank, labels, queries[1020:], 3, 20, 0.1)
    np.testing.assert_allclose(ours[1020:].numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_few_shot_takes_exactly_so_many_of_each_class(shots):
    index = labelled_subset(LABELS, generator(), shots)
    assert LABELS[index].bincount().tolist() == [shots, shots, shots, 0, shots]
    assert index.tolist() == sorted(set(index.tolist()))


def test_few_shot_draws():
    draws = [labelled_subset(LABELS, generator(s), 1).tolist() for s in range(40)]
    assert draws[0] == labelled_subset(LABELS, generator(0), 1).tolist()
    assert set().union(*draws) == set(range(len(LABELS)))  # no sample is left out for ever


def test_few_shot_names_the_short_class():
    with pytest.raises(UserError, match=r"--shots 4 is more than class [124] has \(3 samples\)"):
        labelled_subset(LABELS, generator(), 4)
    with pytest.raises(UserError, match=r"class 7 has \(1 samples\)"):
        labelled_subset(torch.tensor([0, 0, 7, 1, 1]), generator(), 2)


@pytest.mark.parametrize(("fraction", "counts"), [(1.0, [40, 10, 3]), (0.25, [10, 2, 1]), (0.05, [2, 1, 1])])
def test_label_fraction_is_taken_of_each_class(fraction, counts):
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 3)[torch.randperm(53, generator=generator(3))]
    index = labelled_subset(labels, generator(), fraction=fraction)
    assert labels[index].bincount().tolist() == counts  # 2.5 is rounded to even
    assert index.tolist() == sorted(set(index.tolist()))
    other = labelled_subset(labels, generator(1), fraction=fraction)
    assert (other.tolist() == index.tolist()) == (fraction == 1.0)
    again = labelled_subset(labels, generator(), fraction=fraction)
    assert torch.equal(again, index)


def test_subsets_leave_the_global_state():
    before = torch.get_rng_state()
    labelled_subset(LABELS, generator(), 1)
    labelled_subset(LABELS, generator(), fraction=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_standardize():
    train = torch.randn(50, 4, generator=generator(), dtype=torch.float64) * 3 + 5
    train[:, 2] = 7.0  # constant in training, not in the test rows
    other = torch.randn(20, 4, generator=generator(1), dtype=torch.float64)
    ours, theirs = standardize(train, other)
    for j in (0, 1, 3):
        mean, std = np.mean(train[:, j].numpy()), np.std(train[:, j].numpy())
        np.testing.assert_allclose(ours[:, j], (train[:, j] - mean) / std, rtol=1e-10)
        np.testing.assert_allclose(theirs[:, j], (other[:, j] - mean) / std, rtol=1e-10)
    assert (ours[:, 2] == 0).all() and (theirs[:, 2] == 0).all()


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_frozen_accuracy_in_percent(protocol):
    x, y = blobs(spread=0.01)
    test, labels = blobs(30, spread=0.01, seed=1)
    assert frozen_accuracy(protocol, (x, y), (test, labels), 3) == 100.0
    wrong = (labels + (torch.arange(30) < 6)) % 3
    assert frozen_accuracy(protocol, (x, y), (test, wrong), 3) == pytest.approx(80.0)


def test_linear_protocol_standardises():
    """A column a million times larger than the rest would drown them otherwise."""
    x, y = blobs(300, spread=0.5)
    noise = 1e6 * torch.randn(300, 1, generator=generator(4))
    x = torch.cat([x, noise], 1)
    assert frozen_accuracy("linear", (x[:200], y[:200]), (x[200:], y[200:]), 3) > 90


def test_unknown_protocol():
    with pytest.raises(UserError, match="knn, linear"):
        frozen_accuracy("svm", blobs(), blobs(), 3)
