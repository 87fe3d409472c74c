"""What has to hold on CUDA, against float64 on the CPU. Run with -m gpu."""

import copy
import itertools

import pytest
import torch
from test_fused import block, compare
from test_twice import NORMS, derivatives, pair

from benchmarks import krr_st as bench
from benchmarks.clom import random_set, sides
from clom.loss import clom_cosine
from clom.matching import gradient_distance
from clom.source import network_factory
from data.augment.dc import dc_augment
from data.augment.dsa import diff_augment
from data.loader import TensorLoader, ViewPipeline
from data.specs import Stats
from data.synthetic.views import ViewFlags
from evaluation.fit import Trainer
from evaluation.recipes import sgd_by_epochs
from krr_st.loss import krr_loss
from krr_st.views import OnlineTargets, TargetViews
from models import get_model
from utils.device import place
from utils.precision import autocast, float32_mode
from utils.seed import local_seed

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STATS = Stats((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


@pytest.fixture(autouse=True, scope="session")
def cuda():
    if not torch.cuda.is_available():
        pytest.exit("these tests need CUDA, which is not available here", 2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_krr_loss_and_gradients():
    """m, b, d, D of the published CIFAR-100 setting, a quarter of each."""
    f_real, y_real = draw(256, 2048), draw(256, 128, seed=1)
    exact = [draw(250, 2048, seed=2).requires_grad_(), draw(250, 128, seed=3).requires_grad_()]
    wanted = krr_loss(f_real, y_real, *exact)
    wanted.backward()
    ours = [t.detach().float().to(CUDA).requires_grad_() for t in exact]
    loss = krr_loss(f_real.float().to(CUDA), y_real.float().to(CUDA), *ours)
    loss.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)
    for a, b in zip(ours, exact, strict=True):
        assert (a.grad.cpu().double() - b.grad).norm() < 1e-3 * b.grad.norm()


def features(name, precision):
    with local_seed(0):
        model = get_model(name, (3, 32, 32), 10).eval().requires_grad_(False)
    x = draw(32, 3, 32, 32)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double().embed(x)
        with float32_mode(precision), autocast(precision, CUDA):
            found = place(model, CUDA).embed(x.float().to(CUDA))
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["convnet_128_256_512_bn", "resnet18", "vgg", "mobilenet"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("tf32", 5e-3), ("bf16", 5e-2)])
def test_networks(name, precision, bound):
    assert features(name, precision) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [128, 136])
@pytest.mark.parametrize("images", [False, True])
def test_fused_layers(dtype, bound, training, channels, images):
    """Bounds for gradients that ReLU cuts off at other places."""
    if images and dtype == torch.float32:
        pytest.skip("the first block's kernels are for bf16")
    x = 1 + draw(64, 3, 32, 32).float()
    with float32_mode("fp32"):
        apart = compare(block(channels).to(CUDA), training, dtype, x.to(CUDA), images)
    assert max(apart.values()) < bound, apart


def test_an_outer_step_of_both_forms():
    parts = bench.make_parts(64, 256, CUDA)
    with float32_mode("fp32"):
        assert max(bench.differences(parts, 128, CUDA).values()) < 2e-2


def test_bf16_gradients_point_the_same_way():
    parts = bench.make_parts(64, 256, CUDA)
    grads = {}
    for precision in ("fp32", "bf16"):
        distiller = bench.our_side(parts, 128, CUDA, precision=precision, table=False)
        with float32_mode(precision):
            distiller.step()
        grads[precision] = distiller.x_syn.grad.flatten()
    assert torch.cosine_similarity(grads["fp32"], grads["bf16"], dim=0) > 0.9


