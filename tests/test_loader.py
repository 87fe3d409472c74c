"""TensorLoader: what is drawn, in which order, and that a restored stream goes on unbroken."""

import io
from itertools import chain, islice

import pytest
import torch

from data.augment import normalize
from data.loader import ImagePipeline, TensorLoader, fits
from data.specs import Stats

CPU = torch.device("cpu")
STATS = Stats((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def numbered(count, size=4):
    """Image i has the value i in every pixel, and i as its target."""
    x = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, size, size)
    return x.contiguous(), torch.arange(count)


def make(count=10, batch_size=4, seed=0, targets=True, **more):
    x, y = numbered(count)
    return TensorLoader(
        x,
        y if targets else None,
        batch_size=batch_size,
        device=CPU,
        generator=torch.Generator().manual_seed(seed),
        **more,
    )


def drawn(batches):
    """Indices of each batch, read from the pixels and checked against the targets."""
    found = []
    for x, y in batches:
        assert (x == x[:, :1, :1, :1]).all()
        assert torch.equal(x[:, 0, 0, 0].long(), y)
        found.append(y.tolist())
    return found


def flat(batches):
    return list(chain.from_iterable(batches))


def test_epoch_yields_every_sample_once_in_new_order():
    loader = make()
    passes = [drawn(loader.epoch()) for _ in range(3)]
    for batches in passes:
        assert [len(b) for b in batches] == [4, 4, 2]
        assert sorted(flat(batches)) == list(range(10))
    assert passes[0] != passes[1] != passes[2]
    assert len(loader) == 3


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_forever(drop_last, sizes):
    batches = drawn(islice(make(drop_last=drop_last).forever(), 4 * len(sizes)))
    assert [len(b) for b in batches] == 4 * sizes
    passes = [flat(batches[i : i + len(sizes)]) for i in range(0, len(batches), len(sizes))]
    for one in passes:
        assert len(set(one)) == len(one) == sum(sizes)
    assert len({tuple(one) for one in passes}) == 4
    if drop_last:  # what is left out changes from pass to pass
        assert set(flat(passes)) == set(range(10))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [8, 3, 1])
def test_passes_that_end_with_a_full_batch(count, drop_last):
    """8 is a multiple of the batch; 3 and 1 are smaller than a batch: then the split is one."""
    batches = drawn(islice(make(count, drop_last=drop_last).forever(), 6))
    assert {len(b) for b in batches} == {min(count, 4)}
    step = max(1, count // 4)
    for i in range(0, 6, step):
        assert sorted(flat(batches[i : i + step])) == list(range(count))


def test_without_shuffle():
    assert drawn(make(shuffle=False).epoch()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    batches = drawn(islice(make(shuffle=False, drop_last=True).forever(), 3))
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


def test_order_comes_from_the_generator_alone():
    before = torch.get_rng_state()
    first, again = (drawn(islice(make(seed=5).forever(), 7)) for _ in range(2))
    assert first == again != drawn(islice(make(seed=6).forever(), 7))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 6, 7])  # passes end after 2 or after 3 batches
def test_restored_stream_goes_on(stop, shuffle, drop_last):
    pipeline = ImagePipeline(STATS, pad=1, hflip=True)

    def build(seed):
        x = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(9))
        return TensorLoader(
            x,
            torch.arange(10),
            batch_size=4,
            device=CPU,
            shuffle=shuffle,
            drop_last=drop_last,
            generator=torch.Generator().manual_seed(seed),
            transform=pipeline,
        )

    loader = build(1)
    stream = loader.forever()
    for _ in range(stop):
        next(stream)
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    wanted = list(islice(stream, 9))
    file.seek(0)
    other = build(2)
    if stop % 2:  # also into a loader that is itself in the middle of a pass
        next(other.forever())
    other.load_state_dict(torch.load(file, weights_only=True))
    for (x, y), (other_x, other_y) in zip(wanted, other.forever(), strict=False):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


def test_a_restored_stream_can_be_saved_again():
    loader = make(seed=1)
    list(islice(loader.forever(), 2))
    state = loader.state_dict()
    other = make(seed=2)
    other.load_state_dict(state)
    again = other.state_dict()
    assert again["position"] == state["position"]
    assert all(torch.equal(again[k], state[k]) for k in ("order_state", "generator"))


