"""Mixup: against a naive loop, in loaders, in the pool and kernel of KRR-ST, over interruptions."""

import copy
import io

import pytest
import torch
from conftest import make_krrst, make_target, plain, write_set, write_target
from test_pool import X as IMAGES
from test_pool import Y, make_network, weights

from data.augment.mixup import mixup
from data.load import load_set
from data.loader import TensorLoader
from data.synthetic import SyntheticSet, TrainingSettings
from evaluation.fit import Trainer, pretrain, set_loader
from evaluation.recipes import PRETRAIN
from krr_st.krr_st import KRRST
from krr_st.loss import krr_loss
from krr_st.pool import ModelPool
from models import get_model
from utils.seed import local_seed, make_generator

CPU = torch.device("cpu")
VECTORS = torch.randn(9, 4, generator=torch.Generator().manual_seed(4))
PICTURES = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(3))
MIXED = PRETRAIN["krr_st"].override(steps=8, batch_size=4, mixup=True)


@pytest.fixture
def image_set(workspace):
    write_set("datasets", "tiny", train=30, test=8)
    write_target()
    return load_set("tiny", 8, "datasets")


def naive(x, y, generator):
    """One image, one entry after another in float64, with the same draws."""
    share = torch.rand(len(x), generator=generator).tolist()
    partner = torch.randperm(len(x), generator=generator).tolist()
    mixed_x, mixed_y = x.clone().double(), y.clone().double()
    for i, (part, j) in enumerate(zip(share, partner, strict=True)):
        for out, given in ((mixed_x, x), (mixed_y, y)):
            values = zip(given[i].flatten().tolist(), given[j].flatten().tolist(), strict=True)
            blended = [part * a + (1 - part) * b for a, b in values]
            out[i] = torch.tensor(blended, dtype=torch.float64).view(given[i].shape)
    return mixed_x, mixed_y


def same_draws(seed=0):
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


def test_against_a_loop():
    ours, theirs = same_draws()
    for _ in range(3):
        found, wanted = mixup(PICTURES, VECTORS, ours), naive(PICTURES, VECTORS, theirs)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    x, y = torch.randn(3, 1, 2, 2).double().requires_grad_(), torch.randn(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: mixup(*t, torch.Generator().manual_seed(1)), (x, y))


def test_shares_are_uniform():
    x, y = torch.zeros(4000, 1, 1, 1), torch.eye(2)[torch.arange(4000) % 2]
    generator = torch.Generator().manual_seed(0)
    blended = mixup(x, y, generator)[1][:, 0]
    mixed = blended[(blended > 0) & (blended < 1)]
    assert 1800 < len(mixed) < 2200  # half of the partners are of the other kind
    counts = torch.histc(mixed, 10, 0, 1)
    assert bool(((counts > 140) & (counts < 260)).all())


def test_batches_of_a_loader(image_set):
    """Those without mixup, mixed by what the loader's generator draws next."""
    given = dict(batch_size=4, device=CPU)
    ours, theirs = same_draws()
    mixed = TensorLoader(PICTURES, VECTORS, generator=ours, mix=True, **given).forever()
    whole = TensorLoader(PICTURES, VECTORS, generator=theirs, **given).forever()
    for _ in range(7):
        found, wanted = next(mixed), naive(*next(whole), theirs)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    for targets in (None, torch.arange(9)):
        with pytest.raises(ValueError, match="target vectors"):
            TensorLoader(PICTURES, targets, generator=ours, mix=True, **given)


def new_network():
    with local_seed(5):
        return get_model("convnet_4_bn", (3, 8, 8), 4)


def test_an_interrupted_training_goes_on_to_the_bit():
    synthetic = SyntheticSet(PICTURES, VECTORS)

    def trainer(seed):
        loader = set_loader(MIXED, synthetic, CPU, torch.Generator().manual_seed(seed))
        return Trainer(new_network(), loader, MIXED)

    whole, begun, other = trainer(1), trainer(1), trainer(2)
    whole.run()
    begun.run(3)
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    other.run()
    assert plain(other.model.state_dict()) == plain(whole.model.state_dict())


