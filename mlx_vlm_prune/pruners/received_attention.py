"""Keep the tokens that receive most attention from the others.

FastVLM token pruning (github.com/aledevv/fastvlm-token-pruning), "ATS": the score of a
token is the attention it receives, the mean over heads and queries, at the tower's last
layer. The one to use where a tower has no CLS token.

As the authors' code (github.com/aledevv/fastvlm-token-pruning@c8feda6) on the same attention.
Differs: every block is run, where theirs skips three of four as soon as it is asked for attention,
and so scores (and hands on) corrupted features; the column means are streamed, never an N x N
array.

Options:
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept.
"""

from .contract import Reduction, Signals, Stage
from .numerics import keep_highest

stage = Stage.FEATURES
needs = {"received_attention": "layer"}


def prune(signals: Signals, K: int, *, layer: float = -1) -> Reduction:
    """Keep the K tokens that receive most; `layer` is read by the host."""
    score_BN = signals.received_attention_BN
    return Reduction(keep_highest(score_BN, K), score_BN=score_BN)
