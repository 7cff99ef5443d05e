"""Promises that every method of the table keeps; a new method is tested without new code.

Shapes: B images, N tokens, D features, K kept.
"""

import inspect
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_ref.pruners as ref
from convert.errors import UserError
from mlx_vlm_prune.pruners import METHODS, Pruner, Signals, plan, resolve
from mlx_vlm_prune.pruners.attention_pool import AttentionPool
from mlx_vlm_prune.pruners.grid import windows
from mlx_vlm_prune.pruners.pipeline import known_options

from . import tiny

D, T, HEADS = 8, 5, 2
# Every method of the table that chooses among tokens; a new one is tested without new code.
CHOOSING = [n for n, m in METHODS.items() if n != "none" and hasattr(m, "prune")]
VARIANTS = [
    *CHOOSING, "similarity:published", "similarity:threshold=0.3", "random:seed=7",
    "cdpruner:negative", "visionzip:contextual=0.5", "vispruner:important=0", "hiprune:objects=1",
    "prumerge:neighbours=2", "pixelprune:tolerance=0.5", "holov:regions=3", "scope:power=2",
    "sparsevlm:recycle=0.9", "pact:clustered=1", "dart:pivots=1", "apet:basis=2", "mmtok:image=2",
]  # fmt: skip
SCORING = [
    "norm", "cls_attention", "received_attention", "patch_norm", "kq_norm", "divprune", "cdpruner",
    "scope", "mmtok", "fastv", "pyramiddrop", "v2drop", "twig", "visionzip:contextual=0",
    "dart:pivots=2",
]  # fmt: skip
INPUTS = ("random", "flat", "duplicated", "near_duplicate", "zero", "one_hot", "extreme")


def ready(spec: str) -> Pruner:
    """The method of a specification; of a twig the host reads the weights, the method none."""
    return resolve(spec, {"twig": METHODS["twig"].make(tiny.TEXT, 1)})


