"""The reference's pruners on examples worked by hand."""

import mlx.core as mx
import numpy as np
import torch

import mlx_vlm_prune.pruners as mlx_pruners
from torch_ref.pruners import METHODS, Signals, reduce
from torch_ref.pruners.contract import Reduction
from torch_ref.pruners.restore import attention_bias

from .test_torch_ref_parts import close


def make_signals(x_ND: list, grid: tuple[int, int], cls: list | None = None) -> Signals:
    row_1N = None if cls is None else torch.tensor([cls]).float()
    return Signals(torch.tensor([x_ND]).float(), grid, cls_attention_BN=row_1N)


def test_norm_keeps_the_longest_and_of_equals_the_first():
    kept = reduce("norm", make_signals([[1, 0], [0, 3], [2, 0], [0, 2], [-2, 0]], (1, 5)), 3)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[1, 2, 3]]


def test_cls_attention_keeps_the_most_attended_and_of_equals_the_first():
    kept = reduce("cls_attention", make_signals([[0]] * 5, (1, 5), [0.1, 0.3, 0.1, 0.1, 0.3]), 3)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[0, 1, 4]]


def test_windows_cover_a_narrow_grid_whose_square_share_of_bands_exceeds_k():
    """9 x 1 in 2: square windows would want 4 bands, of which two had no window."""
    x_ND = [[float(i)] for i in range(9)]
    kept = reduce("avgpool", make_signals(x_ND, (9, 1)), 2)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[1, 6]]
    close(kept.tokens(torch.tensor([x_ND])), torch.tensor([[[1.5], [6.0]]]))


X, Y, Z = [1, 0, 0], [0, 1, 0], [0, 0, 1]


def test_similarity_dissolves_the_smallest_clusters_when_there_are_too_many():
    """X X Y Z Z: Y's cluster goes, and Y, which is like neither, joins the first."""
    kept = reduce("similarity", make_signals([X, X, Y, Z, Z], (1, 5)), 2)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[0, 3]]
    third = 1 / 3
    by_hand = torch.tensor([[[third, third, third, 0, 0], [0, 0, 0, 0.5, 0.5]]])
    assert kept.weight_BKN is not None
    close(kept.weight_BKN, by_hand)


def test_similarity_lets_the_least_alike_stand_alone_when_there_are_too_few():
    """One cluster; the third token is the least like its leader."""
    kept = reduce("similarity", make_signals([[1, 0], [1, 0.1], [1, 0.4], [1, 0.2]], (1, 4)), 2)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[0, 2]]
    assert kept.weight_BKN is not None
    third = 1 / 3
    close(kept.weight_BKN, torch.tensor([[[third, third, 0, third], [0, 0, 1, 0]]]))


def test_similarity_as_published_fills_up_with_the_first_followers():
    kept = reduce("similarity", make_signals([X, X, X, X], (1, 4)), 3, published=True)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[0, 1, 2]]
    assert kept.weight_BKN is not None
    by_hand = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0], [0, 0, 1, 0]]])
    close(kept.weight_BKN, by_hand)


def both_keep(name: str, K: int, x_ND: list, **signals: list) -> list[list[int]]:
    """The tokens that the product and the reference keep."""
    grid, rows = (1, len(x_ND)), {f"{k}_BN": np.array([v], np.float32) for k, v in signals.items()}
    x_1ND = np.array([x_ND], np.float32)
    ours = mlx_pruners.resolve(name)(
        mlx_pruners.Signals(mx.array(x_1ND), grid, **{k: mx.array(v) for k, v in rows.items()}), K
    )
    twins = {k: torch.from_numpy(v) for k, v in rows.items()}
    theirs = reduce(name, Signals(torch.from_numpy(x_1ND), grid, **twins), K)
    assert ours.index_BK is not None and theirs.index_BK is not None
    return [ours.index_BK[0].tolist(), theirs.index_BK[0].tolist()]


