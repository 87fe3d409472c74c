"""Transfer learning (Tables 1-3, Figure 3): the driver behind test.py and test_scratch.py."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
from data.dsa import without_flip
from data.load import ImageSet, ImageSplit
from data.meta import read_meta
from data.specs import KRR_SPECS
from data.synthetic import SyntheticSet
from evaluation.probe import few_shot_indices, label_fraction_indices
from evaluation.protocols import finetune, frozen_accuracy, outputs, pretrain
from evaluation.recipes import SCRATCH, Recipe, finetune_recipe, pretrain_recipe
from krr_st.config import KdFlags, ScratchFlags, TestFlags
from krr_st.measures import TARGET_ERROR, Measure, describe, summarize, table, wanted_measures
from krr_st.presets import Preset, resolve_preset, resolve_targets
from krr_st.target_error import TargetFeatures
from krr_st.target_model import load_target, resolve_checkpoint, target_command
from models import get_model
from utils import cli
from utils.cells import CellStore
from utils.checkpoint import apply_state, fingerprint
from utils.device import place, resolve_device
from utils.errors import UserError
from utils.memory import out_of_memory_says
from utils.runlog import environment, write_json
from utils.seed import derive_seed, local_seed, make_generator, resolve_seed


@dataclass(frozen=True)
class Pretraining:
    """A synthetic set and how it trains a network; None in its place means: from scratch."""

    synthetic: SyntheticSet
    recipe: Recipe
    outputs: int
    scale: float


def build_backbone(
    arch: str,
    img_shape: tuple[int, int, int],
    pretraining: Pretraining | None,
    *,
    dropout: float,
    seed: int,
    device: torch.device,
    width: int = 1,
) -> nn.Module:
    """A network initialised from `seed`, pre-trained unless `pretraining` is None; eval mode.

    `width` is the number of outputs where no pre-training says it.
    """
    outputs_wanted = pretraining.outputs if pretraining else width
    with local_seed(derive_seed(seed, "network")):
        model = place(get_model(arch, img_shape, outputs_wanted, dropout), device)
        if pretraining is not None:
            pretrain(
                model, pretraining.synthetic, pretraining.recipe, device=device,
                generator=make_generator(seed, "pre-training"), scale=pretraining.scale,
            )  # fmt: skip
    return model.eval()


def labelled_indices(target: ImageSet, shots: str, fraction: float | None, seed: int) -> Tensor:
    """Which labelled images a cell may use: a draw from `seed` alone, so the same for all methods.

    Args:
        target: its training split has the labels.
        shots: images a class, or "all".
        fraction: share of each class instead, or None.
        seed: of the repetition.

    Raises:
        UserError: a class has fewer images than `shots`.
    """
    labels = target.train.labels
    generator = make_generator(seed, "labelled subset", shots, fraction)
    if fraction is not None:
        return label_fraction_indices(labels, fraction, generator)
    if shots == "all":
        return torch.arange(len(labels))
    try:
        return few_shot_indices(labels, int(shots), generator)
    except UserError as error:
        raise UserError(f"{target.name}: {error}") from None


class TargetTask:
    """One target set met by one pre-trained network: features are computed at most once."""

    def __init__(self, backbone: nn.Module, arch: str, target: ImageSet, device: torch.device):
        self.backbone, self.arch, self.target, self.device = backbone, arch, target, device
        self._read = {"body": backbone.embed, "outputs": backbone}
        self._kept: dict[tuple[str, str], Tensor] = {}

    def frozen(self, protocol: str, index: Tensor, on: str = "body") -> float:
        """Test accuracy in % of a classifier on frozen features of the images at `index`."""
        train, test = self.target.train, self.target.test
        if ("train", on) not in self._kept and 4 * len(index) < len(train):
            # few: the others' features may never be asked for
            features = self._compute(train.images[index], on)
        else:
            features = self.features("train", on)[index.to(self.device)]
        return frozen_accuracy(
            protocol, features, train.labels[index], self.features("test", on), test.labels,
            self.target.num_classes,
        )  # fmt: skip

    def features(self, split: str, on: str) -> Tensor:
        """Body features or outputs for a split, "train" or "test": (N, D) on the device."""
        if (split, on) not in self._kept:
            self._kept[split, on] = self._compute(getattr(self.target, split).images, on)
        return self._kept[split, on]

    def _compute(self, images: Tensor, on: str) -> Tensor:
        return outputs(self._read[on], images, self.target, self.device)

    def finetuned(
        self, index: Tensor, recipe: Recipe, *, dropout: float, scale: float, seed: int
    ) -> float:
        """Test accuracy in % after fine-tuning a copy on the images at `index`."""
        target, train = self.target, self.target.train
        if len(index) < len(train):
            train = ImageSplit(train.images[index], train.labels[index], train.path)
        with local_seed(derive_seed(seed, "head", target.name)):
            model = get_model(self.arch, target.img_shape, target.num_classes, dropout)
            apply_state(
                model, self.backbone.state_dict(), origin="the pre-trained network", skip=("fc.",)
            )
            return finetune(
                place(model, self.device), target, train, recipe, device=self.device,
                generator=make_generator(seed, "fine-tuning", target.name), scale=scale,
            )  # fmt: skip


def may_mirror(name: str, data_dir: Path) -> bool:
    """Whether mirror images of a set mean the same: its row says so, or its meta.json if any."""
    spec = KRR_SPECS.get(name)
    return spec.hflip if spec else bool(read_meta(Path(data_dir) / name).get("hflip", True))


def source_classes(name: str, data_dir: Path) -> int:
    """How many classes a source has by its row, else its meta.json; 0 where neither says it."""
    spec = KRR_SPECS.get(name)
    return spec.num_classes if spec else len(read_meta(data_dir / name).get("class_names") or ())


def load_pretraining(flags: TestFlags | KdFlags, size: int, arch: str) -> Pretraining:
    """The synthetic set of a method and the recipe that belongs to it, with the flags put in.

    Raises:
        UserError: unknown method, missing or damaged set, one of another image size or with
            labels that the source does not have.
    """
    kd = isinstance(flags, KdFlags)
    recipe = pretrain_recipe(flags.method, flags.source_data_name, arch, kd=kd).override(
        epochs=flags.pre_epoch, steps=flags.pre_iteration, optimizer=flags.pre_opt,
        lr=flags.pre_lr, wd=flags.pre_wd, batch_size=flags.pre_batch_size, dsa=flags.pre_dsa,
        momentum=flags.pre_momentum, schedule=flags.pre_schedule, warmup=flags.pre_warmup,
    )  # fmt: skip
    if flags.pre_dsa is None and not may_mirror(flags.source_data_name, flags.data_dir):
        recipe = recipe.override(dsa=without_flip(recipe.dsa))
    path = flags.synthetic_path
    if path is None:
        path = flags.synthetic_data_dir / flags.source_data_name / flags.method
    synthetic = SyntheticSet.load(path)
    if synthetic.images.shape[2:] != (size, size):
        raise UserError(
            f"{path} holds images of {tuple(synthetic.images.shape[2:])} pixels, "
            f"expected {size} x {size}; see --img_size"
        )
    wanted = "class indices" if recipe.loss == "cross_entropy" else "float vectors"
    if synthetic.soft == (recipe.loss == "cross_entropy"):
        raise UserError(f"{path}: method {flags.method} is pre-trained on {wanted}, found others")
    if synthetic.soft:
        return Pretraining(synthetic, recipe, synthetic.targets.shape[1], flags.steps_scale)
    seen = int(synthetic.targets.max()) + 1
    classes = source_classes(flags.source_data_name, flags.data_dir) or seen
    if seen > classes:
        raise UserError(
            f"{path} holds label {seen - 1}, but {flags.source_data_name} has {classes} classes"
        )
    return Pretraining(synthetic, recipe, classes, flags.steps_scale)


def load_targets(
    names: tuple[str, ...], size: int, data_dir: Path, img_shape: tuple[int, ...] | None
) -> list[ImageSet]:
    """Read every target once; of a set that has no test split the training split stands in.

    Args:
        names: of the targets.
        size: side of their images.
        data_dir: folder of the prepared tensors.
        img_shape: (C, H, W) that one network takes; None: the first target's.

    Raises:
        UserError: a set that is missing, lacks labels or a test split, or has other channels.
    """
    targets: list[ImageSet] = []
    for name in names:
        target = data.load(name, size, data_dir)
        if target.test is None and name in KRR_SPECS and not KRR_SPECS[name].has_test:
            print(f"{name} has no test split: accuracies on it are those of its training images")
            target = replace(target, test=target.train)
        if target.num_classes is None or target.test is None or target.test.labels is None:
            what = "test split" if target.test is None else "labels in each split"
            raise UserError(f"{target.train.path.parent} has no {what}; a target needs both")
        wanted = img_shape or (targets or [target])[0].img_shape
        if target.img_shape != wanted:
            raise UserError(
                f"images of {name} are {target.img_shape}, those the network is made for {wanted}"
            )
        targets.append(target)
    return targets


def run_transfer(flags: ScratchFlags) -> int:
    """Measure every (target, labels, seed) cell, print the table, write results.json.

    Args:
        flags: of test_scratch.py, or TestFlags with a method.

    Raises:
        UserError: bad flags, data or synthetic set; finished cells stay in results.jsonl.
    """
    measures = wanted_measures(flags)
    preset = resolve_preset(flags.source_data_name, flags.data_dir, flags.img_size)
    arch = preset.network if flags.test_model == "base" else flags.test_model.lower()
    method = flags.method if isinstance(flags, TestFlags) else SCRATCH
    device = resolve_device(flags.device, flags.gpu_id)
    seed = resolve_seed(flags.seed)
    pretraining = None
    if isinstance(flags, TestFlags):
        pretraining = load_pretraining(flags, preset.size, arch)
    names = resolve_targets(flags.source_data_name, flags.target_data_name, flags.data_dir)
    shape = tuple(pretraining.synthetic.images.shape[1:]) if pretraining else None
    targets = load_targets(names, preset.size, flags.data_dir, shape)
    for target in targets:  # what cannot be measured is said before anything is trained
        get_model(arch, target.img_shape, target.num_classes)
        for measure in measures:
            labelled_indices(target, measure.shots, flags.label_fraction, seed)
    features = {}
    if flags.target_error or (pretraining is None and flags.probe_on != "body"):
        features = load_target_features(flags, preset, targets, pretraining, device)
    store = CellStore(flags.log_dir / "results.jsonl")
    if pretraining is not None:
        print(f"pre-training: {pretraining.recipe}")
    settings = cell_settings(flags, method, arch, preset.size, pretraining)
    cells = []
    with out_of_memory_says(device, "lower --pre_batch_size or --finetune_batch_size"):
        for repetition in range(flags.num_test):
            cells += run_repetition(
                seed + repetition, targets, measures, features, flags, arch, pretraining, settings,
                store, device,
            )  # fmt: skip
    folder = flags.log_dir / flags.source_data_name / method / arch / flags.protocol
    write_json(folder / "results.json", {
        "flags": cli.as_json(flags), "environment": environment(device),
        "summary": summarize(cells), "cells": cells,
    })  # fmt: skip
    print(table(cells, flags))
    print(f"results: {folder / 'results.json'}")
    return 0


def cell_settings(
    flags: ScratchFlags, method: str, arch: str, size: int, pretraining: Pretraining | None
) -> dict[str, Any]:
    """Everything but target, labels and seed that a cell's value depends on."""
    settings: dict[str, Any] = {
        "source": flags.source_data_name, "method": method, "model": arch, "size": size,
        "protocol": flags.protocol, "label_fraction": flags.label_fraction,
        "dropout": flags.dropout, "steps_scale": flags.steps_scale,
    }  # fmt: skip
    if pretraining is not None:
        synthetic = pretraining.synthetic
        settings["pretraining"] = asdict(pretraining.recipe)
        settings["synthetic_set"] = fingerprint(synthetic.images, synthetic.targets)
    return settings


