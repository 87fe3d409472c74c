"""Compact storage: decoding by independent formulas, bytes, hostile files."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import scipy.fft
import torch

from data.specs import Stats
from data.synthetic import SyntheticSet, TrainingSettings, save_compact
from data.synthetic.__main__ import main
from data.synthetic.compact import CompactFlags, encode, images_within
from data.synthetic.views import ViewFlags
from data.target_scale import TargetScale
from data.whitening import Whitening
from utils.errors import UserError

STATS = Stats((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def make(m=12, size=8, width=20, training=None, stats=STATS):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(m, 3, size, size, generator=g)
    y = torch.randn(m, width, generator=g) if width else torch.arange(m) % 4
    return SyntheticSet(x, y, stats, "toy", {"method": "dm"}, training or TrainingSettings())


def store(synthetic, path, **how):
    save_compact(synthetic, path, CompactFlags(**how))
    return safetensors.torch.load_file(path), SyntheticSet.load(path)


def enlarge_by_hand(x, height, width):
    """Bilinear interpolation, corners not aligned, pixel by pixel in float64."""
    c, h, w = x.shape
    out = np.zeros((c, height, width))

    def place(i, small, large):
        at = min(max((i + 0.5) * small / large - 0.5, 0), small - 1)
        low = int(at)
        return low, min(low + 1, small - 1), at - low

    for i in range(height):
        top, bottom, down = place(i, h, height)
        for j in range(width):
            left, right, along = place(j, w, width)
            for k in range(c):
                upper = x[k, top, left] * (1 - along) + x[k, top, right] * along
                lower = x[k, bottom, left] * (1 - along) + x[k, bottom, right] * along
                out[k, i, j] = upper * (1 - down) + lower * down
    return out


@pytest.mark.parametrize("x_size", [1, 3, 4, 7])
def test_images_are_the_nearest_that_enlarge_by_hand(tmp_path, x_size):
    x = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(x_size))
    stored, again = store(SyntheticSet(x, torch.randn(2, 4)), tmp_path / "a.safetensors", x_size=x_size)
    width = round(10 * x_size / 8)
    assert stored["x"].shape == (2, 3, x_size, width)
    for small, decoded in zip(stored["x"].double().numpy(), again.images.numpy(), strict=True):
        np.testing.assert_allclose(decoded, enlarge_by_hand(small, 8, 10), atol=1e-5)
    # Least squares: what remains is orthogonal to the enlargement of every stored pixel.
    unit = torch.eye(x_size * width, dtype=torch.float64).view(-1, 1, x_size, width)
    basis = torch.stack([torch.from_numpy(enlarge_by_hand(u, 8, 10)) for u in unit.numpy()])
    rest = (x - again.images).double()
    products = torch.einsum("bchw,khw->bck", rest, basis[:, 0])
    torch.testing.assert_close(products, torch.zeros_like(products), atol=1e-4, rtol=0)


def test_what_was_enlarged_once_is_kept(tmp_path):
    _, once = store(make(), tmp_path / "a.safetensors", x_size=4, y_rank=3)
    _, twice = store(once, tmp_path / "b.safetensors", x_size=4, y_rank=3)
    torch.testing.assert_close(once.images, twice.images, atol=1e-5, rtol=0)
    torch.testing.assert_close(once.targets, twice.targets, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("standardised", [False, True])
def test_low_rank_targets_are_optimal(tmp_path, rank, standardised):
    s, unit = make(), np.ones(20)
    if standardised:  # then errors count in standard deviations, as in the loss
        unit = np.logspace(-1, 2, 20)
        scale = TargetScale(torch.zeros(20), torch.from_numpy(unit).float())
        s = SyntheticSet(s.images, s.targets, training=TrainingSettings(targets=scale))
    stored, again = store(s, tmp_path / "a.safetensors", y_rank=rank)
    assert stored["y.left"].shape == (12, rank) and stored["y.right"].shape == (rank, 20)
    y = s.targets.double().numpy()
    mean, left, right = (stored[f"y.{k}"].double().numpy() for k in ("mean", "left", "right"))
    np.testing.assert_allclose(again.targets, mean + left @ right, atol=1e-6)
    spectrum = np.linalg.svd((y - y.mean(0)) / unit, compute_uv=False)
    error = np.square((y - again.targets.numpy()) / unit).sum()
    np.testing.assert_allclose(error, np.square(spectrum[rank:]).sum(), rtol=1e-5, atol=1e-9)


def test_share_of_variance(tmp_path):
    s = make()
    y = s.targets.double().numpy()
    kept = np.square(np.linalg.svd(y - y.mean(0), compute_uv=False)).cumsum()
    for share in (1e-6, 0.5, 0.78, 0.999):
        stored, _ = store(s, tmp_path / "a.safetensors", y_variance=share)
        rank = stored["y.left"].shape[1]
        assert kept[rank - 1] >= share * kept[-1] and (rank == 1 or kept[rank - 2] < share * kept[-1])
    stored, _ = store(SyntheticSet(s.images, torch.ones(12, 5)), tmp_path / "a.safetensors", y_variance=0.9)
    assert stored["y.left"].shape == (12, 1)


@pytest.mark.parametrize("width", [20, 0])
def test_without_options_nothing_is_lost(tmp_path, width):
    s = make(width=width, training=TrainingSettings(0.1, "none", Whitening(torch.zeros(192), torch.eye(192))))
    stored, again = store(s, tmp_path / "a.safetensors")
    assert torch.equal(again.images, s.images) and torch.equal(again.targets, s.targets)
    assert again.targets.dtype == s.targets.dtype
    assert (again.stats, again.data_name, again.info) == (s.stats, s.data_name, s.info)
    assert again.training.record() == s.training.record()
    assert width or stored["y"].dtype == torch.uint8


def test_class_indices_take_the_smallest_type_that_holds_them(tmp_path):
    x = torch.zeros(1, 1, 2, 2)
    for largest, dtype in (
        (255, torch.uint8),
        (256, torch.int16),
        (40000, torch.int32),
        (2**40, torch.int64),
    ):
        stored, again = store(SyntheticSet(x, torch.tensor([largest])), tmp_path / "a.safetensors")
        assert stored["y"].dtype == dtype and again.targets.tolist() == [largest]


def test_rounding(tmp_path):
    s = make()
    s = SyntheticSet(torch.cat([s.images[:, :2], torch.full((12, 1, 8, 8), 0.7)], 1), s.targets)
    stored, again = store(s, tmp_path / "a.safetensors", x_dtype="uint8", y_dtype="bf16")
    x = s.images.double().numpy()
    low, high = x.min((0, 2, 3)), x.max((0, 2, 3))
    worst = np.abs(again.images.numpy() - x).max((0, 2, 3))
    assert (worst <= (high - low) / 510 + 1e-6).all()
    slope, offset = stored["x.map"].double().numpy()[:, :, None, None]
    np.testing.assert_allclose(again.images, slope * stored["x"].numpy() + offset, atol=1e-6)
    assert torch.equal(again.targets, s.targets.bfloat16().float())
    _, again = store(s, tmp_path / "a.safetensors", x_dtype="bf16")
    assert torch.equal(again.images, s.images.bfloat16().float())


@pytest.mark.parametrize("rank, width", [(None, 20), (None, 1), (4, 20), (5, 20)])
def test_rounded_target_vectors(tmp_path, rank, width):
    s, (name, columns) = make(width=width), ("y", width) if rank is None else ("y.left", rank)
    stored, again = store(s, tmp_path / "a.safetensors", y_dtype="uint8", y_rank=rank)
    levels = stored[name].numpy()
    assert levels.dtype == np.uint8 and levels.shape == (12, columns)
    slope, offset = stored["y.map"].double().numpy()
    found = slope * levels + offset
    if rank is None:
        wanted = s.targets.double().numpy()
    else:
        exact, _ = store(s, tmp_path / "b.safetensors", y_rank=rank)
        wanted = exact["y.left"].double().numpy()
        found_right = stored["y.right"].double().numpy()
        assert stored["y.right"].dtype == stored["y.mean"].dtype == torch.bfloat16
        np.testing.assert_allclose(
            again.targets, stored["y.mean"].double().numpy() + found @ found_right, atol=1e-5
        )
    step = (wanted.max(0) - wanted.min(0)) / 255
    assert (np.abs(found - wanted).max(0) <= step / 2 + 1e-6).all()
    if rank is None:
        np.testing.assert_allclose(again.targets, found, atol=1e-6)


def test_pixels_of_real_images_survive_in_one_byte(tmp_path):
    pixels = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, -1, -1) / 255
    x = (pixels - torch.tensor(STATS.mean).view(-1, 1, 1)) / torch.tensor(STATS.std).view(-1, 1, 1)
    stored, again = store(
        SyntheticSet(x, torch.arange(2), STATS), tmp_path / "a.safetensors", x_dtype="uint8"
    )
    assert torch.equal(stored["x"][1, 2].flatten(), torch.arange(256).byte())
    torch.testing.assert_close(again.images, x, atol=1e-5, rtol=0)


def filtered(x, cutoff):
    """Low frequencies of (3, 8, 8) in float64, by SciPy's cosine transform."""
    along = np.arange(8) / 8
    gain = 1 / (1 + (np.hypot(along[:, None], along) / cutoff) ** 8)
    spectrum = scipy.fft.dctn(np.asarray(x, dtype=np.float64), axes=(1, 2), norm="ortho")
    return scipy.fft.idctn(gain * spectrum, axes=(1, 2), norm="ortho")


