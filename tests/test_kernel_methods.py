"""FRePo and KIP against the formulas of their papers, and the optimisers they need against theirs."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, resolved, write_set
from torch import nn

import train
from data.augment import normalize
from data.load import load_set
from data.real_data import RealImages
from data.synthetic import SyntheticSet
from data.whitening import Whitening
from distillation.problem import Problem
from krr_st.frepo import FRePo, centred, frepo_loss, label_margin
from krr_st.kip import KIP, draw_weights, estimated_kernel
from models import get_model
from utils.optim import LAMB, AdaBelief, make_optimizer, make_schedule

ROOT = Path(__file__).resolve().parents[1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ------------------------------------------------------------------ FRePo


def naive_frepo(f_real, y_real, f_syn, y_syn, ridge):
    """Loops over pairs, an explicit inverse."""
    m, b = len(f_syn), len(f_real)

    def kernel(a, c):
        return sum(float(u) * float(v) for u, v in zip(a, c, strict=True)) + 1.0

    k_ss = torch.tensor([[kernel(a, c) for c in f_syn] for a in f_syn], dtype=torch.float64)
    k_ss += ridge * k_ss.trace() / m * torch.eye(m, dtype=torch.float64)
    weights = torch.linalg.inv(k_ss) @ y_syn
    total = 0.0
    for i in range(b):
        row = [kernel(f_real[i], f_syn[j]) for j in range(m)]
        for c in range(y_syn.shape[1]):
            predicted = sum(row[j] * float(weights[j, c]) for j in range(m))
            total += 0.5 * (predicted - float(y_real[i, c])) ** 2
    return total / b


def test_frepo_loss_against_loops():
    f_real, f_syn, y_syn = randn(5, 7), randn(4, 7, seed=1), randn(4, 3, seed=2)
    y_real = centred(torch.tensor([0, 2, 1, 1, 0]), 3).double()
    for ridge in (1e-6, 0.3):
        found = frepo_loss(f_real, y_real, f_syn, y_syn, ridge)
        assert float(found) == pytest.approx(naive_frepo(f_real, y_real, f_syn, y_syn, ridge), rel=1e-9)


def test_labels_and_their_margin():
    y = centred(torch.tensor([1, 0]), 4)
    assert y.tolist() == [[-0.25, 0.75, -0.25, -0.25], [0.75, -0.25, -0.25, -0.25]]
    assert float(label_margin(y)) == -0.25  # at most 1/C each
    close = torch.tensor([[0.5, 0.4, 0.0, 0.0]], requires_grad=True)
    margin = label_margin(close)
    assert margin.item() == pytest.approx(-0.1)
    (grad,) = torch.autograd.grad(margin, close)
    assert grad.tolist() == [[-1.0, 1.0, 0.0, 0.0]]


@pytest.fixture
def problem(workspace):
    write_set("datasets", "tiny", train=48, test=8)
    image_set = load_set("tiny", 8, "datasets")
    whitening = Whitening.fit(image_set.train.images, image_set.stats, CPU, True)
    real = RealImages.from_set(image_set, CPU)
    return Problem(image_set, CPU, 3, real=real, whitening=whitening)


def make(kind, problem, **changes):
    flags = dict(data_name="tiny", img_size=8, num_images=8, outer_batch_size=16, num_models=2)
    return kind(problem, resolved(kind.__name__, **{**flags, **changes}))


def test_a_frepo_step_by_hand(problem):
    """Mirrored copies in the kernel, centred labels, LAMB on both; then one Adam step of the network."""
    distiller = make(FRePo, problem, train_model="convnet_4_bn", online_iteration=5)
    distiller.begin()
    assert [slot.age for slot in distiller.pool.slots] == [0, 2]
    x, y = distiller.x_syn.detach().clone(), distiller.y_syn.detach().clone()
    torch.testing.assert_close(y[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / 0.4**0.5)
    loader, pool = make(FRePo, problem, train_model="convnet_4_bn").loader, distiller.pool
    raw, index = next(loader.forever())
    drawn, real_draw = [], pool.draw
    pool.draw = lambda: drawn.append(real_draw()) or drawn[-1]
    before = {k: v.clone() for k, v in pool.slots[0].model.state_dict().items()}
    pool.slots = pool.slots[:1]
    loss = distiller.step()["loss"]
    net = copy.deepcopy(drawn[0].model)
    net.load_state_dict(before)
    net.eval().requires_grad_(False)
    x1, y1 = x.clone().requires_grad_(), y.clone().requires_grad_()
    mirrored = torch.cat([x1, x1.flip(3)])
    y_real = centred(problem.image_set.train.labels[index], 4)
    f_real = net.embed(problem.whitening(raw))
    wanted = frepo_loss(f_real, y_real, net.embed(mirrored), torch.cat([y1, y1])) + label_margin(y1)
    torch.testing.assert_close(loss, wanted.detach())
    wanted.backward()
    optimizer = LAMB([x1, y1], lr=3e-4)
    optimizer.step()
    torch.testing.assert_close(distiller.x_syn.detach(), x1.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(distiller.y_syn.detach(), y1.detach(), rtol=0, atol=1e-6)
    adam = torch.optim.Adam(net.train().requires_grad_(True).parameters(), lr=3e-4)
    (0.5 * (net(x1.detach()) - y1.detach()).square().sum(1).mean()).backward()
    adam.step()
    torch.testing.assert_close(net.state_dict(), drawn[0].model.state_dict(), rtol=1e-4, atol=1e-6)


def test_published_settings_of_frepo(workspace):
    write_set("datasets", "mnist", channels=1)

    def found(name, count):
        flags = resolved("frepo", data_name=name, num_images=count)
        return flags.use_flip, flags.zca, flags.test_model

    assert found("cifar10", 500) == (True, True, "convnet_128_256_512_none")
    assert found("cifar100", 100)[:2] == (True, True) and found("cifar100", 1000)[0] is False
    assert found("tinyimagenet", 200) == (True, True, "convnet_64_128_256_512_none")
    bn = resolved("kip", data_name="cifar10", num_images=10, train_model="convnet_8_bn")
    assert bn.test_model == "convnet_8_none"  # FRePo's and KIP's evaluations are without BatchNorm
    assert found("tinyimagenet", 2000)[0] is False and found("mnist", 12)[:2] == (False, False)
    assert resolved("frepo", data_name="mnist", num_images=12, zca=True).zca is True


@pytest.mark.parametrize("kind", [FRePo, KIP])
def test_the_written_set_is_ordinary_and_its_whitening_leads_back(problem, kind):
    changes = dict(platt=True) if kind is KIP else {}
    distiller = make(kind, problem, **changes)
    synthetic = distiller.synthetic()
    assert isinstance(synthetic, SyntheticSet) and synthetic.soft
    pixels = problem.image_set.train.images.flatten(1).double() / 255
    stats = problem.image_set.stats
    x = synthetic.images.double() * torch.tensor(stats.std)[:, None, None].double()
    x = (x + torch.tensor(stats.mean)[:, None, None].double()).flatten(1)
    gaps = (x[:, None] - pixels[None]).abs().amax(2).amin(1)  # to the nearest real image
    assert gaps.max() < 1e-4
    distiller.step()
    synthetic = distiller.synthetic()
    seen = synthetic.training.whitening(synthetic.images)
    torch.testing.assert_close(seen, distiller.images().detach(), rtol=0, atol=1e-4)


def test_fixed_labels_stay(problem):
    for kind in (FRePo, KIP):
        distiller = make(kind, problem, learn_label=False)
        before = distiller.y_syn.clone()
        distiller.step()
        assert torch.equal(distiller.y_syn, before) and distiller.x_syn.grad.norm() > 0


# ------------------------------------------------------------------ KIP by random features


def arc_cosine(x, z):
    """NNGP of one hidden ReLU layer, weights of variance 2/fan-in, biases of 0.01, in closed form."""

    def covariance(a, b):
        return 2 * a @ b.mT / a.shape[1] + 0.01

    k_xz = covariance(x, z)
    norms = (covariance(x, x).diagonal()[:, None] * covariance(z, z).diagonal()[None]).sqrt()
    angle = (k_xz / norms).clamp(-1, 1).acos()
    return 2 * norms / (2 * math.pi) * (angle.sin() + (math.pi - angle) * angle.cos()) + 0.01


def test_the_estimated_kernel_nears_the_closed_form_as_networks_widen():
    x, z = randn(6, 20).float(), randn(5, 20, seed=1).float()
    exact, errors, draws = arc_cosine(x, z), [], generator(2)
    for width in (16, 256, 4096):
        features = []
        for _ in range(8):
            net = nn.Sequential(nn.Linear(20, width), nn.ReLU())
            draw_weights(net, draws)
            features.append((net(x).detach(), net(z).detach()))
        found = estimated_kernel(*zip(*features, strict=True))
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.02  # as 1/sqrt(width)


def test_weights_have_the_published_spread():
    conv = nn.Conv2d(50, 200, 3)
    draw_weights(conv, generator())
    assert float(conv.weight.detach().std()) == pytest.approx((2 / 450) ** 0.5, rel=0.01)
    assert float(conv.bias.detach().std()) == pytest.approx(0.1, rel=0.15)


def test_a_kip_step_by_hand(problem):
    distiller = make(KIP, problem, num_models=2, num_batches=2, train_model="convnet_4_none", platt=True)
    other = make(KIP, problem, num_models=2, num_batches=2, train_model="convnet_4_none", platt=True)
    loss = distiller.step()["loss"]
    stream, batches = other.stream("networks"), other.loader.forever()
    raw, index = zip(*(next(batches) for _ in range(2)), strict=True)
    x_real, labels = problem.whitening(torch.cat(raw)), problem.image_set.train.labels[torch.cat(index)]
    f_real, f_syn = [], []
    for net in other.networks:
        draw_weights(net, stream)
        f_real.append(net.embed(x_real).double())
        f_syn.append(net.embed(other.x_syn.detach()).double())
    d, m = f_real[0].shape[1], len(other.x_syn)
    phi_r, phi_s = (torch.cat(f, 1) / (2 * d) ** 0.5 for f in (f_real, f_syn))
    k_rs, k_ss = 2 * phi_r @ phi_s.mT + 0.01, 2 * phi_s @ phi_s.mT + 0.01
    eye = torch.eye(m, dtype=torch.float64)
    weights = torch.linalg.solve(k_ss + 5e-3 * k_ss.trace() / m * eye, other.y_syn.detach().double())
    wanted = nn.functional.cross_entropy(k_rs @ weights, labels)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    # The first step of AdaBelief has the size of its rate, wherever the gradient is not zero.
    moved = (distiller.x_syn - other.x_syn).detach().abs()
    assert float(moved.max()) == pytest.approx(1e-3 / 0.9, rel=0.2)
    assert float(distiller.learned["temperature"].abs()) > 0
    assert not torch.equal(distiller.learned["transform"], torch.eye(192))


# ------------------------------------------------------------------ optimisers


def test_lamb_against_its_formula():
    w, target = randn(4, 3), randn(4, 3, seed=1)
    p = w.clone().requires_grad_()
    optimizer = LAMB([p], lr=0.1, weight_decay=0.02)
    m = v = torch.zeros_like(w)
    for t in range(1, 6):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        g = 2 * (w - target)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        r = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + 0.02 * w
        w = w - 0.1 * (w.norm() / r.norm()) * r
        optimizer.step()
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)
    zero = torch.zeros(3, requires_grad=True)
    zero.grad = torch.ones(3)
    make_optimizer("lamb", [zero], lr=0.5).step()
    torch.testing.assert_close(zero.detach(), torch.full((3,), -0.5), rtol=1e-4, atol=0)  # ratio 1


def test_adabelief_against_its_formula():
    w, target = randn(4, 3), randn(4, 3, seed=1)
    p = w.clone().requires_grad_()
    optimizer = AdaBelief([p], lr=0.1)
    m = s = torch.zeros_like(w)
    for t in range(1, 6):
        optimizer.zero_grad()
        (p - target).pow(4).sum().backward()
        g = 4 * (w - target) ** 3
        m = 0.9 * m + 0.1 * g
        s = 0.999 * s + 0.001 * (g - m) ** 2 + 1e-16
        w = w - 0.1 * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-16)
        optimizer.step()
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [LAMB, AdaBelief])
def test_their_states_resume_exactly(kind):
    def run(steps, saved=None):
        p = torch.ones(3, requires_grad=True)
        optimizer = kind([p], lr=0.1)
        if saved is not None:
            with torch.no_grad():
                p.copy_(saved[0])
            optimizer.load_state_dict(saved[1])
        for _ in range(steps):
            optimizer.zero_grad()
            (p * torch.tensor([1.0, 2.0, 3.0])).square().sum().backward()
            optimizer.step()
        return p.detach().clone(), optimizer.state_dict()

    assert torch.equal(run(3, run(2))[0], run(5)[0])


def test_a_cosine_to_a_tenth():
    optimizer = LAMB([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule, rates = make_schedule("cosine_to_tenth", optimizer, 10), []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2 * (0.1 + 0.45 * (1 + math.cos(math.pi * t / 10))) for t in range(11)])


def test_whitened_real_images_reach_the_networks(problem):
    x = normalize(problem.image_set.train.images[:4], problem.image_set.stats)
    assert torch.equal(problem.whiten(x), problem.whitening(x))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["frepo", "kip"])
def test_two_processes_equal_one(workspace, method):
    """The real batch is dealt to them; the set is the same up to rounding."""
    write_set("datasets", "tiny", train=64, test=16)
    flags = (
        f"--method {method} --data_name tiny --img_size 8 --device cpu --seed 4 --num_images 8 "
        "--outer_iteration 6 --outer_batch_size 16 --num_models 2 --pre_iteration 2 --print_every 2 "
        "--train_model convnet_4_none"
    ).split()
    assert train.main([*flags, "--exp_name", "one"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *flags, "--exp_name", "two"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = (SyntheticSet.load(f"results/{name}") for name in ("one", "two"))
    torch.testing.assert_close(one.images, two.images, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.targets, two.targets, rtol=1e-3, atol=1e-4)
    start = normalize(load_set("tiny", 8, "datasets").train.images, load_set("tiny", 8, "datasets").stats)
    gaps = (one.images[:, None] - start[None]).abs().amax((2, 3, 4)).amin(1)
    assert gaps.min() > 1e-4  # it is no longer the real images that it began with


def test_a_learning_rate_of_labels_that_are_kept_is_refused(workspace, capsys):
    write_set("datasets", "tiny")
    argv = ["--method", "kip", "--data_name", "tiny", "--img_size", "8", "--num_images", "8", "--dry_run"]
    assert train.main([*argv, "--outer_lr_y", "0.1", "--no-learn_label"]) == 2
    assert "--outer_lr_y is the learning rate of labels" in capsys.readouterr().err
    assert train.main([*argv, "--outer_lr_y", "0.1"]) == 0


def test_networks_without_biases_are_drawn_too():
    network = get_model("resnet10", (3, 8, 8), 1)
    before = network.conv1.weight.clone()
    draw_weights(network, generator())
    assert network.conv1.bias is None and not torch.equal(network.conv1.weight, before)