def features(kind: str, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Vectors (B, N, ...) of one of the kinds that have broken published methods."""
    x = rng.normal(size=shape).astype(np.float32)
    N = shape[1]
    if kind == "flat":
        x[:] = x[:, :1]
    elif kind == "duplicated":
        x[:, N // 2 :] = x[:, : N - N // 2]
    elif kind == "near_duplicate":
        x = x[:, :1] + 1e-4 * x
    elif kind == "zero":
        x[:] = 0
    elif kind == "one_hot":
        x = np.eye(shape[-1], dtype=np.float32)[rng.integers(shape[-1], size=shape[:-1])]
    elif kind == "extreme":
        x = x * 1e4
    return x


def shares(kind: str, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Attention rows (B, ..., N) that sum to one."""
    scores = np.zeros(shape) if kind in ("flat", "zero") else rng.normal(size=shape)
    share = np.exp(scores)
    return (share / share.sum(-1, keepdims=True)).astype(np.float32)


def case(kind: str, B: int, grid: tuple[int, int], seed: int) -> dict:
    """Every signal there is, as numpy arrays by the names of the contract."""
    rng, N = np.random.default_rng(seed), grid[0] * grid[1]
    real_BT = rng.random((B, T)) < 0.7
    real_BT[:, 0] = True
    vectors = {
        name: features(kind, rng, B, N, D)
        for name in ("x", "pixels", "patches", "before", "normed", "keys", "next_keys")
    }
    return {
        "grid": grid,
        **{f"{name}_BND": x for name, x in vectors.items()},
        **{f"{x}_BNHd": features(kind, rng, B, N, HEADS, D // HEADS) for x in ("queries", "keys")},
        "cls_query_BHd": features("random", rng, B, HEADS, D // HEADS),
        "text_BTD": features("random", rng, B, T, D),
        "text_keys_BTD": features("random", rng, B, T, D),
        "text_real_BT": real_BT,
        "text_attention_BTN": shares(kind, rng, B, T, N),
        **{
            f"{name}_attention_BN": shares(kind, rng, B, N)
            for name in ("cls", "received", "object", "local", "last", "next", "mean", "twig")
        },
    }


def signals(of: dict) -> Signals:
    return Signals(**{k: v if k == "grid" else mx.array(v) for k, v in of.items()})


def some(of: dict, b: slice) -> dict:
    """The same of some images of the batch."""
    return {k: v if k == "grid" else v[b] for k, v in of.items()}


@st.composite
def cases(draw):
    grid = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    B, N = draw(st.integers(1, 3)), grid[0] * grid[1]
    K, seed = draw(st.integers(1, N)), draw(st.integers(0, 99))
    return case(draw(st.sampled_from(INPUTS)), B, grid, seed), K


many = settings(max_examples=40, deadline=None)


@pytest.mark.parametrize("spec", VARIANTS)
@many
@given(given_=cases())
def test_both_frameworks_keep_the_same_tokens_and_mix_them_alike(spec, given_):
    agree(spec, *given_)


def agree(spec: str, of: dict, K: int) -> None:
    """Both frameworks keep the same tokens and mix them alike."""
    pruner = ready(spec)
    ours, theirs = pruner(signals(of), K), twin(pruner, of, K)
    np.testing.assert_array_equal(np.array(ours.index_BK), theirs.index_BK.numpy())
    kept = theirs.tokens(torch.from_numpy(of["x_BND"])).numpy()
    close(np.array(ours.tokens(mx.array(of["x_BND"]))), kept)


def twin(pruner: Pruner, of: dict, K: int) -> ref.Reduction:
    seen = ref.Signals(**{k: v if k == "grid" else torch.from_numpy(v) for k, v in of.items()})
    return ref.reduce(pruner.name, seen, K, **pruner.options)


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """float32 parity: rtol 1e-4, atol 1e-5 of the largest value."""
    np.testing.assert_allclose(
        ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max(initial=0) + 1e-12
    )


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("spec", [*VARIANTS, "none"])
def test_keeping_all_is_the_identity_bit_for_bit(spec, kind):
    of = case(kind, 2, (3, 5), 0)
    kept = ready(spec)(signals(of), 15)
    assert np.array(kept.tokens(mx.array(of["x_BND"]))).tobytes() == of["x_BND"].tobytes()


@pytest.mark.parametrize("spec", VARIANTS)
@many
@given(given_=cases())
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(spec, given_):
    of, K = given_
    pruner = ready(spec)
    together = pruner(signals(of), K)
    for b in range(len(of["x_BND"])):
        alone = pruner(signals(some(of, slice(b, b + 1))), K)
        np.testing.assert_array_equal(np.array(alone.index_BK[0]), np.array(together.index_BK[b]))


@pytest.mark.parametrize("spec", VARIANTS)
@many
@given(given_=cases())
def test_k_distinct_tokens_in_range_are_kept_each_in_its_own_slot_and_merged_once(spec, given_):
    of, K = given_
    B, N, _ = of["x_BND"].shape
    kept = ready(spec)(signals(of), K)
    index_BK, weight_BKN = np.array(kept.index_BK).astype(int), np.array(kept.mixture(N))
    assert index_BK.shape == (B, K)
    assert (np.diff(index_BK, axis=1) > 0).all()
    assert index_BK.min() >= 0 and index_BK.max() < N
    anchors = np.take_along_axis(weight_BKN, index_BK[..., None], axis=2)
    assert (weight_BKN >= 0).all()
    if not spec.startswith("prumerge"):  # its slots add up neighbours, which may be shared
        assert (anchors > 0).all()
        assert ((weight_BKN > 0).sum(axis=1) <= 1).all()


@pytest.mark.parametrize(
    "spec", ["avgpool", "similarity", "similarity:threshold=0.3", "tome", "apet"]
)
@many
@given(given_=cases())
def test_a_merging_method_gives_every_token_to_exactly_one_mean(spec, given_):
    of, K = given_
    weight_BKN = np.array(ready(spec)(signals(of), K).mixture(of["x_BND"].shape[1]))
    np.testing.assert_allclose(weight_BKN.sum(-1), 1, rtol=1e-5)
    assert ((weight_BKN > 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize("spec", SCORING)
def test_a_scoring_method_follows_its_tokens_when_they_are_shuffled(spec):
    of = case("random", 1, (4, 6), 3)
    order = np.random.default_rng(5).permutation(24)
    shuffled = {
        k: v[..., order] if k.endswith("N") else v[:, order] if "_BN" in k else v
        for k, v in of.items()
    }
    kept = np.array(ready(spec)(signals(of), 7).index_BK[0])
    moved = ready(spec)(signals(shuffled), 7)
    assert sorted(order[np.array(moved.index_BK[0])]) == kept.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spec", VARIANTS)
def test_half_precision_keeps_the_same_k_tokens_and_its_dtype(spec, dtype):
    """Choices are made in float64, so what both frameworks read in half they choose alike."""
    of, pruner = case("random", 2, (5, 6), 1), ready(spec)
    half = {k for k, v in of.items() if np.ndim(v) > 2}
    seen = {k: v if k == "grid" else mx.array(v) for k, v in of.items()}
    seen |= {k: seen[k].astype(getattr(mx, dtype)) for k in half}
    kept = pruner(Signals(**seen), 11)
    assert kept.tokens(seen["x_BND"]).dtype == seen["x_BND"].dtype
    same = {k: v if k == "grid" else torch.from_numpy(v) for k, v in of.items()}
    same |= {k: same[k].to(getattr(torch, dtype)) for k in half}
    theirs = ref.reduce(pruner.name, ref.Signals(**same), 11, **pruner.options)
    np.testing.assert_array_equal(np.array(kept.index_BK), theirs.index_BK.numpy())
    assert len(set(np.array(kept.index_BK[0]).tolist())) == 11


def test_every_method_has_its_twin_and_every_module_its_line():
    assert set(ref.METHODS) == set(METHODS)
    for name, method in METHODS.items():
        theirs = ref.METHODS[name]
        assert ref.STAGES[method.stage.name.lower()][name] is theirs
        for function in ("prune", "cuts", "schedule", "weigh"):
            assert hasattr(method, function) == hasattr(theirs, function), (name, function)
        options = (
            {k: v for k, v in inspect.signature(theirs.prune).parameters.items()}
            if (hasattr(theirs, "prune"))
            else {}
        )
        for key, parameter in options.items():
            if parameter.default is not parameter.empty:
                assert known_options(method)[key] == parameter.default, (name, key)
    helpers = {"contract", "grid", "budget", "clusters", "pipeline", "scorer", "spec"}
    modules = {file.stem for file in Path(METHODS["none"].__file__).parent.glob("[a-z]*.py")}
    assert modules == set(METHODS) | helpers


@pytest.mark.parametrize("layers", [4, 8, 24, 32])
@pytest.mark.parametrize("N", [49, 196, 576])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if hasattr(m, "schedule")])
def test_a_decoder_method_holds_k_rows_in_the_average_layer_or_says_that_it_cannot(name, N, layers):
    for K in range(1, N, 5):
        try:
            plan = METHODS[name].schedule(layers, N, K)
        except ValueError as e:
            with pytest.raises(ValueError):
                ref.METHODS[name].schedule(layers, N, K)
            late = name == "twig" and K > 0.75 * N  # from 24 of 32 on it holds none
            assert "cannot keep" in str(e) and (K < N / 2 or late)
            continue
        assert plan == ref.METHODS[name].schedule(layers, N, K)
        held = [N] * layers
        for layer, left in sorted(plan.items()):
            assert 1 <= layer < layers and 0 <= left <= held[layer]
            held[layer:] = [left] * (layers - layer)
        above = 1 if name == "twig" else 0  # its paper rounds up
        assert K - max(2, N / layers if name == "vtw" else 2) < sum(held) / layers <= K + above


@pytest.mark.parametrize("layers", [1, 4, 12])
@pytest.mark.parametrize(
    "spec", [n for n, m in METHODS.items() if hasattr(m, "cuts")] + ["tome:r=3"]
)
def test_an_encoder_method_ends_with_k_tokens(spec, layers):
    for K in (1, 7, 48):
        pruner = ready(spec)
        plan = pruner.ask(pruner.method.cuts, layers, 49, K)
        assert plan == ref.Step(pruner.name, K, pruner.options).call("cuts", layers, 49, K)
        left = [n for _, _, n in plan]
        assert left[-1] == K and left == sorted(left, reverse=True) and max(left) <= 49
        assert all(
            0 <= layer < layers and place in ("before", "middle") for layer, place, _ in plan
        )


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("K", [20, 98, 150])
def test_similarity_agrees_at_full_width_on_near_duplicates_too(noise, K):
    rng = np.random.default_rng(K)
    kinds_8D = rng.normal(size=(8, 768))
    x_BND = kinds_8D[rng.integers(8, size=(1, 196))] + noise * rng.normal(size=(1, 196, 768))
    of = {"x_BND": x_BND.astype(np.float32), "grid": (14, 14)}
    ours, theirs = resolve("similarity")(signals(of), K), twin(resolve("similarity"), of, K)
    np.testing.assert_array_equal(np.array(ours.index_BK), theirs.index_BK.numpy())
    np.testing.assert_array_equal(np.array(ours.weight_BKN), theirs.weight_BKN.numpy())


BROKEN = {  # of every family a method, and what is done to a helper of its twin
    "uniform": ("centre", lambda window, columns: window[1] * columns - columns + window[3] - 1),
    "avgpool": ("members", lambda window, columns: [window[0] * columns + window[2]]),
    "norm": ("top", lambda score, K: ref.contract.top(-score, K)),
    "similarity": ("exactly", lambda of, likeness, K: ref.similarity.first(of, K, len(likeness))),
    "visionzip": ("alike", lambda x: -ref.contract.alike(x)),
    "vispruner": ("alike", lambda x: -ref.contract.alike(x)),
    "prumerge": ("best", lambda score, K: ref.contract.best(-score, K)),
    "hiprune": ("best", lambda score, K: ref.contract.best(-score, K)),
    "holov": ("between_0_and_1", lambda score: score.double()),
    "tome": ("alike", lambda x, y: -ref.contract.alike(x, y)),
    "pixelprune": ("errors", lambda patch, grid, tolerance: patch.abs().sum(dim=1)),
    "divprune": ("alike", lambda x: -ref.contract.alike(x)),
    "cdpruner": ("between_0_and_1", lambda score: 1 - ref.contract.between_0_and_1(score)),
    "mmtok": ("cover", lambda rows, salient, K: list(range(K))),
    "apet": ("errors", lambda x, basis: -x.norm(dim=-1)),
    "fastv": ("top", lambda score, K: ref.contract.top(-score, K)),
    "sparsevlm": ("centres", lambda apart, C: list(range(C))),
    "dart": ("best", lambda score, K: ref.contract.best(-score, K)),
    "pact": ("fewest", lambda apart, K: (0.0, list(range(K)))),
    "twig": ("top", lambda score, K: ref.contract.top(-score, K)),
}


@pytest.mark.parametrize("spec", BROKEN)
def test_the_check_between_frameworks_fails_for_a_broken_twin(spec, monkeypatch):
    helper, broken = BROKEN[spec]
    of = case("random", 2, (6, 6), 0)
    agree(spec, of, 14)
    monkeypatch.setattr(f"torch_ref.pruners.{spec}.{helper}", broken)
    with pytest.raises(AssertionError):
        agree(spec, of, 14)


# Those whose weights choose; a twig's are read by the host (tests/test_twig.py).
LEARNED = [n for n, m in METHODS.items() if getattr(m, "learned", False) and n != "twig"]


def learned_pair(name: str, tokens: int) -> tuple:
    """Random weights of a learned method in both frameworks."""
    torch.manual_seed(tokens)
    theirs = ref.METHODS[name].make(D, tokens).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    ours = METHODS[name].make(D, tokens)
    state = {k.replace("pool_", ""): mx.array(v.numpy()) for k, v in theirs.state_dict().items()}
    ours.load_weights(list(state.items()))
    return ours, theirs


@pytest.mark.parametrize("name", LEARNED)
@many
@given(given_=cases())
def test_a_learned_method_agrees_between_frameworks_and_keeps_k(name, given_):
    of, K = given_
    if of["x_BND"].shape[1] == K:
        return
    weights, theirs = learned_pair(name, K)
    ours = resolve(name, {name: weights})(signals(of), K)
    seen = ref.Signals(**{k: v if k == "grid" else torch.from_numpy(v) for k, v in of.items()})
    with torch.no_grad():
        kept = theirs.prune(seen, K)
        close(np.array(ours.tokens(mx.array(of["x_BND"]))), kept.tokens(seen.x_BND).numpy())
    if kept.index_BK is not None:
        np.testing.assert_array_equal(np.array(ours.index_BK), kept.index_BK.numpy())


def test_a_predicted_budget_is_each_images_own_and_agrees_between_frameworks():
    of = case("random", 3, (6, 6), 2)
    weights, theirs = learned_pair("mlp", 9)
    pruner = resolve("mlp:dynamic", {"mlp": weights})
    seen = ref.Signals(**{k: v if k == "grid" else torch.from_numpy(v) for k, v in of.items()})
    with torch.no_grad():
        told = theirs.budgets(seen, 12)
    assert pruner.budgets(signals(of), 12) == told
    assert pruner.has_dynamic_budget and len(set(told)) > 1 and min(told) >= 1 and max(told) <= 36


def test_attention_pool_is_the_softmax_of_its_queries_in_both_frameworks():
    rng, N, K = np.random.default_rng(2), 20, 6
    x_BND = rng.normal(size=(2, N, D)).astype(np.float32)
    weights = {"pool_queries": rng.normal(size=(K, D))}
    for name in "qkv":
        weights[f"pool_{name}_proj.weight"] = rng.normal(size=(D, D))
        weights[f"pool_{name}_proj.bias"] = rng.normal(size=D)
    weights = {k: v.astype(np.float32) for k, v in weights.items()}
    pool = AttentionPool(K, D)
    pool.load_weights([(k.removeprefix("pool_"), mx.array(v)) for k, v in weights.items()])
    kept = resolve("attention_pool", {"attention_pool": pool})(Signals(mx.array(x_BND), (4, 5)), K)

    def linear(x, name):
        return x @ weights[f"pool_{name}_proj.weight"].T + weights[f"pool_{name}_proj.bias"]

    logits_BKN = linear(weights["pool_queries"], "q") @ linear(x_BND, "k").swapaxes(1, 2) / D**0.5
    share_BKN = np.exp(logits_BKN - logits_BKN.max(-1, keepdims=True))
    share_BKN /= share_BKN.sum(-1, keepdims=True)
    close(np.array(kept.tokens(mx.array(x_BND))), share_BKN @ linear(x_BND, "v"))
    theirs = ref.attention_pool.AttentionPool(K, D)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    with torch.no_grad():
        twin_kept = theirs.prune(ref.Signals(torch.from_numpy(x_BND), (4, 5)), K)
        close(
            np.array(kept.tokens(mx.array(x_BND))),
            twin_kept.tokens(torch.from_numpy(x_BND)).numpy(),
        )


def test_windows_of_a_grid_worked_by_hand():
    # 4 x 4 in 4: four quarters; their upper left middle tokens are 0, 2, 8, 10.
    quarters = [w.ravel().tolist() for w in windows((4, 4), 4)]
    assert quarters == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    kept = resolve("uniform")(Signals(mx.zeros((1, 16, D)), (4, 4)), 4)
    assert np.array(kept.index_BK[0]).tolist() == [0, 2, 8, 10]
    # 2 x 5 in 3: one band of both rows, cut at columns 0, 1, 3 and 5.
    thirds = [w.ravel().tolist() for w in windows((2, 5), 3)]
    assert thirds == [[0, 5], [1, 2, 6, 7], [3, 4, 8, 9]]


def test_similarity_published_drops_the_bottom_of_an_image_and_the_fix_does_not():
    x = np.eye(8, dtype=np.float32)[None]  # nothing is alike
    seen = Signals(mx.array(x), (4, 2))
    published = resolve("similarity:published")(seen, 4)
    assert np.array(published.index_BK[0]).tolist() == [0, 1, 2, 3]
    assert np.array(published.weight_BKN)[0, :, 4:].sum() == 0  # the lower half is gone
    fixed = resolve("similarity")(seen, 4)
    assert (np.array(fixed.weight_BKN)[0].sum(axis=0) > 0).all()


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("avgpol", "did you mean avgpool"),
        ("random:sed=3", "did you mean seed"),
        ("random:seed=x", "takes an int"),
        ("similarity:published=maybe", "takes a bool"),
        ("norm:p=1", "it has none"),
        ("attention_pool", "holds no weights"),
        ("twig", "holds no weights"),
        ("holov:beta=nan", "takes a float"),
        ("fastv:layer=inf", "takes a float"),
        ("restore", "needs one, as in"),
        ("fastv+vtw", "of which a chain can hold one"),
        ("fastv+norm", "write norm\\+fastv"),
        ("none+fastv", "leave it out"),
        ("norm:keep=5", "earlier method"),
        ("norm:keep=0+fastv", "at least 1"),
        ("tome+restore", "nothing to restore"),
    ],
)
def test_a_wrong_pruner_or_option_is_named_with_what_there_is(spec, part):
    with pytest.raises(UserError, match=part):
        plan(spec)


@pytest.mark.parametrize("K", [0, 17])
def test_a_budget_outside_one_to_n_is_refused(K):
    with pytest.raises(UserError, match="keep 1 to 16"):
        resolve("norm")(Signals(mx.zeros((1, 16, D)), (4, 4)), K)


def test_features_that_are_not_numbers_are_refused():
    x = mx.full((1, 16, D), mx.nan)
    with pytest.raises(UserError, match="NaN"):
        resolve("norm")(Signals(x, (4, 4)), 4)