@pytest.mark.parametrize("border, seeded", [("reflect", True), ("reflect", False), ("constant", False)])
@pytest.mark.parametrize(("blend", "hybrid"), [(False, None), (True, None), (True, True)])
def test_views_are_crops_and_flips_of_the_stored_images(tmp_path, blend, hybrid, border, seeded):
    s, pad, k = make(m=4), 1, 6
    views = ViewFlags(k, blend, hybrid).draw(4, 8, True, 3)
    assert views.border == "reflect" and (views.drawn is not None) == blend
    if not seeded:
        views = dataclasses.replace(views, border=border, drawn=None)
    numbers = views.numbers.tolist()
    assert int(views.numbers.max()) < 18 and (blend or all(len(set(row)) == k for row in numbers))
    whole = views.images(s.images, STATS)
    rows = torch.tensor([5, 0, 23])
    assert torch.equal(views.images(s.images, STATS, rows), whole[rows])
    targets = torch.randn(4 * k, 20)
    how = CompactFlags(x_size=8)
    save_compact(SyntheticSet(whole, targets, STATS, views=views), tmp_path / "a.safetensors", how)
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")
    torch.testing.assert_close(stored["x"], s.images, atol=1e-6, rtol=0)  # each once
    assert ("x.drawn" in stored) == (blend and seeded) != ("x.views" in stored)
    again = SyntheticSet.load(tmp_path / "a.safetensors")
    assert again.images.shape == (24, 3, 8, 8) and torch.equal(again.targets, targets)
    if border == "constant":  # what the first files do not say
        facts = {"version": 1, "size": [8, 8], "pad": pad}
        about = json.dumps({"mean": STATS.mean, "std": STATS.std})
        metadata = {"compact": json.dumps(facts), "synthetic_set": about}
        safetensors.torch.save_file(stored, tmp_path / "first.safetensors", metadata)
        first = SyntheticSet.load(tmp_path / "first.safetensors")
        assert torch.equal(first.images, again.images) and first.views.border == "constant"
    black = -np.array(STATS.mean) / np.array(STATS.std)

    def at(i, r, c):
        if border == "reflect":
            r, c = (abs(v) if v < 8 else 14 - v for v in (r, c))
        return s.images[i, :, r, c].numpy() if 0 <= r < 8 and 0 <= c < 8 else black

    def seen(i, number):
        flip, top, left = number // 9, number // 3 % 3 - 1, number % 3 - 1
        found = np.empty((3, 8, 8))
        for r in range(8):
            for c in range(8):
                found[:, r, 7 - c if flip else c] = at(i, r + top, c + left)
        return found

    for i in range(4):
        np.testing.assert_allclose(again.images[i * k], s.images[i], atol=1e-5)  # the first as it is
        for j in range(k):
            expected = seen(i, numbers[i][j])
            if blend:
                partner, share = int(views.partners[i, j]), int(views.shares[i, j]) / 255
                assert (partner == i) == (j == 0)
                theirs = seen(partner, int(views.partner_views[i, j]))
                if hybrid:  # low frequencies by the share, high ones by the rest
                    cutoff = 0.5 / 8 * 24 ** (int(views.cutoffs[i, j]) / 255)
                    low, low_of_theirs = filtered(expected, cutoff), filtered(theirs, cutoff)
                    high = (1 - share) * (expected - low) + share * (theirs - low_of_theirs)
                    expected = share * low + (1 - share) * low_of_theirs + high
                else:
                    expected = share * expected + (1 - share) * theirs
            np.testing.assert_allclose(again.images[i * k + j], expected, atol=1e-5)


