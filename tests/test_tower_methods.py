"""Promises of methods inside and before the tower: `ipcv`, whose tokens come back, iLLaVA's two
parts, and `docprune`; as plain loops, against the reference, and in chains.

Shapes: B images, N tokens, K kept, D features.
"""

import json
import math
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import torch_ref.pruners as ref
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.conversation import Conversation
from mlx_vlm_prune.models.towers.pixels import patch_greys
from mlx_vlm_prune.pruners import Reduction, Signals, plan, resolve, rows
from mlx_vlm_prune.pruners.attention_pool import AttentionPool
from mlx_vlm_prune.pruners.docprune import LEVEL, commonest
from mlx_vlm_prune.pruners.ipcv import nearest_kept
from torch_ref.models.towers.signals import greys

from . import tiny
from .pruner_cases import case, close, reference_signals, signals
from .test_authors import inputs
from .test_model import K, pair
from .test_model import (
    test_a_batch_equals_one_prompt_at_a_time_while_decoding_too as check_batch,
)
from .test_model import (
    test_cached_decoding_equals_the_cache_free_recomputation_at_every_split as check_cache,
)
from .test_model import test_keeping_all_gives_the_unpruned_bits as check_all
from .test_model import test_logits_equal_the_reference_for_every_method as check_logits
from .test_pruners_by_loops import ATTENTION, N, X

__all__ = ["pair"]  # a fixture
CHAINS = [
    "ipcv+divprune", "ipcv:until=0.9,least+cls_attention:layer=2",
    "ipcv:until=0.9,layer=0+norm+restore",
    "docprune+ipcv:neighbours=2+received_attention:layer=1+fastv", "ipcv:until=0.9+restore",
    "illava_tower:keep=11+illava_decoder", "illava_tower:keep=11+divprune+restore",
    "docprune:keep=12+norm+restore", "pixelprune:keep=13+ipcv:until=2,share=0.5+divprune",
    "ipcv+uniform", "ipcv:until=0.9+dual_attention:key=0.3", "illava_tower:keep=11+kq_norm",
]  # fmt: skip


@pytest.mark.parametrize("spec", CHAINS)
def test_logits_equal_the_reference(pair, spec):
    check_logits(pair, spec, "keep")


@pytest.mark.parametrize("spec", CHAINS[:4])
def test_chains_keep_what_every_method_promises(pair, spec):
    check_all(pair, spec)
    check_batch(pair, spec, "keep")
    check_cache(pair, spec, "keep")


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("ipcv.one", lambda then_ND, index, now_KD, neighbours: then_ND),
        ("ipcv.attends_to_all", lambda layers: []),
        ("illava_tower.taken_in", lambda x_D, leaving_RD: leaving_RD.mean(0)),
        ("docprune.ink", lambda level_NP, tolerance: level_NP.double().mean(1)),
    ],
)
def test_the_check_fails_for_a_broken_twin(pair, part, broken, monkeypatch):
    monkeypatch.setattr(f"torch_ref.pruners.{part}", broken)
    spec = {"ipcv": "ipcv:until=0.9+divprune"}.get(part.split(".")[0], part.split(".")[0])
    with pytest.raises(AssertionError):
        check_logits(pair, spec, "keep")


def squared_distance(u: list[float], v: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(u, v, strict=True))


BEFORE = [[float((5 * i + 3 * d + i * d) % 7) for d in range(6)] for i in range(N)]
NOW = [[float((3 * i + 2 * d) % 5) for d in range(6)] for i in range(N)]


