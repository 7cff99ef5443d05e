"""LLaVA-PruMerge+ (arXiv:2403.15388): outliers of CLS attention, filled up with even samples."""

import torch

from .contract import Reduction, Signals, best, stacked
from .prumerge import merged, scored

needs = {"cls_query": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1) -> Reduction:
    made = []
    for score_N, keys_ND in scored(signals):
        quarter, three = score_N.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
        high = (score_N > three + 1.5 * (three - quarter)).sum().item()
        kept = best(score_N, min(K, int(high)))
        rest = [i for i in range(len(score_N)) if i not in set(kept)]
        missing = K - len(kept)
        kept += [rest[i * len(rest) // missing] for i in range(missing)]
        made.append(merged(score_N, keys_ND, sorted(kept), K, neighbours))
    return stacked([i for i, _ in made], [w for _, w in made], signals.x_BND.device)
