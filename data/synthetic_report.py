"""What a synthetic set holds, in words and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from data.synthetic import SyntheticSet


def summarize(synthetic: SyntheticSet) -> list[str]:
    """What a set holds, one fact a line."""
    images, targets = synthetic.images, synthetic.targets
    shape = " x ".join(map(str, images.shape[1:]))
    lines = [
        f"images   {len(synthetic)} of {shape} (C x H x W), {_range(images)}",
        f"targets  {_count_targets(targets)}",
        "finite   yes: no NaN or infinite value in images or targets",
    ]
    if synthetic.stats is None:
        lines.append("stats    unknown (give --data_name to de-normalise)")
    else:
        outside = share_outside(synthetic)
        lines.append(f"stats    mean {synthetic.stats.mean}, std {synthetic.stats.std}")
        lines.append(f"pixels   {outside:.2%} outside [0, 1] after de-normalising")
    lines.append(f"data     {synthetic.data_name or 'unknown'}")
    return lines + [f"info     {key}: {json.dumps(value)}" for key, value in synthetic.info.items()]


def _range(values: Tensor) -> str:
    return f"range {values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}"


def share_outside(synthetic: SyntheticSet) -> float:
    """The share of de-normalised values outside [0, 1], which clamping changes."""
    # Half an 8-bit step of tolerance: real pixels return from normalised space with rounding.
    pixels = synthetic.unclamped_pixels() - 0.5
    return float((pixels.abs() > 0.5 + 0.5 / 255).float().mean())


def _count_targets(targets: Tensor) -> str:
    if targets.is_floating_point():
        return f"float vectors of length {targets.shape[1]}, {_range(targets)}"
    classes, counts = (v.tolist() for v in targets.unique(return_counts=True))
    if min(counts) == max(counts):
        return f"class indices, {len(classes)} classes with {counts[0]} each"
    listed = ", ".join(f"{c}: {n}" for c, n in zip(classes[:20], counts[:20], strict=True))
    more = f", ... (from {min(counts)} to {max(counts)} each)" if len(classes) > 20 else ""
    return f"class indices, {len(classes)} classes: {listed}{more}"


def draw(synthetic: SyntheticSet, path: Path, limit: int = 100) -> str:
    """Draw a grid of at most `limit` images spread evenly over the set."""
    from utils.images import save_grid  # torchvision: slow to import, and only drawing needs it

    chosen = torch.linspace(0, len(synthetic) - 1, min(limit, len(synthetic))).round().long()
    if synthetic.stats is None:
        values, how = synthetic.images, "stretched to the full range, the statistics are unknown"
        values = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    else:
        values, how = synthetic.to_pixels(), "de-normalised and clamped"
    save_grid(values[chosen], path)
    return f"grid     {path}: {len(chosen)} of {len(synthetic)} images, {how}"
