"""Keep the tokens that the prompt's last token attends to in a few layers trained to judge early.

TwigVLM, Shao et al., ICCV 2025, arXiv:2503.14075, its token pruning. A twig, a few layers
trained to predict the answer from the output of an early layer (2 of 32), reads the prompt; the
score of a visual token is the attention that the prompt's last token pays to it in the
twig's last layer, the mean over heads. The highest R go on in the base, and before layer `wipe`
(24 of 32) all visual tokens leave; positions are kept. With L layers, V tokens, the twig
on layer K and the wipe at F, an average of R' keeps R = ceil((L R' - K V) / (F - K)). `rank` is R
itself, the `attention_rank` of the authors' first README, and there is no budget then.
Its speculative decoding is `--num-draft-tokens` (generation/speculation.py), with any method.

As the authors' code (github.com/MILVLG/twigvlm@53ba6f6). Differs: of the twig's last layer one row
of attention is computed, not the layer; a budget that leaves R below 1 or above V is refused; any
batch and any number of images.

The layer is the one that the weights were trained on. Training here is theirs but for its length
and rate: the base stays as it is, the twig begins as the base's next layers, final norm and output
layer, and learns from the answers' loss, nothing pruned.

It keeps what the answer's first word needs, not what the words after it do.

Options:
    layer: layer of the language model that the twig grows on, as trained; below 1 a share of the
        depth
    wipe: layer from which no visual token is left; below 1 a share of the depth
    rank: how many tokens of an image go on at the cut; 0 is what the budget says

Shapes: I images, N tokens, K kept.
"""

from typing import Any

from .budget import average_of_rank, cut_and_wipe
from .contract import Reduction, Signals, Stage
from .numerics import keep_highest

stage = Stage.DECODER
learned = True  # its weights are layers, which models/language/twig.py makes
needs: dict[str, str | None] = {"twig_attention": None}


def schedule(
    layers: int, N: int, K: int, *, layer: float = 2 / 32, wipe: float = 24 / 32, rank: int = 0
) -> dict[int, int]:
    """One cut where the twig grows, and none left from `wipe` on."""
    return cut_and_wipe(layers, N, K, layer, wipe, rank)


def own_budget(
    weights: Any, N: int, *, layer: float = 2 / 32, wipe: float = 24 / 32, rank: int = 0
) -> int | None:
    """K in the average layer, where `rank` says how many go on."""
    layers = weights.config.num_hidden_layers
    return average_of_rank(layers, N, layer, wipe, rank) if rank else None


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K most attended."""
    score_BN = signals.twig_attention_BN
    return Reduction(keep_highest(score_BN, K), score_BN=score_BN)


def fixed_options(weights: Any) -> dict[str, int]:
    """The layer that it was trained on."""
    return {"layer": weights.layer}