@pytest.mark.parametrize(
    "width, how, views, blend",
    [
        (20, {}, 1, False),
        (20, dict(x_size=4, x_dtype="uint8", y_rank=3, y_dtype="bf16"), 1, False),
        (20, dict(x_size=5, x_dtype="bf16", y_rank=7), 4, False),
        (20, dict(y_dtype="bf16"), 3, True),
        (20, dict(y_dtype="uint8"), 3, True),
        (20, dict(y_dtype="uint8", y_rank=5), 4, True),
        (20, dict(y_dtype="uint8", y_rank=5), 4, "hybrid"),
        (20, dict(y_bits=13, y_rank=5), 4, "hybrid"),
        (20, dict(y_bits=40), 3, True),
        (0, dict(x_dtype="uint8"), 1, False),
    ],
)
def test_budget_and_what_inspect_prints_are_what_the_file_holds(tmp_path, capsys, width, how, views, blend):
    label, seen = width or torch.uint8, ViewFlags(views, bool(blend), blend == "hybrid")
    sizes = []
    for m in (9, 10):
        s, numbers = make(m, width=width), None
        if views > 1:
            numbers = seen.draw(m, 8, True, 0)
            s = make(m * views, width=width)
        path = tmp_path / "a.safetensors"
        save_compact(dataclasses.replace(s, views=numbers), path, CompactFlags(**how))
        held = safetensors.torch.load_file(path)
        x, y = (sum(t.nbytes for k, t in held.items() if k[0] == kind) for kind in "xy")
        sizes.append(x + y)
    given = (3, 8, 8), label, CompactFlags(**how), seen
    within = [images_within(b, *given) for b in (*sizes, sizes[1] - 1)]
    assert within == [9, 10, 9]
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    plain = 4 * 192 * 10 * views, (4 * width or 8) * 10 * views
    assert f"stored   X {x} + Y {y} = {x + y} bytes, per image {x / 10:.6g} + {y / 10:.6g}" in said
    assert f"float32  X {plain[0]} + Y {plain[1]} = {sum(plain)} bytes" in said


