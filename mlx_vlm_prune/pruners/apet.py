"""Keep the tokens that a few basis tokens approximate worst.

ApET, Ma et al., CVPR 2026, arXiv:2602.19870: approximation error guides the compression.
`basis` tokens that lie far apart (farthest point sampling) span a space; each token is
approximated in it by least squares; the K with the largest error stay. The basis tokens take the
places of those with the smallest error among them, the first token of the basis the first place;
every token that does not stay merges into the most similar of the others, to their mean.

As the authors' code (github.com/MaQianKun0/ApET@70cc01b), which chooses among the tower's
features. Differs: sampling starts at the longest token, theirs at a random one; the fit is exact,
theirs adds 1e-5 to the diagonal; one slot at least is no basis token, where theirs fails; their
second cut, inside the decoder, is a chain here.

Options:
    basis: basis tokens, 1 or more

Shapes: B images, N tokens, K kept, M basis tokens, C = K - M merged, D features.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import (
    choice_dtype,
    choosing,
    constant,
    fused,
    keep_highest,
    noise,
    rounded,
    to_choice_dtype,
)
from .rows import nearest_slots

stage = Stage.FEATURES


def prune(signals: Signals, K: int, *, basis: int = 10) -> Reduction:
    """Keep K and merge the rest into them."""
    if basis < 1:
        raise ValueError(f"basis is {basis}; it must be at least 1")
    with choosing():
        error_BN, basis_BM = approximation_errors(signals.x_BND, basis)
        M = min(basis_BM.shape[1], K - 1)
        order_BN = mx.argsort(-error_BN, axis=-1)
        merged_BC, replaced_BM = order_BN[:, : K - M], order_BN[:, K - M : K]
        replaced_BM = mx.sort(replaced_BM, axis=-1) if M else replaced_BM
        _, slot_BN = nearest_slots(signals.x_BND, merged_BC)
        slot_BN = mx.put_along_axis(slot_BN, replaced_BM, mx.array(-1, slot_BN.dtype), axis=1)
        N = error_BN.shape[1]
        means_BCN = Reduction.merge(merged_BC, slot_BN).mixture(N)
        place_BK = mx.concatenate([merged_BC, replaced_BM], axis=1)
        weight_BKN = mx.concatenate([means_BCN, Reduction(basis_BM[:, :M]).mixture(N)], axis=1)
        weight_BKN = take(weight_BKN, mx.argsort(place_BK, axis=1))
        return Reduction(keep_highest(error_BN, K), weight_BKN, score_BN=error_BN)


def approximation_errors(x_BND: mx.array, basis: int) -> tuple[mx.array, mx.array]:
    """The length of what the basis leaves of each token, as a share of the longest token's, (B, N),
    and the basis tokens (B, M) in the order in which they were sampled.

    Gram-Schmidt, a basis token at a time.
    """
    zero_length = noise()  # as a share of the longest token's: shorter is no direction
    x_BND = to_choice_dtype(x_BND)
    B, N, _ = x_BND.shape
    length_BN = mx.sqrt(mx.square(x_BND).sum(axis=-1))
    longest_B11 = mx.maximum(length_BN.max(axis=-1)[:, None, None], constant(1e-30))
    x_BND = residual_BND = x_BND / longest_B11
    i_B1 = mx.argmax(rounded(length_BN / longest_B11[..., 0]), axis=-1, keepdims=True)
    gap_BN = mx.full((B, N), mx.inf).astype(choice_dtype())  # squared, to the nearest basis token
    sampled = []
    for _ in range(min(basis, N)):
        sampled.append(i_B1)
        basis_B1D = take(residual_BND, i_B1)
        square_B11 = mx.square(basis_B1D).sum(axis=-1, keepdims=True)
        share_BN1 = (residual_BND * basis_B1D).sum(axis=-1, keepdims=True)
        residual_BND = without(residual_BND, basis_B1D, square_B11, share_BN1)
        distance_BN = squares(x_BND, take(x_BND, i_B1)).sum(axis=-1)
        gap_BN = mx.minimum(gap_BN, rounded(distance_BN))
        i_B1 = mx.argmax(gap_BN, axis=-1, keepdims=True)
    error_BN = mx.round(mx.sqrt(mx.square(residual_BND).sum(axis=-1)) / zero_length) * zero_length
    return error_BN, mx.concatenate(sampled, axis=1)


@fused
def without(
    residual_BND: mx.array, basis_B1D: mx.array, square_B11: mx.array, share_BN1: mx.array
) -> mx.array:
    """What a basis token of squared length `square_B11` leaves of the others; `share_BN1` are their
    products with it."""
    share_BN1 = share_BN1 / mx.maximum(square_B11, constant(1e-300))
    has_direction_B11 = square_B11 > noise() ** 2
    return residual_BND - mx.where(has_direction_B11, share_BN1 * basis_B1D, 0)


@fused
def squares(x_BND: mx.array, y_B1D: mx.array) -> mx.array:
    """Squared differences."""
    return mx.square(x_BND - y_B1D)
