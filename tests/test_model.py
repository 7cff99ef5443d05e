"""Promises of the whole model: encode, prune, project, splice, decode.

Shapes: I images, L tokens, V words.
"""

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.models.language.minimind import attend
from mlx_vlm_prune.models.towers.signals import Cut, TowerPass
from mlx_vlm_prune.pruners import METHODS, Pruner, Signals, plan, resolve
from torch_ref.models.decoder import attention
from torch_ref.pruners import Step

from . import tiny
from .pruner_cases import close

POLICIES = ("keep", "renumber")
CHOOSING = [n for n in METHODS if n not in ("none", "restore", "ivc", "attention_pool")]
# Of a decoder method K is the average over 3 layers, of which the first holds all 16.
SPECS = [
    *CHOOSING, "visionzip+fastv", "tome+divprune", "cls_attention+cdpruner", "fastv+restore",
    "cls_attention+restore", "downsample+norm", "patch_norm:keep=11+pact:prompt", "vtw+restore",
    "similarity+sparsevlm", "visionzip:keep=11+pyramiddrop", "apet+restore", "twig+restore",
    "tome:r=2", "cls_attention:layer=0", "global_local:keep=11+fastv", "cls_attention+twig",
    "patch_norm:keep=13+norm+ivc", "norm+ivc:anchors=0.8+restore", "pyramiddrop+ivc+restore",
]  # fmt: skip
K = 9
ROWS = (
    tiny.row("user # what is in the picture ?"),
    tiny.row("# and # is there a red star ?"),
    tiny.row("how many stars are red and how many pictures is the user in ?"),  # the most words
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random weights in the reference and in MLX, brought over by the converter."""
    reference = tiny.taught(tiny.reference())
    model, _ = load(tiny.checkpoint(reference, tmp_path_factory.mktemp("pair")), dtype="float32")
    pixels = np.random.default_rng(0).normal(size=(3, 64, 64, 3)).astype(np.float32)
    return SimpleNamespace(ours=model, theirs=reference, pixels=pixels)


def logits(pair, rows, images, spec, K, policy="keep"):
    pixels = mx.array(pair.pixels[images]) if images else None
    chain = plan(spec, pair.ours.learned)
    before = pair.ours(rows, pixels, chain, K, policy, last_only=False)
    return before, np.array(before.logits_BLV)


def steps_of(pair, spec: str, K: int) -> list[Step]:
    """The same chain for the reference, with what the product leaves to each step."""
    pipeline = plan(spec, pair.ours.learned)
    budgets = pipeline.budgets(tiny.N, K).per_step
    steps = [Step(s.name, k, s.options) for s, k in budgets]
    return [*steps, *(Step(e.name, None, e.options) for e in pipeline.enhancers)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_equal_the_reference_for_every_method(pair, spec, policy):
    rows = list(ROWS)
    before, ours = logits(pair, rows, [0, 1, 2], spec, K, policy)
    pixels = torch.from_numpy(pair.pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = pair.theirs.logits(rows, pixels, steps_of(pair, spec, K), positions=policy).numpy()
    left = before.trace.steps[-1].reductions[0].slots
    for b, row in enumerate(rows):
        length = len(row.ids) - len(row.runs) * (tiny.N - left)
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


class Replaying:
    """A pipeline whose steps repeat, once told to, what they answered the first time.

    What methods choose may depend on the prompt's words, and so change when they grow.
    """

    def __init__(self, pair, spec: str):
        pipeline, self.again = plan(spec, pair.ours.learned), False
        steps = tuple(self.wrapped(step) for step in pipeline.steps)
        self.pipeline = replace(pipeline, steps=steps)

    def wrapped(self, step: Pruner) -> Pruner:
        if not step.method.prune:
            return step
        reductions = []

        @functools.wraps(step.method.prune)
        def prune(signals, K, **options):
            if self.again:
                reductions.append(reductions.pop(0))
                return reductions[-1]
            reductions.append(step.method.prune(signals, K, **options))
            return reductions[-1]

        return replace(step, method=replace(step.method, prune=prune))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", ["none", *SPECS])
def test_cached_decoding_equals_the_cache_free_recomputation_at_every_split(pair, spec, policy):
    budget, chain = tiny.N if spec == "none" else K, Replaying(pair, spec)
    row, answer_ids = ROWS[1], tiny.row("yes the red star is left of it").ids
    pixels = mx.array(pair.pixels[:2])
    before = pair.ours([row], pixels, chain.pipeline, budget, policy, last_only=False)
    chain.again = True
    whole = tiny.Prompt([*row.ids, *answer_ids], row.runs)
    after = pair.ours([whole], pixels, chain.pipeline, budget, policy, last_only=False)
    expected_LV, position_B1 = np.array(after.logits_BLV)[0, -len(answer_ids) :], before.next_B1
    for token, expected_V in zip(answer_ids, expected_LV, strict=True):
        got = before.step(mx.array([[token]]))
        position_B1 = position_B1 + 1
        close(np.array(got)[0, 0], expected_V)


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
    every = range(language.depth)
    whole = language.logits(language.run(every, embeds, positions, language.make_cache()))
    cache = language.make_cache()
    first = language.run(every, embeds[:, :split], positions[:, :split], cache)
    second = language.run(every, embeds[:, split:], positions[:, split:], cache)
    parts = [np.array(language.logits(x_BLD)) for x_BLD in (first, second)]
    close(np.concatenate(parts, axis=1), np.array(whole))


@pytest.mark.parametrize(
    "spec", ["norm", "fastv", "sparsevlm", "pyramiddrop", "pact", "dart", "twig"]
)
def test_a_long_prompt_read_in_pieces_gives_the_same_as_at_once(pair, spec, monkeypatch):
    whole, expected = logits(pair, list(ROWS), [0, 1, 2], spec, K)
    monkeypatch.setattr("mlx_vlm_prune.models.layers.PREFILL_STEP_SIZE", 6)
    monkeypatch.setattr("mlx_vlm_prune.models.decoder.QUERY_CHUNK", 2)
    pieces, got = logits(pair, list(ROWS), [0, 1, 2], spec, K)
    for b, row in enumerate(ROWS):
        length = len(row.ids) - len(row.runs) * (tiny.N - whole.trace.steps[-1].reductions[0].slots)
        close(got[b, -length:], expected[b, -length:])
    assert [c.rows for c in pieces.cache] == [c.rows for c in whole.cache]


@pytest.mark.parametrize("name", SPECS)
def test_keeping_all_gives_the_unpruned_bits(pair, name):
    _, full = logits(pair, [ROWS[0]], [0], "none", tiny.N)
    _, kept = logits(pair, [ROWS[0]], [0], name, tiny.N)
    assert kept.tobytes() == full.tobytes()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_equals_one_prompt_at_a_time_while_decoding_too(pair, spec, policy):
    rows, answer_ids = list(ROWS), [9, 12, 30]
    together, _ = logits(pair, rows, [0, 1, 2], spec, K, policy)
    stepped = [np.array(s) for s in steps(pair.ours, together, answer_ids, len(rows))]
    image = 0
    for b, row in enumerate(rows):
        images = list(range(image, image + len(row.runs)))
        image += len(row.runs)
        alone, _ = logits(pair, [row], images, spec, K, policy)
        length = alone.logits_BLV.shape[1]
        close(np.array(together.logits_BLV)[b, -length:], np.array(alone.logits_BLV)[0])
        for got, expected in zip(stepped, steps(pair.ours, alone, answer_ids, 1), strict=True):
            close(got[b], np.array(expected)[0])


def steps(model, before, answer_ids, B):
    position_B1 = before.next_B1
    for token in answer_ids:
        yield before.step(mx.full((B, 1), token))
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


def test_pruning_in_the_decoder_leaves_fewer_rows_in_deeper_caches_and_their_bytes(pair):
    row, words = ROWS[0], len(ROWS[0].ids) - tiny.N
    full, _ = logits(pair, [row], [0], "none", tiny.N)
    before, _ = logits(pair, [row], [0], "fastv", K)  # 16, then 5 and 5: 26 of 3 x 9
    assert [layer.rows - words for layer in before.cache] == [16, 5, 5]
    assert before.cache[1].nbytes * full.cache[1].rows == full.cache[1].nbytes * (words + 5)
    index = np.array(before.trace.steps[-1].reductions[0].index_BK)[0]
    start = row.runs[0][0]
    held = np.array(before.cache[2].positions_BS)[0, start : start + 5]
    assert held.tolist() == (start + index).tolist()  # fastv keeps positions
    gone, _ = logits(pair, [row], [0], "vtw", K)
    assert [layer.rows - words for layer in gone.cache] == [16, 0, 0]


def test_positions_are_those_of_the_methods_paper_unless_told(pair):
    def counts(spec, policy):
        """Do the rows of the last layer count up to the next position without a gap?"""
        chain = plan(spec, {"attention_pool": METHODS["attention_pool"].make_weights(32, 12)})
        before = pair.ours([ROWS[0]], mx.array(pair.pixels[:1]), chain, K, policy)
        position_S, after = np.array(before.cache[-1].positions_BS)[0], before.next_B1.item()
        assert position_S[-1] == after - 1
        assert after == len(ROWS[0].ids) or "pool" in spec
        return position_S.tolist() == list(range(after - len(position_S), after))

    assert not counts("fastv", None) and counts("fastv", "renumber")
    assert counts("pyramiddrop", None) and not counts("pyramiddrop", "keep")
    assert counts("attention_pool+fastv", "keep")  # pooled slots have no place of their own


def test_a_merged_token_gets_the_attention_of_all_its_members(pair):
    """Reading one token twice equals reading it once with a bias of log 2."""
    language, rng = pair.ours.language, np.random.default_rng(3)
    x = mx.array(rng.normal(size=(1, 5, 48)).astype(np.float32))
    twice = x[:, mx.array([0, 1, 1, 2, 3, 4])]
    places = mx.array([[0, 1, 1, 2, 3, 4]])  # both copies stand in one place
    x_1LD = language.run(range(1), twice, places, language.make_cache())
    twice_1LV = np.array(language.logits(x_1LD))
    bias = mx.array([[0.0, np.log(2), 0, 0, 0]])
    once = language.run(range(1), x, mx.arange(5)[None], language.make_cache(), bias_BL=bias)
    close(np.array(language.logits(once))[0, 2:], twice_1LV[0, 3:])


def test_the_tower_reads_a_merged_patch_as_often_as_it_has_members(pair):
    """Flat images: all patches are alike but for their positions, which are taken away."""
    tower = copy.deepcopy(pair.ours.tower)
    weight = tower.embeddings.position_embedding.weight
    tower.embeddings.position_embedding.weight = mx.broadcast_to(weight[:1], weight.shape)
    pixels = mx.broadcast_to(mx.array(pair.pixels[:1, :1, :1]), (1, 64, 64, 3))
    full = np.array(tower(pixels).signals.x_BND)
    cuts = [Cut(0, "middle", 7, resolve("tome")), Cut(1, "middle", 3, resolve("tome"))]
    done = tower(pixels, {}, cuts)
    close(np.array(done.signals.x_BND), full[:, :3])
    assert np.array(done.signals.size_BN).sum() == 16


def test_a_chain_keeps_the_places_of_the_whole_image(pair):
    """The second step counts in what the first left; what is told counts in the image."""
    before, _ = logits(pair, [ROWS[0]], [0], "uniform:keep=8+norm", 3)
    first, last = (np.array(stop.reductions[0].index_BK)[0] for stop in before.trace.steps[1:])
    assert set(last) < set(first) and len(first) == 8 and len(last) == 3


@pytest.mark.parametrize(
    ("spec", "broken"),
    [
        ("cls_attention+restore", "torch_ref.pruners.restore.attention_bias"),
        ("pact", "torch_ref.pruners.pact.proportional"),
        ("tome", "torch_ref.pruners.tome.proportional"),
        ("fastv", "torch_ref.pruners.fastv.schedule"),
        ("patch_norm", "torch_ref.pruners.patch_norm.cuts"),
        ("downsample", "torch_ref.pruners.downsample.smaller_grid"),
        ("twig", "torch_ref.models.decoder.twig_attention"),
        ("twig", "torch_ref.pruners.twig.cut_and_wipe"),
    ],
)
def test_the_check_of_the_model_fails_for_a_broken_twin(pair, spec, broken, monkeypatch):
    wrong = {
        "attention_bias": lambda signals, kept: torch.zeros(kept.index_BK.shape) + 1e-3,
        "proportional": False,
        "schedule": lambda layers, N, K: {2: 5},
        "cuts": lambda layers, N, K: [(1, "before", K)],
        "smaller_grid": lambda grid, K: (3, 2),
        "twig_attention": lambda twig, prompt: attention(twig, twig.layers[0], prompt)[2],
        "cut_and_wipe": lambda layers, N, K, layer, wipe, rank: {1: 11, 2: 1},
    }
    monkeypatch.setattr(broken, wrong[broken.rsplit(".", 1)[1]])
    with pytest.raises(AssertionError):
        test_logits_equal_the_reference_for_every_method(pair, spec, "keep")


def test_without_cls_the_mean_patch_stands_in_for_it():
    rng = np.random.default_rng(4)
    q, k = (mx.array(rng.normal(size=(2, 3, 12, 4)).astype(np.float32)) for _ in range(2))
    want = {"cls_attention": 0, "cls_query": 0, "received_attention": 0}
    run = TowerPass(Signals(mx.zeros((2, 12, 5)), (3, 4)), want, 1, (), has_cls=False)
    run.read(0, q, k)
    logits = np.array(q) @ np.array(k).swapaxes(2, 3) / 2
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    close(np.array(run.signals.cls_attention_BN), share.mean(axis=(1, 2)))
    close(np.array(run.signals.received_attention_BN), share.mean(axis=(1, 2)))
    close(np.array(run.signals.cls_query_BHd), np.array(q).mean(axis=2))


@pytest.mark.parametrize("spec", ["mlp:dynamic", "mlp:dynamic+sparsevlm"])
def test_images_with_budgets_of_their_own_give_in_a_batch_what_they_give_alone(pair, spec):
    mx.random.seed(6)
    weights = METHODS["mlp"].make_weights(32, 0)
    weights.mean_need = mx.array([1.0])
    weights.need.bias = mx.zeros((1,))
    chain, rows = plan(spec, {"mlp": weights}), list(ROWS)
    together = pair.ours(rows, mx.array(pair.pixels), chain, 6, "keep")
    counts = [one.slots for one in together.trace.steps[-1].reductions]
    assert len(set(counts)) > 1, counts
    image = 0
    for b, row in enumerate(rows):
        images, image = pair.pixels[image : image + len(row.runs)], image + len(row.runs)
        alone = pair.ours([row], mx.array(images) if len(images) else None, chain, 6, "keep")
        assert alone.rows[0] == together.rows[b]
        close(np.array(together.logits_BLV)[b], np.array(alone.logits_BLV)[0])
