"""Degenerate numbers: finite results or one clear line, and a loss that is not finite stops."""

import contextlib
import io
import shutil

import pytest
import torch
from conftest import write_set
from fault_commands import NET, module, write_tiny

from clom.matching import METRICS, distribution_distance, gradient_distance
from data.loader import TensorLoader
from evaluation.fit import Trainer
from evaluation.recipes import sgd_by_epochs
from krr_st.loss import krr_loss
from utils import checkpoint
from utils.errors import UserError

KRR = (
    "train.py",
    f"--data_name tiny --img_size 8 --device cpu --seed 0 --target_model {NET} "
    f"--train_model {NET} --num_models 1 --online_iteration 2 --outer_iteration 3 "
    "--outer_batch_size 16 --pre_epoch 1 --test_iteration 1 --exp_name run",
    "results/run/?_syn.pt",
)
DC = (
    "methods/DC_DSA_DM/main.py",
    "--dataset CIFAR10 --img_size 8 --model ConvNetD1 --device cpu "
    "--seed 0 --ipc 1 --batch_real 2 --num_eval 1 --Iteration 2 --epoch_eval_train 1 "
    "--outer_loop 2 --inner_loop 1 --save_path run",
    "run/res_*.pt",
)
TARGET = (
    "krr_st.target",
    f"--data_name tiny --img_size 8 --device cpu --seed 0 --target_model {NET} "
    "--epochs 2 --batch_size 10 --projector_dim 4 --save_dir made",
    "made/*.pt",
)


def same_pictures(images):
    return images[:1].expand_as(images).contiguous()


PICTURES = {
    "black": torch.zeros_like,
    "all the same": same_pictures,
    "one bright picture": lambda images: torch.zeros_like(images).index_fill(0, torch.tensor([0]), 255),
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [t for v in inner if isinstance(v, torch.Tensor | dict | list | tuple) for t in tensors(v)]


def finite_or_one_line(folder, command):
    """Whether the results are finite (True) or the command refused in one line (False)."""
    script, flags, made = command
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = module(script).main(flags.split())
    if code == 2:
        (line,) = errors.getvalue().splitlines()
        assert line.startswith("error:") and "nan" not in line.split(";")[0].lower().split()
        return False
    assert code == 0
    found = [t for path in folder.glob(made) for t in tensors(checkpoint.load(path))]
    assert found and all(t.isfinite().all() for t in found)
    return True


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_tiny(folder)
    write_set(folder / "datasets", "cifar10", train=30, test=10, classes=10)
    return folder


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(good, folder)
    for path in folder.glob("datasets/*/meta.json"):
        path.unlink()  # statistics are measured from the pictures of the test
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("command", [KRR, DC, TARGET], ids=["train", "main", "target"])
def test_constant_and_equal_pictures(here, monkeypatch, command, pictures):
    """Kernels of rank one, gradients of zero, BatchNorm without variance."""
    for path in here.glob("datasets/*/X_*_8.pth"):
        checkpoint.save(PICTURES[pictures](checkpoint.load(path)), path)
    flags = command[1] + (" --num_images 8" if command is KRR else "")
    assert finite_or_one_line(here, (command[0], flags, command[2]))


def test_one_image(here):
    """M = 1: a kernel of one number."""
    assert finite_or_one_line(here, (KRR[0], KRR[1] + " --num_images 1", KRR[2]))


@pytest.mark.parametrize("method", ["DC", "DSA", "DM"])
@pytest.mark.parametrize("init", ["noise", "real"])
def test_a_class_without_pictures(here, method, init):
    path = here / "datasets/cifar10/Y_tr_8.pth"
    labels = checkpoint.load(path)
    checkpoint.save(torch.where(labels == 3, 4, labels), path)
    flags = f"{DC[1]} --method {method} --init {init}"
    assert not finite_or_one_line(here, (DC[0], flags, DC[2]))


@pytest.mark.parametrize("method", ["DC", "DSA", "DM"])
def test_one_picture_a_class(here, method):
    for name in ("X", "Y"):
        path = here / f"datasets/cifar10/{name}_tr_8.pth"
        checkpoint.save(checkpoint.load(path)[:10].clone(), path)
    assert finite_or_one_line(here, (DC[0], f"{DC[1]} --method {method} --init real", DC[2]))


# ------------------------------------------------------------------ the functions themselves


@pytest.mark.parametrize("ridge", [1e-6, 1e-12])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e6])
@pytest.mark.parametrize("rows", ["equal", "doubled", "zero"])
def test_krr_loss_of_singular_kernels(rows, scale, ridge):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, generator=generator) * scale
    x = {"equal": x[:1].repeat(8, 1), "doubled": x[:4].repeat(2, 1), "zero": 0 * x}[rows]
    x.requires_grad_()
    y = torch.randn(8, 3, generator=generator, requires_grad=True)
    real, wanted = torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)
    loss = krr_loss(real, wanted, x, y, ridge)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and y.grad.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("zero", ["one", "other", "both"])
def test_gradient_distance_of_zero_gradients(metric, zero):
    shape = (4, 3)
    one = torch.zeros(shape) if zero != "other" else torch.randn(shape)
    other = torch.zeros(shape) if zero != "one" else torch.randn(shape)
    one.requires_grad_()
    # A bias beside it: "ours" leaves it out.
    value = gradient_distance([one, one.sum(1)], [other, other.sum(1)], metric)
    value.backward()
    assert value.isfinite() and one.grad.isfinite().all()


def test_class_means_of_an_empty_class_are_refused():
    with pytest.raises(ValueError, match="class counts"):
        distribution_distance(torch.zeros(3, 2), torch.zeros(2, 2), [3, 0], [1, 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [1, 4])
def test_a_loss_that_is_not_finite_is_caught_in_its_step(value, step):
    steps = []

    def spoil(x, generator):
        steps.append(1)
        return x * value if len(steps) == step else x

    def loss(model, x, y):
        return (model(x) - y).abs().sum() if value > 0 else model(x).sum() * 1.0

    loader = TensorLoader(
        torch.ones(3, 2),
        torch.zeros(3, 1),
        batch_size=3,
        device=torch.device("cpu"),
        generator=torch.Generator(),
        transform=spoil,
    )
    recipe = sgd_by_epochs(9, 0.1, 0.0, 0.0, 3)
    with pytest.raises(UserError, match=f"step {step}"):
        Trainer(torch.nn.Linear(2, 1), loader, recipe, loss_fn=loss).run()
    assert len(steps) == step