def test_plain_forms_are_weighed_too(tmp_path, capsys):
    s = make(width=0)
    for form, name in (
        ("pair", "s"),
        ("safetensors", "s.safetensors"),
        ("npz", "s.npz"),
        ("res", "res_s.pt"),
    ):
        s.save(tmp_path / name, form)
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert "stored   X 9216 + Y 96 = 9312 bytes, per image 768 + 8 = 776" in capsys.readouterr().out
    s.save(tmp_path / "p", "png")
    assert main(["inspect", str(tmp_path / "p")]) == 0
    pictures = sum(p.stat().st_size for p in (tmp_path / "p").glob("*.png"))
    assert f"X {pictures} + Y {(tmp_path / 'p' / 'labels.csv').stat().st_size}" in capsys.readouterr().out


def test_a_form_that_forgets_views_says_so(tmp_path, capsys):
    views = ViewFlags(3, True).draw(4, 8, True, 3)
    save_compact(dataclasses.replace(make(m=12), views=views), tmp_path / "v.safetensors", CompactFlags())
    for form, lost in (("npz", True), ("compact", False)):
        target = str(tmp_path / f"out.{'npz' if lost else 'safetensors'}")
        assert main(["convert", str(tmp_path / "v.safetensors"), target, "--form", form]) == 0
        assert ("lost     that 3 images each are views of one" in capsys.readouterr().out) == lost


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_first_views_of_a_set(tmp_path, capsys, kept):
    views = ViewFlags(3, True, True).draw(4, 8, True, 3)
    whole = dataclasses.replace(make(m=12), images=views.images(make(m=4).images, STATS), views=views)
    save_compact(whole, source := tmp_path / "v.safetensors")
    argv = ["convert", str(source), str(tmp_path / "few.safetensors"), "--form", "compact", "--views"]
    assert main([*argv, str(kept)]) == 0
    assert f"{4 * kept} images" in capsys.readouterr().out
    few = SyntheticSet.load(tmp_path / "few.safetensors")
    rows = [i * 3 + j for i in range(4) for j in range(kept)]
    torch.testing.assert_close(few.images, whole.images[rows], atol=1e-6, rtol=0)
    assert torch.equal(few.targets, whole.targets[rows]) and (few.views is None) == (kept == 1)
    assert main([*argv, "4", "--overwrite"]) == 2
    assert "--views 4" in capsys.readouterr().err
    assert len(SyntheticSet.load(tmp_path / "few.safetensors")) == 4 * kept