def test_target_views_lookup_and_fill():
    images = (draw(20, 3, 32, 32).sigmoid() * 255).to(torch.uint8)
    model = place(get_model("convnet_8_bn", (3, 32, 32), 4), CUDA).eval().requires_grad_(False)

    def target(x):
        with torch.no_grad():
            return model(x)

    loader = TensorLoader(
        images,
        None,
        batch_size=16,
        device=CUDA,
        generator=torch.Generator().manual_seed(0),
        transform=ViewPipeline(STATS, pad=4, hflip=True),
        drop_last=True,
    ).forever()
    tables = [TargetViews(target, torch.empty(20 * 162, 4, device=CUDA), 162) for _ in range(2)]
    on_host = TargetViews(target, torch.empty(20 * 162, 4), 162)
    with float32_mode("fp32"):
        tables[0].fill(images, STATS, 4, CUDA)
        for _ in range(20):
            (x, view), index = next(loader)
            batch = x, index, view
            wanted = OnlineTargets(target)(*batch)
            for table in (*tables, on_host):
                torch.testing.assert_close(table(*batch), wanted, rtol=1e-3, atol=1e-4)


def test_hybrid_views_of_a_set():
    """Images and their gradient, those of the CPU."""
    views = ViewFlags(6, True, True).draw(10, 32, True, 0)
    found = []
    for device in (CPU, CUDA):
        x = draw(10, 3, 32, 32).float().to(device).requires_grad_()
        with float32_mode("fp32"):
            seen = views.images(x, STATS)
            seen.square().mean().backward()
        found.append((seen.detach().cpu(), x.grad.cpu()))
    for wanted, ours in zip(*found, strict=True):
        assert (ours - wanted).norm() < 1e-5 * wanted.norm()


HYBRID = dict(views=4, blend=True, hybrid=True, view_batch=48)


@pytest.mark.parametrize("more", [dict(), dict(pool_mixup=True), HYBRID])
def test_a_replayed_step_is_the_same(more):
    parts, losses = bench.make_parts(32, 200, CUDA), []  # every fourth batch is a small one
    with float32_mode("fp32"):
        for graph in (False, True):
            distiller = bench.our_side(
                parts, 64, CUDA, precision="fp32", table=True, cuda_graph=graph, **more
            )
            distiller.pool.max_steps = 6  # its network is replaced in place
            losses.append([float(distiller.step()["loss"]) for _ in range(16)])
    assert [r.recorded is not None for r in distiller.pool.slots[0].replays.values()] == [True, True]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def three_steps_without_waiting(distiller):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            distiller.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("graph", "more"), [(False, dict()), (True, dict()), (True, HYBRID)])
def test_a_step_does_not_wait_for_the_device(graph, more):
    parts = bench.make_parts(32, 1024, CUDA)
    distiller = bench.our_side(parts, 64, CUDA, precision="bf16", table=True, cuda_graph=graph, **more)
    for _ in range(6):  # a first pass, the first order of the data and a recording may wait
        distiller.step()
    three_steps_without_waiting(distiller)


def matching(method, model, replays=True):
    """A distiller on 24 random images a class, 16 of them a batch."""
    images = random_set(24, 10, 16)
    _, ours = sides(method, 2, images, CUDA, model=model, batch_real=16, outer=2, inner=4)
    if not replays:
        ours.replays, ours.new_network = None, network_factory(model, images, CUDA)
    return ours


@pytest.mark.parametrize("model", ["ConvNetW32", "ConvNetBN", "MLP"])
@pytest.mark.parametrize("method", ["DC", "DSA", "DM"])
def test_replayed_matching_is_the_same(method, model):
    kinds = [matching(method, model, replays) for replays in (False, True)]
    assert kinds[1].replays is not None
    with float32_mode("fp32"):
        for _ in range(10):
            kinds[0].x_syn.data.copy_(kinds[1].x_syn)  # rounding does not add up
            losses = [float(distiller.step()["loss"]) for distiller in kinds]
            assert losses[1] == pytest.approx(losses[0], rel=2e-3)
            moved = [distiller.x_syn.detach() for distiller in kinds]
            assert (moved[1] - moved[0]).norm() < 1e-2 * moved[0].norm()
    recorded = [replayed.recorded is not None for replayed in kinds[1].replays._found.values()]
    together = method == "DM" and model == "ConvNetBN"
    assert all(recorded) and len(recorded) == {"DC": 2, "DSA": 7, "DM": 0 if together else 6}[method]


