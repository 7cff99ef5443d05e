"""Keep the tokens that CLS attends to and that the kept ones do not cover yet.

SCOPE, Deng et al., NeurIPS 2025, arXiv:2510.24214. A token u is covered as well as its most
similar kept token covers it. Greedily, the next token is the one with the largest gain
in coverage, summed over the image, times its saliency (CLS attention) to the `power`.

As the authors' code (github.com/kinredon/SCOPE@6bf7306), which compares the tower's features,
not the projected tokens.

Options:
    power: exponent of the CLS attention; 0 leaves coverage alone
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .coverage import greedy_cover
from .lazy import HeldRows, read_lazily
from .numerics import choice_dtype, choosing, constant, to_choice_dtype
from .rows import Rows, cosine_rows

stage = Stage.FEATURES
needs = {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, power: float = 1.0, layer: float = -1) -> Reduction:
    """Keep K; `layer` is read by the host."""
    with choosing():
        salient_BN = mx.power(to_choice_dtype(signals.cls_attention_BN), constant(power))
        return Reduction(index_BK=greedy_cover(similar_columns, salient_BN, K, signals.x_BND))


def similar_columns(x_BND: mx.array) -> Rows | HeldRows:
    """How similar every token is to each."""
    return read_lazily(cosine_rows(x_BND, hold=choice_dtype() == mx.float32))
