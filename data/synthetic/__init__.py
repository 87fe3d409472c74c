"""Synthetic sets: what distillation hands to evaluation, and the files that hold them."""

from data.synthetic.compact import CompactFlags
from data.synthetic.forms import FORMS, save_compact, save_experiments
from data.synthetic.set import SyntheticSet
from data.synthetic.training import TrainingSettings

__all__ = ["FORMS", "CompactFlags", "SyntheticSet", "TrainingSettings", "save_compact", "save_experiments"]
