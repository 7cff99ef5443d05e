"""Signals for the pruners' tests, and both frameworks side by side.

Shapes: B images, N tokens, D features, T words, K kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

import torch_ref.pruners as ref
from mlx_vlm_prune.models.language.twig import Twig
from mlx_vlm_prune.pruners import METHODS, Pruner, Signals, resolve
from mlx_vlm_prune.pruners.numerics import precision

from . import tiny

D, T, HEADS = 8, 5, 2
# Every method of the table that chooses among tokens; a new one is tested without new code.
CHOOSING = [n for n, m in METHODS.items() if n != "none" and m.prune]
VARIANTS = [
    *CHOOSING, "similarity:published", "similarity:threshold=0.3", "random:seed=7",
    "cdpruner:negative", "visionzip:contextual=0.5", "vispruner:important=0", "hiprune:objects=1",
    "prumerge:neighbours=2", "pixelprune:tolerance=0.5", "holov:regions=3", "scope:power=2",
    "sparsevlm:recycle=0.9", "sparsevlm:sums", "pact:clustered=1", "pact:prompt", "dart:pivots=1",
    "window_merge:side=2", "dual_attention:relation=2", "two_scales:fine=0.2",
    "apet:basis=2", "mmtok:image=2", "divprune+restore:published", "norm+restore:published",
    "norm+ivc", "divprune+ivc:anchors=0.8", "ivc_prune:seeds=0.2,anchors=0.5", "ivc_prune+ivc",
]  # fmt: skip
INPUTS = ("random", "flat", "duplicated", "near_duplicate", "zero", "one_hot", "extreme")


@contextmanager
def float64_choices() -> Iterator[None]:
    """Inside the block everything is computed on the CPU device, and chosen in float64: a GPU has
    none. What is equal bit for bit, or to a twin, is so there only; GPUs hold the parity contract
    of test_choices_float32."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with precision("float64"):
            yield
    finally:
        mx.set_default_device(device)


def make_pruner(spec: str) -> Pruner:
    """The method of a specification; of a twig the host reads the weights, the method none."""
    return resolve(spec, {"twig": Twig(tiny.TEXT, 1, 1)})


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
    elif kind.endswith("clustered"):
        centre = x[:, rng.integers(4, size=N)]
        x = centre + (1e-3 if kind == "tightly clustered" else 0.1) * x
    return x


def shares(kind: str, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Attention rows (B, ..., N) that sum to one."""
    logits = np.zeros(shape) if kind in ("flat", "zero") else rng.normal(size=shape)
    share = np.exp(logits)
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
        "features_BND": features(kind, rng, B, N, D),
        "cls_key_BHd": features("random", rng, B, HEADS, D // HEADS),
        "text_share_BT": shares("random", rng, B, T),
        "prompt_attention_BN": shares(kind, rng, B, N),
        "layer_attention_BN": shares(kind, rng, B, N),
        # Greys, each of one of five levels.
        "grey_BNP": rng.integers(0, 5, size=(B, N, 4)).astype(np.float32) / 10,
        "sensitivity_BN": shares(kind, rng, B, N),
        "values_BNHd": features(kind, rng, B, N, HEADS, D // HEADS),
        "cls_value_BHd": features("random", rng, B, HEADS, D // HEADS),
        "cls_row_BN": shares(kind, rng, B, N),
        "entrance_BND": features(kind, rng, B, N, D),
        "cls_rank_BN": (rng.permuted(np.tile(np.arange(N), (B, 1)), axis=1) / N).astype(np.float32),
        "held_values_BNHd": features(kind, rng, B, N, HEADS, D // HEADS),
        "text_values_BTHd": features("random", rng, B, T, HEADS, D // HEADS),
        **rotary_means(B, grid),
    }


def rotary_means(B: int, grid: tuple[int, int], start: int = 3) -> dict:
    """The means of RoPE's cosines and sines of an image's tokens behind `start` words, by its
    formula with three frequencies, each image one word later."""
    positions_BN1 = start + np.arange(B)[:, None, None] + np.arange(grid[0] * grid[1])[:, None]
    angle_BN3 = positions_BN1 * np.array([1, 0.1, 0.01])
    return {
        "rotary_cosine_BN": np.cos(angle_BN3).mean(axis=-1).astype(np.float32),
        "rotary_sine_BN": np.sin(angle_BN3).mean(axis=-1).astype(np.float32),
    }


def signals(arrays: dict) -> Signals:
    return Signals(**{k: v if k == "grid" else mx.array(v) for k, v in arrays.items()})


def reference_signals(arrays: dict) -> ref.Signals:
    """The same in the reference."""
    return ref.Signals(**{k: v if k == "grid" else torch.from_numpy(v) for k, v in arrays.items()})


def select_images(arrays: dict, b: slice) -> dict:
    """The same of some images of the batch."""
    return {k: v if k == "grid" else v[b] for k, v in arrays.items()}


@st.composite
def cases(draw):
    grid = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    B, N = draw(st.integers(1, 3)), grid[0] * grid[1]
    K, seed = draw(st.integers(1, N)), draw(st.integers(0, 99))
    return case(draw(st.sampled_from(INPUTS)), B, grid, seed), K


many = settings(max_examples=20, deadline=None)


def assert_agreement(spec: str, arrays: dict, K: int) -> None:
    """Both frameworks keep the same tokens and mix them alike."""
    pruner = make_pruner(spec)
    ours, theirs = pruner(signals(arrays), K), reference_reduction(pruner, arrays, K)
    np.testing.assert_array_equal(np.array(ours.index_BK), theirs.index_BK.numpy())
    kept = theirs.tokens(torch.from_numpy(arrays["x_BND"])).numpy()
    close(np.array(ours.tokens(mx.array(arrays["x_BND"]))), kept)


def reference_reduction(
    pruner: Pruner, arrays: dict, K: int, has_cls: bool = True, frames: int = 1
) -> ref.Reduction:
    tokens = reference_signals(arrays).replace(has_cls=has_cls, frames=frames)
    return completed_reduction(pruner, tokens, K)


def completed_reduction(pruner: Pruner, tokens: ref.Signals, K: int) -> ref.Reduction:
    """What the reference makes of them, with an enhancer that completes the choice."""
    enhancer = pruner.enhancer
    chosen, step = K, enhancer and ref.Step(enhancer.name, None, enhancer.options)
    if step and tokens.x_BND.shape[1] > K:
        chosen = step.call("selected", K)
    kept = ref.reduce(pruner.name, tokens, chosen, **pruner.options)
    return step.call("complete", tokens, kept, K) if step and chosen < K else kept


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """float32 parity: rtol 1e-4, atol 1e-5 of the largest value."""
    np.testing.assert_allclose(
        ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max(initial=0) + 1e-12
    )


# Those whose weights choose; a twig's are read by the host (tests/test_twig.py).
LEARNED = [n for n, m in METHODS.items() if m.learned and n != "twig"]


def learned_pair(name: str, tokens: int) -> tuple:
    """Random weights of a learned method in both frameworks."""
    torch.manual_seed(tokens)
    theirs = ref.METHODS[name].make_weights(D, tokens).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    ours = METHODS[name].make_weights(D, tokens)
    state = {k.replace("pool_", ""): mx.array(v.numpy()) for k, v in theirs.state_dict().items()}
    ours.load_weights(list(state.items()))
    return ours, theirs
