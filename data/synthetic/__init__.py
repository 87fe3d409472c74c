"""Synthetic sets: what distillation hands to evaluation, and the files that hold them."""

from data.synthetic.forms import FORMS, save_compact, save_experiments
from data.synthetic.set import SyntheticSet
from data.synthetic.training import TrainingSettings

__all__ = ["FORMS", "SyntheticSet", "TrainingSettings", "save_compact", "save_experiments"]
