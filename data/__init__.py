"""Data sets as tensors: specs, preparation, loading, device-resident batches, augmentation."""

from data.load import load

__all__ = ["load"]
