"""KRR-ST: self-supervised dataset distillation for transfer learning (arXiv 2310.06511)."""
