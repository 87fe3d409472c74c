"""Pre-trained networks from elsewhere: any image network of transformers or torchvision.

With them comes the form of their images: the size, and mean and std for pixels in [0, 1].
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from utils import checkpoint
from utils.errors import UserError, first_line, pick
from utils.seed import local_seed

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_BILINEAR = 2  # PIL's number
# How the names of weights begin that the image side of a vision-language model does not need.
_NOT_OF_IMAGES = ("text", "logit", "multimodal", "image_to_mm")


@dataclass(frozen=True)
class Foundation:
    """A network from elsewhere in eval mode: normalised (B, 1 or 3, *size) -> (B, dim) features."""

    network: nn.Module
    dim: int
    size: tuple[int, int]  # (height, width) of its images
    mean: tuple[float, ...]  # of each of their channels, for pixels in [0, 1]
    std: tuple[float, ...]
    mode: str  # how images are resized, bilinear or bicubic


class ImageTower(nn.Module):
    """The image side of a transformers model: any vision or vision-language model.

    Images (B, C, H, W) -> features (B, D): the projected image embedding where there is one (CLIP,
    SigLIP), else the pooled output if it was trained, else the class token, else the mean over
    positions. A masked autoencoder sees every patch. `missing` are weights that the checkpoint lacks;
    a UserError says that the image side needs some other than a pooler's.
    """

    def __init__(self, model: nn.Module, missing: Iterable[str], where: str) -> None:
        super().__init__()
        self.joint = hasattr(model, "get_image_features")
        if self.joint and hasattr(model, "text_model"):
            model.text_model = nn.Identity()  # never used; its weights would only take memory
        self.masked = model.config.model_type == "vit_mae"
        if self.masked:
            model.config.mask_ratio = 0.0
        needed = {key for key in missing if not (self.joint and key.startswith(_NOT_OF_IMAGES))}
        # Checkpoints of classifiers have no pooler: a random one would be no pre-trained feature.
        self.pooled = not any(key.startswith("pooler.") for key in needed)
        needed = {k for k in needed if not k.startswith("pooler.") and not k.endswith("mask_token")}
        if needed:
            shown = ", ".join(sorted(needed)[:3])
            raise UserError(f"{where}: the checkpoint lacks {len(needed)} weights, such as {shown}")
        names = [name for name, _ in model.named_parameters()]
        self.has_token = any(name.endswith(("cls_token", "class_embedding")) for name in names)
        self.model = model

    def embed(self, x: Tensor) -> Tensor:
        network, options = self.model.get_image_features if self.joint else self.model, {}
        if self.masked:  # patches are sorted by noise, which would be drawn: a ramp keeps their order
            patches = self.model.embeddings.patch_embeddings.num_patches
            options["noise"] = torch.arange(patches, device=x.device).expand(len(x), -1)
        out = network(pixel_values=x, **options)
        if not isinstance(out, Tensor):
            pooled = getattr(out, "pooler_output", None) if self.pooled else None
            out = out.last_hidden_state if pooled is None else pooled
        if out.dim() == 3:  # tokens (B, T, D)
            return out[:, 0] if self.has_token else out.mean(1)
        return out.mean((2, 3)) if out.dim() == 4 else out  # maps (B, D, h, w), or features

    forward = embed  # there are no logits


def load_hf(name: str) -> Foundation:
    """A transformers network; no code of the checkpoint is run.

    `name` is a folder as `save_pretrained` writes it (used offline), or a name on the hub. A UserError
    for an unknown name, no connection, damaged or missing weights, or no image network.
    """
    where, folder = f"hf:{name}", Path(name).expanduser()
    if not name:
        raise UserError("hf: must be followed by a folder or a name on the Hugging Face hub")
    local = folder.is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{where}: the folder {folder} does not exist")
    if local:
        checkpoint.check_files(folder)
    source = str(folder) if local else name
    options = {"trust_remote_code": False, "local_files_only": local}
    # A config could name an attention kernel that would be fetched from the hub and run.
    kernel = {"attn_implementation": "eager"}
    try:
        from transformers import AutoModel  # slow to import, and only this needs it
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every retry
        if not local:
            print(f"{where}: no such folder; looking it up on the Hugging Face hub", flush=True)
        with local_seed(0):  # weights that the checkpoint lacks are drawn; ImageTower judges them
            model, report = AutoModel.from_pretrained(source, output_loading_info=True, **kernel, **options)
    except Exception as error:  # transformers and its hub client raise a dozen types
        _refuse(f"{where} cannot be loaded", error)
    network = ImageTower(model.float(), report["missing_keys"], where).eval()
    processor = _processor(source, local, options, where)
    parts = (getattr(model.config, name, None) for name in ("vision_config", "image_config"))
    size = _input_size(processor, next((part for part in parts if part), model.config))
    mean, std = _processor_stats(processor, where)
    dim = _feature_width(network, (len(mean), *size), where)
    bilinear = getattr(processor, "resample", None) == _BILINEAR
    return Foundation(network, dim, size, mean, std, "bilinear" if bilinear else "bicubic")


def _refuse(what: str, error: Exception) -> NoReturn:
    """Raise one line for whatever another library raised."""
    raise UserError(f"{what} ({type(error).__name__}: {first_line(error)[:300]})") from None


def _feature_width(network: nn.Module, img_shape: tuple[int, int, int], where: str) -> int:
    """Width of the features, found by two passes over noise, which must agree."""
    noise = torch.randn((2, *img_shape), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            once, again = network(noise), network(noise)
    except Exception as error:  # whatever a network raises on inputs it is not made for
        _refuse(f"{where} cannot take images of {img_shape[1]} x {img_shape[2]}", error)
    if not once.isfinite().all():
        raise UserError(f"{where}: its features are not finite; the checkpoint is damaged")
    if once.dim() != 2 or not torch.allclose(once, again, atol=1e-4, rtol=1e-3):
        raise UserError(f"{where}: its features of an image are not one fixed vector")
    return once.shape[1]


def _processor(source: str, local: bool, options: dict[str, Any], where: str) -> Any:
    """The image processor; ImageNet's mean and std for a folder without one."""
    if local and not any((Path(source) / file).exists() for file in _PROCESSOR_FILES):
        print(f"{where} has no image processor: ImageNet's mean and std are used")
        return SimpleNamespace(image_mean=IMAGENET[0], image_std=IMAGENET[1], rescale_factor=1 / 255)
    try:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(source, **options)
    except Exception as error:
        _refuse(f"the image processor of {where} cannot be loaded", error)