@pytest.mark.parametrize(
    ("count", "neighbours", "least"), [(4, 1, 0), (7, 3, 1), (12, 10, 0), (3, 10, 1)]
)
def test_ipcv_as_loops(count, neighbours, least):
    changes = {i: (1 - 2 * least) * squared_distance(X[i], BEFORE[i]) for i in range(N)}
    index = sorted(sorted(changes, key=lambda i: (-changes[i], i))[:count])
    everything = []
    for j in range(N):
        near = sorted(index, key=lambda i: (squared_distance(X[i], X[j]), i))[:neighbours]
        change = [sum(NOW[i][d] - X[i][d] for i in near) / len(near) for d in range(6)]
        stayed = j in index
        everything.append(NOW[j] if stayed else [X[j][d] + change[d] for d in range(6)])
    pruner = resolve(f"ipcv:neighbours={neighbours},least={least}")
    ours = Signals(mx.array([X]), (4, 5), before_BND=mx.array([BEFORE]))
    kept = pruner(ours, count)
    theirs = ref.Signals(torch.tensor([X]), (4, 5), before_BND=torch.tensor([BEFORE]))
    twin = ref.reduce("ipcv", theirs, count, least=bool(least))
    assert kept.index_BK.tolist() == twin.index_BK.tolist() == [index]
    now = [[NOW[i] for i in index]]
    whole = pruner.call(pruner.method.give_back, ours, kept)(mx.array(now))
    step = ref.Step("ipcv", count, {"neighbours": neighbours})
    twin_whole = step.call("give_back", theirs, twin)(torch.tensor(now))
    for all_BND in (np.array(whole), twin_whole.numpy()):
        np.testing.assert_allclose(all_BND[0], everything, atol=1e-5)


IPCV = json.loads((Path(__file__).parent / "authors" / "ipcv.json").read_text())


@pytest.mark.parametrize("run", IPCV["cases"])
def test_ipcv_gives_back_what_its_authors_code_does(run):
    """`given_back`: of all tokens the mean of their features times 1 to D, after the kept ones x
    became sin(3x) + x / 2."""
    given, pruner, step = inputs(run), resolve("ipcv"), ref.Step("ipcv")
    ours, theirs = signals(given), reference_signals(given)
    kept, twin = pruner(ours, run["K"]), ref.reduce("ipcv", theirs, run["K"])
    x_BKD = np.array(kept.tokens(ours.x_BND))
    now_BKD = np.sin(3 * x_BKD) + x_BKD / 2
    whole = pruner.call(pruner.method.give_back, ours, kept)(mx.array(now_BKD))
    twin_whole = step.call("give_back", theirs, twin)(torch.from_numpy(now_BKD))
    for all_BND in (np.array(whole), twin_whole.numpy()):
        sums = (all_BND[0] * np.arange(1, run["D"] + 1)).mean(axis=1)
        np.testing.assert_allclose(sums, run["given_back"], atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 19])
@pytest.mark.parametrize("recycled", [0.05, 0.5, 1.0])
def test_illava_as_loops(count, recycled):
    order = sorted(range(N), key=lambda i: (-ATTENTION[i], i))
    index, leaving = sorted(order[:count]), order[count:]
    values = {i: list(X[i]) for i in index}
    for centre in order[count - max(1, round(recycled * count)) : count]:
        products = {j: sum(a * b for a, b in zip(X[centre], X[j], strict=True)) for j in leaving}
        place = {j: p for p, j in enumerate(leaving)}
        likest = sorted(leaving, key=lambda j: (-products[j], place[j]))[:5]
        powers = [math.exp((products[j] - products[likest[0]]) / math.sqrt(6)) for j in likest]
        for d in range(6):
            taken = sum(p * X[j][d] for p, j in zip(powers, likest, strict=True)) / sum(powers)
            values[centre][d] = (X[centre][d] + taken) / 2
    for name, signal in (
        ("illava_tower", "layer_attention_BN"),
        ("illava_decoder", "last_attention_BN"),
    ):
        row = np.array([ATTENTION], np.float32)
        ours = Signals(mx.array([X]), (4, 5), **{signal: mx.array(row)})
        theirs = ref.Signals(torch.tensor([X]), (4, 5), **{signal: torch.from_numpy(row)})
        kept = resolve(f"{name}:recycled={recycled}")(ours, count)
        twin = ref.reduce(name, theirs, count, recycled=recycled)
        assert kept.index_BK.tolist() == twin.index_BK.tolist() == [index]
        for x_BKD in (np.array(kept.tokens(ours.x_BND)), twin.tokens(theirs.x_BND).numpy()):
            np.testing.assert_allclose(x_BKD[0], [values[i] for i in index], atol=1e-5)


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_docprune_as_loops(tolerance):
    levels = [[(3 * i + 7 * p + i * p) % 6 for p in range(5)] for i in range(N)]
    counts = Counter(level for row in levels for level in row)
    background = min(counts, key=lambda level: (-counts[level], level))
    ink = {i: sum(abs(n - background) > tolerance for n in levels[i]) / 5 for i in range(N)}
    index = sorted(sorted(ink, key=lambda i: (-ink[i], i))[:6])
    grey = np.array([levels], np.float32) * np.float32(LEVEL)
    kept = resolve(f"docprune:tolerance={tolerance}")(
        Signals(mx.zeros((1, N, 2)), (4, 5), grey_BNP=mx.array(grey)), 6
    )
    twins = ref.Signals(torch.zeros(1, N, 2), (4, 5), grey_BNP=torch.from_numpy(grey))
    twin = ref.reduce("docprune", twins, 6, tolerance=tolerance)
    assert kept.index_BK.tolist() == twin.index_BK.tolist() == [index]


