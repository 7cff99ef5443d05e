"""IPCV (arXiv:2512.18747): the tokens that changed most go on; the others come back at the end.

Shapes: N tokens, K kept, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .contract import Reduction, Signals, layer_at
from .numerics import keep_highest

needs: dict[str, str | None] = {"before": "layer"}


def cuts(layers: int, N: int, K: int, layer: float = 3 / 32) -> list[tuple[int, str, int]]:
    return [(layer_at(layer, layers), "before", K)]


def leaves(N: int, K: int, share: float = 0.35) -> int:
    return max(1, int(N * share))


def attends_to_all(layers: int, layer: float = 3 / 32, until: float = 10 / 32) -> list[int]:
    """In these layers tokens that left are attended to."""
    return [i for i in range(layers) if layer_at(layer, layers) <= i < layer_at(until, layers)]


def prune(signals: Signals, K: int, layer: float = 3 / 32, least: bool = False) -> Reduction:
    change_BND = signals.x_BND.double() - signals.before_BND.double()
    change_BN = change_BND.square().sum(-1).round(decimals=12)
    return Reduction(keep_highest(-change_BN if least else change_BN, K))


def give_back(
    signals: Signals, kept: Reduction, neighbours: int = 10
) -> Callable[[Tensor], Tensor]:
    """From the kept tokens, later, to all tokens."""
    assert kept.index_BK is not None
    then_BND, index_BK = signals.x_BND, kept.index_BK

    def all_tokens(now_BKD: Tensor) -> Tensor:
        images = zip(then_BND, index_BK.tolist(), now_BKD, strict=True)
        return torch.stack([one(*image, neighbours) for image in images])

    return all_tokens


def one(then_ND: Tensor, index: list[int], now_KD: Tensor, neighbours: int) -> Tensor:
    """All tokens of one image."""
    kept_KD = then_ND[index].double()
    whole_ND = then_ND.clone()
    for i, token_D in enumerate(then_ND):
        if i in index:
            whole_ND[i] = now_KD[index.index(i)]
            continue
        # |kept|^2 - 2 kept . token: the distance but for the token's own square.
        distance_K = kept_KD.square().sum(1) - 2 * (kept_KD @ token_D.double())
        near = distance_K.round(decimals=12).argsort(stable=True)[:neighbours]
        whole_ND[i] = token_D + (now_KD[near] - then_ND[index][near]).mean(0)
    return whole_ND