@pytest.mark.parametrize("method", ["DC", "DSA", "DM"])
def test_matching_does_not_wait_for_the_device(method):
    distiller = matching(method, "ConvNetW32")
    for _ in range(12):  # until every operation is recorded
        distiller.step()
    three_steps_without_waiting(distiller)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_replayed_training_is_the_same(optimizer, dropout):
    """Rates that fall, momenta that are forgotten, a small last batch; dropout goes on drawing."""
    x, y = draw(40, 3, 16, 16).float().to(CUDA), torch.arange(40) % 4
    recipe = sgd_by_epochs(16, 0.01, 0.9, 1e-3, 32, (6, 10)).override(
        fresh_momentum=True, optimizer=optimizer, lr=0.01 if optimizer == "sgd" else 1e-3
    )
    traces = []
    for replays in (False, True):
        with local_seed(0):
            network = get_model("convnet_32_32_bn", (3, 16, 16), 4, dropout=dropout)
        draws = torch.Generator().manual_seed(0)
        loader = TensorLoader(x, y, batch_size=32, device=CUDA, generator=draws)
        trainer, trace = Trainer(place(network, CUDA), loader, recipe), []
        assert trainer.replays is not None
        trainer.replays = trainer.replays if replays else None
        given = dict(on_step=lambda step, loss, rate, log=trace: log.append(float(loss)))
        with float32_mode("fp32"), local_seed(1):
            trainer.run(20, **given)
            trainer.run(**given)
        traces.append(trace)
    assert [r.recorded is not None for r in trainer.replays._found.values()] == [True, True]
    assert len(set(traces[1])) == 32
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(recipe.lr / 100)
    if not dropout:
        assert traces[1] == pytest.approx(traces[0], rel=2e-2, abs=1e-3)


def test_images_that_do_not_fit_come_through_pinned_memory(monkeypatch):
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 4, 4).contiguous()

    def batches(device):
        loader = TensorLoader(
            images, torch.arange(40), batch_size=8, device=device, generator=torch.Generator().manual_seed(0)
        )
        return [(x.cpu(), y.cpu()) for _ in range(3) for x, y in loader.epoch()]

    wanted = batches(CPU)
    monkeypatch.setattr("data.loader.fits", lambda images, device: False)
    for ours, theirs in zip(batches(CUDA), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_second_derivatives_of_norms(name):
    exact, ours = pair(name)
    x = 1 + draw(16, 3, 8, 8, seed=1)
    wanted = derivatives(exact, x.clone().requires_grad_())
    found = derivatives(ours.float().to(CUDA), x.float().to(CUDA).requires_grad_())
    for a, b in zip(itertools.chain(*found), itertools.chain(*wanted), strict=True):
        assert (a.cpu().double() - b).norm() < 1e-3 * b.norm()


def test_clom_losses():
    f_real, f_syn = draw(64, 32), draw(20, 32, seed=1)
    y_real, y_syn = torch.arange(64) % 4, torch.arange(20) % 4
    wanted = clom_cosine(f_real, y_real, f_syn, y_syn)
    found = clom_cosine(*(t.to(CUDA) for t in (f_real.float(), y_real, f_syn.float(), y_syn)))
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)
    grads = [draw(8, 3, 3, 3), draw(8), draw(10, 128)]
    others = [draw(*g.shape, seed=5) for g in grads]
    for metric in ("ours", "mse", "cos"):
        wanted = gradient_distance(grads, others, metric)
        found = gradient_distance(*([g.float().to(CUDA) for g in side] for side in (grads, others)), metric)
        assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_dsa_draws_the_same_on_both_devices():
    x = draw(16, 3, 32, 32).float()
    strategy = "color_crop_cutout_flip_scale_rotate"
    ours, wanted = (
        diff_augment(x.to(device), strategy, generator=torch.Generator().manual_seed(3)).cpu()
        for device in (CUDA, CPU)
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_the_older_augmentation_draws_the_same_on_both_devices():
    x = draw(64, 1, 28, 28).float()
    ours, wanted = (
        dc_augment(x.to(device), "crop_scale_rotate_noise", torch.Generator().manual_seed(3)).cpu()
        for device in (CUDA, CPU)
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
