"""The registry of distillation methods: one row each, and nowhere else is a method named."""

from clom.config import DistillFlags
from clom.dc import GradientMatching
from clom.dm import DistributionMatching
from clom.setup import MatchingSetup
from distillation.run import Method
from krr_st import frepo, kip
from krr_st.config import RECIPES, FRePoFlags, KIPFlags, TrainFlags
from krr_st.krr_st import KRRST
from krr_st.setup import KernelSetup, KRRSTSetup
from trajectory.mkdt import MKDT, MKDTFlags
from trajectory.mtt import MTT, MTTFlags
from trajectory.setup import TrajectorySetup
from utils.errors import pick

_MATCHING = dict(Iteration=1000, lr_img=0.1, init="noise")

ROWS = (
    Method(
        "KRR_ST",
        KRRST,
        KRRSTSetup,
        TrainFlags,
        "kernel ridge regression to self-supervised targets (ICLR 2024)",
        recipes=RECIPES,
        labels="features",
    ),
    Method(
        "FRePo",
        frepo.FRePo,
        KernelSetup,
        FRePoFlags,
        "kernel ridge regression on trained features to class labels (NeurIPS 2022)",
        published=frepo.published,
    ),
    Method(
        "KIP",
        kip.KIP,
        KernelSetup,
        KIPFlags,
        "kernel regression with random features: RFAD (NeurIPS 2022), after KIP",
        published=kip.published,
    ),
    Method("DC", GradientMatching, MatchingSetup, DistillFlags, "gradient matching (ICLR 2021)", _MATCHING),
    Method(
        "DSA",
        GradientMatching,
        MatchingSetup,
        DistillFlags,
        "gradient matching with siamese augmentation (ICML 2021)",
        _MATCHING,
        lambda dataset, ipc: {"init": "real"},
        augments=True,
    ),
    Method(
        "DM",
        DistributionMatching,
        MatchingSetup,
        DistillFlags,
        "distribution matching (WACV 2023)",
        dict(Iteration=20000, lr_img=1.0, init="real"),
        lambda dataset, ipc: {"lr_img": 10.0} if dataset == "CIFAR10" and ipc >= 100 else {},
        augments=True,
        mirrors=True,
    ),
    Method(
        "MTT",
        MTT,
        TrajectorySetup,
        MTTFlags,
        "matching training trajectories (CVPR 2022); DATM with --recipe datm",
        recipes={"published": {}, "datm": {}},
    ),
    Method(
        "MKDT",
        MKDT,
        TrajectorySetup,
        MKDTFlags,
        "matching trajectories of knowledge distillation (ICLR 2025)",
        labels="features",
    ),
)
METHODS: dict[str, Method] = {row.name.lower(): row for row in ROWS}


def find_method(name: str) -> Method:
    """The row of a method, by its name without regard to case.

    Raises:
        UserError: unknown name; the message lists the valid ones.
    """
    return pick(METHODS, name.lower(), "--method")
