"""MustDrop's second stage (arXiv:2411.10803): attention of all words, of one word, and key tokens.

Shapes: n tokens at present, K kept, T words.
"""

from .budget import several_cuts
from .contract import Reduction, Signals, index_reduction
from .numerics import highest

needs: dict[str, str | None] = {"text_attention": None, "cls_rank": "layer"}


def schedule(layers: int, N: int, K: int) -> dict[int, int]:
    def counts(t: float) -> list[int]:
        return [max(1, int(N * t**stage)) for stage in (1, 2, 3, 4)]

    return several_cuts(layers, N, K, [(4 * stage + 3) / 32 for stage in range(4)], counts)


def prune(
    signals: Signals, K: int, *, key: float = 0.08, relation: float = 1.0,
    layer: float = -1, behind: bool = True,
) -> Reduction:  # fmt: skip
    kept = []
    for b, real_T in enumerate(signals.text_real_BT):
        attention_Tn = signals.text_attention_BTN[b][real_T].double()
        of_all_n, of_one_n = attention_Tn.sum(dim=0), attention_Tn.max(dim=0).values
        of_all_n = of_all_n / of_all_n.sum().clamp(min=1e-30) / relation
        score_n = of_all_n.maximum(of_one_n).clamp(max=1).round(decimals=12)
        rank_n = signals.cls_rank_BN[b]
        of_key = [i for i in rank_n.argsort(stable=True).tolist() if rank_n[i] < key]
        others = [i for i in highest(score_n, len(score_n)) if i not in set(of_key)]
        kept.append(sorted([*of_key, *others][:K]))
    return index_reduction(signals, kept)
