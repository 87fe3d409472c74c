"""DC, DSA and DM at tiny size: what they match and draw, and that they go on where they stopped."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_set

import data
from clom import CLoM, distillers, gradient_distance, layout
from clom.config import DistillFlags, MatchDMFlags, default_run_folder, loops, resolve
from clom.distill import initial_images
from clom.distribution_matching import DistributionMatching, embed_real
from clom.evaluate import (
    Augmentation,
    published_augmentation,
    published_training,
    score_network,
)
from clom.gradient_matching import GradientMatching
from clom.inputs import keeps_meaning_mirrored
from clom.layout import batch_norms
from clom.real import RealImages
from clom.run import make_schedule
from clom.training import Training, dc_evaluation, train_on
from data.dsa import diff_augment
from models import get_network
from utils.errors import UserError
from utils.seed import local_seed

CPU = torch.device("cpu")
DSA = "color_crop_cutout_flip_scale_rotate"


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny", train=46)
    return workspace


@pytest.fixture
def real(tiny):
    return RealImages.from_set(data.load("tiny", 8, family="dc"), CPU)


def network(name="ConvNetD1"):
    def build(seed):
        with local_seed(seed):
            return get_network(name, 3, 4, (8, 8))

    return build


def make(kind, real, *, net="ConvNetD1", ipc=1, init="noise", **options):
    x, y = initial_images(real, (3, 8, 8), ipc, init, torch.Generator().manual_seed(0))
    options = {"lr_img": 1.0, "batch_real": 8, "seed": 0, **options}
    return kind(x, y, real, new_network=network(net), **options)


def held_out_loss(kind, real, distiller, **options):
    """Mean loss of fixed networks and real batches on the distiller's images."""
    probe = make(kind, real, lr_img=1e-30, seed=123, ipc=distiller.ipc, **options)
    with torch.no_grad():
        probe.x_syn.copy_(distiller.x_syn)
    return sum(float(probe.step()["loss"]) for _ in range(4))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GradientMatching, dict(outer_loop=2, inner_loop=1)),
        (GradientMatching, dict(strategy=DSA, outer_loop=2, inner_loop=1)),
        (DistributionMatching, dict(strategy=DSA)),
    ],
    ids=["DC", "DSA", "DM"],
)
def test_a_tiny_run_lowers_its_loss(real, kind, options):
    distiller = make(kind, real, lr_img=0.5, **options)
    before = held_out_loss(kind, real, distiller, **options)
    for _ in range(8):
        distiller.step()
    assert held_out_loss(kind, real, distiller, **options) < 0.7 * before


def test_gradient_of_the_sum_over_classes(real):
    distiller = make(GradientMatching, real, ipc=2)
    net = network()(0)
    state = distiller.generators["real images"].get_state()
    gradient, total = distiller._match(net)
    distiller.generators["real images"].set_state(state)
    parameters, expected = list(net.parameters()), 0.0
    for c in range(4):
        index = real.draw_class(c, 8, distiller.generators["real images"])
        y = torch.full((8,), c)
        g_real = torch.autograd.grad(F.cross_entropy(net(real.at(index)), y), parameters)
        own = distiller.x_syn[2 * c : 2 * c + 2]
        loss = F.cross_entropy(net(own), y[:2])
        g_syn = torch.autograd.grad(loss, parameters, create_graph=True)
        expected = expected + gradient_distance(g_syn, g_real)
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, distiller.x_syn)[0])


@pytest.mark.parametrize("net", ["ConvNetD1", "ConvNetBN", "ConvNetLN"])
def test_parts_of_a_batch_change_nothing_but_rounding(real, monkeypatch, net):
    """Gradients of real images, a training, test accuracies, DM's groups of classes."""

    def everything(pixels):
        monkeypatch.setattr(layout, "CPU_PIXELS", pixels)
        matching = make(GradientMatching, real, net=net, ipc=2, outer_loop=2, inner_loop=3)
        loss = [matching.step()["loss"], make(DistributionMatching, real, net=net).step()["loss"]]
        x, y = real.at(torch.arange(20)), real.labels[:20]
        trainer = train_on(
            network(net)(0), x, y, Training(2, 0.1, batch_size=7), augment=None, device=CPU,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        model = trainer.run()
        return [matching.x_syn.detach(), *loss, trainer.window.mean(), *model.parameters()]

    for small, whole in zip(everything(3 * 64), everything(10**9), strict=True):
        torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-5)