def test_convert(tmp_path, capsys):
    make(m=40).save(tmp_path / "s")
    out = str(tmp_path / "c.safetensors")
    argv = ["convert", str(tmp_path / "s"), out, "--form", "compact"]
    options = ["--x_size", "4", "--x_dtype", "uint8", "--y_rank", "4", "--y_dtype", "bf16"]
    assert main([*argv, *options]) == 0
    said = capsys.readouterr().out
    # x 40·3·4·4, its map 2·3·4; y (40·4 + 4·20 + 20) · 2
    assert "X 1944 + Y 520 = 2464 bytes" in said and "targets by at most" in said
    assert "x 40 x 3 x 4 x 4 uint8" in said
    assert main(["inspect", out]) == 0 and "40 of 3 x 8 x 8" in capsys.readouterr().out
    for more, word in (
        (["--x_size", "9"], "--x_size 9"),
        (["--y_rank", "21"], "--y_rank 21"),
        (["--y_rank", "2", "--y_variance", "0.5"], "--y_variance"),
        (["--y_variance", "2"], "--y_variance"),
        (["--x_dtype", "int4"], "--x_dtype"),
        (["--y_bits", "8", "--y_dtype", "uint8"], "--y_dtype"),
        (["--y_bits", "161"], "--y_bits 161: expected at most 8 for each of 20"),
        (["--y_rank", "2", "--y_bits", "17"], "--y_bits 17: expected at most 8 for each of 2"),
        (["--form", "npz", "--x_size", "4"], "--form npz"),
    ):
        refused = tmp_path / "new.safetensors"
        try:
            code = main([*argv[:2], str(refused), *argv[3:], *more])
        except SystemExit as stop:
            code = stop.code
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2 and word in line and not refused.exists()
    with pytest.raises(UserError, match="class indices"):
        save_compact(make(width=0), out, CompactFlags(y_rank=2))
    with pytest.raises(UserError, match="class indices"):
        save_compact(make(width=0), out, CompactFlags(y_bits=2))
    with pytest.raises(UserError, match=r"ending in .safetensors"):
        save_compact(make(), tmp_path / "a.pt")


def test_budgets_that_cannot_be_met():
    # 3·8·8·4 + 2·4 bytes an image; mean and two directions of 48·4 bytes once
    with pytest.raises(UserError, match="first image takes 1352 bytes, each other 776"):
        images_within(1000, (3, 8, 8), 48, CompactFlags(y_rank=2), ViewFlags())
    with pytest.raises(UserError, match="--y_variance"):
        images_within(10**6, (3, 8, 8), 48, CompactFlags(y_variance=0.5), ViewFlags())
    with pytest.raises(UserError, match="--views 19: an image has 18 different views"):
        ViewFlags(19).draw(3, 8, True, 0)
    with pytest.raises(UserError, match="single image"):
        ViewFlags(4, True).draw(1, 8, True, 0)
    with pytest.raises(UserError, match=r"--hybrid .* add --blend"):
        ViewFlags(4, hybrid=True).draw(3, 8, True, 0)


X, MAP = torch.zeros(2, 3, 4, 4), torch.ones(2, 3)
Y = torch.zeros(2, 5)
LOW = {"y.mean": torch.zeros(5), "y.left": torch.zeros(2, 1), "y.right": torch.zeros(1, 5)}
FACTS = {"version": 1, "size": [8, 8], "pad": 1}
BYTE = torch.zeros(2, 3).byte()
BITS = torch.tensor([8, 8, 8, 8, 8], dtype=torch.uint8)
REFLECT = {"border": "reflect"}


def drawn(*numbers):
    return {"x.drawn": torch.tensor(numbers)}


