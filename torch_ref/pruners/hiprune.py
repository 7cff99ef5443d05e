"""HiPrune (arXiv:2508.00553): objects and their neighbours from a middle layer, then the last."""

from .contract import Reduction, Signals, index_reduction
from .numerics import highest

needs = {"object_attention": "object_layer", "received_attention": "layer"}


def prune(
    signals: Signals, K: int, *, objects: float = 0.1, object_layer: float = 0.33,
    layer: float = -1,
) -> Reduction:  # fmt: skip
    rows, columns = signals.grid
    index = []
    for middle_N, deep_N in zip(
        signals.object_attention_BN, signals.received_attention_BN, strict=True
    ):
        anchors = highest(middle_N, round(K * objects / 5))
        beside: set[int] = set()
        for anchor in anchors:
            r, c = divmod(anchor, columns)
            around = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
            beside |= {a * columns + b for a, b in around if 0 <= a < rows and 0 <= b < columns}
        kept = [*anchors, *sorted(beside - set(anchors))]
        others = [i for i in highest(deep_N, len(deep_N)) if i not in kept]
        index.append(sorted([*kept, *others][:K]))
    return index_reduction(signals, index)
