"""Values in few bits, and blended views that a seed stands for: by naive arithmetic on Python's integers."""

import itertools

import numpy as np
import pytest
import safetensors.torch
import torch
from test_compact import STATS, store

from data.synthetic import SyntheticSet, TrainingSettings, save_compact
from data.synthetic.compact import CompactFlags, images_within
from data.synthetic.levels import pack_bits, share_bits, unpack_bits
from data.synthetic.views import ViewFlags
from data.target_scale import TargetScale


def errors_of(t, total):
    (levels, slope, low), bits = share_bits(t, total)
    assert int(bits.sum()) == total and bool((levels < 2**bits).all())
    return (levels * slope + low - t).square().sum(0), bits


def test_no_other_sharing_of_bits_loses_less():
    scales = torch.tensor([5.0, 0.2, 1.0], dtype=torch.float64)
    t = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scales + 7
    alone = [[float(errors_of(t[:, i : i + 1], bits)[0]) for bits in range(9)] for i in range(3)]
    for total in (0, 1, 4, 7, 13, 24):
        shares = [s for s in itertools.product(range(9), repeat=3) if sum(s) == total]
        least = min(sum(alone[i][b] for i, b in enumerate(share)) for share in shares)
        errors, bits = errors_of(t, total)
        np.testing.assert_allclose(float(errors.sum()), least, rtol=1e-9)
        if total == 7:
            assert bits[0] > bits[2] > bits[1]


