"""Promises of the whole model: encode, prune, project, splice, decode.

Shapes: I images, L tokens, V words.
"""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_vlm_prune.language.minimind import attend
from mlx_vlm_prune.loading import load
from mlx_vlm_prune.pruners import METHODS, resolve

from . import tiny
from .test_pruners import close

CHOOSING = [name for name in METHODS if name not in ("none", "attention_pool")]
POLICIES = ("keep", "renumber")
ROWS = (
    tiny.row("user # what is in the picture ?"),
    tiny.row("# and # is there a red star ?"),
    tiny.row("how many ?"),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random weights in the reference and in MLX, brought over by the converter."""
    reference = tiny.reference()
    model, _ = load(tiny.checkpoint(reference, tmp_path_factory.mktemp("pair")), dtype="float32")
    pixels = np.random.default_rng(0).normal(size=(3, 64, 64, 3)).astype(np.float32)
    return SimpleNamespace(ours=model, theirs=reference, pixels=pixels)


def logits(pair, rows, images, name, K, policy="keep"):
    pixels = mx.array(pair.pixels[images]) if images else None
    before = pair.ours(rows, pixels, resolve(name), K, policy, last_only=False)
    return before, np.array(before.logits_BLV)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CHOOSING)
def test_logits_equal_the_reference_for_every_method(pair, name, policy):
    rows = list(ROWS)
    _, ours = logits(pair, rows, [0, 1, 2], name, 5, policy)
    pixels = torch.from_numpy(pair.pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = pair.theirs.logits(rows, pixels, pruner=name, K=5, positions=policy).numpy()
    for b, row in enumerate(rows):
        length = len(row.ids) - len(row.runs) * (tiny.N - 5)
        close(ours[b, -length:], theirs[b, -length:])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 3e-2)])
def test_half_precision_stays_near_the_reference(tmp_path, dtype, tolerance):
    """The reference has the same rounded weights and computes in float32."""
    reference = tiny.reference(seed=3)
    model, _ = load(tiny.checkpoint(reference, tmp_path), dtype=dtype)
    reference = reference.to(getattr(torch, dtype)).float()
    pixels = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    half = mx.array(pixels).astype(getattr(mx, dtype))
    before = model([ROWS[0]], half, resolve("avgpool"), 5, last_only=False)
    assert before.logits_BLV.dtype == half.dtype
    ours = np.array(before.logits_BLV.astype(mx.float32))
    with torch.no_grad():
        seen = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        theirs = reference.logits([ROWS[0]], seen, pruner="avgpool", K=5).numpy()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["none", *CHOOSING])
def test_cached_decoding_equals_the_cache_free_recomputation_at_every_split(pair, name, policy):
    K = tiny.N if name == "none" else 6
    row, said = ROWS[1], tiny.row("yes the red star is left of it").ids
    whole = tiny.Prompt([*row.ids, *said], row.runs)
    _, expected_1LV = logits(pair, [whole], [0, 1], name, K, policy)
    before, _ = logits(pair, [row], [0, 1], name, K, policy)
    position_B1 = before.next_B1
    start = before.lengths[0]
    for i, token in enumerate(said):
        got = pair.ours.step(mx.array([[token]]), position_B1, before)
        position_B1 = position_B1 + 1
        close(np.array(got)[0, 0], expected_1LV[0, start + i])


@pytest.mark.parametrize("L", [1, 5])
def test_attention_folded_for_a_cpu_equals_the_fused_one_of_a_gpu(L):
    rng, S = np.random.default_rng(0), 9
    q = mx.array(rng.normal(size=(2, 6, L, 8)).astype(np.float32))
    k, v = (mx.array(rng.normal(size=(2, 3, S, 8)).astype(np.float32)) for _ in range(2))
    causal = mx.arange(S)[None] <= mx.arange(S - L, S)[:, None]
    folded = attend(q, k, v, causal[None, None] if L > 1 else None, fold=True)
    fused = attend(q, k, v, "causal" if L > 1 else None, fold=False)
    close(np.array(folded), np.array(fused))


@pytest.mark.parametrize("split", range(1, 12))
def test_a_prompt_read_in_two_pieces_gives_the_same_as_in_one(pair, split):
    language, rng = pair.ours.language, np.random.default_rng(1)
    embeds = mx.array(rng.normal(size=(1, 12, 48)).astype(np.float32))
    positions = mx.array([[0, 1, 2, 5, 6, 9, 10, 11, 12, 20, 21, 22]])  # gaps, as pruning leaves
    whole = np.array(language(embeds, positions))
    cache = language.make_cache()
    first = language(embeds[:, :split], positions[:, :split], cache)
    second = language(embeds[:, split:], positions[:, split:], cache)
    close(np.concatenate([np.array(first), np.array(second)], axis=1), whole)


def test_a_long_prompt_read_in_pieces_gives_the_same_as_at_once(pair, monkeypatch):
    whole, expected = logits(pair, list(ROWS), [0, 1, 2], "norm", 7)
    monkeypatch.setattr("mlx_vlm_prune.model.PIECE", 6)
    pieces, got = logits(pair, list(ROWS), [0, 1, 2], "norm", 7)
    for b, length in enumerate(whole.lengths):
        close(got[b, -length:], expected[b, -length:])
    assert pieces.cache[0].rows == whole.cache[0].rows


@pytest.mark.parametrize("name", CHOOSING)
def test_keeping_all_gives_the_unpruned_bits(pair, name):
    _, full = logits(pair, [ROWS[0]], [0], "none", tiny.N)
    _, kept = logits(pair, [ROWS[0]], [0], name, tiny.N)
    assert kept.tobytes() == full.tobytes()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_equals_one_prompt_at_a_time_while_decoding_too(pair, policy):
    rows, said = list(ROWS), [9, 12, 30]
    together, _ = logits(pair, rows, [0, 1, 2], "cls_attention", 7, policy)
    stepped = [np.array(s) for s in steps(pair.ours, together, said, len(rows))]
    image = 0
    for b, row in enumerate(rows):
        images = list(range(image, image + len(row.runs)))
        image += len(row.runs)
        alone, _ = logits(pair, [row], images, "cls_attention", 7, policy)
        length = alone.lengths[0]
        close(np.array(together.logits_BLV)[b, -length:], np.array(alone.logits_BLV)[0])
        for got, expected in zip(stepped, steps(pair.ours, alone, said, 1), strict=True):
            close(got[b], np.array(expected)[0])


def steps(model, before, said, B):
    position_B1 = before.next_B1
    for token in said:
        yield model.step(mx.full((B, 1), token), position_B1, before)
        position_B1 = position_B1 + 1


def test_pruning_before_the_decoder_leaves_exactly_the_pruned_rows_in_every_cache(pair):
    full, _ = logits(pair, [ROWS[0]], [0], "none", tiny.N)
    before, _ = logits(pair, [ROWS[0]], [0], "norm", 4)
    length = len(ROWS[0].ids) - tiny.N + 4
    assert {layer.rows for layer in before.cache} == {length}
    assert before.cache[0].nbytes * len(ROWS[0].ids) == full.cache[0].nbytes * length


def test_positions_keep_or_count_by_hand(pair):
    """Two words, an image of 16 of which tokens 0, 2, 8 and 10 stay, one word."""
    row = tiny.Prompt([7, 8, *[tiny.IMAGE] * 16, 9], [(2, 16)])
    keep, _ = logits(pair, [row], [0], "uniform", 4, "keep")
    assert np.array(keep.cache[0].positions_BS)[0, :7].tolist() == [0, 1, 2, 4, 10, 12, 18]
    assert keep.next_B1.item() == 19
    count, _ = logits(pair, [row], [0], "uniform", 4, "renumber")
    assert np.array(count.cache[0].positions_BS)[0, :7].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert count.next_B1.item() == 7


def test_dropped_cache_rows_leave_the_others_and_their_positions(pair):
    """Decoding after a drop equals reading the shorter prompt with the same positions."""
    language, rng = pair.ours.language, np.random.default_rng(3)
    embeds = mx.array(rng.normal(size=(1, 9, 48)).astype(np.float32))
    positions, stay = mx.arange(9)[None], mx.array([[0, 1, 4, 6, 8]])
    cache = language.make_cache()[:1]
    layer = language.layers[0].self_attn
    from mlx_vlm_prune.language.minimind import Rotary, Step

    def read(x, p, rows):
        step = Step(p, Rotary(p, language.config.head_dim, language.config.rope_theta), False)
        return layer(x, step, rows)

    read(embeds, positions, cache[0])
    cache[0].keep(stay)
    token, place = embeds[:, :1], mx.array([[9]])
    shorter = language.make_cache()[0]
    read(embeds[:, stay[0]], stay, shorter)
    close(np.array(read(token, place, cache[0])), np.array(read(token, place, shorter)))
    assert np.array(cache[0].positions_BS)[0, :6].tolist() == [0, 1, 4, 6, 8, 9]