def test_prunesid_seats_each_direction_and_then_the_ones_that_are_unlike():
    """Two directions, of tokens 0 to 5 and 6 to 8. For K = 8 the mean cosine is 18 / 36 less what
    the 18 mixed pairs have, and a quarter of it the threshold, so each group has one survivor, its
    most attended. Each is seated, and the six others go half and half, as far as there is room:
    the second group is full with three."""
    first, second = [6, -6, 0, 0], [0, 0, 5, -5]
    x_ND = [first] * 6 + [second] * 3
    attention = [0.05, 0.2, 0.1, 0.15, 0.01, 0.09, 0.1, 0.2, 0.1]
    assert both_keep("prunesid", 8, x_ND, cls_attention=attention) == [[0, 1, 2, 3, 5, 6, 7, 8]] * 2
    # For K = 3 there is one group, whose most attended survives; the others follow by attention.
    assert both_keep("prunesid", 3, x_ND, cls_attention=attention) == [[1, 3, 7]] * 2


def test_zoo_prune_takes_the_most_sensitive_and_then_those_that_are_also_far():
    """Scaled: 0, 1/4, 1, 1/2, 3/4. After token 2 the distances are 1, 1, -, 0, 1, so token 4 is
    next, then 1; without a spread token 0 comes first, and then what is unlike it."""
    x_ND = [[1, 0], [1, 0], [0, 1], [0, 2], [3, 0]]
    moved = [1, 2, 5, 3, 4]
    assert both_keep("zoo_prune", 1, x_ND, sensitivity=moved) == [[2]] * 2
    assert both_keep("zoo_prune", 2, x_ND, sensitivity=moved) == [[2, 4]] * 2
    assert both_keep("zoo_prune", 2, x_ND, sensitivity=[3, 3, 3.001, 3, 3]) == [[0, 2]] * 2


def test_a_matrix_moves_every_token_alike_and_a_square_root_the_small_ones_more():
    """The root of 4 and of 1 moved by 0.01: their derivatives are 1/4 and 1/2."""
    x_BND = np.array([[[4.0], [1.0]]], np.float32)
    for methods, root, x in (
        (mlx_pruners.METHODS, mx.sqrt, mx.array(x_BND)),
        (METHODS, torch.sqrt, torch.from_numpy(x_BND)),
    ):
        probe = methods["zoo_prune"].probe
        np.testing.assert_allclose(probe(lambda x: 2 * x, x).tolist(), [[2, 2]], rtol=1e-4)
        moved = probe(root, x, directions=3, seed=1)
        np.testing.assert_allclose(moved.tolist(), [[0.25, 0.5]], rtol=1e-4)


def test_restore_counts_what_its_options_say():
    """Six tokens, of which 1 and 4 stay. By likeness 0, 2, 3 and 5 count for 4, in the row 0 and 2
    for 1; without decay each counts as one."""
    x_BND = np.array([[[0, 1], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1]]], np.float32)
    signals = mlx_pruners.Signals(mx.array(x_BND), (2, 3))
    bias, kept = mlx_pruners.METHODS["restore"].attention_bias, [[1, 4]]
    twins = Signals(x_BND=torch.tensor(x_BND), grid=(2, 3))
    for options, counts in (
        ({"decay": False}, [[1, 5]]),
        ({"decay": False, "nearby": True}, [[3, 3]]),
        ({"decay": False, "nearby": True, "strength": 0.5}, [[3**0.5, 3**0.5]]),
        ({"nearby": True}, None),
    ):
        ours = np.array(bias(signals, mlx_pruners.Reduction(mx.array(kept)), **options))
        theirs = attention_bias(twins, Reduction(index_BK=torch.tensor(kept)), **options)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)
        if counts:
            np.testing.assert_allclose(np.exp(ours), counts, rtol=1e-5)
        else:
            assert (ours > 0).all() and (ours < np.log(3)).all()