def test_a_second_call_of_forever_goes_on():
    loader, whole = make(), make()
    parts = drawn(islice(loader.forever(), 2)) + drawn(islice(loader.forever(), 5))
    assert parts == drawn(islice(whole.forever(), 7))


def test_storage_is_kept_and_targets_are_optional():
    loader = make(targets=False)
    assert loader.resident and loader.images.dtype == torch.uint8
    x, y = next(loader.epoch())
    assert torch.equal(y, x[:, 0, 0, 0].long()) and x.dtype == torch.uint8


def test_vector_targets_stay_with_their_images():
    x, y = numbered(6)
    vectors = torch.stack([y.float(), -y.float()], 1)
    loader = TensorLoader(x, vectors, batch_size=4, device=CPU, generator=torch.Generator().manual_seed(0))
    for images, targets in loader.epoch():
        assert torch.equal(targets[:, 0], images[:, 0, 0, 0].float())
        assert torch.equal(targets[:, 1], -targets[:, 0])


def test_transform_gets_the_loaders_generator():
    loader = make(transform=lambda x, g: x.float() + torch.rand(1, generator=g))
    assert {float(x.flatten()[0]) % 1 for x, _ in loader.epoch()} != {0.0}
    assert loader.images.dtype == torch.uint8


def test_batches_from_host_memory_are_the_same(monkeypatch):
    """The path for splits that do not fit into the device, on the one device there is here."""
    resident = drawn(islice(make(seed=4).forever(), 7))
    monkeypatch.setattr("data.loader.fits", lambda images, device: False)
    loader = make(seed=4)
    assert not loader.resident
    assert drawn(islice(loader.forever(), 7)) == resident


@pytest.mark.parametrize(("limit", "resident"), [(10 * 48, True), (10 * 48 - 1, False)])
def test_the_limit_counts_stored_bytes(limit, resident, monkeypatch):
    """The meta device stands for an accelerator: it has shapes and no values."""
    x, y = numbered(10)
    monkeypatch.setattr("data.loader.free_memory", lambda device: 2 * limit)
    assert fits(x, torch.device("cuda")) == resident and fits(x, CPU)
    monkeypatch.setattr("data.loader.fits", lambda images, device: resident)
    loader = TensorLoader(x, y, batch_size=4, device=torch.device("meta"), generator=torch.Generator())
    assert loader.resident == resident
    assert loader.images.device.type == ("meta" if resident else "cpu")
    assert [x.shape[0] for x, _ in loader.epoch()] == [4, 4, 2]
    assert all(x.device.type == y.device.type == "meta" for x, y in loader.epoch())


def test_bad_arguments():
    x, y = numbered(5)
    with pytest.raises(ValueError, match="5 images but 4 targets"):
        TensorLoader(x, y[:4], batch_size=2, device=CPU, generator=torch.Generator())
    with pytest.raises(ValueError, match="batch_size"):
        TensorLoader(x, y, batch_size=0, device=CPU, generator=torch.Generator())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pipeline_without_augmentation_only_normalises(dtype):
    x = torch.randint(256, (3, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    x = x.to(torch.uint8) if dtype == torch.uint8 else x / 255
    kept = x.clone()
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    out = ImagePipeline(STATS)(x, generator)
    pixels = kept.double() / (255 if dtype == torch.uint8 else 1)
    for c in range(3):
        expected = (pixels[:, c] - STATS.mean[c]) / STATS.std[c]
        torch.testing.assert_close(out[:, c].double(), expected, rtol=1e-5, atol=1e-6)
    assert out.dtype == torch.float32 and torch.equal(x, kept)
    assert torch.equal(before, generator.get_state())


def test_pipeline_pads_with_black_pixels():
    """Zero padding comes before the normalisation: white images show (0 - mean) / std outside."""
    white = torch.full((64, 3, 4, 4), 255, dtype=torch.uint8)
    out = ImagePipeline(STATS, pad=2, hflip=True)(white, torch.Generator().manual_seed(0))
    black_and_white = normalize(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1), STATS)
    for c in range(3):
        values = out[:, c].unique()
        torch.testing.assert_close(values, black_and_white[:, c, 0, 0])
    assert (out == out[:1]).all(dim=(1, 2, 3)).float().mean() < 0.5
