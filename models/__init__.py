"""The two model zoos: `get_model` (KRR-ST) and `get_network` (DC)."""

from models.registry import EVAL_MODES, MODELS, NETWORKS, eval_pool, get_model, get_network

__all__ = ["EVAL_MODES", "MODELS", "NETWORKS", "eval_pool", "get_model", "get_network"]
