"""Synthetic sets: checks, every file form there and back, old and hostile files, the commands."""

import csv
import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from data.specs import Stats
from data.synthetic import FORMS, SyntheticSet, main, save_experiments
from utils.errors import UserError
from utils.images import save_grid

STATS = Stats((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
CALLED = []


class Payload:
    """Unpickling this with full pickle would call `mark`."""

    def __reduce__(self):
        return (mark, ())


def mark():
    CALLED.append(1)


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
    return (
        tmp_path
        / {"pair": "s", "png": "p", "res": "res_x.pt", "safetensors": "s.safetensors"}[form]
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
        ((X, Y.float()), "targets have shape"),
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


def test_png_clamps_rounds_and_names_classes(tmp_path):
    x = torch.tensor([-1.0, 0.0, 0.501, 3.0]).view(1, 1, 2, 2)
    info = {"class_names": ["cat", "dog, small"]}
    s = SyntheticSet(x, torch.tensor([1]), Stats((0.0,), (1.0,)), None, info)
    s.save(tmp_path / "p", "png")
    stored = np.array(Image.open(tmp_path / "p" / "00000.png"))
    assert stored.tolist() == [[0, 0], [128, 255]]
    assert '00000.png,1,"dog, small"' in (tmp_path / "p" / "labels.csv").read_text()
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
    with pytest.raises(UserError, match=r"'zip'; valid: pair, png, res, safetensors"):
        make().save(tmp_path / "z", "zip")
    (tmp_path / "file").write_text("")
    for form in FORMS:
        with pytest.raises(UserError, match="cannot write"):
            make().save(tmp_path / "file" / path_of(form, tmp_path).name, form)


# Foreign files


def test_hostile_files_are_refused_and_not_run(tmp_path):
    pickle.loads(pickle.dumps(Payload()))
    assert CALLED  # the payload works where code is run
    CALLED.clear()
    torch.save(Payload(), tmp_path / "x_syn.pt")
    torch.save(torch.arange(2), tmp_path / "y_syn.pt")
    torch.save({"data": [[Payload(), Payload()]]}, tmp_path / "res_bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    (tmp_path / "bad.safetensors").write_bytes(pickle.dumps(Payload()))
    for name in ("x_syn.pt", "res_bad.pt", "plain.pt", "bad.safetensors", ""):
        with pytest.raises(UserError, match=str(tmp_path)):
            SyntheticSet.load(tmp_path / name)
    assert not CALLED


def write_res(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "content, message",
    [
        (torch.zeros(2), "holds Tensor, expected a dict"),
        ({"weight": torch.zeros(2)}, r"holds \['weight'\], expected a dict"),
        ({"data": []}, "expected a dict whose 'data'"),
        ({"data": [torch.zeros(2)]}, "experiment 0 is not a pair"),
        ({"data": [[torch.zeros(2, 3, 4, 4), Y[:1]]]}, "there are 2 images"),
        ({"data": [[X, Y]], "accs_all_exps": {"a": ["x"]}}, "accs_all_exps must map"),
        ({"data": [[X, Y]], "accs_all_exps": [1]}, "accs_all_exps must map"),
    ],
)
def test_damaged_res_files(content, message, tmp_path):
    path = write_res(tmp_path / "res_bad.pt", content)
    with pytest.raises(UserError, match=rf"res_bad.pt.*{message}"):
        SyntheticSet.load(path)


def test_damaged_pairs(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        SyntheticSet.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither x_syn.pt and y_syn.pt nor labels.csv"):
        SyntheticSet.load(tmp_path)
    torch.save(X, tmp_path / "x_syn.pt")
    with pytest.raises(UserError, match=r"y_syn.pt does not exist"):
        SyntheticSet.load(tmp_path)
    torch.save(Y[:1], tmp_path / "y_syn.pt")
    with pytest.raises(UserError, match=f"{tmp_path}: targets .* 2 images"):
        SyntheticSet.load(tmp_path)
    torch.save(Y, tmp_path / "y_syn.pt")
    with pytest.raises(UserError, match="only res files"):
        SyntheticSet.load(tmp_path, experiment=1)
    for text, message in (
        ("{", "readable JSON"),
        ("[]", "JSON list"),
        ('{"mean": 1, "std": 2}', "equally long lists"),
        ('{"mean": [0.5], "std": [0]}', "equally long lists"),
        ('{"mean": [0.5], "std": [1]}', "do not fit images of 3 channels"),
    ):
        (tmp_path / "x_syn.json").write_text(text)
        with pytest.raises(UserError, match=message):
            SyntheticSet.load(tmp_path)


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"images": X}, path)
    with pytest.raises(UserError, match=r"a.safetensors holds \['images'\], expected images and"):
        SyntheticSet.load(path)
    safetensors.torch.save_file({"images": X, "targets": Y}, path)
    assert SyntheticSet.load(path).stats is None
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        SyntheticSet.load(path)


def test_damaged_png_folders(tmp_path):
    make().save(tmp_path / "p", "png")
    labels, meta = tmp_path / "p" / "labels.csv", tmp_path / "p" / "meta.json"
    good = labels.read_text()
    for text, message in (
        ("file,label\n", "lists no image"),
        ("a,b\n1,2\n", "columns file and label"),
        ("file,label\n00000.png,cat\n", "columns file and label"),
        ("file,label\n../p/00000.png,1\n", "expected a file in that folder"),
        ("file,label\nmissing.png,1\n", r"missing.png cannot be read \(FileNotFoundError\)"),
        ("file,label\nlabels.csv,1\n", "labels.csv cannot be read"),
    ):
        labels.write_text(text)
        with pytest.raises(UserError, match=message):
            SyntheticSet.load(tmp_path / "p")
    labels.write_text(good)
    Image.new("RGB", (3, 3)).save(tmp_path / "p" / "00002.png")
    with pytest.raises(UserError, match=r"00002.png has shape \(3, 3, 3\)"):
        SyntheticSet.load(tmp_path / "p")
    Image.new("RGBA", (7, 5)).save(tmp_path / "p" / "00002.png")
    with pytest.raises(UserError, match="mode RGBA"):
        SyntheticSet.load(tmp_path / "p")
    Image.new("RGB", (7, 5)).save(tmp_path / "p" / "00002.png")
    with pytest.raises(UserError, match="do not fit images of 3"):
        SyntheticSet.load(tmp_path / "p", stats=Stats((0.5,), (0.5,)))
    meta.unlink()
    with pytest.raises(UserError, match=r"meta.json gives no mean and std"):
        SyntheticSet.load(tmp_path / "p")
    assert SyntheticSet.load(tmp_path / "p", stats=STATS).stats == STATS


# Commands and the grid


def test_inspect_and_convert(tmp_path, capsys):
    make().save(tmp_path / "s")
    assert main(["inspect", str(tmp_path / "s"), "--out", str(tmp_path / "grid.png")]) == 0
    said = capsys.readouterr().out
    assert "6 of 3 x 5 x 7" in said and "3 classes with 2 each" in said and "no NaN" in said
    assert "0.00% outside" in said and "toy" in said and "6 of 6 images" in said
    assert Image.open(tmp_path / "grid.png").size == (3 * 72 + 2, 2 * 52 + 2)
    for form in FORMS:
        destination = tmp_path / "out" / path_of(form, tmp_path).name
        arguments = ["convert", str(tmp_path / "s"), str(destination), "--form", form]
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert "targets equal" in said and ("clamped" in said) == (form == "png")
        assert_same(SyntheticSet.load(destination), make(), 1e-5)


def test_convert_measures_the_clamped_share(tmp_path, capsys):
    x = torch.zeros(1, 1, 2, 2)
    x[0, 0, 0, 0] = 2.0
    SyntheticSet(x, torch.tensor([0]), Stats((0.0,), (1.0,))).save(tmp_path / "s")
    assert main(["convert", str(tmp_path / "s"), str(tmp_path / "p"), "--form", "png"]) == 0
    said = capsys.readouterr().out
    assert "25.00% of pixels clamped" in said and "differ by at most 1," in said


def test_inspect_soft_unknown_stats_and_published_stats(tmp_path, capsys):
    x = torch.randn(3, 3, 32, 32)
    SyntheticSet(x, torch.randn(3, 4)).save(tmp_path)
    assert main(["inspect", str(tmp_path), "--out", str(tmp_path / "g.png")]) == 0
    said = capsys.readouterr().out
    assert "float vectors of length 4" in said and "stats    unknown" in said
    assert "stretched" in said
    flags = ["--data_name", "CIFAR10", "--family", "dc"]
    assert main(["inspect", str(tmp_path), *flags]) == 0
    assert "0.2023" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--data_name", "imagenette"]) == 2
    assert "no published mean and std at size 32" in capsys.readouterr().err


def test_uneven_classes_are_counted(tmp_path, capsys):
    SyntheticSet(X, torch.tensor([4, 4])).save(tmp_path / "a")
    SyntheticSet(pixels(3), torch.tensor([1, 0, 1])).save(tmp_path / "b")
    many = torch.cat([torch.arange(25), torch.tensor([0])])
    SyntheticSet(pixels(26), many).save(tmp_path / "c")
    for name, text in (
        ("a", "1 classes with 2 each"),
        ("b", "2 classes: 0: 1, 1: 2"),
        ("c", "(from 1 to 2 each)"),
    ):
        main(["inspect", str(tmp_path / name)])
        assert text in capsys.readouterr().out


def test_convert_says_that_other_experiments_stay_behind(tmp_path, capsys):
    save_experiments(tmp_path / "res_x.pt", [make(), make()], {})
    source, out = str(tmp_path / "res_x.pt"), str(tmp_path / "s")
    assert main(["convert", source, out, "--form", "pair", "--experiment", "1"]) == 0
    assert "only experiment 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["inspect", "nowhere"], ["convert", "nowhere", "x", "--form", "png"]]
)
def test_command_errors_are_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == "error: synthetic set nowhere does not exist\n"
    with pytest.raises(SystemExit) as stop:
        main(["convert", "a", "b", "--form", "zip"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_grid_layout_and_errors(tmp_path):
    x = torch.stack([torch.full((1, 2, 2), v) for v in (0.0, 0.5, 2.0)])
    save_grid(x, tmp_path / "g.png", columns=3, scale=4)
    grid = np.array(Image.open(tmp_path / "g.png"))
    assert grid.shape == (12, 32, 3)
    assert [int(grid[5, 2 + 10 * i + 1, 0]) for i in range(3)] == [0, 128, 255]
    for bad in (torch.zeros(1, 2, 4, 4), torch.zeros(3, 4, 4), torch.zeros(0, 3, 4, 4)):
        with pytest.raises(UserError, match="cannot draw"):
            save_grid(bad, tmp_path / "bad.png")
    assert not (tmp_path / "bad.png").exists()
