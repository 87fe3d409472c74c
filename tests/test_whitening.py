"""Whitening against its definition, and its way with a synthetic set through files and evaluations."""

import dataclasses

import pytest
import torch
from conftest import CPU, NET, write_set

from clom.source import to_space
from data.augment import normalize
from data.load import load_set
from data.specs import Stats
from data.synthetic import FORMS, SyntheticSet, TrainingSettings
from data.synthetic.training import TRAINING_FILE, write_safetensors
from data.whitening import RIDGE, Whitening
from evaluation.fit import pretrain
from evaluation.recipes import PRETRAIN
from evaluation.score import score_network
from models import get_model
from utils.errors import UserError
from utils.seed import local_seed, make_generator

STATS = Stats((0.5, 0.4, 0.45), (0.25, 0.2, 0.22))


@pytest.fixture(scope="module")
def images():
    """Smooth random pictures: neighbouring pixels are correlated."""
    noise = torch.rand(3000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    return ((0.2 * noise + 0.8 * blurred) * 255).round().byte()


def covariance(x):
    x = x.flatten(1).double()
    x = x - x.mean(0)
    return x.mT @ x / (len(x) - 1)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_map_is_zca_with_a_ridge(images, normalized):
    """In closed form: the covariance S becomes S / (S + ridge), along the same directions."""
    found = Whitening.fit(images, STATS, CPU, normalized)
    x = normalize(images, STATS).double()
    pixels = x if normalized else images.double() / 255
    values, vectors = torch.linalg.eigh(covariance(pixels))
    wanted = (vectors * (values / (values + RIDGE))) @ vectors.mT
    z = found(x.float())
    assert z.dtype == torch.float32 and z.shape == x.shape
    torch.testing.assert_close(covariance(z), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, 4, 4), rtol=0, atol=1e-5)
    flat = (pixels - pixels.mean(0)).flatten(1)
    by_hand = flat @ (vectors * (values + RIDGE).rsqrt()) @ vectors.mT
    torch.testing.assert_close(z.flatten(1).double(), by_hand, rtol=0, atol=2e-5)


def test_without_much_ridge_the_covariance_is_the_identity(images, monkeypatch):
    monkeypatch.setattr("data.whitening.RIDGE", 1e-9)
    z = Whitening.fit(images, STATS, CPU)(normalize(images, STATS))
    torch.testing.assert_close(covariance(z).float(), torch.eye(48), rtol=0, atol=1e-3)


def test_undo_is_exact(images):
    found = Whitening.fit(images, STATS, CPU)
    x = normalize(images[:50], STATS)
    torch.testing.assert_close(found.undo(found(x)), x, rtol=0, atol=2e-6)
    z = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found(found.undo(z)), z, rtol=0, atol=2e-6)


def test_float_images_and_chunks_make_no_difference(images, monkeypatch):
    whole = Whitening.fit(images, STATS, CPU)
    monkeypatch.setattr("data.whitening._ROWS", 700)
    parts = Whitening.fit(images.float() / 255, STATS, CPU)
    torch.testing.assert_close(parts.matrix, whole.matrix, rtol=1e-4, atol=1e-5)


def test_too_large_images_are_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr("data.whitening.free_memory", lambda device: 10**6)
    with pytest.raises(UserError, match=r"--zca: whitening 12288 values .* --no-zca"):
        Whitening.fit(torch.zeros(2, 3, 64, 64), STATS, CPU)


def test_other_statistics_of_the_same_pictures(images):
    """A set that is brought into another space keeps its whitened images."""
    found, other = Whitening.fit(images, STATS, CPU), Stats((0.0,) * 3, (1.0,) * 3)
    synthetic = SyntheticSet(
        normalize(images[:6], STATS), torch.arange(6), STATS, training=TrainingSettings(whitening=found)
    )
    moved = to_space(synthetic, other)
    z = moved.training.whitening(moved.images)
    torch.testing.assert_close(z, found(synthetic.images), rtol=0, atol=1e-5)


# ------------------------------------------------------------------ with a synthetic set


def made(pictures, **changes):
    training = TrainingSettings(0.02, "flip", Whitening.fit(pictures, STATS, CPU))
    x = normalize(pictures[:4], STATS)
    synthetic = SyntheticSet(x, torch.tensor([0, 0, 1, 2]), STATS, "tiny", {"method": "x"}, training)
    return dataclasses.replace(synthetic, **changes)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_how_to_train(images, tmp_path, form):
    one_file = dict.fromkeys(("safetensors", "compact"), "set.safetensors")
    names = {"res": "res_X.pt", "npz": "set.npz", **one_file}
    path, synthetic = tmp_path / names.get(form, "set"), made(images)
    synthetic.save(path, form)
    again = SyntheticSet.load(path)
    assert again.training.record() == synthetic.training.record()
    assert torch.equal(again.training.whitening.matrix, synthetic.training.whitening.matrix)
    assert torch.equal(again.targets, synthetic.targets) and again.stats == STATS
    tolerance = 1 / 255 / 0.2 if form == "png" else 0
    torch.testing.assert_close(again.images, synthetic.images, rtol=0, atol=tolerance)
    if form not in ("png", "hf"):  # which never replace a folder
        made(images, training=TrainingSettings()).save(path, form)
        assert not SyntheticSet.load(path).training
        assert not list(tmp_path.rglob(f"*{TRAINING_FILE}"))


