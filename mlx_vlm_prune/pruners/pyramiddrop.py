"""Drop a share of the tokens at several depths.

PyramidDrop, Xing et al., CVPR 2025, arXiv:2410.17247. At each of `stages` layers, the first
after `start` of the depth and then evenly (8, 16 and 24 of 32), the same share of the
visual tokens leaves. The score is the attention of the prompt's last token by the
coming layer's own projections. Positions are renumbered at every stage.

As the authors' code (github.com/Cooperx521/PyramidDrop@6444f30). Differs: the share follows from
the budget (theirs is half, which gives 270 of 576 in the average).

Options:
    start: depth of the first cut, a share between 0 and 1
    stages: cuts, 1 to 100

Shapes: I images, N tokens, K kept.
"""

from .budget import check_stages, several_cuts
from .contract import Reduction, Signals, Stage
from .numerics import keep_highest

stage = Stage.DECODER
needs: dict[str, str | None] = {"next_attention": None}
positions = "renumber"


def schedule(
    layers: int, N: int, K: int, *, start: float = 0.25, stages: int = 3
) -> dict[int, int]:
    """The same share stays at each stage."""
    check_stages(stages)
    if not 0 < start < 1:
        raise ValueError("start is a share of the depth above 0 and below 1")
    at = [start + i * (1 - start) / stages for i in range(stages)]

    def counts(t: float) -> list[int]:
        return [max(1, int(N * t**i)) for i in range(1, stages + 1)]

    return several_cuts(layers, N, K, at, counts)


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K most attended."""
    score_BN = signals.next_attention_BN
    return Reduction(keep_highest(score_BN, K), score_BN=score_BN)
