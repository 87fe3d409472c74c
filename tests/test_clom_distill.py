"""DC, DSA and DM at tiny size: what they match and draw, and that they go on where they stopped."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, resolved, write_set

from clom import base
from clom.config import DistillFlags, default_run_folder, loops
from clom.dc import GradientMatching
from clom.dm import DistributionMatching, embed_real
from clom.loss import CLoM
from clom.matching import gradient_distance
from clom.pool import RealFeatures
from clom.setup import MatchingSetup, NetworkObserver, evaluation_recipe
from data.augment.dsa import apply_drawn
from data.load import load_set
from data.loader import TensorLoader
from data.real_data import RealImages
from data.synthetic import SyntheticSet
from distillation.loop import Plan
from distillation.problem import Problem
from evaluation.fit import Trainer
from evaluation.recipes import dc_evaluation, sgd_by_epochs
from evaluation.score import score_network
from methods import METHODS
from models import get_network, layout
from models.layout import batch_norms
from utils.errors import UserError
from utils.seed import local_seed

DSA = "color_crop_cutout_flip_scale_rotate"


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny", train=46)
    return workspace


@pytest.fixture
def image_set(tiny):
    return load_set("tiny", 8, family="dc")


@pytest.fixture
def real(image_set):
    return RealImages.from_set(image_set, CPU)


@pytest.fixture
def make(image_set, real):
    """Builds a distiller on the tiny set from changes of its flags."""

    def make(kind, *, net="ConvNetD1", seed=0, extra=None, **changes):
        settings = dict(
            model=net,
            ipc=1,
            init="noise",
            lr_img=1.0,
            batch_real=8,
            outer_loop=1,
            inner_loop=1,
            dsa_strategy="none",
        )
        problem = Problem(image_set, CPU, seed, real=real, extra=extra)
        return kind(problem, DistillFlags(**{**settings, **changes}))

    return make


def network(name="ConvNetD1"):
    def build(seed):
        with local_seed(seed):
            return get_network(name, 3, 4, (8, 8))

    return build


def held_out_loss(make, kind, distiller, **options):
    """Mean loss of fixed networks and real batches on the distiller's images."""
    probe = make(kind, seed=123, ipc=distiller.ipc, **{**options, "lr_img": 1e-30})
    with torch.no_grad():
        probe.x_syn.copy_(distiller.x_syn)
    return sum(float(probe.step()["loss"]) for _ in range(4))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GradientMatching, dict(outer_loop=2, inner_loop=1)),
        (GradientMatching, dict(dsa_strategy=DSA, outer_loop=2, inner_loop=1)),
        (DistributionMatching, dict(dsa_strategy=DSA)),
    ],
    ids=["DC", "DSA", "DM"],
)
def test_a_tiny_run_lowers_its_loss(make, kind, options):
    distiller = make(kind, lr_img=0.5, **options)
    before = held_out_loss(make, kind, distiller, **options)
    for _ in range(8):
        distiller.step()
    assert held_out_loss(make, kind, distiller, **options) < 0.7 * before


def test_gradient_of_the_sum_over_classes(make, real):
    distiller = make(GradientMatching, ipc=2)
    net = network()(0)
    state = distiller.stream("real images").get_state()
    gradient, total = distiller._match(net)
    distiller.stream("real images").set_state(state)
    parameters, expected = list(net.parameters()), 0.0
    for c in range(4):
        index = real.draw_class(c, 8, distiller.stream("real images"))
        y = torch.full((8,), c)
        g_real = torch.autograd.grad(F.cross_entropy(net(real.at(index)), y), parameters)
        own = distiller.x_syn[2 * c : 2 * c + 2]
        loss = F.cross_entropy(net(own), y[:2])
        g_syn = torch.autograd.grad(loss, parameters, create_graph=True)
        expected = expected + gradient_distance(g_syn, g_real)
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, distiller.x_syn)[0])


@pytest.mark.parametrize("net", ["ConvNetD1", "ConvNetBN", "ConvNetLN"])
def test_parts_of_a_batch_change_nothing_but_rounding(make, real, monkeypatch, net):
    """Gradients of real images, a training, test accuracies, DM's groups of classes."""

    def everything(pixels):
        monkeypatch.setattr(layout, "CPU_PIXELS", pixels)
        matching = make(GradientMatching, net=net, ipc=2, outer_loop=2, inner_loop=3)
        loss = [matching.step()["loss"], make(DistributionMatching, net=net).step()["loss"]]
        loader = TensorLoader(
            real.at(torch.arange(20)),
            real.labels[:20],
            batch_size=7,
            device=CPU,
            generator=torch.Generator().manual_seed(0),
        )
        trainer = Trainer(network(net)(0), loader, sgd_by_epochs(2, 0.1, 0.9, 5e-4, 7))
        model = trainer.run()
        return [matching.x_syn.detach(), *loss, trainer.window.mean(), *model.parameters()]

    for small, whole in zip(everything(3 * 64), everything(10**9), strict=True):
        torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-5)


