"""The target model: the Barlow Twins loss, its two views, and `python -m krr_st.target`."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_target, write_set

from data.load import load_set
from data.specs import Stats
from evaluation.target import Representation, load_target
from krr_st import target as target_module
from krr_st.target import TwoViews, barlow_twins_loss, projector
from utils import checkpoint
from utils.errors import UserError

STATS = Stats((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
PLAIN = Stats((0.0,) * 3, (1.0,) * 3)
CPU = torch.device("cpu")
NET = "convnet_3_4_bn"


def load(path):
    images = SimpleNamespace(img_shape=(3, 8, 8), size=8)
    return load_target(NET, path, images, CPU, data_name="tiny", data_dir=Path("datasets"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(n=6, p=4, dtype=torch.float64, seed=0):
    g = generator(seed)
    z = torch.randn(n, p, generator=g, dtype=torch.float64)
    return z.to(dtype), (z + torch.randn(n, p, generator=g, dtype=torch.float64)).to(dtype)


def double_loop(z1, z2, weight):
    """Equation 1 and 2 of arXiv 2103.03230 with population statistics and eps 1e-5."""
    n, p = z1.shape
    total = 0.0
    for i in range(p):
        for j in range(p):
            a, b = z1[:, i], z2[:, j]
            a_mean, b_mean = sum(a) / n, sum(b) / n
            a_var = sum((v - a_mean) ** 2 for v in a) / n + 1e-5
            b_var = sum((v - b_mean) ** 2 for v in b) / n + 1e-5
            covariance = sum((a[k] - a_mean) * (b[k] - b_mean) for k in range(n)) / n
            c = covariance / math.sqrt(a_var * b_var)
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


@pytest.mark.parametrize("weight", [0.0, 5e-3, 1.0])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3), (9, 1)])
def test_loss_is_the_double_loop(shape, weight):
    z1, z2 = pair(*shape)
    z1, z2 = 3 * z1 + 2, z2 - 5  # the standardisation undoes any scale and offset
    expected = double_loop(z1.numpy(), z2.numpy(), weight)
    assert float(barlow_twins_loss(z1, z2, weight)) == pytest.approx(expected, rel=1e-9)


def test_default_weight_is_the_papers():
    z1, z2 = pair()
    assert torch.equal(barlow_twins_loss(z1, z2), barlow_twins_loss(z1, z2, 5e-3))


def test_perfect_views_with_independent_columns_cost_nothing():
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    assert float(barlow_twins_loss(z, z, 1.0)) < 1e-9
    assert float(barlow_twins_loss(z, -z, 0.0)) == pytest.approx(8, rel=1e-4)  # C_ii = -1 twice
    twice = z[:, :1].expand(4, 2)  # two equal columns: C is all ones
    assert float(barlow_twins_loss(twice, twice, 0.5)) == pytest.approx(0.5 * 2, rel=1e-4)


def test_gradcheck():
    z1, z2 = pair(5, 3)
    assert torch.autograd.gradcheck(
        lambda a, b: barlow_twins_loss(a, b, 0.3), (z1.requires_grad_(), z2.requires_grad_())
    )


def test_half_precision_is_computed_in_float32():
    z1, z2 = pair(dtype=torch.bfloat16)
    value = barlow_twins_loss(z1, z2)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(barlow_twins_loss(z1.double(), z2.double())), 1e-4)


def test_a_constant_column_is_finite():
    z1, z2 = pair(dtype=torch.float32)
    z1 = z1.clone()
    z1[:, 0] = 7.0
    z1.requires_grad_()
    value = barlow_twins_loss(z1, z2)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(z1.grad).all()


@pytest.mark.parametrize(
    ("first", "second"), [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((1, 3), (1, 3)), ((4,), (4,))]
)
def test_shapes_that_do_not_fit(first, second):
    with pytest.raises(ValueError, match="n >= 2"):
        barlow_twins_loss(torch.zeros(first), torch.zeros(second))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projector(layers):
    head = projector(5, 7, layers)
    assert head(torch.randn(4, 5)).shape == (4, 7)
    assert sum(isinstance(m, torch.nn.Linear) for m in head) == layers
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in head) == layers - 1


def views(size=8, channels=3, stats=STATS, hflip=True, min_crop=0.3, jitter=0.5):
    return TwoViews((channels, size, size), stats, hflip=hflip, min_crop=min_crop, jitter=jitter)


def test_two_views_are_reproducible_and_differ():
    x = torch.randint(256, (5, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    state = torch.get_rng_state()
    first, second = views()(x, generator(3))
    again, again_second = views()(x, generator(3))
    other, _ = views()(x, generator(4))
    assert first.shape == second.shape == (5, 3, 8, 8) and first.dtype == torch.float32
    assert torch.equal(first, again) and torch.equal(second, again_second)
    for i in range(5):  # each image has its own two views
        assert not torch.allclose(first[i], second[i]) and not torch.allclose(first[i], other[i])
    assert torch.equal(state, torch.get_rng_state())


def test_following_batches_get_other_views():
    x = torch.rand(2, 3, 8, 8, generator=generator())
    draw, augment = generator(1), views()
    assert not torch.equal(augment(x, draw)[0], augment(x, draw)[0])


def test_views_are_of_their_image_and_normalised_last():
    """A grey image stays its grey under crop, mirror and no jitter: only the statistics show."""
    x = torch.tensor([0.1, 0.4, 0.7]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (STATS.mean, STATS.std))
    for view in views(jitter=0.0)(x, generator()):
        torch.testing.assert_close(view, (x - mean) / std)


def test_uint8_equals_float():
    x = torch.randint(256, (3, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    torch.testing.assert_close(views()(x, generator(1)), views()(x.float() / 255, generator(1)))


@pytest.mark.parametrize("hflip", [True, False])
def test_only_hflip_mirrors(hflip):
    """A ramp rises to the right in every crop; only a mirror makes it fall."""
    ramp = torch.linspace(0, 1, 8).expand(40, 3, 8, 8).contiguous()
    pictures = torch.cat(views(hflip=hflip, jitter=0.0, stats=PLAIN)(ramp, generator()))
    falls = (pictures[:, 0, 4, 0] > pictures[:, 0, 4, -1]).float().mean()
    assert 0.3 < falls < 0.7 if hflip else falls == 0


def test_one_channel_and_no_gradient():
    augment = views(channels=1, stats=Stats((0.5,), (0.5,)))
    x = torch.rand(3, 1, 8, 8, generator=generator(), requires_grad=True)
    first, second = augment(x, generator())
    assert first.shape == (3, 1, 8, 8) and not torch.equal(first, second)
    assert not first.requires_grad and not second.requires_grad


# ------------------------------------------------------------------ python -m krr_st.target


def write_data(root, labels=True, count=12):
    g = generator(7)
    folder = root / "datasets" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("tr", count), ("te", 4)):
        x = torch.randint(256, (n, 3, 8, 8), generator=g, dtype=torch.uint8)
        y = torch.arange(n) % 2
        torch.save(x, folder / f"X_{split}_8.pth")
        if labels:
            torch.save(y, folder / f"Y_{split}_8.pth")


def train_target(root, *more, name="ckpt"):
    flags = f"--data_name tiny --target_model {NET} --epochs 4 --batch_size 5 --seed 3 --device cpu"
    flags += f" --projector_dim 6 --projector_layers 2 --data_dir {root / 'datasets'}"
    flags += f" --save_dir {root / name} --save_every 1 --eval_every 2"
    return target_module.main([*flags.split(), *more])


def result(root, name="ckpt"):
    return torch.load(root / name / f"barlow_twins_{NET}_tiny.pt", weights_only=True)


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_target_command(tmp_path, capsys):
    write_data(tmp_path)
    assert train_target(tmp_path) == 0
    state = result(tmp_path)
    own = Representation(NET, (3, 8, 8)).backbone.state_dict()
    assert state.keys() == own.keys() and not any(k.startswith("fc") for k in state)
    assert state["layers.0.block.1.num_batches_tracked"] == 2 * 4 * 2  # views, epochs, full batches
    folder = tmp_path / "ckpt" / f"barlow_twins_{NET}_tiny"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in log] == [1, 2, 3, 4]
    assert [e["epoch"] for e in log if "knn_accuracy" in e] == [2, 4]
    assert json.loads((folder / "results.json").read_text())["loss"] == log[-1]["loss"]
    assert not (folder / "state.pt").exists()
    capsys.readouterr()
    assert train_target(tmp_path) == 0
    assert "there already" in capsys.readouterr().out
    assert train_target(tmp_path, "--lr", "0.5") == 2
    assert "lr 0.001 -> 0.5" in capsys.readouterr().err
    model = load(tmp_path / "ckpt" / f"barlow_twins_{NET}_tiny.pt")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, model.dim) == (2, 4)


def test_target_never_sees_labels(tmp_path):
    write_data(tmp_path)
    assert train_target(tmp_path) == 0
    for path in (tmp_path / "datasets" / "tiny").glob("Y_*"):
        path.unlink()
    assert train_target(tmp_path, name="unlabelled") == 0
    assert equal_states(result(tmp_path), result(tmp_path, "unlabelled"))
    results = tmp_path / "unlabelled" / f"barlow_twins_{NET}_tiny" / "results.json"
    assert json.loads(results.read_text())["knn_accuracy"] is None


def test_the_bank_of_knn_is_not_the_first_classes_alone(tmp_path, monkeypatch):
    """Sets are often in the order of their classes."""
    folder = write_set(tmp_path, "tiny", train=48, test=24)
    found = []
    for ordered in (False, True):
        if ordered:
            for kind in "XY":
                path = folder / f"{kind}_tr_8.pth"
                order = torch.arange(48).view(12, 4).T.flatten()
                checkpoint.save(checkpoint.load_tensor(path)[order], path)
        monkeypatch.setattr(target_module, "_KNN_ROWS", 24)
        image_set = load_set("tiny", 8, tmp_path)
        found.append(target_module.knn_accuracy(make_target(), image_set, CPU))
    assert found[1] > 90 and abs(found[0] - found[1]) < 10


@pytest.mark.parametrize(("save_every", "saved"), [(1, 2), (3, 0)])
def test_target_interrupted_and_resumed(tmp_path, monkeypatch, capsys, save_every, saved):
    write_data(tmp_path)
    assert train_target(tmp_path) == 0
    loss, calls = target_module.barlow_twins_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:  # two steps an epoch: in the third epoch
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(target_module, "barlow_twins_loss", killed)
        assert train_target(tmp_path, "--save_every", str(save_every), name="stopped") == 130
    assert train_target(tmp_path, "--save_every", str(save_every), name="stopped") == 0
    assert (f"resuming after epoch {saved} of 4" in capsys.readouterr().out) == (saved > 0)
    assert equal_states(result(tmp_path), result(tmp_path, "stopped"))

    def log(name):
        path = tmp_path / name / f"barlow_twins_{NET}_tiny" / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    assert log("stopped") == log("ckpt")


def checkpoint_file(tmp_path, change):
    state = Representation(NET, (3, 8, 8)).backbone.state_dict()
    change(state)
    path = tmp_path / "target.pt"
    checkpoint.save(state, path)
    return path


def test_load_target_ignores_the_head_alone(tmp_path):
    path = checkpoint_file(tmp_path, lambda s: s.update({"fc.weight": torch.zeros(7, 4)}))
    load(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("layers.1.block.0.bias"), "missing layers.1.block.0.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update({"layers.0.block.0.bias": torch.zeros(9)}), r"\(9,\), expected \(3,\)"),
    ],
)
def test_load_target_names_what_does_not_fit(tmp_path, change, named):
    with pytest.raises(UserError, match=named):
        load(checkpoint_file(tmp_path, change))


def test_load_target_says_how_to_make_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=rf"make it with: python -m krr_st\.target .*--target_model {NET} "):
        load(tmp_path / "no.pt")
