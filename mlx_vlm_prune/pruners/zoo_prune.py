"""Keep tokens by whose changes the projector's answer changes most, unlike those kept already.

ZOO-Prune, CVPR 2026, arXiv:2509.24837. A token's sensitivity is estimated without gradients: the
mean length of (M(x + h u) - M(x - h u)) / 2h over random directions u of length one, the same for
all tokens, with M the projector. Greedily, the next token kept has the largest product of its
sensitivity, scaled to 0 to 1, and its distance 1 - cos to the nearest kept token; the first is the
most sensitive.

As the authors' code (github.com/AIM-SKKU/ZOO-Prune@159f7f9) for LLaVA-1.5, which compares projected
tokens. Differs: the directions follow from a seed, theirs are drawn again each time; the projector
reads float32, theirs float16; sensitivities that differ by less than a thousandth count alike.

A projector that is one matrix moves all tokens alike: then diversity alone decides. It reads
2 * `directions` * N rows more for the choice. Models that merge patches inside the tower have no
projector to ask.

Options:
    directions: how many directions are tried, 1 to 1000
    step: h, how far a token is moved, above 0
    seed: seed of the directions, 0 or more

Shapes: B images, N tokens, D features, m directions, K kept.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .numerics import choosing, constant, scale_to_unit, to_choice_dtype
from .salience_coverage import weighted_centres

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"sensitivity": None}
MOST_DIRECTIONS = 1000
ROWS = 8192  # that the projector reads at once, where one direction needs no more
LEAST_SPREAD = 1e-3  # of the largest sensitivity: what differs less is the rounding of float32


def probe(
    project: Callable[[mx.array], mx.array], features_BND: mx.array, *,
    directions: int = 64, step: float = 0.01, seed: int = 0,
) -> mx.array:  # fmt: skip
    """The sensitivity of each token, (B, N) float32, from the tokens ahead of the projector."""
    if not 1 <= directions <= MOST_DIRECTIONS or step <= 0 or seed < 0:
        raise ValueError(
            f"directions, step and seed are {directions}, {step:g} and {seed}; they must be 1 to"
            f" {MOST_DIRECTIONS}, above 0, and 0 or more"
        )
    B, N, D = features_BND.shape
    unit_mD = np.random.default_rng(seed).standard_normal((directions, D))
    unit_mD /= np.linalg.norm(unit_mD, axis=1, keepdims=True)
    shift_mD = mx.array((step * unit_mD).astype(np.float32))
    x_B1ND = features_BND.astype(mx.float32)[:, None]
    at_once, moved_BN = max(1, ROWS // (2 * B * N)), mx.zeros((B, N))
    for first in range(0, directions, at_once):
        shift_n1D = shift_mD[first : first + at_once, None]
        both = mx.concatenate([x_B1ND + shift_n1D, x_B1ND - shift_n1D], axis=1)
        answer = project(both.flatten(1, 2)).astype(mx.float32)
        ahead, behind = mx.split(answer.reshape(B, 2, -1, N, answer.shape[-1]), 2, axis=1)
        moved_BN = moved_BN + mx.linalg.norm(ahead - behind, axis=-1)[:, 0].sum(axis=1)
    return moved_BN / (2 * step * directions)


def prune(signals: Signals, K: int) -> Reduction:
    """Keep K."""
    with choosing():
        moved_BN = to_choice_dtype(signals.sensitivity_BN)
        high_B1 = moved_BN.max(axis=-1, keepdims=True)
        is_level_B1 = high_B1 - moved_BN.min(axis=-1, keepdims=True) < LEAST_SPREAD * high_B1
        weight_BN = mx.where(is_level_B1, constant(1), scale_to_unit(moved_BN))
        return Reduction(weighted_centres(signals.x_BND, weight_BN, K))
