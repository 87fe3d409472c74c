"""Synthetic sets: checks, every file form there and back, what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.specs import Stats
from data.synthetic import FORMS, SyntheticSet, TrainingSettings, save_compact, save_experiments
from data.synthetic.views import ViewFlags
from data.target_scale import TargetScale
from utils.errors import UserError

STATS = Stats((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def pixels(m=6, c=3, h=5, w=7):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (m, c, h, w), generator=g).float() / 255


def make(soft=False, m=6, stats=STATS, **changes):
    c = len(stats.mean) if stats else 3
    x = pixels(m, c)
    if stats:
        x = (x - torch.tensor(stats.mean)[:, None, None]) / torch.tensor(stats.std)[:, None, None]
    y = torch.randn(m, 4) if soft else torch.arange(m) // 2
    info = {"method": "dm", "accs_all_exps": {"ConvNet": [0.5, 0.25]}}
    return SyntheticSet(x, y, stats, "toy", info, **changes)


def path_of(form, tmp_path):
    return tmp_path / {"pair": "s", "png": "p", "res": "res_x.pt", "compact": "c.safetensors"}.get(
        form, f"s.{form}"
    )


def assert_same(a, b, tolerance=0.0):
    torch.testing.assert_close(a.images, b.images, rtol=0, atol=tolerance)
    assert torch.equal(a.targets, b.targets) and a.targets.dtype == b.targets.dtype
    assert a.stats == b.stats and a.data_name == b.data_name


# The class


def test_casts_detaches_and_reports():
    x = torch.nn.Parameter(torch.randn(4, 1, 2, 2, dtype=torch.float64))
    s = SyntheticSet(x, torch.tensor([0, 1, 2, 3], dtype=torch.uint8))
    assert s.images.dtype == torch.float32 and not s.images.requires_grad
    assert s.targets.dtype == torch.int64 and not s.soft and len(s) == 4
    assert SyntheticSet(x, torch.zeros(4, 1).half()).soft
    assert torch.equal(SyntheticSet(x.float(), s.targets).images, x.float())


def test_what_gives_a_set_away_is_written_last(tmp_path, monkeypatch):
    """A killed write leaves nothing that would count as a set without what lies beside it."""
    written, real = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: written.append(Path(to).name) or real(self, to))
    made = make(training=TrainingSettings(lr=0.5))
    made.save(tmp_path / "pair")
    assert sorted(written) == ["training.safetensors", "x_syn.json", "x_syn.pt", "y_syn.pt"]
    assert written[-1] == "x_syn.pt"
    del written[:]
    made.save(tmp_path / "res_DM.pt", "res")
    assert len(written) == 3 and written[-1] == "res_DM.pt"


def test_to_pixels_by_hand():
    x = torch.tensor([0.0, 1.0, -10.0, 10.0]).view(1, 1, 2, 2)
    s = SyntheticSet(x, torch.zeros(1).long(), Stats((0.5,), (0.25,)))
    torch.testing.assert_close(s.to_pixels().flatten(), torch.tensor([0.5, 0.75, 0.0, 1.0]))
    torch.testing.assert_close(s.unclamped_pixels().flatten()[2:], torch.tensor([-2.0, 3.0]))
    with pytest.raises(UserError, match=r"mean and std .* are unknown"):
        SyntheticSet(x, torch.zeros(1).long()).to_pixels()


X, Y = torch.zeros(2, 3, 4, 4), torch.zeros(2).long()
NAN = torch.tensor([[0.0], [float("nan")]])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, Y), "images are NoneType"),
        ((X.byte(), Y), "images are torch.uint8"),
        ((X[0], Y), r"shape \(3, 4, 4\), expected \(m, C, H, W\)"),
        ((X[:0], Y[:0]), "m at least 1"),
        ((X + NAN.view(2, 1, 1, 1), Y), "images hold 48 non-finite values .* first in row 1"),
        ((X.double() + 1e300, Y), "images hold 96 non-finite"),
        ((X, [0, 1]), "targets are list"),
        ((X, Y + 0.5), "targets hold 0.5 in row 0, expected whole numbers"),
        ((X, torch.tensor([0, 1e300], dtype=torch.float64)), "non-finite values .* row 1"),
        ((X, Y[:, None]), "targets have shape"),
        ((X, Y.bool()), "dtype torch.bool"),
        ((X, torch.zeros(2, 0)), "targets have shape"),
        ((X, Y[:1]), "there are 2 images"),
        ((X, Y - 1), "class index -1"),
        ((X, NAN), "targets hold 1 non-finite values"),
        ((X, Y, Stats((0.5,), (0.5,))), "do not fit images of 3 channels"),
        ((X, Y, Stats((0.5,) * 3, (0.5, 0.0, 0.5))), "do not fit"),
        ((X, Y, None, None, {"a": X}), "plain JSON values"),
    ],
)
def test_bad_sets_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        SyntheticSet(*arguments)


# Forms


@pytest.mark.parametrize("form", ["pair", "safetensors"])
@pytest.mark.parametrize("soft", [False, True])
def test_exact_round_trips(form, soft, tmp_path):
    s, path = make(soft), path_of(form, tmp_path)
    s.save(path, form)
    again = SyntheticSet.load(path)
    assert_same(again, s)
    assert again.info == s.info


@pytest.mark.parametrize("form", ["safetensors", "compact"])
def test_equal_sets_make_equal_files(form, tmp_path):
    scale = TargetScale(torch.zeros(4), torch.ones(4))
    s = make(soft=True, training=TrainingSettings(lr=0.1, targets=scale))
    for n in range(8):  # the library orders the texts at random
        s.save(tmp_path / f"{n}.safetensors", form)
    first, *others = [(tmp_path / f"{n}.safetensors").read_bytes() for n in range(8)]
    assert all(other == first for other in others)


def test_round_trip_without_facts(tmp_path):
    s = SyntheticSet(pixels(), torch.arange(6))
    for form in ("pair", "safetensors", "res"):
        s.save(path_of(form, tmp_path), form)
        again = SyntheticSet.load(path_of(form, tmp_path))
        assert_same(again, s)


def test_pair_is_two_plain_tensors(tmp_path):
    s = make(True)
    s.save(tmp_path)
    for name, value in (("x_syn.pt", s.images), ("y_syn.pt", s.targets)):
        assert torch.equal(torch.load(tmp_path / name, weights_only=True), value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x_syn.json", "x_syn.pt", "y_syn.pt"]
    for name in ("x_syn.pt", "y_syn.pt"):
        assert_same(SyntheticSet.load(tmp_path / name), s)
    s.save(tmp_path / "new" / "x_syn.pt")
    assert_same(SyntheticSet.load(tmp_path / "new"), s)


def test_a_view_saves_only_itself(tmp_path):
    base = torch.randn(500, 3, 8, 8)
    SyntheticSet(base[:2], torch.arange(2)).save(tmp_path)
    assert (tmp_path / "x_syn.pt").stat().st_size < 10_000


def test_published_pair_with_the_config_of_a_run(tmp_path):
    torch.save(torch.randn(3, 3, 4, 4), tmp_path / "x_syn.pt")
    torch.save(torch.randn(3, 8), tmp_path / "y_syn.pt")
    assert SyntheticSet.load(tmp_path).stats is None
    config = {"mean": STATS.mean, "std": STATS.std, "data_name": "cifar100", "outer_lr": 1e-4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"info": {"not": "ours"}}))
    s = SyntheticSet.load(tmp_path)
    assert s.stats == STATS and s.data_name == "cifar100" and s.info == {}
    other = Stats((0.0,) * 3, (1.0,) * 3)
    s = SyntheticSet.load(tmp_path, stats=other, data_name="mine")
    assert s.stats == other and s.data_name == "mine"


def test_views_of_a_run_know_their_source(tmp_path):
    views = ViewFlags(2).draw(2, 8, True, 0)
    whole = SyntheticSet(torch.randn(4, 3, 8, 8), torch.randn(4, 5), STATS, views=views)
    save_compact(whole, tmp_path / "set.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"data_name": "mine", "info": {"no": 1}}))
    found = SyntheticSet.load(tmp_path)
    assert (found.data_name, found.info, found.stats) == ("mine", {}, STATS)


def test_res_holds_what_validate_reads(tmp_path):
    a, b = make(), make()
    save_experiments(tmp_path / "res_x.pt", [a, b], {"ConvNet": [np.float64(0.5), 0.25]})
    raw = torch.load(tmp_path / "res_x.pt", weights_only=True)  # no NumPy scalar inside
    assert set(raw) == {"data", "accs_all_exps"} and len(raw["data"]) == 2
    assert raw["accs_all_exps"] == {"ConvNet": [0.5, 0.25]}
    assert torch.equal(raw["data"][0][0], a.images) and raw["data"][0][1].dtype == torch.int64
    second = SyntheticSet.load(tmp_path / "res_x.pt", experiment=1)
    assert_same(second, b)
    assert second.info["num_experiments"] == 2 and second.info["experiment"] == 1
    assert second.info["method"] == "dm"
    with pytest.raises(UserError, match=r"res_x.pt holds experiments 0 to 1, not 2"):
        SyntheticSet.load(tmp_path / "res_x.pt", experiment=2)
    with pytest.raises(UserError, match="not -1"):
        SyntheticSet.load(tmp_path / "res_x.pt", experiment=-1)


def test_old_res_file_with_numpy_scalars(tmp_path):
    path = tmp_path / "res_DC_CIFAR10_ConvNet_1ipc.pt"
    old = {"data": [[torch.randn(2, 3, 4, 4), torch.tensor([0, 1])]]}
    torch.save(old | {"accs_all_exps": {"ConvNet": [np.float64(0.28), np.float64(0.3)]}}, path)
    s = SyntheticSet.load(path)
    assert s.info["accs_all_exps"] == {"ConvNet": [0.28, 0.3]} and s.stats is None
    assert all(type(a) is float for a in s.info["accs_all_exps"]["ConvNet"])
    assert torch.equal(s.images, old["data"][0][0])


def test_png_round_trip_is_exact_for_8_bit_pixels(tmp_path):
    s = make()
    s.save(tmp_path / "p", "png")
    assert sorted(p.name for p in (tmp_path / "p").iterdir())[:2] == ["00000.png", "00001.png"]
    stored = np.array(Image.open(tmp_path / "p" / "00003.png"))
    np.testing.assert_array_equal(stored, (pixels()[3] * 255).round().byte().permute(1, 2, 0))
    with (tmp_path / "p" / "labels.csv").open() as file:
        assert list(csv.reader(file))[:2] == [["file", "label"], ["00000.png", "0"]]
    again = SyntheticSet.load(tmp_path / "p")
    assert_same(again, s, 1e-5)
    assert again.info == s.info
    assert (tmp_path / "p").stat().st_mode & 0o700 == 0o700
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_png_clamps_and_rounds(tmp_path):
    x = torch.tensor([-1.0, 0.0, 0.501, 3.0]).view(1, 1, 2, 2)
    s = SyntheticSet(x, torch.tensor([1]), Stats((0.0,), (1.0,)))
    s.save(tmp_path / "p", "png")
    stored = np.array(Image.open(tmp_path / "p" / "00000.png"))
    assert stored.tolist() == [[0, 0], [128, 255]]
    assert (tmp_path / "p" / "labels.csv").read_text().split() == ["file,label", "00000.png,1"]
    given = SyntheticSet.load(tmp_path / "p", stats=Stats((0.5,), (0.5,)))
    torch.testing.assert_close(given.images.flatten()[-1:], torch.ones(1))


def test_forms_say_what_they_cannot_hold(tmp_path):
    for form in ("png", "res"):
        with pytest.raises(UserError, match=r"float (targets|vectors).*--form pair or safetensors"):
            make(True).save(path_of(form, tmp_path), form)
    with pytest.raises(UserError, match="unknown"):
        make(stats=None).save(tmp_path / "p", "png")
    with pytest.raises(UserError, match="1 or 3 channels"):
        make(stats=Stats((0.5,) * 2, (0.5,) * 2)).save(tmp_path / "p", "png")
    make().save(tmp_path / "p", "png")
    with pytest.raises(UserError, match="not an empty folder"):
        make().save(tmp_path / "p", "png")
    with pytest.raises(UserError, match="res_DC"):
        make().save(tmp_path / "x_syn.pt", "res")
    with pytest.raises(UserError, match=r"ending in .safetensors"):
        make().save(tmp_path / "a.pt", "safetensors")
    with pytest.raises(UserError, match="no experiment"):
        save_experiments(tmp_path / "res_x.pt", [], {})
    with pytest.raises(UserError, match=r"'zip'; valid: compact, hf, npz, pair, png, res, safetensors"):
        make().save(tmp_path / "z", "zip")
    (tmp_path / "file").write_text("")
    for form in FORMS:
        with pytest.raises(UserError, match="cannot write"):
            make().save(tmp_path / "file" / path_of(form, tmp_path).name, form)
