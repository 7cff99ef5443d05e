"""Prune what matters least, and cluster the rest.

PACT, Dhouib et al., CVPR 2025, arXiv:2504.08966. At `layer` (4 of 32): a token's worth is
the softmax over tokens of its key with the mean visual query (mean over heads), times
the norm of its hidden state. The least worthy are pruned; the others are clustered by
the distance of their keys: in the order of density (of the distances over 2, whatever the cutoff)
a token becomes a centre when it is farther than a cutoff from every centre so far. A cluster's
mean goes on where its centre was, counting in attention as often as it has members; a pruned
token within 1.5 cutoffs of a centre is taken into its mean after all.

As the authors' code (github.com/orailix/PACT@cf9a0c9) with its cutoff (`cutoff=0.21`): worth comes
from queries and keys before rotation, distances from keys after it. Differs: exactly K clusters,
so the cutoff follows from the budget (bisection) unless it is given, and then the densest of too
many centres stay; of too few centres, the most worthy tokens fill up; the mean query and the
softmax are those of an image's own tokens, so that words ahead of it do not change what stays,
where theirs take in every row up to the prompt's last visual token (their name for those rows is
`is_not_text`): `prompt=True`.

One centre after another is found, so on a GPU similarities return to the host, once; in mlx-vlm's
models also how many members each cluster has.

Options:
    layer: layer of the language model before which tokens leave; below 1 a share of the depth
    clustered: share of all tokens that is clustered, not pruned, at least K; 0 to 1
    cutoff: one minus a cosine, up to which a token joins a centre; 0 is the smallest for K
    prompt: mean query and softmax of all rows up to the prompt's last visual token

Shapes: I images, N tokens, K kept, n tokens that are clustered, m rows of their distances,
D features.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from .budget import one_cut
from .contract import Reduction, Signals, Stage, take
from .numerics import choice_dtype, choosing, on_host, rounded, to_choice_dtype
from .rows import cosine_rows, nearest_slots

stage = Stage.DECODER
needs: dict[str, str | None] = {"mean_attention": None}
proportional = True
SPREAD = 2.0  # of the density
RETRIEVED = 1.5  # cutoffs: a pruned token as near to a centre is merged after all


def schedule(layers: int, N: int, K: int, *, layer: float = 4 / 32) -> dict[int, int]:
    """One cut."""
    return one_cut(layers, N, K, layer)


def prune(
    signals: Signals, K: int, *, clustered: float = 0.55, cutoff: float = 0.0, prompt: bool = False
) -> Reduction:
    """Merge into K clusters of the share `clustered` of all tokens.

    Whether a token becomes a centre depends on all centres before it, and that for each of 22
    cutoffs: so similarities return to the host, once.
    """
    if not 0 <= clustered <= 1:
        raise ValueError(f"clustered is {clustered}; it is a share from 0 to 1")
    if not 0 <= cutoff <= 2:
        raise ValueError(f"cutoff is {cutoff}; it is one minus a cosine, 0 to 2")
    with choosing():
        length_BN = mx.sqrt(mx.square(to_choice_dtype(signals.x_BND)).sum(axis=-1))
        share_BN = signals.prompt_attention_BN if prompt else signals.mean_attention_BN
        worth_BN = rounded(to_choice_dtype(share_BN) * length_BN)
        keys_BND, N = signals.next_keys_BND, worth_BN.shape[1]
        order_Bn = mx.argsort(-worth_BN, axis=-1)[:, : max(K, int(clustered * N))]
        cutoffs, centres = zip(
            *(find_centres(d_nn, K, cutoff) for d_nn in distances(take(keys_BND, order_Bn))),
            strict=True,
        )
        place_BK = mx.array([fill_up(c, order_Bn.shape[1], K) for c in centres])
        index_BK = mx.sort(take(order_Bn, place_BK), axis=1)
        cutoff_B1 = mx.array(cutoffs, choice_dtype())[:, None]
        similar_BN, slot_BN = nearest_slots(keys_BND, index_BK)
        belongs_BN = 1 - similar_BN <= RETRIEVED * cutoff_B1
        belongs_BN = mx.put_along_axis(belongs_BN, order_Bn, mx.array(True), axis=1)
        merged = Reduction.merge(index_BK, mx.where(belongs_BN, slot_BN, -1))
        return replace(merged, score_BN=worth_BN)


def fill_up(centres: list[int], n: int, K: int) -> list[int]:
    """K of n places: the centres, then the first of the others."""
    others = sorted(set(range(n)) - set(centres))
    return centres + others[: K - len(centres)]


def distances(x_BnD: mx.array) -> np.ndarray:
    """One minus the cosine of every two tokens, (B, n, n)."""
    (B, n, _), first = x_BnD.shape, 0
    distance_Bnn = np.empty((B, n, n))
    for block_Bmn in cosine_rows(x_BnD, hold=False).blocks():
        (similar_Bmn,) = on_host(block_Bmn)
        m = similar_Bmn.shape[1]
        np.subtract(1, similar_Bmn, out=distance_Bnn[:, first : first + m])
        first += m
    return distance_Bnn


def find_centres(distance_nn: np.ndarray, K: int, cutoff: float) -> tuple[float, list[int]]:
    """At most K centres, with their cutoff: the one that is given, or the smallest, to a millionth,
    that gives no more."""
    order_n = np.argsort(-densities(distance_nn), kind="stable")
    low, high = -1e-6, 2.0  # of one minus a cosine
    for _ in range(0 if cutoff else 21):
        middle = (low + high) / 2
        few_enough = len(spaced_centres(distance_nn, order_n, middle, K + 1)) <= K
        low, high = (low, middle) if few_enough else (middle, high)
    cutoff = cutoff or high
    return cutoff, spaced_centres(distance_nn, order_n, cutoff, K)


def spaced_centres(
    distance_nn: np.ndarray, order_n: np.ndarray, cutoff: float, most: int
) -> list[int]:
    """Centres in the order given, each farther than the cutoff from all before it; the first
    `most` of them."""
    centres: list[int] = []
    nearest_n = np.full(len(distance_nn), np.inf)  # distance to a centre
    for i in order_n.tolist():
        if nearest_n[i] > cutoff:
            centres.append(i)
            if len(centres) == most:
                break
            np.minimum(nearest_n, distance_nn[i], out=nearest_n)
    return centres


def densities(distance_nn: np.ndarray) -> np.ndarray:
    """How many points are near each, (n,), each counted by its distance; to nine digits."""
    near = (np.exp(-np.square(row_n / SPREAD)).sum() for row_n in distance_nn)
    return np.fromiter(near, float, len(distance_nn)).round(9)