def test_siamese_draws_are_equal_for_real_and_synthetic(real, monkeypatch):
    seen = []

    def spy(x, strategy, **options):
        seen.append((len(x), options["seed"], options["siamese"], options["align_corners"]))
        return diff_augment(x, strategy, **options)

    monkeypatch.setattr(distillers, "diff_augment", spy)
    for kind in (GradientMatching, DistributionMatching):
        seen.clear()
        make(kind, real, strategy=DSA).step()
        assert [count for count, *_ in seen] == [8, 1] * 4
        pairs = list(itertools.batched(seen, 2)) if hasattr(itertools, "batched") else list(
            zip(seen[::2], seen[1::2], strict=True)
        )  # fmt: skip
        assert all(a[1:] == b[1:] and a[2] and not a[3] for a, b in pairs)
        assert len({a[1] for a, _ in pairs}) == 4  # each class its own
    x = torch.randn(1, 3, 8, 8)
    a, b = make(DistributionMatching, real, strategy=DSA).siamese(x.expand(5, -1, -1, -1), x)
    torch.testing.assert_close(a, b.expand_as(a))


def test_dm_takes_one_batch_under_batch_norm(real):
    sizes = []
    distiller = make(DistributionMatching, real, net="ConvNetBN", ipc=2)
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
    x, counts = real.draw_all_classes(8, torch.Generator().manual_seed(0))
    net = network()(0)
    together = embed_real(net, x)
    monkeypatch.setattr(layout, "CPU_PIXELS", 5 * 64)
    torch.testing.assert_close(embed_real(net, x), together)
    by_class = torch.cat([net.embed(part) for part in x.split(counts)])
    torch.testing.assert_close(by_class, together)


def test_dm_networks_are_frozen_and_only_images_move(real):
    distiller = make(DistributionMatching, real)
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


def test_batch_norm_of_gradient_matching(real):
    distiller = make(GradientMatching, real, net="ConvNetBN")
    model = network("ConvNetBN")(0).train()
    fresh = model.features[1].running_mean.clone()
    distiller._fix_statistics(model)
    assert not torch.equal(model.features[1].running_mean, fresh)
    assert model.training and all(not module.training for module in batch_norms(model))
    fixed = model.features[1].running_mean.clone()
    distiller._match(model)
    assert torch.equal(model.features[1].running_mean, fixed)


def test_small_classes_give_what_they_have(real):
    counts = [len(index) for index in real.index_of_class]
    assert counts == [12, 12, 11, 11]
    x, given = real.draw_all_classes(100, torch.Generator().manual_seed(0))
    assert given == counts and len(x) == 46
    index = real.draw_class(2, 11, torch.Generator().manual_seed(0))
    assert (real.labels[index] == 2).all() and len(set(index.tolist())) == 11
    assert float(make(DistributionMatching, real, batch_real=100).step()["loss"]) > 0


def test_initial_images(real):
    x, y = initial_images(real, (3, 8, 8), 2, "real", torch.Generator().manual_seed(0))
    assert y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    everything = real.at(torch.arange(46))
    for image, label in zip(x, y.tolist(), strict=True):
        match = [i for i in range(46) if torch.equal(everything[i], image)]
        assert match and real.labels[match[0]] == label
    with pytest.raises(UserError, match="class 2 has 11 training images, --ipc 12"):
        initial_images(real, (3, 8, 8), 12, "real", torch.Generator())


def test_clom_moves_the_images(real):
    results = []
    for alpha in (None, 0.0, 100.0):
        clom = None
        if alpha is not None:
            clom = CLoM(network()(5), alpha=alpha, real=real, batch_size=16)
        distiller = make(DistributionMatching, real, clom=clom)
        losses = [distiller.step() for _ in range(2)]
        results.append(distiller.x_syn.detach())
        assert (float(losses[0]["clom"]) > 0) == (alpha == 100.0)
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_defaults_by_method_and_ipc():
    dc, dsa, dm = (resolve(DistillFlags(method=m, ipc=10)) for m in ("DC", "DSA", "DM"))
    assert (dc.Iteration, dc.lr_img, dc.init, dc.dsa_strategy) == (1000, 0.1, "noise", "none")
    assert (dsa.Iteration, dsa.dsa_strategy) == (1000, DSA)
    assert (dm.Iteration, dm.lr_img, dm.init, dm.dsa_strategy) == (20000, 1.0, "real", DSA)
    assert (dc.outer_loop, dc.inner_loop) == (10, 50)
    assert [loops(i) for i in (1, 5, 20, 30, 40, 50, 100)] == [
        (1, 1), (1, 1), (20, 25), (30, 20), (40, 15), (50, 10), (50, 10),
    ]  # fmt: skip
    assert resolve(DistillFlags(method="DSA"), hflip=False).dsa_strategy == DSA.replace("_flip", "")
    assert resolve(DistillFlags(method="DSA", dsa_strategy="None")).dsa_strategy == "none"