def test_docprune_keeps_what_is_printed_on_a_page_worked_by_hand():
    """4 x 4 patches of 4 x 4 pixels: a line across the second row of patches, a dot in the last
    patch, and grain of one level everywhere."""
    page = np.full((16, 16, 3), 250.0)
    page[::2, ::3] -= 1
    page[5, :12] = 0
    page[13, 14] = 30
    pixels = ((page / 255 - 0.45) / 0.2686).astype(np.float32)[None]
    grey_BNP = patch_greys(mx.array(pixels), 4)
    theirs = greys(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), 4)
    close(np.array(grey_BNP), theirs.numpy())
    pruner = resolve("docprune")
    kept = pruner(Signals(mx.zeros((1, 16, 2)), (4, 4), grey_BNP=grey_BNP), 4)
    assert kept.index_BK.tolist() == [[4, 5, 6, 15]]
    np.testing.assert_allclose(np.array(kept.score_BN)[0, [4, 7, 15]], [4 / 16, 0, 1 / 16])


def test_the_commonest_number_and_of_equals_the_lowest():
    rows = [[3, 1, 3, 1, 2], [5, 5, 5, 5, 5], [-2, 9, 9, -2, 4], [1, 2, 3, 4, 5]]
    assert commonest(mx.array(rows)).tolist() == [1, 5, -2, 1]


def test_chains_hand_on_all_that_comes_back():
    def budgets(spec: str, count: int = 49):
        chain = plan(spec).budgets(196, count)
        return [left for _, left in chain.per_step], chain.handed_on

    assert budgets("ipcv+divprune") == ([68, 49], [196, 49])
    assert budgets("ipcv:keep=90+divprune+fastv") == ([90, 74, 49], [196, 74, 49])
    assert budgets("docprune+ipcv+divprune") == ([125, 43, 49], [125, 125, 49])
    assert budgets("ipcv") == ([49], [49])  # the last keeps the budget itself
    assert budgets("ipcv+divprune", 196) == ([196, 196], [196, 196])
    assert budgets("illava") == ([138, 49], [138, 49])  # 196 - 0.4 x 147
    chain = plan("ipcv+norm+fastv").budgets(196, 49)
    assert (chain.before_last, chain.before_layers) == (74, 74)
    assert plan("ipcv+fastv").budgets(196, 49).before_layers == 196
    for spec, count in (("ipcv:share=0+norm", 9), ("docprune:share=2+norm", 9)):
        with pytest.raises(UserError, match="share is"):
            plan(spec).budgets(196, count)


def test_what_came_back_is_counted_as_there_and_what_left_for_good_once(pair):
    for spec, left in (
        ("ipcv+norm+restore", 16), ("docprune:keep=12+ipcv+norm+restore", 12),
        ("docprune+restore", 7), ("illava_tower+restore", 7), ("ipcv+restore", 7),
    ):  # fmt: skip
        pipeline = plan(spec)
        encoded = pair.ours.run_tower(mx.array(pair.pixels), pipeline, pipeline.budgets(16, 7))
        counted = np.array(encoded.signals.represented_BN)
        assert counted.shape == (3, left) and (counted.sum(axis=1) == 16).all(), spec
        assert encoded.signals.x_BND.shape[1] == left
        assert (encoded.kept is None) == (left == 16)


