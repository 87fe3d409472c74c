"""The KRR loss against the textbook: ones column written out, explicit inverse, plain loops."""

import pytest
import torch

from krr_st import loss as loss_module
from krr_st.loss import krr_loss, krr_predict

RIDGE = 1e-3


def problem(b=5, m=4, d=3, dim=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, d), (b, dim), (m, d), (m, dim))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def textbook(f_real, y_real, f_syn, y_syn, ridge, lam=None):
    """Mean over b·D of the squared error; λ is differentiated through unless it is given."""
    f_real, f_syn = (torch.cat([f, torch.ones(len(f), 1).to(f)], 1) for f in (f_real, f_syn))
    k_ss = torch.stack([torch.stack([(p * q).sum() for q in f_syn]) for p in f_syn])
    k_rs = torch.stack([torch.stack([(p * q).sum() for q in f_syn]) for p in f_real])
    lam = ridge * torch.trace(k_ss) if lam is None else lam
    predicted = k_rs @ torch.linalg.inv(k_ss + lam * torch.eye(len(f_syn)).to(k_ss)) @ y_syn
    total = 0.0
    for i in range(len(y_real)):
        for j in range(y_real.shape[1]):
            total = total + (predicted[i, j] - y_real[i, j]) ** 2
    return total / (len(y_real) * y_real.shape[1])


def constant_lambda(f_syn, ridge):
    return float(ridge * ((f_syn**2).sum() + len(f_syn)))  # the ones column adds m to the trace


@pytest.mark.parametrize("shape", [dict(), dict(m=1), dict(b=1), dict(m=7, d=2), dict(dim=1)])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 3.0])
def test_value_is_the_textbooks(shape, ridge):
    data = problem(**shape)
    torch.testing.assert_close(krr_loss(*data, ridge), textbook(*data, ridge), rtol=1e-8, atol=0)


def test_default_ridge_is_the_published_one():
    data = problem()
    assert torch.equal(krr_loss(*data), krr_loss(*data, 1e-6))


def gradients(function, data, ridge, **more):
    f_real, y_real, f_syn, y_syn = data
    f_syn, y_syn = f_syn.clone().requires_grad_(), y_syn.clone().requires_grad_()
    return torch.autograd.grad(function(f_real, y_real, f_syn, y_syn, ridge, **more), (f_syn, y_syn))


@pytest.mark.parametrize("m", [1, 4, 9])  # 9: more rows than feature columns
def test_gradients_take_lambda_as_a_constant(m):
    data = problem(m=m)
    ours = gradients(krr_loss, data, RIDGE)
    detached = gradients(textbook, data, RIDGE, lam=constant_lambda(data[2], RIDGE))
    through = gradients(textbook, data, RIDGE)
    for ours_i, detached_i in zip(ours, detached, strict=True):
        torch.testing.assert_close(ours_i, detached_i, rtol=1e-8, atol=1e-12)
    assert (ours[0] - through[0]).norm() > 1e-5 * ours[0].norm()
    torch.testing.assert_close(ours[1], through[1])  # λ does not depend on y_syn


def test_gradcheck_in_every_input():
    """λ is a constant in the gradient: hold it fixed by making f_syn's trace part of the ridge."""
    f_real, y_real, f_syn, y_syn = (t.requires_grad_() for t in problem(m=3))
    lam = constant_lambda(f_syn.detach(), RIDGE)

    def loss(f_real, y_real, f_syn, y_syn):
        ridge = lam / constant_lambda(f_syn.detach(), 1.0)
        return krr_loss(f_real, y_real, f_syn, y_syn, ridge)

    assert torch.autograd.gradcheck(loss, (f_real, y_real, f_syn, y_syn))


def test_gradient_of_predictions_is_not_only_that_of_the_mean():
    f_real, _, f_syn, y_syn = problem(m=3)
    lam = constant_lambda(f_syn, RIDGE)

    def predict(f_syn, y_syn):
        return krr_predict(f_real, f_syn, y_syn, lam / constant_lambda(f_syn.detach(), 1.0))

    assert torch.autograd.gradcheck(predict, (f_syn.requires_grad_(), y_syn.requires_grad_()))


HARD = {
    "duplicate rows": lambda f: f[:1].expand_as(f).contiguous(),
    "constant features": lambda f: torch.full_like(f, 3.0),
    "zero features": torch.zeros_like,
    "large features": lambda f: 100 * f,
    "one huge column": lambda f: torch.cat([1e3 * f[:, :1], f[:, 1:]], 1),
}


@pytest.mark.parametrize("case", HARD)
def test_float32_stays_close_to_float64_where_the_kernel_is_singular(case):
    f_real, y_real, f_syn, y_syn = problem(b=20, m=30, d=8, dim=3)
    f_syn = HARD[case](f_syn).float().double()  # the same numbers in both precisions
    data = [t.float().double() for t in (f_real, y_real, f_syn, y_syn)]
    single = [t.float() for t in data]
    value = krr_loss(*single)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), krr_loss(*data), rtol=1e-2, atol=1e-6)
    for ours, exact in zip(gradients(krr_loss, single, 1e-6), gradients(krr_loss, data, 1e-6), strict=True):
        assert torch.isfinite(ours).all()
        assert (ours.double() - exact).norm() < 0.05 * exact.norm() + 1e-6


