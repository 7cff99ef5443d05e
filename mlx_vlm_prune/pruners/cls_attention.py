"""Keep the tokens that CLS, the tower's summary token, attends to most.

FasterVLM, Zhang et al., arXiv:2412.01818: the score of a token is the attention that CLS pays to
it, the mean over heads, at the layer whose output the features are (`layer=-1`): LLaVA's last but
one, as theirs, MiniMind2-V's last. In a tower without a CLS token the attention that a token
receives from all stands in its place: then this is `received_attention`.

As the authors' code (github.com/Theia-4869/FasterVLM@f5d5f12). Differs: only the CLS row of the
attention is computed.

Options:
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept.
"""

from .contract import Reduction, Signals, Stage
from .numerics import keep_highest

stage = Stage.FEATURES
needs = {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, layer: float = -1) -> Reduction:
    """Keep the K tokens that CLS attends to most; `layer` is read by the host."""
    score_BN = signals.cls_attention_BN
    return Reduction(keep_highest(score_BN, K), score_BN=score_BN)