def test_settings_that_do_not_fit_are_one_line(images, tmp_path):
    with pytest.raises(UserError, match=r"whitening's matrix is \(48, 48\), the images need \(192, 192\)"):
        made(images, images=torch.zeros(4, 3, 8, 8))
    with pytest.raises(UserError, match="learned step size -1"):
        TrainingSettings(-1.0)
    made(images).save(tmp_path)
    for content in (b"", b"no such file", (tmp_path / TRAINING_FILE).read_bytes()[:3000]):
        (tmp_path / TRAINING_FILE).write_bytes(content)
        with pytest.raises(UserError, match=TRAINING_FILE):
            SyntheticSet.load(tmp_path)
    mean, matrix = torch.zeros(48), torch.eye(48)
    for text, tensors in (
        ('{"lr": true}', {}),
        ('{"lr": "0.1"}', {}),
        (f'{{"lr": 1{"0" * 400}}}', {}),
        (f'{{"momentum": -1{"0" * 400}}}', {}),
        ('{"dsa": "blur"}', {}),
        ("{}", {"whitening.mean": mean, "whitening.matrix": 1e300 * matrix.double()}),
        ("{}", {"whitening.mean": mean, "whitening.matrix": matrix.to(torch.float8_e4m3fn)}),
    ):
        write_safetensors(tensors, tmp_path / TRAINING_FILE, training=text)
        with pytest.raises(UserError, match=TRAINING_FILE) as error:
            SyntheticSet.load(tmp_path)
        assert len(str(error.value)) < 400


def test_a_network_is_trained_and_tested_in_whitened_space(workspace):
    """The same as a network without whitening on images that are whitened already."""
    write_set("datasets", "tiny")
    image_set = load_set("tiny", 8, "datasets")
    whitening = Whitening.fit(image_set.train.images, image_set.stats, CPU)
    x, y = normalize(image_set.train.images[:8], image_set.stats), image_set.train.labels[:8]
    whitened, plain = (
        SyntheticSet(x, y, training=TrainingSettings(whitening=whitening)),
        SyntheticSet(whitening(x), y),
    )
    recipe = PRETRAIN["dm"].override(epochs=3)

    def network(seed):
        with local_seed(seed):
            return get_model(NET, (3, 8, 8), 4)

    a = pretrain(network(0), whitened, recipe, make_generator(0))
    b = pretrain(network(0), plain, recipe, make_generator(0))
    real = normalize(image_set.test.images, image_set.stats)
    torch.testing.assert_close(a(real), b(whitening(real)))
    torch.testing.assert_close(a.embed(real), b.embed(whitening(real)))
    assert "prepare" not in " ".join(a.state_dict())
    # A test on the way leaves the training alone.
    often, once = (
        score_network(network, whitened, image_set, recipe, seed=1, device=CPU, test_every=n)
        for n in (1, None)
    )
    assert (often.final, often.loss) == (once.final, once.loss)


def test_npz_of_kip_and_frepo(tmp_path):
    """`images` or `image`, channels last, labels as vectors; nothing in it is executed."""
    import numpy as np

    x = np.random.default_rng(0).normal(size=(6, 8, 8, 3))
    y = np.eye(6, 10) - 0.1
    for names in (("images", "labels"), ("image", "label")):
        np.savez(tmp_path / "set.npz", **dict(zip(names, (x, y), strict=True)))
        found = SyntheticSet.load(tmp_path / "set.npz")
        assert found.images.shape == (6, 3, 8, 8) and found.images.dtype == torch.float32
        torch.testing.assert_close(found.images[2, 1], torch.from_numpy(x[2, :, :, 1]).float())
        torch.testing.assert_close(found.targets, torch.from_numpy(y).float())
    np.savez(tmp_path / "set.npz", images=x.transpose(0, 3, 1, 2), labels=np.arange(6)[:, None])
    found = SyntheticSet.load(tmp_path / "set.npz")
    assert found.images.shape == (6, 3, 8, 8) and found.targets.tolist() == list(range(6))
    for content in (b"", b"PK", (tmp_path / "set.npz").read_bytes()[:500]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.npz"):
            SyntheticSet.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "set.npz", images=x)
    with pytest.raises(UserError, match="expected images and labels"):
        SyntheticSet.load(tmp_path / "set.npz")
    np.savez(tmp_path / "set.npz", images=x, labels=np.array([{}] * 6, dtype=object))
    with pytest.raises(UserError, match=r"set\.npz"):
        SyntheticSet.load(tmp_path / "set.npz")