def _input_size(processor: Any, config: Any) -> tuple[int, int]:
    """(height, width) after the processor's crop or resize, else the network's own, else 224."""
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    for size in filter(None, (crop, getattr(processor, "size", None), getattr(config, "image_size", None))):
        if isinstance(size, int):
            return size, size
        if not isinstance(size, (list, tuple)):
            sides = dict(size)
            size = [sides.get(side) or sides.get("shortest_edge") for side in ("height", "width")]
        if len(size) == 2 and all(size):
            return int(size[0]), int(size[1])
    return 224, 224


def _processor_stats(processor: Any, where: str) -> tuple[tuple[float, ...], ...]:
    """Mean and std of pixels in [0, 1] equivalent to the processor's rescaling and normalising."""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = processor.rescale_factor if getattr(processor, "do_rescale", True) else 1 / 255
    try:
        shift, scale = (tuple(float(v) / (255 * factor) for v in values) for values in (mean, std))
        fit = len(shift) == len(scale) in (1, 3) and all(0 < v < math.inf for v in scale)
        if fit and all(map(math.isfinite, shift)):
            return shift, scale
    except (TypeError, ValueError, ZeroDivisionError):
        pass
    raise UserError(
        f"{where}: its image processor has image_mean {mean}, image_std {std} and rescale_factor "
        f"{factor}; expected one or three numbers each, the last two positive"
    )


def load_torchvision(name: str, path: Path | None = None) -> Foundation:
    """A torchvision classifier, named as in `torchvision.models`, without its last linear layer.

    `path` is a state dict of it; None: torchvision's default weights, downloaded once. A UserError for
    an unknown name, a failed download, a state dict that does not fit, or no linear layer.
    """
    import torchvision  # slow to import, and only this needs it

    where = f"torchvision:{name}"
    known = torchvision.models.list_models(module=torchvision.models)
    pick(dict.fromkeys(known), name, "torchvision model")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    recipe = weights.transforms()
    try:
        network = torchvision.models.get_model(name, weights=weights if path is None else None)
    except Exception as error:  # network, disk or a damaged download
        _refuse(f"the weights of {where} cannot be fetched; a file: --target_ckpt", error)
    linear = [key for key, part in network.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UserError(f"{where} has no linear layer to take the features from")
    if path is not None:
        state = checkpoint.load_state(path, what="target checkpoint")
        try:
            checkpoint.apply_state(network, state, origin=path, skip=(f"{linear[-1]}.",))
        except UserError:
            raise
        except Exception as error:  # mnasnet needs more than names and tensors
            _refuse(f"{path} cannot be put into {where}", error)
    network.set_submodule(linear[-1], nn.Identity())
    size = recipe.crop_size[0], recipe.crop_size[-1]
    dim = _feature_width(network.eval(), (3, *size), where)
    mode = "bilinear" if recipe.interpolation.value == "bilinear" else "bicubic"
    return Foundation(network, dim, size, tuple(recipe.mean), tuple(recipe.std), mode)