def test_layers_whose_signals_are_wanted_see_all_tokens_again(pair):
    """With all neighbours' changes alike, here none, what comes back is what left."""
    chain = plan("ipcv:until=0.9+cls_attention:layer=2").budgets(16, 7)
    step = chain.per_step[0][0]
    assert chain.whole_layers(step, 3) == {1, 2}
    assert plan("ipcv:until=0.9").budgets(16, 7).whole_layers(step, 3) == {1}
    encoded = pair.ours.run_tower(
        mx.array(pair.pixels), plan("ipcv+received_attention:layer=2"),
        plan("ipcv+received_attention:layer=2").budgets(16, 7),
    )  # fmt: skip
    assert encoded.signals.received_attention_BN.shape == (3, 16)


def test_methods_that_would_take_tokens_from_among_those_that_left_are_refused(pair):
    pixels = mx.array(pair.pixels[:1])
    for spec, other in (("tome:keep=13+ipcv+norm", "tome"), ("ipcv+kq_norm", "kq_norm")):
        with pytest.raises(UserError, match=f"ipcv knows all tokens.*{other} lets some go"):
            pair.ours([tiny.row("# ?")], pixels, plan(spec), K)


def test_methods_of_a_tower_stand_in_the_order_of_their_layers(pair):
    pixels = mx.array(pair.pixels[:1])
    for spec, refused in (
        ("illava_tower:keep=11+flowcut", "flowcut chooses among what illava_tower leaves"),
        ("flowcut:keep=12+kq_norm", None), ("flowcut:keep=12+illava_tower", None),
        ("tome:keep=12+illava_tower", "illava_tower chooses among what tome leaves at layer 2"),
    ):  # fmt: skip
        if refused is None:
            pair.ours([tiny.row("# ?")], pixels, plan(spec), K)
            continue
        with pytest.raises(UserError, match=refused):
            pair.ours([tiny.row("# ?")], pixels, plan(spec), K)


def test_options_that_cost_more_the_larger_they_are_have_a_bound(pair):
    for name in ("illava_tower", "illava_decoder", "pyramiddrop"):
        with pytest.raises(UserError, match=f"{name}: stages is 101; it is 1 to 100"):
            step = plan(f"{name}:stages=101").steps[0]
            step.call(step.method.cuts or step.method.schedule, 24, 16, 9)
    with pytest.raises(UserError, match="restore: dims is 2 to 1024"):
        chain = plan("norm+restore:dims=1025")
        pair.ours([tiny.row("# ?")], mx.array(pair.pixels[:1]), chain, K)
    with pytest.raises(UserError, match="lookahead: boost is 16; it is 0 to 15"):
        chain = plan("lookahead:boost=16")
        pair.ours([tiny.row("# ?")], mx.array(pair.pixels[:1]), chain, K)


def test_what_ranks_by_cls_is_refused_behind_mixtures(pair):
    chain = plan("attention_pool+dual_attention", {"attention_pool": AttentionPool(12, 32)})
    with pytest.raises(UserError, match="ranks tokens by CLS's attention"):
        pair.ours([tiny.row("# ?")], mx.array(pair.pixels[:1]), chain, 8)


def test_a_chat_encodes_anew_where_tokens_come_back_or_stay_away(pair):
    encodings = set()
    for spec in ("ipcv+norm", "ipcv:keep=5+norm", "ipcv"):
        pipeline = plan(spec)
        held = Conversation.__new__(Conversation)
        held.model = pair.ours
        encodings.add(held.encoding(pipeline, pipeline.budgets(16, 5)))
    assert len(encodings) == 3


def test_neighbours_are_found_without_an_array_of_all_pairs(monkeypatch):
    """The peak while 1,600 tokens get their neighbours, 20 MB for all pairs, is far below that; and
    blocks find what the whole matrix does."""
    kept = Reduction(mx.arange(0, 1600, 2)[None])
    tokens = signals(case("random", 1, (40, 40), 0))
    mx.eval(list(tokens.arrays.values()))
    whole = nearest_kept(tokens.x_BND, kept.index_BK, 10).tolist()
    monkeypatch.setattr(rows, "MOST_HELD", 0)
    monkeypatch.setattr(rows, "BLOCK", 16)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    near = nearest_kept(tokens.x_BND, kept.index_BK, 10)
    mx.eval(near)
    assert mx.get_peak_memory() - before < 12e6
    assert near.tolist() == whole
