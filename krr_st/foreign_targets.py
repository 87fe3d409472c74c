"""Target models from elsewhere: any image network of transformers or torchvision.

Such a network sees what it was made for: images are brought back to pixels, resized to its input
size and normalised with its own mean and std. All of it is differentiable in the images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import denormalize, normalize
from data.specs import Stats
from utils import checkpoint
from utils.errors import UserError, pick
from utils.seed import local_seed

IMAGENET = Stats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class ForeignTarget(nn.Module):
    """A foreign network as a map from data-set-normalised images to features.

    Args:
        network: takes what `features` gives it.
        features: (network, images normalised its way) -> (B, dim).
        img_shape: (C, H, W) of the data set.
        data_stats: what incoming images are normalised with.
        size: (height, width) the network expects.
        stats: mean and std the network expects, of pixels in [0, 1].
        name: for messages.

    Attributes:
        dim: width of the features.

    Raises:
        UserError: the network cannot take such images, or two passes over them differ.
    """

    def __init__(
        self,
        network: nn.Module,
        features: Callable[[nn.Module, Tensor], Tensor],
        *,
        img_shape: tuple[int, int, int],
        data_stats: Stats,
        size: tuple[int, int],
        stats: Stats,
        name: str,
    ) -> None:
        super().__init__()
        self.network, self._features = network, features
        self.data_stats, self.size, self.stats = data_stats, size, stats
        self.dim = self._probe(img_shape, name)

    def _probe(self, img_shape: tuple[int, int, int], name: str) -> int:
        """Width of the features, found by two passes over noise, which must agree."""
        noise = torch.randn((2, *img_shape), generator=torch.Generator().manual_seed(0))
        self.eval()
        try:
            with torch.no_grad():
                once, again = self(noise), self(noise)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except Exception as error:  # whatever a network raises on inputs it is not made for
            _refuse(f"{name} cannot take images of {self.size[0]} x {self.size[1]}", error)
        if not once.isfinite().all():
            raise UserError(f"{name}: its features are not finite; the checkpoint is damaged")
        if once.dim() != 2 or not torch.allclose(once, again, atol=1e-4, rtol=1e-3):
            raise UserError(f"{name}: its features of an image are no fixed vector")
        return once.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images normalised with `data_stats` -> (B, dim)."""
        pixels = denormalize(x, self.data_stats)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, len(self.stats.mean), -1, -1)
        if pixels.shape[2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        return self._features(self.network, normalize(pixels, self.stats))


def _refuse(what: str, error: Exception) -> NoReturn:
    """One line out of whatever another library raised."""
    lines = str(error).strip().splitlines() or [""]
    raise UserError(f"{what} ({type(error).__name__}: {lines[0][:300]})") from None


def pooled_output(network: nn.Module, x: Tensor) -> Tensor:
    """The trained pooled features of an image tower (CLIP, SigLIP): (B, C, H, W) -> (B, D)."""
    return network(pixel_values=x).pooler_output


def token_or_map(network: nn.Module, x: Tensor) -> Tensor:
    """The class token, the mean over tokens where there is none, or the mean over space.

    The pooler of such a network is passed over: many checkpoints leave it untrained.

    Args:
        network: a transformers network with `last_hidden_state`.
        x: (B, C, H, W).

    Returns:
        (B, D).

    Raises:
        UserError: no hidden state that belongs to images.
    """
    hidden = getattr(network(pixel_values=x), "last_hidden_state", None)
    if hidden is None or hidden.dim() not in (3, 4):
        raise UserError("the network gives no image features (last_hidden_state)")
    if hidden.dim() == 4:
        return hidden.mean((2, 3))  # (B, D, h, w)
    has_class_token = any(key.endswith("cls_token") for key, _ in network.named_parameters())
    return hidden[:, 0] if has_class_token else hidden.mean(1)  # (B, T, D)


def unmasked_token(network: nn.Module, x: Tensor) -> Tensor:
    """The class token of a masked autoencoder that sees all of (B, C, H, W): (B, D)."""
    # It keeps the patches of lowest noise in that order: a ramp leaves them where they are.
    patches = network.embeddings.patch_embeddings.num_patches
    noise = torch.arange(patches, device=x.device).expand(len(x), -1)
    return network(pixel_values=x, noise=noise).last_hidden_state[:, 0]


def load_hf(
    name: str, path: Path | None, img_shape: tuple[int, int, int], stats: Stats
) -> ForeignTarget:
    """A transformers network, from a local folder or the hub; no code of the checkpoint is run.

    Args:
        name: folder as `save_pretrained` writes it (used offline), or a name on the hub.
        path: must be None; the weights are in the folder.
        img_shape: (C, H, W) of the data set.
        stats: what its images are normalised with.

    Raises:
        UserError: unknown name, no network, damaged or missing weights, or no image network.
    """
    if path is not None:
        raise UserError(f"--target_ckpt {path} has no meaning for hf:{name}, which has its own")
    where = f"hf:{name}"
    if not name:
        raise UserError("hf: is to be followed by a folder or a name on the Hugging Face hub")
    local = Path(name).expanduser()
    if not local.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{where}: the folder {local} does not exist")
    source = str(local) if local.is_dir() else name
    options = {"trust_remote_code": False, "local_files_only": local.is_dir()}
    try:
        from transformers import AutoModel  # slow to import, and only this needs it
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every retry
        if not local.is_dir():
            print(f"{where}: no folder of that name, so the Hugging Face hub is asked", flush=True)
        with local_seed(0):  # parts the checkpoint lacks are drawn, then looked at below
            network, report = AutoModel.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:  # transformers and its hub client raise a dozen types
        _refuse(f"{where} cannot be loaded", error)
    network, features = _image_tower(network, set(report["missing_keys"]), where)
    processor = _processor(source, local.is_dir(), options, where)
    return ForeignTarget(
        network.float(), features, img_shape=img_shape, data_stats=stats, name=where,
        size=_input_size(processor, network.config), stats=_processor_stats(processor, where),
    )  # fmt: skip


def _image_tower(
    network: nn.Module, missing: set[str], where: str
) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """The part that sees images and how its features are read; `missing` are absent weights."""
    tower = getattr(network, "vision_model", None)
    if tower is not None:
        network, features = tower, pooled_output
        missing = {key for key in missing if key.startswith("vision_model.")}
    elif str(getattr(network.config, "model_type", "")).endswith("_vision_model"):
        features = pooled_output
    elif getattr(network.config, "model_type", "") == "vit_mae":
        network.config.mask_ratio, features = 0.0, unmasked_token
    else:
        features = token_or_map
        missing = {key for key in missing if not key.startswith("pooler.")}
    missing = {key for key in missing if not key.endswith("mask_token")}
    if missing:
        shown = ", ".join(sorted(missing)[:5])
        raise UserError(f"{where}: the checkpoint lacks {len(missing)} weights ({shown})")
    return network, features


def _processor(source: str, local: bool, options: dict[str, Any], where: str) -> Any | None:
    """The image processor; None for a folder without one."""
    if local and not any((Path(source) / file).exists() for file in _PROCESSOR_FILES):
        print(f"{where} has no image processor: ImageNet's mean and std are used")
        return None
    try:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(source, **options)
    except Exception as error:
        _refuse(f"the image processor of {where} cannot be loaded", error)


def _input_size(processor: Any | None, config: Any) -> tuple[int, int]:
    """(height, width) after the processor's crop or resize, else the network's own, else 224."""
    sizes = [getattr(config, "image_size", None), 224]
    if processor is not None:
        crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
        sizes = [crop, getattr(processor, "size", None), *sizes]
    for size in sizes:
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[0]), int(size[1])
        sides = dict(size) if size is not None else {}
        if sides.get("height") and sides.get("width"):
            return int(sides["height"]), int(sides["width"])
        if sides.get("shortest_edge"):
            return int(sides["shortest_edge"]), int(sides["shortest_edge"])
    raise AssertionError("224 always fits")


