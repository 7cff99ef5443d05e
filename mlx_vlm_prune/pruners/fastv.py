"""After a few layers, keep the tokens that the prompt's last token attends to most.

FastV, Chen et al., ECCV 2024, arXiv:2403.06764. At `layer` (2 of 32) the score of a visual
token is the attention that the prompt's last token paid to it in the layer before, the
mean over heads. The rest leave; positions are kept.

As the authors' code (github.com/pkunlp-icler/FastV@d165972). Differs: one row of attention is
computed, not the matrix; any batch and any number of images; rows really leave the deeper caches.

Options:
    layer: layer of the language model before which tokens leave; below 1 a share of the depth

Shapes: I images, N tokens, K kept.
"""

from .budget import one_cut
from .contract import Reduction, Signals, Stage
from .numerics import keep_highest

stage = Stage.DECODER
needs: dict[str, str | None] = {"last_attention": None}


def schedule(layers: int, N: int, K: int, *, layer: float = 2 / 32) -> dict[int, int]:
    """One cut."""
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K most attended."""
    score_BN = signals.last_attention_BN
    return Reduction(keep_highest(score_BN, K), score_BN=score_BN)