DRAWN = drawn(2, 0, 3, 1, 1)
VIEWS = {
    "x.views": BYTE,
    "x.partners": BYTE.clone(),
    "x.partner_views": BYTE.clone(),
    "x.shares": BYTE.clone(),
}


@pytest.mark.parametrize(
    "tensors, facts, message",
    [
        ({"x": X, "y": Y}, {"version": 4}, "version 4, expected 1 to 3"),
        ({"x": X, "y": Y}, {"version": None}, "version None"),
        ({"x": X, "y": Y}, {"size": [8]}, "size is"),
        ({"x": X, "y": Y}, {"size": [8, "8"]}, "size is"),
        ({"x": X, "y": Y}, {"size": [8, 10**30]}, "size is"),
        ({"x": X, "y": Y}, {"size": [8, -1]}, "size is"),
        ({"x": X, "y": Y}, {"pad": 99}, "padding"),
        ({"x": X, "y": Y}, {"pad": 1.0}, "padding"),
        ({"x": X, "y": Y}, {"border": "circular"}, "border 'circular'"),
        ({"x": X, "y": Y}, {"border": "reflect", "size": [1, 8]}, "cannot be shifted by 1"),
        ({"x": X, "y": Y}, {"size": [10**5, 10**5]}, "decoded values"),
        ({"x": X, "y": Y}, {"size": [2, 8]}, "at most"),
        ({"y": Y}, {}, r"x of shape \(n, C, h, w\)"),
        ({"x": X[0], "y": Y}, {}, "x of shape"),
        ({"x": X[:0], "y": Y}, {}, "x of shape"),
        ({"x": X.double(), "y": Y}, {}, "float32, bfloat16 or uint8"),
        ({"x": X.to(torch.complex64), "y": Y}, {}, "float32, bfloat16 or uint8"),
        ({"x": X.to(torch.float8_e4m3fn), "y": Y}, {}, "float32, bfloat16 or uint8"),
        ({"x": X + float("nan"), "y": Y}, {}, "finite"),
        ({"x": X.byte(), "y": Y}, {}, "x.map"),
        ({"x": X, "x.map": MAP, "y": Y}, {}, "x.map"),
        ({"x": X.byte(), "x.map": MAP[:1].clone(), "y": Y}, {}, "x.map of shape"),
        ({"x": X.byte(), "x.map": MAP / 0, "y": Y}, {}, "finite"),
        ({"x": X.byte() + 255, "x.map": MAP * 3e38, "y": Y}, {}, "non-finite"),
        ({"x": X}, {}, "y, or"),
        ({"x": X, "y": Y, **LOW}, {}, "y, or"),
        ({"x": X, "y": Y[:1].clone()}, {}, "2 images"),
        ({"x": X, "y": Y.to(torch.float8_e5m2)}, {}, "y in float32"),
        ({"x": X, **LOW, "y.mean": torch.zeros(4)}, {}, "y.right of shape"),
        ({"x": X, **LOW, "y.mean": torch.zeros(())}, {}, "y.mean"),
        ({"x": X, **LOW, "y.left": torch.zeros(3, 1)}, {}, "y.left for 2"),
        ({"x": X, **LOW, "y.left": torch.zeros(2, 2)}, {}, "y.right of shape"),
        ({"x": X, **LOW, "y.left": torch.zeros(2, 3), "y.right": torch.zeros(3, 5)}, {}, "a rank"),
        (
            {"x": X, **LOW, "y.right": torch.ones(1, 5).double()},
            {},
            r"y.right of shape \(r, D\) in float32, bf",
        ),
        ({"x": X, **LOW, "y.right": torch.full((1, 5), torch.inf)}, {}, "finite"),
        (
            {"x": X, **LOW, "y.left": torch.full((2, 1), 3e38), "y.right": torch.full((1, 5), 9.0)},
            {},
            "finite",
        ),
        ({"x": X, **LOW, "y.left": torch.zeros(2, 1).byte()}, {}, "y.map of shape"),
        ({"x": X, **LOW, "y.map": torch.ones(2, 1)}, {}, "y.map of shape"),
        ({"x": X, "y": Y.byte(), "y.map": torch.ones(2, 3)}, {}, "y.map of shape"),
        ({"x": X, "y": Y.byte(), "y.map": torch.ones(2, 5).double()}, {}, "y.map of shape"),
        ({"x": X, "y": Y[:, 0].byte(), "y.map": torch.ones(2, 1)}, {}, "y.map of shape"),
        ({"x": X, "y": Y.byte(), "y.bits": BITS}, {}, "y.map of shape"),
        ({"x": X, "y": Y, "y.map": torch.ones(2, 5), "y.bits": BITS}, {}, "y.bits in uint8"),
        ({"x": X, "y": Y.byte(), "y.map": torch.ones(2, 5), "y.bits": BITS.int()}, {}, "y.bits in uint8"),
        (
            {"x": X, "y": Y.byte(), "y.map": torch.ones(2, 5), "y.bits": BITS[:4].clone()},
            {},
            "y.bits in uint8",
        ),
        ({"x": X, "y": Y.byte(), "y.map": torch.ones(2, 5), "y.bits": BITS[None].clone()}, {}, "y.bits in"),
        ({"x": X, "y": Y.byte(), "y.map": torch.ones(2, 5), "y.bits": BITS + 1}, {}, "each at most 8"),
        ({"x": X, "y": Y.byte(), "y.map": torch.ones(2, 5), "y.bits": BITS + 250}, {}, "each at most 8"),
        ({"x": X, "y": Y.byte(), "y.map": torch.ones(2, 4), "y.bits": BITS}, {}, "y.map of shape"),
        ({"x": X, "y": Y[:, 0].byte(), "y.map": torch.ones(2, 5), "y.bits": BITS}, {}, "y.bits in uint8"),
        ({"x": X, "y.bits": BITS}, {}, "y.bits in uint8"),
        (
            {"x": X, "y": Y.byte(), "y.map": torch.ones(2, 5), "y.bits": BITS.to(torch.complex64)},
            {},
            "y.bits in",
        ),
        ({"x": X, "y": torch.empty(2**45, 0).byte(), "y.bits": BITS * 0}, {}, "at most 2147483648 values"),
        ({"x": X, "y": Y, "y.unit": torch.ones(5)}, {}, "y.unit with y.right"),
        (
            {"x": X, **LOW, "y.left": BYTE, "y.map": torch.ones(2, 3), "y.bits": BITS[:3].clone()},
            {},
            "y.right of",
        ),
        ({"x": X, **DRAWN, "y": Y}, {}, "border reflect"),
        ({"x": X[:1].clone(), **DRAWN, "y": Y}, REFLECT, "several images"),
        ({"x": X, "x.drawn": DRAWN["x.drawn"].int(), "y": Y}, REFLECT, r"x.drawn of shape \(5\) in int64"),
        ({"x": X, "x.drawn": DRAWN["x.drawn"][:4].clone(), "y": Y}, REFLECT, "x.drawn of shape"),
        ({"x": X, **drawn(1, 0, 3, 1, 1), "y": Y}, REFLECT, "k from 2"),
        ({"x": X, **drawn(4, 0, 3, 1, 1), "y": Y}, REFLECT, "k from 2"),
        ({"x": X, **drawn(2, -1, 3, 1, 1), "y": Y}, REFLECT, "a seed below"),
        ({"x": X, **drawn(2, 2**32, 3, 1, 1), "y": Y}, REFLECT, "a seed below"),
        ({"x": X, **drawn(2, 0, 3, 2, 1), "y": Y}, REFLECT, "two switches"),
        ({"x": X, **drawn(2, 0, 2**60, 1, 1), "y": Y}, REFLECT, "drawn views"),
        ({"x": X[..., :1, :1].clone(), **drawn(2, 0, 2**25, 1, 1), "y": Y}, REFLECT, "drawn views"),
        ({"x": X, **DRAWN, "x.cutoffs": BYTE, "y": Y}, REFLECT, "x.drawn or x.views"),
        ({"x": X, **DRAWN, **VIEWS, "y": Y.repeat(3, 1)}, REFLECT, "x.drawn or x.views"),
        ({"x": X, **DRAWN, "y": Y.repeat(2, 1)}, REFLECT, "no mean and std"),
        ({"x": X, "x.views": BYTE[:1].clone(), "y": Y}, {}, "x.views"),
        ({"x": X, "x.views": BYTE.int(), "y": Y}, {}, "x.views"),
        ({"x": X, "x.views": BYTE + 18, "y": Y}, {}, "view numbers"),
        ({"x": X, "x.views": BYTE[:, :0].clone(), "y": Y}, {}, "x.views"),
        ({"x": X, **VIEWS, "x.partners": BYTE + 2, "y": Y.repeat(3, 1)}, {}, "partners below 2"),
        ({"x": X, **VIEWS, "x.partners": BYTE.short() - 1, "y": Y.repeat(3, 1)}, {}, "partners below 2"),
        ({"x": X, **VIEWS, "x.partner_views": BYTE + 18, "y": Y.repeat(3, 1)}, {}, "view numbers"),
        ({"x": X, **VIEWS, "x.shares": BYTE.float(), "y": Y.repeat(3, 1)}, {}, "x.shares .* in uint8"),
        ({"x": X, **VIEWS, "x.shares": BYTE[:1].clone(), "y": Y.repeat(3, 1)}, {}, "x.shares of shape"),
        ({"x": X, "x.views": BYTE, "x.shares": BYTE.clone(), "y": Y}, {}, "or none of them"),
        ({"x": X, **{k: v for k, v in VIEWS.items() if k != "x.views"}, "y": Y}, {}, "blends of the views"),
        ({"x": X, **VIEWS, "x.cutoffs": BYTE.short(), "y": Y.repeat(3, 1)}, {}, "x.cutoffs .* in uint8"),
        ({"x": X, "x.views": BYTE, "x.cutoffs": BYTE.clone(), "y": Y.repeat(3, 1)}, {}, "x.shares with"),
        ({"x": X, "x.views": BYTE, "y": Y.repeat(3, 1)}, {}, "no mean and std"),
        ({"x": X, "x.views": BYTE, "y": Y.repeat(3, 1)}, {"mean": [0.5], "std": [1]}, "3 channels"),
    ],
)
def test_hostile_files_are_one_line(tmp_path, capsys, tensors, facts, message):
    path, facts = tmp_path / "bad.safetensors", FACTS | facts
    stats = {k: facts.pop(k) for k in ("mean", "std") if k in facts}
    metadata = {"compact": json.dumps(facts), "synthetic_set": json.dumps(stats)}
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=rf"bad.safetensors.*{message}"):
        SyntheticSet.load(path)
    assert main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_small_file_cannot_ask_for_a_large_set(tmp_path):
    wide = {"y.mean": torch.zeros(2**20), "y.left": torch.zeros(2**12, 1), "y.right": torch.zeros(1, 2**20)}
    x = torch.zeros(2**12, 1, 1, 1)
    safetensors.torch.save_file(
        {"x": x, **wide},
        tmp_path / "a.safetensors",
        {"compact": json.dumps({"version": 1, "size": [1, 1], "pad": 0})},
    )
    with pytest.raises(UserError, match="at most 2147483648 target values"):
        SyntheticSet.load(tmp_path / "a.safetensors")
    for text in ("[]", "{", "1"):
        safetensors.torch.save_file({"x": X, "y": Y}, tmp_path / "a.safetensors", {"compact": text})
        with pytest.raises(UserError, match="JSON"):
            SyntheticSet.load(tmp_path / "a.safetensors")


def test_encoding_leaves_the_set_alone():
    s = make()
    before = s.images.clone(), s.targets.clone()
    tensors, _ = encode(s.images, s.targets, CompactFlags())
    tensors["x"].zero_(), tensors["y"].zero_()
    assert torch.equal(s.images, before[0]) and torch.equal(s.targets, before[1])


def test_gradients_of_views_are_the_same_bits_with_several_threads():
    """Many views show one image; threads that added up its gradient as they come would differ."""
    generator = torch.Generator().manual_seed(0)
    views = ViewFlags(8, True).draw(20, 16, True, 0)
    x = torch.rand(20, 3, 16, 16, generator=generator).requires_grad_()
    weight = torch.rand(160, 3, 16, 16, generator=generator)
    threads = torch.get_num_threads()

    def gradient():
        return torch.autograd.grad((views.images(x, Stats((0.5,) * 3, (0.2,) * 3)) * weight).sum(), x)[0]

    try:
        torch.set_num_threads(1)
        expected = gradient()
        torch.set_num_threads(4)
        assert all(torch.equal(gradient(), expected) for _ in range(20))
    finally:
        torch.set_num_threads(threads)