def test_siamese_draws_are_equal_for_real_and_synthetic(make, monkeypatch):
    seen = []

    def spy(x, name, values, align_corners):
        seen.append((len(x), name, values.tolist(), align_corners))
        return apply_drawn(x, name, values, align_corners)

    monkeypatch.setattr(base, "apply_drawn", spy)
    for kind in (GradientMatching, DistributionMatching):
        seen.clear()
        make(kind, dsa_strategy=DSA).step()
        assert [count for count, *_ in seen] == [8, 1] * 4
        pairs = list(zip(seen[::2], seen[1::2], strict=True))
        assert all(a[1:] == b[1:] and not a[3] for a, b in pairs)
        assert len({str(a[1:]) for a, _ in pairs}) == 4  # each class its own
    x = torch.randn(1, 3, 8, 8)
    a, b = make(DistributionMatching, dsa_strategy=DSA).siamese(x.expand(5, -1, -1, -1), x)
    torch.testing.assert_close(a, b.expand_as(a))


def test_dm_takes_one_batch_under_batch_norm(make):
    sizes = []
    distiller = make(DistributionMatching, net="ConvNetBN", ipc=2)
    build = distiller.new_network

    def watched(seed):
        model = build(seed)
        model.features.register_forward_hook(lambda m, given, out: sizes.append(len(given[0])))
        assert model.training
        return model

    distiller.new_network = watched
    distiller.step()
    assert sizes == [32, 8]


def test_dm_in_parts_equals_class_by_class(real, monkeypatch):
    parts = list(real.draw_classes(8, torch.Generator().manual_seed(0)))
    net, x = network()(0), torch.cat(parts)
    together = embed_real(net, x)
    monkeypatch.setattr(layout, "CPU_PIXELS", 5 * 64)
    torch.testing.assert_close(embed_real(net, x), together)
    by_class = torch.cat([net.embed(part) for part in parts])
    torch.testing.assert_close(by_class, together)


def test_dm_networks_are_frozen_and_only_images_move(make):
    distiller = make(DistributionMatching)
    built = []
    build = distiller.new_network
    distiller.new_network = lambda seed: built.append(build(seed)) or built[-1]
    before = distiller.x_syn.detach().clone()
    distiller.step()
    distiller.step()
    assert not torch.equal(before, distiller.x_syn)
    assert all(not p.requires_grad for model in built for p in model.parameters())
    weights = [next(m.parameters()) for m in built]
    assert not torch.equal(*weights)  # each iteration its own network


def test_batch_norm_of_gradient_matching(make):
    distiller = make(GradientMatching, net="ConvNetBN")
    model = network("ConvNetBN")(0).train()
    fresh = model.features[1].running_mean.clone()
    distiller._fix_statistics(model)
    assert not torch.equal(model.features[1].running_mean, fresh)
    assert model.training and all(not module.training for module in batch_norms(model))
    fixed = model.features[1].running_mean.clone()
    distiller._match(model)
    assert torch.equal(model.features[1].running_mean, fixed)


def test_small_classes_give_what_they_have(make, real):
    counts = [len(index) for index in real.index_of_class]
    assert counts == [12, 12, 11, 11]
    assert [len(x) for x in real.draw_classes(100, torch.Generator().manual_seed(0))] == counts
    index = real.draw_class(2, 11, torch.Generator().manual_seed(0))
    assert (real.labels[index] == 2).all() and len(set(index.tolist())) == 11
    assert float(make(DistributionMatching, batch_real=100).step()["loss"]) > 0


def test_initial_images(image_set, real):
    problem = Problem(image_set, CPU, 0, real=real)
    x, y = problem.start_by_class(2, "real")
    assert y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    everything = real.at(torch.arange(46))
    for image, label in zip(x, y.tolist(), strict=True):
        match = [i for i in range(46) if torch.equal(everything[i], image)]
        assert match and real.labels[match[0]] == label
    with pytest.raises(UserError, match="class 2 has 11 training images, --ipc 12"):
        problem.start_by_class(12, "real")
    noise, y = problem.start_by_class(500, "noise")
    assert noise.shape == (2000, 3, 8, 8) and y.bincount().tolist() == [500] * 4
    assert abs(float(noise.mean())) < 0.01 and float(noise.std()) == pytest.approx(1, abs=0.01)


def test_clom_moves_the_images(make, real):
    results = []
    for alpha in (None, 0.0, 100.0):
        clom = None
        if alpha is not None:
            clom = CLoM(network()(5), alpha=alpha, real=RealFeatures(real), batch_size=16)
        distiller = make(DistributionMatching, extra=clom)
        losses = [distiller.step() for _ in range(2)]
        results.append(distiller.x_syn.detach())
        assert (float(losses[0]["clom"]) > 0) == (alpha == 100.0)
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_defaults_by_method_and_ipc():
    dc, dsa, dm = (resolved(m, ipc=10) for m in ("DC", "DSA", "DM"))
    assert (dc.Iteration, dc.lr_img, dc.init, dc.dsa_strategy) == (1000, 0.1, "noise", "none")
    assert (dsa.Iteration, dsa.dsa_strategy) == (1000, DSA)
    assert (dm.Iteration, dm.lr_img, dm.init, dm.dsa_strategy) == (20000, 1.0, "real", DSA)
    assert (dc.outer_loop, dc.inner_loop) == (10, 50)
    assert [loops(i) for i in (1, 5, 20, 30, 40, 50, 100)] == [
        (1, 1),
        (1, 1),
        (20, 25),
        (30, 20),
        (40, 15),
        (50, 10),
        (50, 10),
    ]
    assert resolved("DSA", dataset="SVHN").dsa_strategy == DSA.replace("_flip", "")
    assert resolved("DSA", dsa_strategy="None").dsa_strategy == "none"


