"""The model pool: ages, replacement under both reset policies, reproducibility, resuming."""

import io
from collections import Counter

import pytest
import torch

from krr_st.pool import ModelPool
from models import get_model
from utils.errors import UserError
from utils.seed import local_seed

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
BUILT = []  # every network made, in order
TAKEN = Counter()  # id of a network -> optimiser steps it has really taken


def make_model(seed):
    with local_seed(seed):
        model = get_model("convnet_3_bn", (3, 8, 8), 4)
    BUILT.append(model)  # kept alive, so that ids stay unique
    return model


def make_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: TAKEN.update([id(model)]))
    return optimizer


def make_network(seed):
    model = make_model(seed)
    return model, make_optimizer(model)


def make_pool(size=2, max_steps=3, seed=0, reset="paper"):
    BUILT.clear()
    TAKEN.clear()
    return ModelPool(
        make_network,
        size=size,
        max_steps=max_steps,
        generator=torch.Generator().manual_seed(seed),
        reset=reset,
    )


def advance(pool, count):
    for _ in range(count):
        pool.update(pool.draw(), X, Y)


def weights(pool):
    return [{k: v.clone() for k, v in s.model.state_dict().items()} for s in pool.slots]


def same(first, second):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(first, second, strict=True)
    )


def lifecycle(reset, visits):
    """(age, steps the network really took, networks built) after each visit of a pool of one."""
    pool = make_pool(size=1, max_steps=3, reset=reset)
    trace = []
    for _ in range(visits):
        slot = pool.draw()
        pool.update(slot, X, Y)
        trace.append((slot.age, TAKEN[id(slot.model)], len(BUILT)))
    return trace


def test_lifecycle_of_the_paper():
    life = [(1, 1), (2, 2), (3, 3), (0, 0)]  # T steps, then a fresh network of age 0, and again
    expected = [(age, taken, 1 + (i + 1) // 4) for i, (age, taken) in enumerate(3 * life)]
    assert lifecycle("paper", 12) == expected


def test_lifecycle_as_released():
    """The counter is never set back: from T on, every visit throws the network away."""
    expected = [(1, 1, 1), (2, 2, 1), (3, 3, 1), (3, 0, 2), (3, 0, 3), (3, 0, 4), (3, 0, 5)]
    assert lifecycle("released", 7) == expected


def test_age_is_the_steps_taken_in_a_large_pool():
    pool = make_pool(size=3, max_steps=4)
    pool.warm_up(X, Y)
    for _ in range(60):
        slot = pool.draw()
        before = slot.age
        pool.update(slot, X, Y)
        assert slot.age == (0 if before == 4 else before + 1)
        assert all(s.age == TAKEN[id(s.model)] <= 4 for s in pool.slots)
    assert len(BUILT) > 6  # the pool was renewed more than once


def test_warm_up_ages():
    pool = make_pool(size=24, max_steps=4)
    assert all(s.age == 0 for s in pool.slots)
    pool.warm_up(X, Y)
    ages = [s.age for s in pool.slots]
    assert set(ages) == {1, 2, 3}
    assert ages == [TAKEN[id(s.model)] for s in pool.slots]


@pytest.mark.parametrize("max_steps", [1, 2])
def test_warm_up_of_a_short_life(max_steps):
    pool = make_pool(size=3, max_steps=max_steps)
    pool.warm_up(X, Y)
    assert [s.age for s in pool.slots] == [1, 1, 1]
    advance(pool, 6)


def test_draw_freezes_and_update_trains():
    pool = make_pool(size=1)
    slot = pool.draw()
    assert not any(m.training for m in slot.model.modules())
    assert not any(p.requires_grad for p in slot.model.parameters())
    before = weights(pool)[0]
    slot.model(X)
    assert same([before], weights(pool))  # running statistics included
    pool.update(slot, X, Y)
    after = weights(pool)[0]
    trained = dict(slot.model.named_parameters())
    unused_bias = {n for n in trained if n.endswith("block.0.bias")}  # BatchNorm takes it out
    assert all(not torch.equal(before[n], after[n]) for n in trained if n not in unused_bias)
    assert any(
        "running_mean" in n and not torch.equal(before[n], after[n]) for n in before
    )  # a step in train mode
    assert not pool.draw().model.training


def test_update_minimises_the_mean_squared_error_on_the_whole_set():
    pool = make_pool(size=1)
    copy = get_model("convnet_3_bn", (3, 8, 8), 4)
    copy.load_state_dict(pool.slots[0].model.state_dict())
    pool.update(pool.draw(), X, Y)
    difference = copy(X) - Y
    (difference.pow(2).sum() / Y.numel()).backward()
    for ours, p in zip(pool.slots[0].model.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), p.detach() - 0.05 * p.grad)


def test_draws_are_uniform():
    pool = make_pool(size=4)
    drawn = Counter(pool.slots.index(pool.draw()) for _ in range(4000))
    assert all(850 < drawn[i] < 1150 for i in range(4))


def test_fresh_networks_differ():
    pool = make_pool(size=3, max_steps=1)
    first = weights(pool)
    advance(pool, 12)
    everyone = [*first, *(m.state_dict() for m in BUILT[3:])]
    kernels = [w["layers.0.block.0.weight"] for w in everyone]
    assert len(kernels) > 5
    for i, a in enumerate(kernels):
        assert not any(torch.equal(a, b) for b in kernels[:i])


def test_same_generator_same_pool():
    runs = []
    for seed in (0, 0, 1):
        pool = make_pool(seed=seed)
        pool.warm_up(X, Y)
        picks = []
        for _ in range(12):
            slot = pool.draw()
            picks.append(pool.slots.index(slot))
            pool.update(slot, X, Y)
        runs.append((picks, weights(pool)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0] and not same(runs[0][1], runs[2][1])


@pytest.mark.parametrize("reset", ["paper", "released"])
@pytest.mark.parametrize("stop", [2, 7])
def test_saved_and_restored_is_never_stopped(reset, stop):
    pool = make_pool(reset=reset)
    pool.warm_up(X, Y)
    advance(pool, stop)
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    advance(pool, 11)
    file.seek(0)
    other = make_pool(seed=99, reset=reset)
    other.load_state_dict(torch.load(file, weights_only=True))
    advance(other, 11)
    assert [s.age for s in pool.slots] == [s.age for s in other.slots]
    assert same(weights(pool), weights(other))
    assert torch.equal(pool.generator.get_state(), other.generator.get_state())


def test_state_of_another_size_is_refused():
    with pytest.raises(ValueError):
        make_pool(size=2).load_state_dict(make_pool(size=3).state_dict())


def test_global_random_state_stays():
    before = torch.get_rng_state()
    pool = make_pool(max_steps=1)
    pool.warm_up(X, Y)
    advance(pool, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_policy_lists_the_known_ones():
    with pytest.raises(UserError, match="paper, released"):
        make_pool(reset="sometimes")
