"""CLoM: a contrastive loss of pre-trained models for DC, DSA and DM (arXiv 2310.03295)."""

from clom.loss import CLoM, clom_ce, clom_ce_mean, clom_cosine
from clom.matching import gradient_distance

__all__ = ["CLoM", "clom_ce", "clom_ce_mean", "clom_cosine", "gradient_distance"]