@pytest.mark.parametrize(("mode", "steps"), [("SS", [0, 2000, 4000]), ("M", [5000])])
def test_one_network_is_evaluated_on_the_way_several_at_the_end(mode, steps):
    setup = object.__new__(MatchingSetup)  # its flags alone matter here
    setup.flags = resolved("DM", eval_mode=mode, eval_interval=2000)
    observer = object.__new__(NetworkObserver)
    observer.setup, observer.plan = setup, Plan(5000, 1, 1)
    assert [s for s in range(0, 5001, 500) if observer.due(s)] == sorted({*steps, 5000})


def test_default_run_folders_tell_published_commands_apart():
    def name(**changes):
        usual = dict(method="DC", CLoM=True, CLoM_distance="cos", models_pool=("ConvNet", "hf:a/b c"))
        return str(default_run_folder(DistillFlags(**{**usual, **changes})))

    assert name() == (
        "condensed/CIFAR10/DC/ConvNet_ipc1_clom-cos-CIFAR10-ConvNet+hf-a-b-c_alpha1000_num1_epoch150"
    )
    changes = [
        dict(alphas=(0.5,)),
        dict(alphas=(1000.0, 0.5)),
        dict(alphas=(1234567.0,)),
        dict(alphas=(1234568.0,)),
        dict(model_num=2),
        dict(epoch=100),
        dict(CLoM_distance="ce"),
        dict(source_dataset="SVHN"),
        dict(models_pool=("ConvNet",)),
        dict(ipc=10),
        dict(method="DM"),
        dict(CLoM=False),
    ]
    long = dict(models_pool=tuple(f"hf:some/model-{i}" for i in range(20)))
    changes += [long, {**long, "epoch": 2}, {**long, "alphas": (7.0,)}]
    names = [name(), *(name(**change) for change in changes)]
    assert len(set(names)) == len(names)
    for path in map(Path, names):
        assert re.fullmatch(r"[A-Za-z0-9._+-]+", path.name) and len(path.name) <= 150


def test_default_strategy_mirrors_only_where_it_may(workspace):
    def mirrors(method, dataset):
        return "flip" in resolved(method, dataset=dataset).dsa_strategy

    for name, dsa, dm in (("CIFAR10", True, True), ("SVHN", False, True), ("digits", False, False)):
        assert (mirrors("DSA", name), mirrors("DM", name)) == (dsa, dm)
    write_set("datasets", "mine")
    assert mirrors("DSA", "mine")
    (workspace / "datasets/mine/meta.json").write_text('{"hflip": false}')
    assert not mirrors("DSA", "mine") and not mirrors("DM", "mine")


def test_evaluation_as_published():
    def recipe(method, dataset, network="ConvNet", **changes):
        return evaluation_recipe(
            METHODS[method.lower()], resolved(method, dataset=dataset, **changes), network
        )

    plain = recipe("DC", "CIFAR10")
    assert (plain.dsa, plain.dc) == ("none", "none")
    assert recipe("DC", "MNIST").dc == "crop_scale_rotate"
    older = recipe("DC", "CIFAR10", "ConvNetBN")
    assert (older.dsa, older.dc) == ("none", "crop_noise")
    dsa = recipe("DM", "MNIST")
    assert (dsa.dsa, dsa.dc, dsa.align_corners) == (DSA, "none", False)
    # Epochs 0 to 300; the rate falls, with fresh momentum, after the one numbered 151.
    assert (plain.epochs, plain.decay_epochs, plain.fresh_momentum) == (301, (152,), True)
    settings = (plain.lr, plain.momentum, plain.wd, plain.batch_size)
    assert settings == (0.01, 0.9, 5e-4, 256)
    assert older.epochs == 1001
    assert recipe("DM", "MNIST", epoch_eval_train=20).epochs == 21


@pytest.mark.parametrize("augmentation", [{"dc": "crop_noise"}, {"dsa": "color_scale"}])
def test_evaluation_learns_and_repeats(image_set, real, augmentation):
    x, y = Problem(image_set, CPU, 0, real=real).start_by_class(8, "real")
    scores = [
        score_network(
            network(),
            SyntheticSet(x, y),
            image_set,
            dc_evaluation(20, 0.01, 256, **augmentation),
            seed=seed,
            device=CPU,
            test_every=7,
        )
        for seed in (0, 0, 1)
    ]
    assert scores[0] == scores[1] != scores[2]
    assert scores[0].final > 0.5 and scores[0].best >= scores[0].final
    assert scores[0].best_epoch in (7, 14, 21)
