"""Data sets as tensors: specs, preparation, loading, device-resident batches, augmentation."""
