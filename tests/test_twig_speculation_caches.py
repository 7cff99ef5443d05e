"""Promises of speculative decoding: after every turn caches hold what a recomputation holds.

Shapes: I images, L rows, V words.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.generation import speculation as speculation_module
from mlx_vlm_prune.generation.speculation import Speculation
from mlx_vlm_prune.models.layers import TwigReader

from . import tiny
from .pruner_cases import close
from .test_model import Replaying
from .twig_pairs import (
    PROMPT,
    SPECS,
    build_pairs,
    generated,
    greedy,
    read_prompt,
    start_speculation,
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return build_pairs(tmp_path_factory.mktemp)


def check_caches(
    pair, spec: str, speculation: Speculation, first: int, chain, limit: int, policy=None
) -> int:
    """After every turn: rows, positions, biases, keys and values of all layers, the twig's too, are
    those of the same tokens read at once into empty caches. How many drafts were wrong."""
    ids = []
    for token in speculation.tokens(first, limit):
        ids.append(token.id)
        if len(ids) != 1 + token.accepted + len(speculation.drafts):
            continue  # not the last of its turn
        chain.again = True
        whole = tiny.Prompt([*PROMPT.ids, *ids[:-1]], PROMPT.runs)
        reader = TwigReader(pair.ours.learned["twig"])
        after = read_prompt(pair, spec, whole, reader, chain.pipeline, policy)
        caches, expected = (
            [*t.cache, *g.cache]
            for t, g in ((speculation.prefill, speculation.reader), (after, reader))
        )
        assert [layer.rows for layer in caches] == [layer.rows for layer in expected]
        for one, other in zip(caches, expected, strict=True):
            positions = (np.array(layer.positions_BS)[:, : layer.rows] for layer in (one, other))
            assert np.array_equal(*positions)
            for part in ("keys_BGSd", "values_BGSd"):
                close(*(np.array(getattr(x, part)[:, :, : x.rows]) for x in (one, other)))
            assert (one.bias_BS is None) == (other.bias_BS is None)
            if one.bias_BS is not None:
                close(np.array(one.bias_BS), np.array(other.bias_BS))
        assert int(mx.argmax(after.logits_BLV[0, -1]).item()) == ids[-1]
    assert len(ids) == limit
    return token.drafted - token.accepted


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["nearly", "short", "wrong"])
def test_after_every_turn_caches_hold_what_a_recomputation_without_any_holds(pairs, name, spec):
    chain = Replaying(pairs[name], spec)
    speculation, first = start_speculation(pairs[name], spec, 4, 0.0, chain=chain.pipeline)
    assert check_caches(pairs[name], spec, speculation, first, chain, 14) > 0


@pytest.mark.parametrize("spec", ["none", "twig", "fastv", "cls_attention"])
def test_so_they_do_where_positions_count_anew_and_room_is_made_inside_a_draft(
    pairs, spec, monkeypatch
):
    monkeypatch.setattr("mlx_vlm_prune.models.cache.STEP", 3)
    pair, chain = pairs["short"], Replaying(pairs["short"], spec)
    speculation, first = start_speculation(
        pair, spec, 4, 0.0, chain=chain.pipeline, policy="renumber"
    )
    assert check_caches(pair, spec, speculation, first, chain, 14, "renumber") > 0


@pytest.mark.parametrize("spec", ["none", "twig"])
def test_a_decoder_that_forgets_to_crop_is_found_out(pairs, spec):
    chain = Replaying(pairs["short"], spec)
    speculation, first = start_speculation(pairs["short"], spec, 4, 0.0, chain=chain.pipeline)
    speculation.crop = lambda rows: None
    with pytest.raises(AssertionError):
        check_caches(pairs["short"], spec, speculation, first, chain, 14)
    speculation, first = start_speculation(pairs["short"], spec, 4, 0.0)
    speculation.crop = lambda rows: None
    ids = [token.id for token in generated(speculation, first, 24)]
    assert ids != greedy(pairs["short"], spec, 24)


def test_a_decoder_that_believes_every_draft_is_found_out(pairs, monkeypatch):
    monkeypatch.setattr(speculation_module, "count_accepted", lambda draft, ids: len(draft))
    speculation, first = start_speculation(pairs["short"], "none", 4, 0.0)
    speculation.verify = lambda states, place, verify=speculation.verify: [
        *speculation.drafts[-1], verify(states, place)[-1]
    ]  # fmt: skip
    ids = [token.id for token in generated(speculation, first, 24)]
    assert ids != greedy(pairs["short"], "none", 24)


@pytest.mark.parametrize("piece", [5, 2048])
@pytest.mark.parametrize("spec", ["none", "twig", "fastv", "cls_attention+restore"])
def test_reading_along_changes_nothing_that_the_model_reads(pairs, spec, piece, monkeypatch):
    monkeypatch.setattr("mlx_vlm_prune.models.layers.PREFILL_STEP_SIZE", piece)
    pair = pairs["nearly"]
    reader = TwigReader(pair.ours.learned["twig"])
    alone, along = read_prompt(pair, spec), read_prompt(pair, spec, twig=reader)
    assert np.array(alone.logits_BLV).tobytes() == np.array(along.logits_BLV).tobytes()
    for one, other in zip(alone.cache, along.cache, strict=True):
        assert one.rows == other.rows
        assert np.array(one.keys_BGSd).tobytes() == np.array(other.keys_BGSd).tobytes()
    assert {layer.rows for layer in reader.cache} == {alone.cache[reader.twig.layer - 1].rows}
