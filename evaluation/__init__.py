"""Training a network and measuring it: the one loop, metrics, recipes and protocols."""

from evaluation.fit import fit

__all__ = ["fit"]
