"""Pre-train a network on a synthetic set and write it to use anywhere: model.safetensors and config.json.

python -m evaluation.export --source_data_name mine --synthetic_path results/mine --out encoders/mine

One line loads it: from evaluation.export import load_encoder; encoder = load_encoder("encoders/mine")
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.augment import normalize
from data.specs import Stats
from data.synthetic.training import read_safetensors, write_safetensors
from data.untrusted import read_json
from data.whitening import Whitening
from evaluation.pretraining import Measurement, NetworkFlags, PretrainFlags, load_pretraining
from models import get_model
from utils import checkpoint
from utils.cli import as_json, command, flag, same_flag, typed
from utils.cost import Forecast
from utils.errors import UserError, first_line
from utils.memory import out_of_memory_says
from utils.run_folder import environment, write_json
from utils.seed import resolve_seed

VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_WHITENING = ("whitening.mean", "whitening.matrix")


@dataclass(frozen=True)
class ExportFlags(PretrainFlags, NetworkFlags):
    """Flags of this command."""

    seed: int | None = same_flag(NetworkFlags, "seed", help="seed; the network is that of test.py with it")
    out: Path = flag(Path("./encoder"), "folder to write")
    overwrite: bool = flag(False, "replace an encoder that is there")


class Encoder(nn.Module):
    """Images with pixels in [0, 1], or uint8, (N, C, H, W) -> features (N, num_features) of a network.

    `outputs` are those of its last layer: of a set with a target model's features, their predictions.
    """

    def __init__(
        self, network: nn.Module, img_shape: tuple[int, ...], stats: Stats, whitening: Whitening | None = None
    ) -> None:
        super().__init__()
        self.network, self.img_shape, self.stats = network, tuple(img_shape), stats
        self.register_buffer("mean", whitening and whitening.mean)
        self.register_buffer("matrix", whitening and whitening.matrix)

    @property
    def num_features(self) -> int:
        return self.network.num_features

    def forward(self, pixels: Tensor) -> Tensor:
        """The features before the network's last layer."""
        return self.network.embed(self._prepared(pixels))

    def outputs(self, pixels: Tensor) -> Tensor:
        """(N, D) of the last layer."""
        return self.network(self._prepared(pixels))

    def _prepared(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[1:]) != self.img_shape:
            raise ValueError(f"images have shape {tuple(pixels.shape[1:])}, expected {self.img_shape}")
        x = normalize(pixels, self.stats)
        return x if self.matrix is None else Whitening(self.mean, self.matrix)(x)


def save_encoder(encoder: Encoder, folder: Path, **facts: Any) -> None:
    """Write an encoder, each file whole or not at all; `facts`: its model, num_outputs, dropout, and more."""
    tensors = {k: v.cpu().contiguous() for k, v in encoder.network.state_dict().items()}
    if encoder.matrix is not None:
        tensors |= dict(zip(_WHITENING, (encoder.mean.cpu(), encoder.matrix.cpu()), strict=True))
    stats = {"mean": encoder.stats.mean, "std": encoder.stats.std}
    write_safetensors(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, {"version": VERSION, "img_shape": encoder.img_shape, **stats, **facts})