def test_one_synthetic_image_in_float32():
    data = problem(m=1, dtype=torch.float32)
    value = krr_loss(*data)
    expected = textbook(*(t.double() for t in data), 1e-6)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


def test_exact_fit_as_the_ridge_vanishes():
    f, y, _, _ = problem(b=4, d=6)
    losses = [float(krr_loss(f, y, f, y, ridge)) for ridge in (1e-2, 1e-4, 1e-6, 1e-10)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-16 < losses[0]


def test_a_constant_target_is_learnt_by_the_appended_one():
    """With zero features only the bias is left: the prediction is the mean target, λ aside."""
    y_syn = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    predicted = krr_predict(torch.randn(4, 2).double(), zeros, y_syn, 1e-9)
    torch.testing.assert_close(predicted, torch.full((4, 1), 3.0).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("index", "shape"),
    [
        (0, (5,)),
        (0, (5, 4)),
        (0, (5, 3, 1)),
        (2, (4, 2)),
        (2, (12,)),
        (1, (4, 2)),
        (1, (5, 3)),
        (1, (5,)),
        (3, (5, 2)),
        (3, (4, 3)),
        (3, (4,)),
    ],
)
def test_shapes_that_do_not_fit(index, shape):
    data = problem()
    data[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"must be|got"):
        krr_loss(*data)


@pytest.mark.parametrize("ridge", [0.0, -1e-6, float("nan")])
def test_ridge_must_be_positive(ridge):
    with pytest.raises(ValueError, match="ridge"):
        krr_loss(*problem(), ridge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_half_features_are_solved_in_full_precision(dtype):
    data = problem(b=6, m=5, d=4, dtype=dtype)
    expected = krr_loss(*(t.double() for t in data))
    f_real, _, f_syn, y_syn = data
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = krr_predict(f_real, f_syn, y_syn)
        value = krr_loss(*data)
    assert predicted.dtype == value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-6)


def test_no_gradient_reaches_detached_real_features():
    f_real, y_real, f_syn, y_syn = problem()
    krr_loss(f_real, y_real, f_syn.requires_grad_(), y_syn.requires_grad_()).backward()
    assert f_real.grad is None and y_real.grad is None
    assert f_syn.grad.abs().sum() > 0 and y_syn.grad.abs().sum() > 0


def test_a_device_without_float64_falls_back(monkeypatch):
    """A constant kernel: in float32 K + λI is not positive definite in arithmetic, in float64 it is."""
    k, y_syn = torch.full((200, 200), 3.0), torch.arange(600.0).view(200, 3) / 600
    lam = 1e-8 * k.trace() * torch.eye(200)
    assert torch.linalg.cholesky_ex(k + lam)[1] != 0 == torch.linalg.cholesky_ex((k + lam).double())[1]
    monkeypatch.setattr(loss_module, "_solve_dtype", lambda x: torch.float32)
    found = loss_module.kernel_weights(k, y_syn, 1e-8)
    assert found.isfinite().all()


def test_a_failed_factorisation_is_nan():
    """LAPACK stops half way and leaves finite numbers behind: the loop has to see that."""
    k = torch.diag(torch.tensor([1.0, 1.0, -1.0])).double()
    factor, failed = torch.linalg.cholesky_ex(k)
    assert failed == 3 and factor.isfinite().all()
    found = loss_module.kernel_weights(k, torch.ones(3, 1).double(), 1e-6)
    assert found.isnan().all()


@pytest.mark.parametrize("ridge", [1e-8, 1e-12])
def test_a_ridge_below_the_rounding_of_the_features(ridge):
    """Rows twice: of equal ones with equal targets the prediction is theirs, as in float64."""
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).repeat(2, 1) * 1e3
    real, y = rows[:4] * 0.5, torch.arange(12.0).view(4, 3).repeat(2, 1)
    torch.testing.assert_close(krr_predict(rows[:4], rows, y, ridge), y[:4], rtol=1e-3, atol=1e-3)
    wanted = krr_predict(real.double(), rows.double(), y.double(), ridge)
    torch.testing.assert_close(krr_predict(real, rows, y, ridge).double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n", [1, 5, 64, 65, 128, 200, 700])
def test_the_inverse_by_blocks(n):
    """As accurate as substitution in one piece, on a factor as the loss has them."""
    torch.manual_seed(n)
    f = torch.randn(n, 300, dtype=torch.float64).relu()
    k = f @ f.mT + 1
    lower = torch.linalg.cholesky(k + 1e-6 * k.trace() * torch.eye(n, dtype=torch.float64))
    wanted = torch.linalg.solve_triangular(lower, torch.eye(n, dtype=torch.float64), upper=False)
    found = loss_module.triangular_inverse(lower)
    assert torch.equal(found, found.tril())
    assert (found - wanted).norm() < 1e-11 * wanted.norm()
