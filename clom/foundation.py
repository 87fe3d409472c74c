"""Foundation models of the transformers library as CLoM models: `hf:NAME_OR_FOLDER`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clom.teachers import Family, Space, Teacher
from data.specs import Stats
from utils.errors import UserError
from utils.seed import local_seed

PREFIX = "hf:"


class ImageTower(nn.Module):
    """The image side of a transformers model: pixels in its own normalisation -> features.

    Uses the projected image embedding where the model has one (CLIP, SigLIP), else the pooled
    output if it was trained, else the class token, else the mean over positions. A masked
    autoencoder sees every patch.

    Args:
        model: any vision or vision-language model.
        missing: its weights that the checkpoint lacks.

    Raises:
        UserError: the image side lacks weights other than a pooler's.
    """

    def __init__(self, model: nn.Module, missing: set[str] = frozenset()) -> None:
        super().__init__()
        self.joint = hasattr(model, "get_image_features")
        if self.joint and hasattr(model, "text_model"):
            model.text_model = nn.Identity()  # never asked; its weights would only take memory
        self.masked = hasattr(model.config, "mask_ratio")
        if self.masked:
            model.config.mask_ratio = 0.0
        needed = {key for key in missing if not self.joint or key.startswith("vis")}
        # Checkpoints of classifiers have no pooler: a random one would be no pre-trained feature.
        self.pooled = not any(key.startswith("pooler.") for key in needed)
        needed = {k for k in needed if not k.startswith("pooler.") and not k.endswith("mask_token")}
        if needed:
            shown = ", ".join(sorted(needed)[:3])
            raise UserError(f"the checkpoint lacks {len(needed)} weights, such as {shown}")
        names = [name for name, _ in model.named_parameters()]
        self.has_token = any(name.endswith(("cls_token", "class_embedding")) for name in names)
        self.model = model

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> features (B, D)."""
        ask = self.model.get_image_features if self.joint else self.model
        out = ask(pixel_values=x, **self._mask(x))
        if not isinstance(out, Tensor):
            pooled = getattr(out, "pooler_output", None) if self.pooled else None
            out = self._from_positions(out.last_hidden_state) if pooled is None else pooled
        return out.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """There are no logits; the same as `embed`."""
        return self.embed(x)

    def _mask(self, x: Tensor) -> dict[str, Tensor]:
        """Patches are ordered by this noise, which would be drawn: a ramp keeps their order."""
        if not self.masked:
            return {}
        patches = self.model.embeddings.patch_embeddings.num_patches
        return {"noise": torch.arange(patches, device=x.device).expand(len(x), -1)}

    def _from_positions(self, hidden: Tensor) -> Tensor:
        """(B, T, D) tokens or (B, D, h, w) maps -> (B, D)."""
        if hidden.dim() == 4:
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.has_token else hidden.mean(1)


def load_foundation(name: str, *, alpha: float, given: Space, device: torch.device) -> Family:
    """Load `hf:NAME_OR_FOLDER` for images of the space `given`; a folder is read offline.

    Images are de-normalised, made three-channel, resized (bicubic, antialiased, differentiable) to
    the model's input size and normalised with the model's own statistics.

    Args:
        name: with or without the prefix.
        alpha: weight of CLoM under this model.
        given: space of real and synthetic images.
        device: where to compute.

    Raises:
        UserError: transformers cannot load it, its weights are incomplete, or it takes no images.
    """
    place = name.removeprefix(PREFIX)
    folder = Path(place).expanduser()
    if place.startswith((".", "/", "~")) and not folder.is_dir():
        raise UserError(f"{name}: there is no folder {place}")
    local = folder.is_dir()
    source = str(folder) if local else place
    try:
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every retry
        if not local:
            print(f"{name}: no such folder, so the Hugging Face hub is asked", flush=True)
        with local_seed(0):  # weights that the checkpoint lacks are drawn; ImageTower judges them
            model, report = AutoModel.from_pretrained(
                source, output_loading_info=True, local_files_only=local
            )
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=local)
    except Exception as error:  # the library raises many types on missing or damaged models
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"transformers cannot load {place!r} as a vision model ({reason})"
        ) from None
    own = _own_space(place, model, processor)
    try:
        tower = ImageTower(model.float(), set(report["missing_keys"]))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return Family(name, alpha, (Teacher(tower, own, given, "bicubic").to(device),))


def _own_space(place: str, model: nn.Module, processor: Any) -> Space:
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    if mean is None or std is None or len(mean) != 3:
        raise UserError(
            f"{place!r} states no mean and std of three channels; is it a vision model?"
        )
    if getattr(processor, "do_rescale", True):  # pixels become 255 · factor times [0, 1]
        white = 255 * processor.rescale_factor
        mean, std = ([v / white for v in values] for values in (mean, std))
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
