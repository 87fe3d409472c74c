"""Batches of augmented 32x32 images: TensorLoader against torch's DataLoader with kornia.

    python -m benchmarks.loader [--count 20000] [--batch 1024] [--repeats 5]

Both sides give normalised float32 batches after a random crop (zero padding 4) and flip; they take
turns, and the ratio of their median times a batch is printed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import medians, shown
from data.loader import ImagePipeline, TensorLoader
from data.specs import KRR_SPECS
from utils.device import resolve_device
from utils.errors import entry_point


def kornia_batches(images, labels, batch_size, stats, device):
    """The plain form: float images, DataLoader, kornia on each batch on the device.

    Without kornia torchvision, which crops and flips all images of a batch alike.
    """
    try:
        import kornia.augmentation as K
    except ImportError:
        import torchvision.transforms.v2 as K
    augment = torch.nn.Sequential(
        K.RandomCrop((32, 32), padding=4),
        K.RandomHorizontalFlip(),
        K.Normalize(torch.tensor(stats.mean), torch.tensor(stats.std)),
    ).to(device)
    dataset = TensorDataset(images.float().div(255), labels)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    while True:
        for x, y in loader:
            yield augment(x.to(device)), y.to(device)


def measure(
    device: torch.device, *, count: int = 20000, batch: int = 1024, repeats: int = 5
) -> dict[str, Any]:
    """Seconds a batch of both sides, and their ratio.

    Args:
        device: where batches are wanted.
        count: images in the random set.
        batch: images a batch.
        repeats: timings a side.
    """
    stats = KRR_SPECS["cifar10"].stats[32]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.randint(10, (count,), generator=generator)
    ours = TensorLoader(
        images,
        labels,
        batch_size=batch,
        device=device,
        generator=generator,
        transform=ImagePipeline(stats, pad=4, hflip=True),
        drop_last=True,
    ).forever()
    plain = kornia_batches(images, labels, batch, stats, device)
    sides = {"TensorLoader": lambda: next(ours), "DataLoader + kornia": lambda: next(plain)}
    seconds = medians(sides, device, repeats=repeats, calls=4)
    return {
        "setting": {"images": count, "batch": batch, "pixels": 32},
        "seconds a batch": seconds,
        "ratio": seconds["DataLoader + kornia"] / seconds["TensorLoader"],
    }


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", help="default: the best there is")
    args = parser.parse_args(argv)
    results = measure(resolve_device(args.device), count=args.count, batch=args.batch, repeats=args.repeats)
    print("seconds a batch:", shown(results["seconds a batch"], 5))
    print(f"ratio {results['ratio']:.1f}")


if __name__ == "__main__":
    sys.exit(main())
