"""What a pruner sees: each signal along the axis of its tokens, and none that it did not ask for.

Shapes: B images, N tokens, K kept, T words, m patches of a block.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch

import torch_ref.pruners as ref
from mlx_vlm_prune.models.projector import merged
from mlx_vlm_prune.pruners import METHODS, Reduction
from torch_ref.models.published import merged as merged_there

from .pruner_cases import CHOOSING, LEARNED, T, case, learned_pair, seen_there, signals

GRID, N = (4, 6), 24
INDEX_BK = np.array([[0, 5, 11, 23], [2, 3, 7, 8]])
OF = case("random", 2, GRID, 0)
NAMES = [name for name in OF if name != "grid"]


def along(name: str) -> int | None:
    """The axis of N in the letters after the last underscore, of which each is an axis."""
    axes = [letter for letter in name.rsplit("_", 1)[1] if letter.isupper()]
    return axes.index("N") if "N" in axes else None


def same(name: str, seen, expected: np.ndarray) -> None:
    ours = np.array(getattr(seen, name).tolist())
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_every_kind_of_suffix_is_there_and_words_are_not_as_many_as_tokens():
    assert {along(name) for name in NAMES} == {None, 1, 2} and T != N
    assert along("text_attention_BTN") == 2 and along("keys_BNHd") == 1
    assert along("cls_query_BHd") is None and along("text_keys_BTD") is None


@pytest.mark.parametrize("name", NAMES)
def test_reducing_takes_the_kept_tokens_along_the_axis_of_tokens(name):
    axis, expected = along(name), OF[name]
    if axis is not None:
        pairs = zip(OF[name], INDEX_BK, strict=True)
        expected = np.stack([np.take(one, index, axis - 1) for one, index in pairs])
    same(name, signals(OF).reduced(Reduction(mx.array(INDEX_BK))), expected)
    same(name, seen_there(OF).take(torch.from_numpy(INDEX_BK)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_merging_patches_takes_means_along_the_axis_of_tokens(name):
    (rows, columns), m = GRID, (2, 3)
    blocks = [
        [(r + i) * columns + c + j for i in range(m[0]) for j in range(m[1])]
        for r in range(0, rows, m[0])
        for c in range(0, columns, m[1])
    ]
    axis, expected = along(name), OF[name]
    if name == "x_BND":
        expected = np.stack([OF[name][:, own].reshape(2, -1) for own in blocks], axis=1)
    elif axis is not None:
        parts = [np.take(OF[name], own, axis).mean(axis) for own in blocks]
        expected = np.stack(parts, axis)
    same(name, merged(signals(OF), m), expected)
    same(name, merged_there(seen_there(OF), m), expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_a_batch_has_its_own_signals(name):
    same(name, signals(OF).of_image(1), OF[name][1:])


SUPPLIED = {  # what a host hands over for a need, where it is not a row of attention
    "grid": [], "text": ["text_BTD", "text_real_BT"], "cls_query": ["cls_query_BHd"],
    "keys": ["keys_BNHd"], "queries": ["queries_BNHd"], "pixels": ["pixels_BND"],
    "patches": ["patches_BND"], "before": ["before_BND"],
    "held_keys": ["keys_BND", "text_keys_BTD"],
    "normed": ["normed_BND", "text_BTD", "text_real_BT"],
    "text_attention": ["text_attention_BTN"],
    "mean_attention": ["mean_attention_BN", "next_keys_BND"],
}  # fmt: skip


def needed(method) -> set[str]:
    return {name for need in method.needs for name in SUPPLIED.get(need, [f"{need}_BN"])}


def missed(prune, seen) -> set[str]:
    """The signals without which the method stops, each with an error that names it."""
    names = set()
    for name in set(NAMES) - {"x_BND"}:
        try:
            prune(seen.replace(**{name: None}), 9)
        except AssertionError as e:
            assert str(e).startswith(f"{name} is ") and "`needs`" in str(e)
            names.add(name)
    return names


@pytest.mark.parametrize("method", [*CHOOSING, *LEARNED])
def test_a_method_reads_what_it_needs_and_is_told_of_a_signal_that_is_withheld(method):
    ours, theirs = METHODS[method], ref.METHODS[method]
    if method in LEARNED:
        ours, theirs = learned_pair(method, 9)
    needs = needed(METHODS[method])
    assert missed(ours.prune, signals(OF)) == needs
    with torch.no_grad():
        assert missed(theirs.prune, seen_there(OF)) == needs


def test_a_signal_that_need_not_be_there_is_asked_for_by_name():
    for seen in (signals(OF), seen_there(OF)):
        assert seen.get("size_BN") is None and seen.get("keys_BND") is seen.keys_BND
        with pytest.raises(AssertionError, match="sizes_BN"):
            seen.get("sizes_BN")
        with pytest.raises(AssertionError, match="sizes_BN"):
            seen.replace(sizes_BN=seen.x_BND)
        with pytest.raises(AttributeError, match="sizes_BN"):
            _ = seen.sizes_BN