def _processor_stats(processor: Any | None, where: str) -> Stats:
    """Mean and std of pixels in [0, 1] that amount to the processor's rescaling and normalising."""
    if processor is None:
        return IMAGENET
    white = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
    if not getattr(processor, "do_normalize", True):
        return Stats((0.0,) * 3, (1 / white,) * 3)
    mean, std = processor.image_mean, processor.image_std
    try:
        return Stats(tuple(v / white for v in mean), tuple(v / white for v in std))
    except TypeError:
        raise UserError(
            f"{where}: its image processor has image_mean {mean} and image_std {std}; expected a "
            "list of numbers each"
        ) from None


def load_torchvision(
    name: str, path: Path | None, img_shape: tuple[int, int, int], stats: Stats
) -> ForeignTarget:
    """A torchvision classifier without its last linear layer.

    Args:
        name: as in `torchvision.models`.
        path: a state dict of that network; None: torchvision's default weights, downloaded once.
        img_shape: (C, H, W) of the data set.
        stats: what its images are normalised with.

    Raises:
        UserError: unknown name, failed download, a state dict that does not fit, no linear layer.
    """
    import torchvision  # slow to import, and only this needs it

    where = f"torchvision:{name}"
    known = torchvision.models.list_models(module=torchvision.models)
    pick(dict.fromkeys(known), name, "torchvision model")
    weights = torchvision.models.get_model_weights(name).DEFAULT
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
        except Exception as error:  # mnasnet asks for more than names and tensors
            _refuse(f"{path} cannot be put into {where}", error)
    network.set_submodule(linear[-1], nn.Identity())
    recipe = weights.transforms()
    return ForeignTarget(
        network, nn.Module.__call__, img_shape=img_shape, data_stats=stats, name=where,
        size=(recipe.crop_size[0], recipe.crop_size[-1]),
        stats=Stats(tuple(recipe.mean), tuple(recipe.std)),
    )  # fmt: skip
