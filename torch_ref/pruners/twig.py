"""TwigVLM (arXiv:2503.14075): by the last token's attention in the twig; late layers hold none.

Its speculative decoding is `torch_ref.generation.speculation`.
"""

from typing import Any

from .budget import average_of_rank, cut_and_wipe
from .contract import Reduction, Signals
from .numerics import keep_highest

learned = True  # its weights are layers: models/language/twig.py
needs: dict[str, str | None] = {"twig_attention": None}


def schedule(
    layers: int, N: int, K: int, layer: float = 2 / 32, wipe: float = 24 / 32, rank: int = 0
) -> dict[int, int]:
    return cut_and_wipe(layers, N, K, layer, wipe, rank)


def own_budget(
    weights: Any, N: int, layer: float = 2 / 32, wipe: float = 24 / 32, rank: int = 0
) -> int | None:
    return average_of_rank(weights.config.num_hidden_layers, N, layer, wipe, rank) if rank else None


def prune(signals: Signals, K: int) -> Reduction:
    return Reduction(keep_highest(signals.twig_attention_BN, K))


def fixed_options(weights: Any) -> dict[str, int]:
    return {"layer": int(weights.layer)}
