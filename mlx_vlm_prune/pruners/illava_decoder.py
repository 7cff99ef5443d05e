"""Keep the tokens that the prompt's last token attends to most, at three depths; recycle the rest.

The decoder part of iLLaVA, ICLR 2026, arXiv:2412.06263; `illava` is the chain with its encoder
part. Before the layers 2, 8 and 14 of 28 as many tokens leave each time. The score is the attention
of the prompt's last token in the layer before, the mean over heads. The last 5 % of those that stay
take in what leaves, as in the tower: see `illava_tower`. Positions are kept.

As the authors' code (github.com/hulianyuyy/iLLaVA@d4e221b), for Qwen3-VL. Differs: the attention is
computed, where theirs is what flash attention returns in its place, the log of each query's own
sum; how many leave follows from the budget, where theirs is a share of what is there.

Options:
    start: the first layer of the language model before which tokens leave; below 1 a share of the
        depth
    end: the last one
    stages: before how many layers, evenly between them, 1 to 100
    recycled: share of the kept that take in what leaves, 0 to 1, at least one token

Shapes: I images, N tokens, K kept.
"""

from .budget import check_stages, several_cuts
from .contract import Reduction, Signals, Stage
from .illava_tower import keep_and_recycle
from .pipeline import layer_at

stage = Stage.DECODER
needs: dict[str, str | None] = {"last_attention": None}


def schedule(
    layers: int, N: int, K: int, *, start: float = 0.07, end: float = 0.5, stages: int = 3
) -> dict[int, int]:
    """As many tokens leave at each stage."""
    check_stages(stages)
    first, last = layer_at(start, layers), layer_at(end, layers)
    if first > last:
        raise ValueError(f"start is layer {first}, and end layer {last}; give an end behind it")
    at = [first + (last - first) * i // max(stages - 1, 1) for i in range(stages)]

    def counts(t: float) -> list[int]:
        left = max(1, int(N * t))
        return [N - (N - left) * i // stages for i in range(1, stages + 1)]

    return several_cuts(layers, N, K, at, counts)


def prune(signals: Signals, K: int, *, recycled: float = 0.05) -> Reduction:
    """Keep the K most attended, of which the last take in what leaves."""
    return keep_and_recycle(signals.x_BND, signals.last_attention_BN, K, recycled)
