"""Trajectory matching: MTT and MKDT, their expert buffers, the gradients of an unrolled training."""