def test_a_set_that_asks_for_it_is_trained_so():
    recipe, asking = PRETRAIN["krr_st"].override(steps=4), TrainingSettings(mixup=True)
    assert recipe.fitted(asking).record() == {**recipe.record(), "mixup": True}
    asked = pretrain(
        new_network(),
        SyntheticSet(PICTURES, VECTORS, training=asking),
        recipe.fitted(asking),
        make_generator(0),
    )
    told = pretrain(
        new_network(), SyntheticSet(PICTURES, VECTORS), recipe.override(mixup=True), make_generator(0)
    )
    assert plain(asked.state_dict()) == plain(told.state_dict())
    without = pretrain(new_network(), SyntheticSet(PICTURES, VECTORS), recipe, make_generator(0))
    assert plain(without.state_dict()) != plain(told.state_dict())


# ------------------------------------------------------------------ KRR-ST


def make_pool(mix):
    given = dict(size=1, max_steps=9, generator=torch.Generator().manual_seed(0))
    return ModelPool(make_network, **given, seen=mix and mixup, draws=mix)


def test_a_step_of_the_pool():
    ours, theirs = same_draws()
    pool = make_pool(ours)
    net = copy.deepcopy(pool.slots[0].model)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        pool.update(pool.draw(), IMAGES, Y)
        x, y = (t.float() for t in naive(IMAGES, Y, theirs))
        optimizer.zero_grad()
        (net.train()(x) - y).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights(pool)[0], net.state_dict())
    # Networks beside the pool leave its draws alone, and are the same each time.
    before = ours.get_state()
    first, again = (pool.aged_copies(3, [0, 2], IMAGES, Y)[1].state_dict() for _ in range(2))
    assert torch.equal(ours.get_state(), before) and plain(first) == plain(again)


def test_the_kernel_sees_the_mixed_set(image_set):
    """Loss and gradients of one step by autograd through the blend, written out."""
    distiller = make_krrst(image_set, pool_mixup=True, num_models=1)
    (real, _), _ = next(make_krrst(image_set, pool_mixup=True, num_models=1).loader.forever())
    net = copy.deepcopy(distiller.pool.slots[0].model).eval()
    x, y = (t.detach().clone().requires_grad_() for t in (distiller.x_syn, distiller.y_syn))
    draws = make_generator(0, "kernel's mixup")
    share, partner = torch.rand(6, generator=draws), torch.randperm(6, generator=draws)
    matrix = torch.diag(share) + (1 - share)[:, None] * torch.eye(6)[partner]  # the blend as a linear map
    mixed = torch.einsum("ij,jchw->ichw", matrix, x), matrix @ y
    f_real = net.embed(real).detach()
    loss = krr_loss(f_real, make_target()(real), net.embed(mixed[0]), mixed[1])
    gradients = torch.autograd.grad(loss, (x, y))
    torch.testing.assert_close(distiller.step()["loss"], loss.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((distiller.x_syn.grad, distiller.y_syn.grad), gradients, rtol=2e-3, atol=1e-5)
    assert distiller.synthetic().training.mixup is True


def test_an_interrupted_distillation_goes_on_to_the_bit(image_set):
    def make(seed=0) -> KRRST:
        return make_krrst(image_set, seed=seed, pool_mixup=True)

    whole, begun, other = make(), make(), make()
    for distiller in (whole, begun):
        distiller.begin()
    for _ in range(8):
        whole.step()
    for _ in range(3):
        begun.step()
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        other.step()
    assert plain(other.state_dict()) == plain(whole.state_dict())


def test_off_it_draws_nothing(image_set):
    a, b = make_krrst(image_set), make_krrst(image_set, pool_mixup=False)
    for distiller in (a, b):
        distiller.begin()
        distiller.step()
    assert plain(a.state_dict()) == plain(b.state_dict())
    assert not any("mixup" in name for name in a.state_dict()["streams"])
    assert not a.synthetic().training
