"""What a pruner sees: each signal along the axis of its tokens, and none that it did not ask for.

Shapes: B images, N tokens, K kept, T words, m patches of a block.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch

import torch_ref.pruners as ref
from mlx_vlm_prune.models.projector import merge_patches
from mlx_vlm_prune.pruners import METHODS, Reduction
from torch_ref.models.projector import merge_patches as reference_merged

from .pruner_cases import CHOOSING, LEARNED, T, case, learned_pair, reference_signals, signals

GRID, N = (4, 6), 24
INDEX_BK = np.array([[0, 5, 11, 23], [2, 3, 7, 8]])
ARRAYS = case("random", 2, GRID, 0)
NAMES = [name for name in ARRAYS if name != "grid"]


def token_axis(name: str) -> int | None:
    """The axis of N in the letters after the last underscore, of which each is an axis."""
    axes = [letter for letter in name.rsplit("_", 1)[1] if letter.isupper()]
    return axes.index("N") if "N" in axes else None


def assert_signal(name: str, signals_, expected: np.ndarray) -> None:
    ours = np.array(getattr(signals_, name).tolist())
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_every_kind_of_suffix_is_there_and_words_are_not_as_many_as_tokens():
    assert {token_axis(name) for name in NAMES} == {None, 1, 2} and T != N
    assert token_axis("text_attention_BTN") == 2 and token_axis("keys_BNHd") == 1
    assert token_axis("cls_query_BHd") is None and token_axis("text_keys_BTD") is None


@pytest.mark.parametrize("name", NAMES)
def test_reducing_takes_the_kept_tokens_along_the_axis_of_tokens(name):
    axis, expected = token_axis(name), ARRAYS[name]
    if axis is not None:
        pairs = zip(ARRAYS[name], INDEX_BK, strict=True)
        expected = np.stack([np.take(one, index, axis - 1) for one, index in pairs])
    assert_signal(name, signals(ARRAYS).reduced(Reduction(mx.array(INDEX_BK))), expected)
    assert_signal(name, reference_signals(ARRAYS).take(torch.from_numpy(INDEX_BK)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_merging_patches_takes_means_along_the_axis_of_tokens(name):
    (rows, columns), m = GRID, (2, 3)
    blocks = [
        [(r + i) * columns + c + j for i in range(m[0]) for j in range(m[1])]
        for r in range(0, rows, m[0])
        for c in range(0, columns, m[1])
    ]
    axis, expected = token_axis(name), ARRAYS[name]
    if name == "x_BND":
        expected = np.stack([ARRAYS[name][:, block].reshape(2, -1) for block in blocks], axis=1)
    elif axis is not None:
        parts = [np.take(ARRAYS[name], block, axis).mean(axis) for block in blocks]
        expected = np.stack(parts, axis)
    assert_signal(name, merge_patches(signals(ARRAYS), m), expected)
    assert_signal(name, reference_merged(reference_signals(ARRAYS), m), expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_a_batch_has_its_own_signals(name):
    assert_signal(name, signals(ARRAYS).of_image(1), ARRAYS[name][1:])


SIGNALS_OF_NEED = {  # what a host hands over for a need, where it is not a row of attention
    "grid": [], "text": ["text_BTD", "text_real_BT"], "cls_query": ["cls_query_BHd"],
    "cls_key": ["cls_key_BHd"], "features": ["features_BND"],
    "keys": ["keys_BNHd"], "queries": ["queries_BNHd"], "pixels": ["pixels_BND"],
    "patches": ["patches_BND"], "before": ["before_BND"],
    "held_keys": ["keys_BND", "text_keys_BTD"],
    "normed": ["normed_BND", "text_BTD", "text_real_BT"],
    "text_attention": ["text_attention_BTN"], "text_share": ["text_share_BT", "text_real_BT"],
    "mean_attention": ["mean_attention_BN", "next_keys_BND"], "grey": ["grey_BNP"],
    "values": ["values_BNHd"], "cls_value": ["cls_value_BHd"], "entrance": ["entrance_BND"],
    "held_values": ["held_values_BNHd", "text_values_BTHd", "text_real_BT"],
    "rotation": ["rotary_cosine_BN", "rotary_sine_BN"],
}  # fmt: skip


def signals_needed(method) -> set[str]:
    names = {name for need in method.needs for name in SIGNALS_OF_NEED.get(need, [f"{need}_BN"])}
    # Which words are real comes with their attention; of methods that read it one asks.
    return names | ({"text_real_BT"} if method.name == "dual_attention" else set())


def missing_signals(prune, signals_) -> set[str]:
    """The signals without which the method stops, each with an error that names it."""
    missing = set()
    for name in set(NAMES) - {"x_BND"}:
        try:
            prune(signals_.replace(**{name: None}), 9)
        except AssertionError as e:
            assert str(e).startswith(f"{name} is ") and "`needs`" in str(e)
            missing.add(name)
    return missing


@pytest.mark.parametrize("method", [*CHOOSING, *LEARNED])
def test_a_method_reads_what_it_needs_and_is_told_of_a_signal_that_is_withheld(method):
    ours, theirs = METHODS[method], ref.METHODS[method]
    if method in LEARNED:
        ours, theirs = learned_pair(method, 9)
    needs = signals_needed(METHODS[method])
    assert missing_signals(ours.prune, signals(ARRAYS)) == needs
    with torch.no_grad():
        assert missing_signals(theirs.prune, reference_signals(ARRAYS)) == needs


def test_a_signal_that_need_not_be_there_is_asked_for_by_name():
    for signals_ in (signals(ARRAYS), reference_signals(ARRAYS)):
        assert signals_.get("size_BN") is None and signals_.get("keys_BND") is signals_.keys_BND
        with pytest.raises(AssertionError, match="sizes_BN"):
            signals_.get("sizes_BN")
        with pytest.raises(AssertionError, match="sizes_BN"):
            signals_.replace(sizes_BN=signals_.x_BND)
        with pytest.raises(AttributeError, match="sizes_BN"):
            _ = signals_.sizes_BN