def load_target_features(
    flags: ScratchFlags,
    preset: Preset,
    targets: list[ImageSet],
    pretraining: Pretraining | None,
    device: torch.device,
) -> dict[str, TargetFeatures]:
    """Name of a target set -> its features under the source's target model.

    Raises:
        UserError: no target model, or a pre-training that does not lead to its features.
    """
    name = flags.target_model or preset.target_model
    path = resolve_checkpoint(name, flags.target_ckpt, flags.source_data_name)
    hint = target_command(name, flags.source_data_name, preset.size, flags.data_dir)
    found = {}
    for target in targets:
        model = load_target(name, path, target.img_shape, device, hint, target.stats)
        found[target.name] = TargetFeatures(model, target, device)
        if pretraining is None or (pretraining.synthetic.soft and pretraining.outputs == model.dim):
            continue
        kind = "target vectors" if pretraining.synthetic.soft else "class labels"
        raise UserError(
            f"--target_error: the synthetic set has {kind} for {pretraining.outputs} outputs; "
            f"expected the {model.dim} features of target model {name}"
        )
    return found


def run_repetition(
    seed: int,
    targets: list[ImageSet],
    measures: list[Measure],
    features: dict[str, TargetFeatures],
    flags: ScratchFlags,
    arch: str,
    pretraining: Pretraining | None,
    settings: dict[str, Any],
    store: CellStore,
    device: torch.device,
) -> list[dict[str, Any]]:
    """All cells of one seed: one pre-trained network serves every target."""
    cells, backbone = [], None
    width = pretraining.outputs if pretraining else next((f.dim for f in features.values()), 1)
    for target in targets:
        task = None
        recipe = finetune_recipe(target.name, arch, target.size).override(
            steps=flags.finetune_iteration, optimizer=flags.finetune_opt, lr=flags.finetune_lr,
            wd=flags.finetune_wd, batch_size=flags.finetune_batch_size,
            momentum=flags.finetune_momentum, schedule=flags.finetune_schedule,
        )  # fmt: skip
        if flags.protocol == "finetune":
            augmentation = "crop and flip" if target.hflip else "crop"
            print(f"fine-tuning on {target.name}: {recipe}, {augmentation}")
        for measure in measures:
            key = {**settings, "protocol": measure.protocol, "target": target.name,
                   "shots": measure.shots, "seed": seed}  # fmt: skip
            if measure.on == "outputs":
                key |= {
                    "probe_on": "outputs",
                    "width": pretraining.outputs if pretraining else width,
                }
            if measure.protocol == "finetune":
                key["finetuning"] = asdict(recipe)
            if target.test is target.train:
                key["tested_on"] = "training images"
            if measure.protocol == TARGET_ERROR:
                key |= {"target_model": features[target.name].digest, "label_fraction": None}
            cell = store.get(key)
            if cell is not None:
                print(f"{describe(cell)} (kept)")
                cells.append(cell)
                continue
            began = time.perf_counter()
            index = labelled_indices(target, measure.shots, flags.label_fraction, seed)
            if backbone is None:
                backbone = build_backbone(
                    arch, target.img_shape, pretraining, dropout=flags.dropout,
                    seed=seed, device=device, width=width,
                )  # fmt: skip
            task = task or TargetTask(backbone, arch, target, device)
            if measure.protocol == "finetune":
                value = task.finetuned(
                    index, recipe, dropout=flags.dropout, scale=flags.steps_scale, seed=seed
                )
                found = {"accuracy": value, "labelled": len(index)}
            elif measure.protocol == TARGET_ERROR:
                found = {"error": features[target.name].error(task.features("test", "outputs"))}
            else:
                value = task.frozen(measure.protocol, index, measure.on)
                found = {"accuracy": value, "labelled": len(index)}
            cells.append(store.add(key, **found, seconds=time.perf_counter() - began))
            print(describe(cells[-1]), flush=True)
    return cells
