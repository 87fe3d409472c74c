"""Foundation models of the transformers library as CLoM models: `hf:NAME_OR_FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clom.teachers import Family, Space, Teacher
from data.specs import Stats
from utils.errors import UserError

PREFIX = "hf:"


class ImageTower(nn.Module):
    """The image side of a transformers model: pixels in its own normalisation -> features.

    Uses the projected image embedding where the model has one (CLIP, SigLIP), else the pooled
    output, else the class token or the mean over positions.

    Args:
        model: any vision or vision-language model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.joint = hasattr(model, "get_image_features")
        if self.joint and hasattr(model, "text_model"):
            model.text_model = nn.Identity()  # never asked; its weights would only take memory
        self.model = model

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> features (B, D)."""
        ask = self.model.get_image_features if self.joint else self.model
        out = ask(pixel_values=x)
        if not isinstance(out, Tensor):
            pooled = getattr(out, "pooler_output", None)
            out = pooled if pooled is not None else _from_positions(out.last_hidden_state)
        return out.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """There are no logits; the same as `embed`."""
        return self.embed(x)


def _from_positions(hidden: Tensor) -> Tensor:
    """(B, T, D) tokens -> the class token; (B, D, h, w) maps -> their mean."""
    return hidden[:, 0] if hidden.dim() == 3 else hidden.mean((2, 3))


def load_foundation(name: str, *, alpha: float, given: Space, device: torch.device) -> Family:
    """Load `hf:NAME_OR_FOLDER` for images of the space `given`.

    Images are de-normalised, made three-channel, resized (bicubic, antialiased, differentiable) to
    the model's input size and normalised with the model's own statistics.

    Args:
        name: with or without the prefix.
        alpha: weight of CLoM under this model.
        given: space of real and synthetic images.
        device: where to compute.

    Raises:
        UserError: transformers cannot load it, or it takes no images.
    """
    place = name.removeprefix(PREFIX)
    if place.startswith((".", "/", "~")) and not Path(place).is_dir():
        raise UserError(f"{name}: there is no folder {place}")
    try:
        from transformers import AutoImageProcessor, AutoModel

        model = AutoModel.from_pretrained(place)
        processor = AutoImageProcessor.from_pretrained(place)
    except Exception as error:  # the library raises many types on missing or damaged models
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"transformers cannot load {place!r} as a vision model ({reason})"
        ) from None
    own = _own_space(place, model, processor)
    tower = ImageTower(model.float())
    return Family(name, alpha, (Teacher(tower, own, given, "bicubic").to(device),))


def _own_space(place: str, model: nn.Module, processor: Any) -> Space:
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    if mean is None or std is None or len(mean) != 3:
        raise UserError(
            f"{place!r} states no mean and std of three channels; is it a vision model?"
        )
    vision = getattr(model.config, "vision_config", model.config)
    sizes = (
        getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", 0) else None,
        getattr(processor, "size", None),
        getattr(vision, "image_size", None),
    )
    size = next((s for s in map(_side, sizes) if s is not None), None)
    if size is None:
        raise UserError(f"{place!r} states no input size")
    return Space(Stats(tuple(mean), tuple(std)), 3, size)


def _side(size: Any) -> tuple[int, int] | None:
    """The library's many ways to write an image size -> (height, width)."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    if hasattr(size, "keys") or hasattr(size, "height"):
        read = size.get if hasattr(size, "get") else lambda key: getattr(size, key, None)
        if read("height") and read("width"):
            return int(read("height")), int(read("width"))
        if read("shortest_edge"):
            return int(read("shortest_edge")), int(read("shortest_edge"))
    return None
