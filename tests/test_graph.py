"""What a CUDA graph would replay computes on a CPU, bit for bit, what runs without one."""

import pytest
import torch
from conftest import make_krrst, plain, resolved, write_set

from data.load import load_set
from krr_st.setup import KRRSTSetup
from utils.errors import UserError
from utils.graph import Replayed


@pytest.fixture
def image_set(workspace):
    write_set("datasets", "tiny", train=40, test=8)  # the third batch of 16 is a small one
    return load_set("tiny", 8, "datasets")


def held(distiller):
    """The set and the networks of the pool."""
    networks = [(slot.model.state_dict(), slot.age) for slot in distiller.pool.slots]
    return plain([distiller.x_syn.detach(), distiller.y_syn.detach(), networks])


@pytest.mark.parametrize(
    "changes", [dict(), dict(outer_grad_norm=0.1, outer_opt="sgd", pool_reset="released")]
)
def test_the_same_bits_with_fixed_places(image_set, changes):
    distillers = [make_krrst(image_set, cuda_graph=g, online_iteration=3, **changes) for g in (False, True)]
    for distiller in distillers:
        distiller.begin()
    before = {id(slot.model) for slot in distillers[1].pool.slots}
    for step in range(14):
        losses = [distiller.step()["loss"] for distiller in distillers]
        assert torch.equal(*losses), step
    assert held(distillers[0]) == held(distillers[1])
    assert {id(slot.model) for slot in distillers[1].pool.slots} == before  # networks were replaced in place
    resumed = make_krrst(image_set, online_iteration=3, **changes)
    resumed.load_state_dict(distillers[1].state_dict())
    assert torch.equal(resumed.step()["loss"], distillers[1].step()["loss"])
    distillers[1].load_state_dict(resumed.state_dict())
    assert held(resumed) == held(distillers[1])
    assert torch.equal(resumed.step()["loss"], distillers[1].step()["loss"])


def test_inputs_have_places_of_their_own():
    seen = []

    def double(x):
        seen.append(x.data_ptr())
        return [2 * x]

    replayed, small, large = Replayed(double), torch.ones(2, 3), torch.ones(4, 3)
    for x in (small, 2 * small):
        assert torch.equal(replayed(x)[0], 2 * x)
    assert seen[0] == seen[1] != small.data_ptr()
    for x in (large, small, 3 * large):  # the largest batch decides; smaller ones run as they are
        assert torch.equal(replayed(x)[0], 2 * x)
    assert seen[2] == seen[4] and seen[3] == small.data_ptr()


@pytest.mark.parametrize(
    ("changes", "device", "words"),
    [
        (dict(), "cpu", "needs an NVIDIA GPU"),
        (dict(pool_mixup=True), "cuda", "--pool_mixup"),
        (dict(online_opt="adam"), "cuda", "--online_opt sgd"),
    ],
)
def test_where_it_does_not_go(changes, device, words):
    flags = resolved("krr_st", data_name="cifar10", cuda_graph=True, **changes)
    with pytest.raises(UserError, match=words):
        KRRSTSetup.check(flags, torch.device(device))


class Tape:
    """In place of utils.graph.Recorder: what it recorded is computed again into the same outputs."""

    def __init__(self, works):
        self.works, self.calls = works, []

    def aside(self, function):
        self.calls.append("aside")
        return function()

    def record(self, function):
        self.calls.append("record")
        self.function, self.outputs = function, function()
        return (self, self.outputs) if self.works else None

    def replay(self):
        self.calls.append("replay")
        for output, value in zip(self.outputs, self.function(), strict=True):
            output.copy_(value)


@pytest.mark.parametrize("works", [True, False])
def test_the_fourth_call_is_recorded(works):
    tape = Tape(works)
    replayed = Replayed(lambda x, y: (x + y, x * y), tape)
    kept = []
    for number in range(1, 7):
        x, y = torch.full((2,), float(number)), torch.ones(2)
        kept.append((x, replayed(x, y)))
    assert all(torch.equal(found[0], x + 1) and torch.equal(found[1], x) for x, found in kept)
    assert tape.calls == ["aside"] * 3 + ["record"] + ["replay"] * 3 * works


@pytest.mark.slow
def test_each_pass_is_compiled_once_for_all_networks(image_set, monkeypatch):
    """Real batches, the last and smaller ones, the set, training: each for its own size."""
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: plain_compile(f, backend="aot_eager", **how))
    torch._dynamo.reset()
    eager, compiled = make_krrst(image_set), make_krrst(image_set, compile=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    drawn = set()
    for _ in range(8):
        assert float(compiled.step()["loss"]) == pytest.approx(float(eager.step()["loss"]), rel=1e-3)
        drawn |= {n for n, slot in enumerate(compiled.pool.slots) if slot.age}
    assert len(drawn) == 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 4
