"""What a CUDA graph would replay computes on a CPU, bit for bit, what runs without one."""

import copy
import itertools
import weakref

import pytest
import torch
from conftest import CPU, make_krrst, plain, resolved, write_set
from torch import nn

from clom import dm
from data.augment.dsa import apply_drawn, diff_augment, draw_siamese
from data.load import load_set
from data.loader import TensorLoader
from data.real_data import RealImages
from distillation.problem import Problem
from evaluation.fit import Trainer
from evaluation.recipes import DSA_STRATEGY, sgd_by_epochs
from krr_st.krr_st import replays
from krr_st.setup import KRRSTSetup
from methods import METHODS
from models import get_network
from utils.device import refill
from utils.errors import UserError
from utils.graph import Replayed, Replays
from utils.seed import local_seed


@pytest.fixture
def image_set(workspace):
    write_set("datasets", "tiny", train=40, test=8)  # the third batch of 16 is a small one
    return load_set("tiny", 8, "datasets")


def held(distiller):
    """The set and the networks of the pool."""
    networks = [(slot.model.state_dict(), slot.age) for slot in distiller.pool.slots]
    return plain([distiller.x_syn.detach(), distiller.y_syn.detach(), networks])


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(outer_grad_norm=0.1, outer_opt="sgd", pool_reset="released"),
        dict(pool_mixup=True),
        dict(views=4, blend=True, hybrid=True, view_batch=10),
    ],
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
    [(dict(), "cpu", "needs an NVIDIA GPU"), (dict(online_opt="adam"), "cuda", "--online_opt sgd")],
)
def test_where_it_does_not_go(changes, device, words):
    flags = resolved("krr_st", data_name="cifar10", cuda_graph=True, **changes)
    with pytest.raises(UserError, match=words):
        KRRSTSetup.check(flags, torch.device(device))


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        (dict(), "cuda", True),
        (dict(), "cpu", False),
        (dict(cuda_graph=False), "cuda", False),
        (dict(views=2), "cuda", True),
        (dict(online_opt="adam"), "cuda", False),
    ],
)
def test_by_default_wherever_it_is_possible(changes, device, expected):
    assert replays(resolved("krr_st", data_name="cifar10", **changes), torch.device(device)) == expected


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


def matching(image_set, name, replays, **changes):
    """DC, DSA or DM on the CPU, with or without fixed places."""
    usual = dict(dataset="tiny", ipc=2, batch_real=9, batch_train=6, outer_loop=2, inner_loop=1, lr_img=1.0)
    problem = Problem(image_set, CPU, 0, real=RealImages.from_set(image_set, CPU))
    distiller = METHODS[name].distiller(problem, resolved(name, **{**usual, **changes}))
    assert distiller.replays is None  # by itself on CUDA alone
    distiller.replays = Replays(CPU) if replays else None
    return distiller


@pytest.mark.parametrize("model", ["ConvNetD1", "ConvNetBN"])
@pytest.mark.parametrize("name", ["dc", "dsa", "dm"])
def test_matching_is_the_same_with_fixed_places(workspace, monkeypatch, name, model):
    """Of 9 real images a class, or of 10 and 9: classes with fewer run as they are."""
    write_set("datasets", "ragged", train=38, test=8)
    image_set = load_set("ragged", 8, "datasets")
    monkeypatch.setattr(dm, "REAL_HELD", 1)  # class by class, as where passes are replayed
    for batch_real in (9, 100):
        kinds = [matching(image_set, name, r, batch_real=batch_real, model=model) for r in (False, True)]
        networks = set()
        for step in range(2):
            losses = [distiller.step()["loss"] for distiller in kinds]
            assert torch.equal(*losses), step
            assert torch.equal(*(distiller.x_syn for distiller in kinds)), step
            networks.add(id(kinds[1]._network))
        assert len(networks) == 1
        recorded = kinds[1].replays._found
        augmented = {"none"} if name == "dc" else set(DSA_STRATEGY.split("_"))
        sizes = {6, 2} if name != "dm" else set()  # of the batches of 8 images in training
        together = name == "dm" and model == "ConvNetBN"
        assert set(recorded) <= (set() if together else augmented | sizes)
        assert together or len(recorded) > len(sizes)


def test_a_network_takes_the_place_of_another():
    for name in ("ConvNetBN", "ConvNetD1", "MLP"):
        first, second = (get_network(name, 3, 4, (8, 8)).to(memory_format=torch.channels_last) for _ in "ab")
        second(torch.randn(4, 3, 8, 8))  # moves its statistics
        places = [t.data_ptr() for t in first.state_dict().values()]
        refill(first, second)
        assert places == [t.data_ptr() for t in first.state_dict().values()]
        assert plain(first.state_dict()) == plain(second.state_dict())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_is_the_same_with_fixed_places(optimizer):
    """Rates that fall, momenta that are forgotten, a small last batch, a resume."""
    x, y = torch.randn(10, 2, generator=torch.Generator().manual_seed(0)).double(), torch.arange(10) % 2
    recipe = sgd_by_epochs(6, 0.1, 0.9, 1e-3, 4, (2, 4)).override(fresh_momentum=True, optimizer=optimizer)

    def trainer(replays):
        with local_seed(0):
            model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
        draws = torch.Generator().manual_seed(0)
        made = Trainer(model, TensorLoader(x, y, batch_size=4, device=CPU, generator=draws), recipe)
        made.replays = Replays(CPU) if replays else None
        return made

    def rest(made, until=None):
        losses = []
        made.run(until, on_step=lambda step, loss, rate: losses.extend([float(loss), rate]))
        return losses

    plain_one, fixed = trainer(False), trainer(True)
    wanted = rest(plain_one)
    assert rest(fixed, 8) == pytest.approx(wanted[:16], rel=1e-5)
    resumed = trainer(True)
    rest(resumed, 5)
    resumed.load_state_dict(copy.deepcopy(fixed.state_dict()))
    resumed.replays = Replays(CPU)  # by itself it has none on a CPU
    assert rest(fixed) == rest(resumed) == pytest.approx(wanted[16:], rel=1e-5)
    assert [len(r._inputs[0]) for r in fixed.replays._found.values()] == [4, 2]
    if optimizer == "sgd":  # AdamW's decay on a CPU is in double precision
        assert plain(fixed.model.state_dict()) == plain(plain_one.model.state_dict())
    kept = weakref.ref(fixed.replays)
    del fixed
    assert kept() is None  # what was recorded, and its memory, goes with the trainer


@pytest.mark.parametrize("name", DSA_STRATEGY.split("_"))
def test_what_was_drawn_before_is_applied_as_ever(name):
    for align_corners, seed in itertools.product((False, True), range(5)):
        x = torch.randn(20, 3, 8, 12)
        drawn, values = draw_siamese(name, seed, x.shape[1:])
        found = apply_drawn(x, drawn, values, align_corners)
        wanted = diff_augment(x, name, seed=seed, siamese=True, align_corners=align_corners)
        assert drawn == name and torch.equal(found, wanted)
    assert apply_drawn(x, *draw_siamese("None", 0, x.shape[1:]), False) is x