def test_main_dm_has_the_published_defaults():
    dm = resolve(MatchDMFlags())
    assert (dm.method, dm.ipc, dm.eval_mode, dm.num_exp, dm.num_eval) == ("DM", 50, "SS", 1, 20)
    assert (dm.epoch_eval_train, dm.Iteration, dm.lr_img, dm.init) == (1000, 20000, 1.0, "real")
    schedule = make_schedule(dm)
    assert [s for s in range(0, 20001, 500) if schedule.evaluates(s)] == list(range(0, 20001, 2000))
    at_the_end = make_schedule(resolve(MatchDMFlags(eval_mode="M")))
    assert [s for s in range(0, 20001, 500) if at_the_end.evaluates(s)] == [20000]


def test_default_run_folders_tell_published_commands_apart():
    def name(**changes):
        base = dict(CLoM=True, CLoM_distance="cos", models_pool=("ConvNet", "hf:a/b c"))
        return str(default_run_folder(DistillFlags(**{**base, **changes})))

    assert name() == (
        "condensed/CIFAR10/DC/"
        "ConvNet_ipc1_clom-cos-CIFAR10-ConvNet+hf-a-b-c_alpha1000_num1_epoch150"
    )
    changes = [
        dict(alphas=(0.5,)), dict(alphas=(1000.0, 0.5)), dict(alphas=(1234567.0,)),
        dict(alphas=(1234568.0,)), dict(model_num=2), dict(epoch=100), dict(CLoM_distance="ce"),
        dict(source_dataset="SVHN"), dict(models_pool=("ConvNet",)), dict(ipc=10),
        dict(method="DM"), dict(CLoM=False),
    ]  # fmt: skip
    long = dict(models_pool=tuple(f"hf:some/model-{i}" for i in range(20)))
    changes += [long, {**long, "epoch": 2}, {**long, "alphas": (7.0,)}]
    names = [name(), *(name(**change) for change in changes)]
    assert len(set(names)) == len(names)
    for path in map(Path, names):
        assert re.fullmatch(r"[A-Za-z0-9._+-]+", path.name) and len(path.name) <= 150


def test_default_strategy_mirrors_only_where_it_may(workspace):
    def mirrors(method, dataset):
        given = DistillFlags(method=method, dataset=dataset)
        return "flip" in resolve(given, keeps_meaning_mirrored(given)).dsa_strategy

    for name, dsa, dm in (("CIFAR10", True, True), ("SVHN", False, True), ("digits", False, False)):
        assert (mirrors("DSA", name), mirrors("DM", name)) == (dsa, dm)
    write_set("datasets", "mine")
    assert mirrors("DSA", "mine")
    (workspace / "datasets/mine/meta.json").write_text('{"hflip": false}')
    assert not mirrors("DSA", "mine") and not mirrors("DM", "mine")


def test_evaluation_as_published():
    plain = published_augmentation("DC", "CIFAR10", "ConvNet", "none")
    assert plain.strategy == "none"
    assert published_augmentation("DC", "MNIST", "ConvNet", "none").strategy == "crop_scale_rotate"
    older = published_augmentation("DC", "CIFAR10", "ConvNetBN", "none")
    assert (older.kind, older.strategy) == ("dc", "crop_noise")
    dsa = published_augmentation("DM", "MNIST", "ConvNet", DSA)
    assert (dsa.kind, dsa.strategy) == ("dsa", DSA)
    training = published_training(plain, None, 0.01, 256)
    # Epochs 0 to 300; the rate falls, with a fresh optimiser, after the one numbered 151.
    assert (training.epochs, training.decay_after, training.fresh) == (301, (152,), True)
    assert published_training(older, None, 0.01, 256).epochs == 1001
    assert published_training(dsa, 20, 0.01, 256).epochs == 21


@pytest.mark.parametrize("augmentation", ["dc", "dsa"])
def test_evaluation_learns_and_repeats(tiny, augmentation):
    image_set = data.load("tiny", 8, family="dc")
    real = RealImages.from_set(image_set, CPU)
    x, y = initial_images(real, (3, 8, 8), 8, "real", torch.Generator().manual_seed(0))
    strategy = {"dc": "crop_noise", "dsa": "color_scale"}[augmentation]
    scores = [
        score_network(
            network(), x, y, image_set, dc_evaluation(20, 0.01, 256),
            Augmentation(augmentation, strategy), seed=seed, device=CPU, test_every=7,
        )
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert scores[0] == scores[1] != scores[2]
    assert scores[0].final > 0.5 and scores[0].best >= scores[0].final
    assert scores[0].best_epoch in (7, 14, 21)
