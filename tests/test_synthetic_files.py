"""Files of synthetic sets from elsewhere (damaged, hostile), the two commands and the grid."""

import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_synthetic import STATS, X, Y, assert_same, make, path_of, pixels

from data.augment import normalize
from data.specs import KRR_SPECS, Stats
from data.synthetic import FORMS, SyntheticSet, save_experiments
from data.synthetic.__main__ import main
from utils.errors import UserError
from utils.plots import save_grid

CALLED = []


class Payload:
    """Unpickling this with full pickle would call `mark`."""

    def __reduce__(self):
        return (mark, ())


def mark():
    CALLED.append(1)


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
    with pytest.raises(UserError, match=r"no synthetic set; expected x_syn.pt and y_syn.pt, labels.csv"):
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


def test_a_png_folder_that_does_not_say_its_statistics(tmp_path, capsys):
    stats = KRR_SPECS["cifar10"].stats[32]
    images = normalize(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), stats)
    SyntheticSet(images, torch.arange(3), stats=stats).save(tmp_path / "p", "png")
    (tmp_path / "p" / "meta.json").unlink()
    assert main(["inspect", str(tmp_path / "p")]) == 2
    assert "gives no mean and std" in capsys.readouterr().err
    for what in (["inspect", str(tmp_path / "p")], ["convert", str(tmp_path / "p"), str(tmp_path / "q")]):
        form = ["--form", "pair"] if what[0] == "convert" else []
        assert main([*what, *form, "--data_name", "cifar10"]) == 0
    assert float((SyntheticSet.load(tmp_path / "q").images - images).abs().max()) < 0.02


def test_a_pair_is_not_written_where_another_form_is_read_first(tmp_path, capsys):
    make().save(tmp_path / "a", "pair")
    make().save(tmp_path / "run" / "set.safetensors", "safetensors")
    argv = ["convert", str(tmp_path / "a"), str(tmp_path / "run"), "--form", "pair", "--overwrite"]
    assert main(argv) == 2
    assert "run holds set.safetensors, which is read first" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["set.safetensors"]


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


def test_statistics_of_a_prepared_set(tmp_path, capsys):
    """Of a listed set without published ones (digits) and of an own set, as meta.json has them."""
    SyntheticSet(torch.randn(3, 3, 16, 16), torch.randn(3, 4)).save(tmp_path / "set")
    flags = ["inspect", str(tmp_path / "set"), "--data_dir", str(tmp_path / "data"), "--data_name"]
    assert main([*flags, "mine"]) == 2
    assert "unknown data set (nothing of that name is prepared in" in capsys.readouterr().err
    for name in ("digits", "mine"):
        (tmp_path / "data" / name).mkdir(parents=True)
        assert main([*flags, name]) == 2
        assert f"{name} has no published mean and std, and none are in" in capsys.readouterr().err
        facts = {"16": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}, "8": {}}
        (tmp_path / "data" / name / "meta.json").write_text(json.dumps({"sizes": facts}))
        assert main([*flags, name]) == 0
        assert "0.1" in capsys.readouterr().out


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


def test_converted_experiments_keep_their_own_accuracies(tmp_path, capsys):
    sets, scores = [SyntheticSet(X, Y)] * 3, {"ConvNet": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "MLP": [0.1, 0.2]}
    save_experiments(tmp_path / "res_three.pt", sets, scores)
    argv = ["convert", str(tmp_path / "res_three.pt"), str(tmp_path / "one.pt"), "--form", "res"]
    assert main([*argv, "--experiment", "1"]) == 0
    assert SyntheticSet.load(tmp_path / "one.pt").info["accs_all_exps"] == {"ConvNet": [0.3, 0.4]}
    SyntheticSet(X, Y, info={"accs_all_exps": 5}).save(tmp_path / "odd")
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "odd"), str(tmp_path / "two.pt"), "--form", "res"]) == 2
    assert "accs_all_exps must map names to lists" in capsys.readouterr().err
    assert not (tmp_path / "two.pt").exists()


def test_target_vectors_of_one_entry(tmp_path):
    y = torch.tensor([[0.25], [-1.5]])
    SyntheticSet(X, y).save(tmp_path / "one.npz", "npz")
    assert torch.equal(SyntheticSet.load(tmp_path / "one.npz").targets, y)
    for odd in (np.ones((2, 1), bool), np.ones((2, 1), np.complex64)):
        np.savez(tmp_path / "odd.npz", images=X.permute(0, 2, 3, 1).numpy(), labels=odd)
        with pytest.raises(UserError, match=r"odd\.npz: targets have shape"):
            SyntheticSet.load(tmp_path / "odd.npz")


def test_a_run_folder_with_one_res_file(tmp_path):
    save_experiments(tmp_path / "res_DM_CIFAR10_ConvNet_1ipc.pt", [SyntheticSet(X, Y)], {})
    assert torch.equal(SyntheticSet.load(tmp_path).images, X)


def test_convert_says_that_other_experiments_stay_behind(tmp_path, capsys):
    save_experiments(tmp_path / "res_x.pt", [make(), make()], {})
    source, out = str(tmp_path / "res_x.pt"), str(tmp_path / "s")
    assert main(["convert", source, out, "--form", "pair", "--experiment", "1"]) == 0
    assert "only experiment 1" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["inspect", "nowhere"], ["convert", "nowhere", "x", "--form", "png"]])
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


@pytest.mark.parametrize("form", ["pair", "res", "safetensors"])
def test_convert_keeps_a_set_that_is_there(tmp_path, form, capsys):
    place = tmp_path / {"res": "set.pt", "safetensors": "set.safetensors"}.get(form, "set")
    for name, seed in (("a", 0), ("b", 1)):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(4, 3, 8, 8, generator=generator)
        SyntheticSet(images, torch.arange(4), Stats((0.5,) * 3, (0.5,) * 3)).save(tmp_path / name)
    convert = ["convert", "--form", form]
    assert main([*convert, str(tmp_path / "a"), str(place)]) == 0
    kept = SyntheticSet.load(place, form=form).images
    capsys.readouterr()
    assert main([*convert, str(tmp_path / "b"), str(place)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--overwrite" in line and "set" in line
    assert torch.equal(SyntheticSet.load(place, form=form).images, kept)
    assert main([*convert, str(tmp_path / "b"), str(place), "--overwrite"]) == 0
    assert not torch.equal(SyntheticSet.load(place, form=form).images, kept)


def test_a_small_npz_cannot_ask_for_much_memory(tmp_path):
    np.savez_compressed(
        tmp_path / "a.npz", images=np.zeros((30, 1024, 1024, 3), np.uint8), labels=np.zeros(30)
    )
    with pytest.raises(UserError, match=r"a.npz is refused: \d+ bytes would unpack to"):
        SyntheticSet.load(tmp_path / "a.npz")
