"""Synthetic sets: what distillation hands to evaluation, and the files that hold them."""

from data.synthetic.forms import FORMS
from data.synthetic.set import SyntheticSet, save_experiments

__all__ = ["FORMS", "SyntheticSet", "save_experiments"]
