"""V2Drop (arXiv:2509.01552): the tokens a layer changed least leave, in the end all but one."""

from .budget import several_cuts
from .contract import Reduction, Signals
from .numerics import keep_highest

needs: dict[str, str | None] = {"before": None}


def schedule(
    layers: int, N: int, K: int, first: float = 3 / 32, second: float = 17 / 32,
    third: float = 22 / 32,
) -> dict[int, int]:  # fmt: skip
    def counts(t: float) -> list[int]:
        if t <= 0.5:
            return [max(1, int(N * (2 * t))), max(1, int(N * (2 * t) ** 2)), 1]
        return [N, N, max(1, int(N * (2 * t - 1)))]

    return several_cuts(layers, N, K, (first, second, third), counts)


def prune(signals: Signals, K: int) -> Reduction:
    moved = (signals.x_BND.double() - signals.before_BND.double()).square().sum(-1)
    return Reduction(keep_highest(moved, K))
