"""Implicit gradients: against finite differences of a training to its end, and against NumPy."""

import pytest
import torch
from conftest import NET, make_krrst, plain, write_set, write_target
from torch import nn
from torch.nn.functional import mse_loss

import train
from data.load import load_set
from krr_st import implicit
from krr_st.config import TrainFlags
from krr_st.implicit import conjugate_gradients, implicit_gradients

F64 = torch.float64


def test_gradients_are_those_of_a_training_to_its_end(monkeypatch):
    """A linear network: the end of its training, held near the start by δ, is that of a linear system."""
    monkeypatch.setattr(implicit, "STEPS", 60)
    monkeypatch.setattr(implicit, "DAMPING", 0.3)
    torch.manual_seed(0)
    x_syn, y_syn, x, y = (torch.randn(*shape, dtype=F64) for shape in ((6, 4), (6, 2), (9, 4), (9, 2)))
    start = nn.Linear(4, 2, dtype=F64).requires_grad_(False)

    def ones(t):
        return torch.cat([t, torch.ones(len(t), 1, dtype=F64)], 1)

    def trained(x_syn, y_syn, near):
        a = ones(x_syn)
        system = 2 / y_syn.numel() * a.T @ a + 0.3 * torch.eye(5, dtype=F64)
        return torch.linalg.solve(system, 2 / y_syn.numel() * a.T @ y_syn + 0.3 * near)

    near = torch.cat([start.weight.T, start.bias[None]])

    def outer(x_syn, y_syn):
        return mse_loss(ones(x) @ trained(x_syn, y_syn, near), y)

    end = trained(x_syn, y_syn, near)
    network = nn.Linear(4, 2, dtype=F64)
    with torch.no_grad():
        network.weight.copy_(end[:4].T)
        network.bias.copy_(end[4])
    learned = [x_syn.requires_grad_(), y_syn.requires_grad_()]
    flags = TrainFlags(outer_loss="implicit")
    loss, *found = implicit_gradients(flags, learned)(network, x_syn, y_syn, x, y)
    assert float(loss) == pytest.approx(float(outer(x_syn, y_syn).detach()), rel=1e-12)
    for at, gradient in zip(learned, found, strict=True):
        for index in ((0, 0), (3, 1), (5, 1)):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    at[index] += step
                    values.append(float(outer(x_syn, y_syn)))
                    at[index] -= step
            assert float(gradient[index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9)


def parts(vector):
    return [vector[:2].view(2, 1), vector[2:]]


@pytest.mark.parametrize("steps", [1, 3, 6, 9])
def test_conjugate_gradients(steps):
    """After as many steps as unknowns the solution, and more do no harm; before, the best of its space."""
    torch.manual_seed(1)
    half = torch.randn(6, 6, dtype=F64)
    a, b = half @ half.T + torch.eye(6, dtype=F64), torch.randn(6, dtype=F64)

    def product(v):
        return parts(a @ torch.cat([p.flatten() for p in v]))

    found = torch.cat([p.flatten() for p in conjugate_gradients(product, parts(b), steps)])
    krylov = torch.stack([torch.linalg.matrix_power(a, n) @ b for n in range(min(steps, 6))], 1)
    basis, _ = torch.linalg.qr(krylov)
    best = basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ b)
    torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8)


def test_it_stops_at_negative_curvature_and_at_zero():
    a = torch.diag(torch.tensor([2.0, 1.0, -5.0], dtype=F64))
    b = torch.tensor([1.0, 1.0, 0.5], dtype=F64)
    products = []

    def product(v):
        products.append(v)
        return [a @ v[0]]

    (found,) = conjugate_gradients(product, [b], 1)
    assert found.equal(b * (b @ b) / (b @ a @ b))
    (later,) = conjugate_gradients(product, [b], 5)
    assert later.isfinite().all()
    (none,) = conjugate_gradients(product, [torch.tensor([0.0, 0.0, 1.0], dtype=F64)], 3)
    assert not none.any()
    (zero,) = conjugate_gradients(product, [torch.zeros(3, dtype=F64)], 3)
    assert not zero.any()


@pytest.mark.parametrize("changes", [{}, dict(views=3, blend=True, view_batch=10)])
def test_steps_and_their_resume(workspace, changes):
    write_set("datasets", "tiny")
    image_set = load_set("tiny", 8, "datasets")
    changes |= dict(outer_loss="implicit", outer_lr=3e-2)
    whole, first, rest = (make_krrst(image_set, **changes) for _ in range(3))
    for distiller in (whole, first):
        distiller.begin()
    start = whole.x_syn.detach().clone()
    for _ in range(12):
        assert whole.step()["loss"].isfinite()
    assert not whole.x_syn.equal(start)
    for _ in range(5):
        first.step()
    rest.load_state_dict(first.state_dict())
    for _ in range(7):
        rest.step()
    assert plain(rest.state_dict()) == plain(whole.state_dict())


def test_a_network_is_left_as_it_was(workspace):
    write_set("datasets", "tiny")
    distiller = make_krrst(load_set("tiny", 8, "datasets"), outer_loss="implicit")
    distiller.begin()
    network = distiller.pool.draw().model
    before = plain(network.state_dict())
    x = distiller.x_syn
    loss, *found = distiller._gradients(network, x, distiller.y_syn, x.detach(), distiller.y_syn.detach())
    assert plain(network.state_dict()) == before and not network.first_order
    assert loss > 0 and [g.shape for g in found] == [x.shape, distiller.y_syn.shape]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--compile", "second derivatives, which --compile"),
        ("--cuda_graph", "--cuda_graph needs an NVIDIA GPU"),
    ],
)
def test_what_does_not_go_with_it(workspace, capsys, flag, message):
    write_set("datasets", "tiny")
    write_target()
    given = ["--data_name=tiny", "--img_size=8", f"--target_model={NET}", "--num_images=4", "--device=cpu"]
    assert train.main([*given, "--outer_loss=implicit", flag]) == 2
    assert message in capsys.readouterr().err
