"""Batches of augmented 32x32 images: TensorLoader against torch's DataLoader with kornia.

    python -m benchmarks.loader [--count 20000] [--batch 1024] [--repeats 5]

Both sides give normalised float32 batches after a random crop (zero padding 4) and flip; they take
turns, and the ratio of their median times a batch is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import kornia.augmentation as K
import torch
from torch.utils.data import DataLoader, TensorDataset

from data.loader import ImagePipeline, TensorLoader
from data.specs import KRR_SPECS


def seconds_a_batch(batches, count: int) -> float:
    """Mean time of `count` batches after one that warms up."""
    next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - began) / count


def kornia_batches(images, labels, batch_size, stats):
    """The plain form: float images, DataLoader, kornia on each batch."""
    augment = torch.nn.Sequential(
        K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip(),
        K.Normalize(torch.tensor(stats.mean), torch.tensor(stats.std)),
    )  # fmt: skip
    dataset = TensorDataset(images.float().div(255), labels)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    while True:
        for x, y in loader:
            yield augment(x), y


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    stats = KRR_SPECS["cifar10"].stats[32]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (args.count, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.randint(10, (args.count,), generator=generator)
    ours = TensorLoader(
        images, labels, batch_size=args.batch, device=torch.device("cpu"), generator=generator,
        transform=ImagePipeline(stats, pad=4, hflip=True), drop_last=True,
    ).forever()  # fmt: skip
    plain = kornia_batches(images, labels, args.batch, stats)
    times = {"TensorLoader": [], "DataLoader + kornia": []}
    for _ in range(args.repeats):
        times["TensorLoader"].append(seconds_a_batch(ours, 10))
        times["DataLoader + kornia"].append(seconds_a_batch(plain, 3))
    median = {name: statistics.median(t) for name, t in times.items()}
    for name, value in median.items():
        print(f"{name}: {1e3 * value:.2f} ms a batch of {args.batch} (median of {args.repeats})")
    print(f"ratio {median['DataLoader + kornia'] / median['TensorLoader']:.1f}")


if __name__ == "__main__":
    main()