@pytest.mark.parametrize("bits, distortion", [(0, 1.0), (1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_a_normal_distribution_loses_what_the_best_uniform_quantiser_does(bits, distortion):
    """Max, "Quantizing for minimum distortion", 1960, table II."""
    t = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors, _ = errors_of(t, bits)
    assert float(errors) / float(t.sub(t.mean()).square().sum()) == pytest.approx(distortion, rel=0.02)


@pytest.mark.parametrize("bits", [[3, 0, 8, 1, 5], [8], [1, 1], [0, 4, 4, 0]])
def test_rows_are_strings_of_bits(bits):
    generator = torch.Generator().manual_seed(2)
    levels = torch.stack([torch.randint(2**b, (6,), generator=generator) for b in bits], 1).byte()
    packed = pack_bits(levels, torch.tensor(bits))
    assert packed.shape == (6, -(-sum(bits) // 8))
    for row, stored in zip(levels.tolist(), packed.tolist(), strict=True):
        number = sum(v << sum(bits[:i]) for i, v in enumerate(row))
        assert int.from_bytes(bytes(stored), "little") == number
    assert torch.equal(unpack_bits(packed, torch.tensor(bits).byte()), levels)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("spread", [0, 3])
def test_target_vectors_in_few_bits(tmp_path, rank, spread):
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(40, *shape, generator=generator) for shape in ((3, 8, 8), (20,)))
    y[:, 10:] = y[:, :10] + y[:, 10:] / 9
    unit = torch.logspace(-1, spread - 1, 20) if spread else torch.ones(20)
    training = TrainingSettings(targets=TargetScale(torch.zeros(20), unit)) if spread else TrainingSettings()
    s = SyntheticSet(x, y * unit, STATS, training=training)
    stored, again = store(s, tmp_path / "a.safetensors", y_rank=rank, y_bits=21)
    bits, slope, low = stored["y.bits"].tolist(), *stored["y.map"].double().numpy()
    rows = stored["y" if rank is None else "y.left"]
    assert sum(bits) == 21 and rows.shape == (40, 3)
    rows = [int.from_bytes(bytes(row), "little") for row in rows.tolist()]
    levels = np.array([[n >> sum(bits[:i]) & 2**b - 1 for i, b in enumerate(bits)] for n in rows])
    found = slope * levels + low
    exact = y.double().numpy()  # in the unit that errors count in
    if rank is not None:
        assert stored["y.right"].dtype == torch.int8
        mean, right = (stored[f"y.{name}"].double().numpy() for name in ("mean", "right"))
        found = mean + found @ right * stored["y.unit"].double().numpy()
        left, spectrum, right = np.linalg.svd(exact - exact.mean(0), full_matrices=False)
        coefficients = left[:, :rank] * spectrum[:rank]
        exact = exact.mean(0) + coefficients @ right[:rank]
    np.testing.assert_allclose(again.targets, found, rtol=1e-4, atol=1e-4)
    # What is lost is what the bits lose, of the best coefficients in exact directions, and no more.
    t = torch.from_numpy(exact if rank is None else coefficients)
    lost = np.square(again.targets.double().numpy() / unit.double().numpy() - exact).sum()
    assert lost == pytest.approx(float(errors_of(t, 21)[0].sum()), rel=0.02)


def test_directions_without_bits_are_not_stored(tmp_path):
    generator = torch.Generator().manual_seed(4)
    s = SyntheticSet(torch.randn(40, 3, 8, 8, generator=generator), torch.randn(40, 20, generator=generator))
    stored, _ = store(s, tmp_path / "a.safetensors", x_dtype="uint8", y_rank=18, y_bits=8)
    count = len(stored["y.bits"])
    assert count <= 8 and min(stored["y.bits"]) > 0 and stored["y.right"].shape == (count, 20)
    taken = sum(t.nbytes for t in stored.values())
    how = CompactFlags(x_dtype="uint8", y_rank=18, y_bits=8)
    # All eight directions that a bit might go to are counted: 20 + 8 + 1 bytes each.
    assert images_within(taken + (8 - count) * 29, (3, 8, 8), 20, how, ViewFlags()) == 40


def twister(seed):
    """Numbers of MT19937: Matsumoto and Nishimura, 1998, seeded as in their version of 2002."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) % 2**32)
    while True:
        for i in range(624):
            mixed = state[i] & 0x80000000 | state[(i + 1) % 624] & 0x7FFFFFFF
            state[i] = state[(i + 397) % 624] ^ mixed >> 1 ^ (0x9908B0DF if mixed & 1 else 0)
            y = state[i]
            y ^= y >> 11
            y ^= y << 7 & 0x9D2C5680
            y ^= y << 15 & 0xEFC60000
            yield y ^ y >> 18


@pytest.mark.parametrize("hybrid", [True, None])
@pytest.mark.parametrize("hflip, known", [(True, 18), (False, 9)])
def test_blends_follow_from_their_seed_for_ever(tmp_path, hybrid, hflip, known):
    views = ViewFlags(30, True, hybrid).draw(7, 8, hflip, seed=2**40 + 12345)
    stream = twister(12345)

    def table(limit):
        return [[next(stream) % limit for _ in range(29)] for _ in range(7)]

    own, theirs, others, shares = table(known), table(known), table(6), table(256)
    assert views.numbers.tolist() == [[4, *row] for row in own]
    assert views.partner_views.tolist() == [[4, *row] for row in theirs]
    assert views.partners.tolist() == [[i, *((i + 1 + n) % 7 for n in row)] for i, row in enumerate(others)]
    assert views.shares.tolist() == [[255, *row] for row in shares]
    assert (views.cutoffs is None) == (hybrid is None)
    assert hybrid is None or views.cutoffs.tolist() == [[255, *row] for row in table(256)]
    x = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = SyntheticSet(views.images(x, STATS), torch.randn(210, 4), STATS, views=views)
    for kept in (30, 11):
        save_compact(whole.first_views(kept), path := tmp_path / "a.safetensors", CompactFlags())
        stored, again = safetensors.torch.load_file(path), SyntheticSet.load(path)
        assert stored["x.drawn"].tolist() == [kept, 12345, 30, hflip, bool(hybrid)]
        assert set(stored) == {"x", "x.drawn", "y"} and again.views.drawn == views.drawn
        for name in ("numbers", "partners", "partner_views", "shares"):
            assert torch.equal(getattr(again.views, name), getattr(views, name)[:, :kept])