def load_encoder(folder: Path | str) -> Encoder:
    """An encoder that this command wrote, in eval mode on the CPU; no code of the folder is run.

    Raises:
        UserError: no encoder is there, or its files are damaged or do not fit each other.
    """
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).exists():
            raise UserError(
                f"{folder / name} does not exist; expected a folder of python -m evaluation.export"
            )
    config, (tensors, _) = read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS)
    given = [config.get(key) for key in ("model", "img_shape", "num_outputs", "dropout")]
    stats = Stats.parse(config, folder / CONFIG)
    if config.get("version") != VERSION or stats is None or not _usable(*given):
        raise UserError(f"{folder / CONFIG} does not describe an encoder of version {VERSION}")
    name, shape, *_ = given
    stats.check_channels(shape[0], folder / CONFIG)
    if not all(t.isfinite().all() for t in tensors.values() if t.is_floating_point()):
        raise UserError(f"{folder / WEIGHTS} holds NaN or infinity, expected finite weights")
    whitening = [tensors.pop(key) for key in _WHITENING if key in tensors]
    size = torch.Size(shape).numel()
    if whitening and [tuple(t.shape) for t in whitening] != [(size,), (size, size)]:
        raise UserError(f"{folder / WEIGHTS}: its whitening does not fit images of {shape}")
    try:
        with torch.device("meta"):  # takes no memory: a small file could describe a network of any size
            described = sum(t.numel() for t in get_model(*given).state_dict().values())
    except (UserError, RuntimeError) as error:
        raise UserError(f"{folder / CONFIG}: {first_line(error)}") from None
    if described != (held := sum(t.numel() for t in tensors.values())):
        raise UserError(f"{folder}: the network {name} has {described} values, {WEIGHTS} holds {held}")
    network = get_model(*given)
    checkpoint.apply_state(network, tensors, origin=folder / WEIGHTS)
    return Encoder(network, shape, stats, Whitening(*whitening) if whitening else None).eval()


def _usable(name: Any, shape: Any, outputs: Any, dropout: Any) -> bool:
    """Whether these are values that get_model can take."""
    whole = [*shape, outputs] if isinstance(shape, list) and len(shape) == 3 else [None]
    numbers = all(type(n) is int and 1 <= n < 2**24 for n in whole)
    return isinstance(name, str) and numbers and type(dropout) in (int, float)


def export(flags: ExportFlags) -> int:
    """Pre-train one network and write it; a UserError for bad flags or an unfit set."""
    if flags.dry_run and not flags.cost:
        print(json.dumps(as_json(flags), indent=2))
        return 0
    if (flags.out / CONFIG).exists() and not flags.cost:
        if not (flags.out / WEIGHTS).exists():
            raise UserError(f"{flags.out} holds a run or another program's files; choose another --out")
        if not flags.overwrite:
            raise UserError(f"{flags.out} holds an encoder already; pass --overwrite to replace it")
    work = Measurement(flags)
    work.pretraining = load_pretraining(flags, work.preset.size, work.arch)
    synthetic, work.width = work.pretraining.synthetic, work.pretraining.outputs
    if synthetic.stats is None:
        named = dict(data_name=flags.source_data_name, data_dir=flags.data_dir)
        raise UserError(
            "the mean and std of the synthetic set are unknown; put them in by: "
            + typed("python -m data.synthetic convert SET NEW --form pair", **named)
        )
    shape, seed = tuple(synthetic.images.shape[1:]), resolve_seed(flags.seed)
    work.forecast = Forecast(work.pretraining_work(), work.device, shorter="--pre_epoch or --steps_scale")
    if flags.cost:
        print(work.forecast.trial(lambda: work.backbone(seed, shape)))
        return 0
    print(f"pre-training: {work.pretraining.recipe}")
    with out_of_memory_says(work.device, "lower --pre_batch_size"):
        network = work.backbone(seed, shape)
    whitening, network.prepare = network.prepare, None
    encoder = Encoder(network, shape, synthetic.stats, whitening)
    facts = {**work.settings(), "num_outputs": work.width, "seed": seed}
    save_encoder(encoder, flags.out, **facts, environment=environment(work.device))
    size = " x ".join(map(str, shape))
    print(f"encoder: {flags.out}, from images of {size} to {encoder.num_features} features; to load it:")
    print(f'from evaluation.export import load_encoder; encoder = load_encoder("{flags.out}")')
    return 0


@command(ExportFlags, prog="python -m evaluation.export", description=__doc__)
def main(flags: ExportFlags) -> int:
    """Export."""
    return export(flags)


if __name__ == "__main__":
    raise SystemExit(main())
