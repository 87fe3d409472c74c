"""Steps never make the host wait for the device: a full queue and CUDA graphs need that.

The device here is `meta`. Its tensors have no values, so that reading one raises by itself; a copy that
would block on CUDA is found where it is dispatched.
"""

from contextlib import nullcontext

import pytest
import torch
from conftest import make_krrst, resolved, write_set
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clom.loss import CLoM
from clom.pool import RealFeatures
from data.augment.dc import dc_augment
from data.load import load_set
from data.real_data import RealImages
from distillation.problem import Problem
from evaluation import fit
from krr_st.views import TargetViews
from methods import METHODS
from models import get_network
from utils.device import upload
from utils.progress import LossWindow

META = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NoTensors(TorchFunctionMode):
    """Raises where torch.tensor copies a value to the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        assert function is not torch.tensor or device.type == "cpu", "torch.tensor waits for the copy"
        return function(*args, **kwargs)


class NoWaiting(TorchDispatchMode):
    """Raises where an operation would make the host wait for the device, or mixes devices."""

    def __enter__(self):
        self.tensors = NoTensors().__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.tensors.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        to = kwargs.get("device") or (tensors[0].device if tensors else None)
        devices = {t.device.type for t in tensors if t.dim() or t.is_meta} | ({to.type} if to else set())
        if len(devices) > 1:
            assert function in COPIES, f"{function} takes tensors of two devices"
            assert to == META, f"{function} brings a tensor back to the host"
            assert kwargs.get("non_blocking") or args[2:] == (True,), f"{function} waits for the copy"
        return function(*args, **kwargs)


@pytest.fixture
def image_set(workspace, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know `meta`
    write_set("datasets", "tiny", train=40, test=8)
    return load_set("tiny", 8, "datasets")


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: t.cpu(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t + torch.ones(3),
        lambda t: t[torch.tensor([0, 1])],
        lambda t: torch.ones(3).to(t.device),
        lambda t: t.copy_(torch.ones(3)),
        lambda t: torch.tensor([1.0, 2.0], device=t.device),
        lambda t: torch.bincount(t.long(), minlength=3),
    ],
)
def test_what_waits_is_found(wait):
    t = torch.ones(3, device=META)
    with NoWaiting():
        assert upload(torch.ones(3), META).add_(t).is_meta
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            wait(t)


def steps(distiller, count=1):
    distiller.step()  # what is kept for later steps may wait
    with NoWaiting():
        for _ in range(count):
            loss = distiller.step()["loss"]
    assert loss.is_meta and loss.shape == ()


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(pool_mixup=True, outer_grad_norm=1.0, online_opt="adam"),
        dict(views=3, blend=True, hybrid=True, view_batch=5),
        dict(outer_batch_size=64, online_iteration=1),  # a new pass and a new network at every step
    ],
)
@pytest.mark.parametrize("table", [False, True])
def test_krr_st(image_set, table, changes):
    distiller = make_krrst(image_set, device=META, **changes)
    if table:
        known = torch.ones(40 * 18, dtype=torch.bool)
        entries = torch.empty(len(known), distiller.problem.target.dim, device=META)
        distiller.targets = TargetViews(distiller.problem.target, entries, 18, known)
    steps(distiller, 2)


KERNEL = dict(data_name="tiny", num_images=8, outer_batch_size=16, num_models=2, init="noise", zca=False)
MATCHING = dict(dataset="tiny", ipc=2, batch_real=4, batch_train=4, outer_loop=2, inner_loop=1)
FLAGS = {
    "frepo": dict(KERNEL, train_model="convnet_4_none", online_iteration=2),
    "kip": dict(KERNEL, train_model="convnet_4_none", num_batches=2),
    "dc": dict(MATCHING, model="ConvNetD1"),
    "dsa": dict(MATCHING, model="ConvNetBN", outer_loop=1, CLoM_distance="ce"),
    "dm": dict(MATCHING, model="ConvNetD1", CLoM_distance="cos"),
}


class NoGuard:
    """In place of FiniteGuard, which on CUDA reads a loss one step later, from pinned memory."""

    def __init__(self, what):
        self.check = lambda loss, step: None
        self.flush = lambda: None


@pytest.mark.parametrize("name", FLAGS)
def test_labelled_methods(image_set, monkeypatch, name):
    monkeypatch.setattr(fit, "FiniteGuard", NoGuard)
    real, row, flags = RealImages.from_set(image_set, META), METHODS[name], resolved(name, **FLAGS[name])
    extra = None
    if "CLoM_distance" in FLAGS[name]:
        teacher = get_network("ConvNetD1", 3, 4, (8, 8)).to(META)
        extra = CLoM(teacher, distance=flags.CLoM_distance, real=RealFeatures(real))
    steps(row.distiller(Problem(image_set, META, 0, real=real, extra=extra), flags))


def test_augmentation_of_evaluation_networks():
    with NoWaiting():
        x = upload(torch.randn(32, 3, 8, 8), META)
        for name in ("crop_scale_rotate_noise", "crop_noise"):
            assert dc_augment(x, name, torch.Generator().manual_seed(0)).is_meta


def test_a_loss_window_mixes_devices_after_a_resume():
    window = LossWindow(3)
    window.load_state_dict({"losses": [1.0, 2.0]})  # on the CPU
    window.add(torch.ones((), device=META))
    with pytest.raises(NotImplementedError, match="meta"):  # all there; only reading it is too much
        window.state_dict()
