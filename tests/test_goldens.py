"""Which tokens every method keeps of one image made by a formula: a change of mind is seen.

Each list was made by this library once and looked at: it is no oracle, it is a memory.

Shapes: N tokens in ROWS x COLUMNS, D features in HEADS heads, T words.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.pruners import METHODS, Signals

from .pruner_cases import make_pruner, rotary_means

pytestmark = pytest.mark.usefixtures("on_the_cpu_in_float64")
ROWS, COLUMNS, D, HEADS, T = 6, 6, 8, 2, 4
N = ROWS * COLUMNS


def wave(count: int, width: int, a: float, b: float) -> np.ndarray:
    """(1, count, width) values from -1 to 1, no two alike."""
    i, d = np.meshgrid(np.arange(count), np.arange(width), indexing="ij")
    return np.sin(a * i + b * d + 0.37 * i * d + 0.01 * i * i)[None].astype(np.float32)


def row(a: float) -> mx.array:
    """(1, N) positive shares."""
    share = np.exp(2 * wave(N, 1, a, 0)[..., 0])
    return mx.array(share / share.sum())


def formula_signals() -> Signals:
    """Every signal there is, by formulas."""
    heads = (1, N, HEADS, D // HEADS)
    vectors = {
        name: mx.array(wave(N, D, 0.3 + 0.21 * k, 1.1 - 0.13 * k))
        for k, name in enumerate(
            ("x_BND", "pixels_BND", "patches_BND", "before_BND", "normed_BND", "keys_BND",
             "next_keys_BND", "features_BND")
        )
    }  # fmt: skip
    return Signals(
        grid=(ROWS, COLUMNS), **vectors,
        queries_BNHd=mx.array(wave(N, D, 0.9, 0.4).reshape(heads)),
        keys_BNHd=mx.array(wave(N, D, 1.7, 0.6).reshape(heads)),
        cls_query_BHd=mx.array(wave(1, D, 0.5, 0.8).reshape(1, HEADS, -1)),
        cls_key_BHd=mx.array(wave(1, D, 0.8, 0.3).reshape(1, HEADS, -1)),
        values_BNHd=mx.array(wave(N, D, 1.2, 0.7).reshape(heads)),
        cls_value_BHd=mx.array(wave(1, D, 0.6, 0.9).reshape(1, HEADS, -1)),
        cls_row_BN=row(0.75),
        entrance_BND=mx.array(wave(N, D, 2.1, 0.2)),
        cls_rank_BN=mx.argsort(mx.argsort(-row(0.45))).astype(mx.float32) / N,
        text_BTD=mx.array(wave(T, D, 0.7, 1.3)), text_keys_BTD=mx.array(wave(T, D, 1.9, 0.2)),
        text_real_BT=mx.array([[True, True, True, False]]),
        text_share_BT=mx.array([[0.5, 0.2, 0.3, 0.0]]),
        text_attention_BTN=mx.concatenate([row(0.1 * t + 0.4)[:, None] for t in range(T)], axis=1),
        cls_attention_BN=row(0.45), local_attention_BN=row(0.6),
        received_attention_BN=row(0.85), object_attention_BN=row(1.3),
        last_attention_BN=row(1.9), next_attention_BN=row(2.3), mean_attention_BN=row(2.9),
        twig_attention_BN=row(3.1), layer_attention_BN=row(3.7),
        grey_BNP=mx.array(np.round(wave(N, 9, 0.41, 0.23), 1)),
        sensitivity_BN=row(0.77),
        held_values_BNHd=mx.array(wave(N, D, 1.3, 0.7).reshape(heads)),
        text_values_BTHd=mx.array(wave(T, D, 0.6, 1.7).reshape(1, T, HEADS, -1)),
        **{k: mx.array(v) for k, v in rotary_means(1, (ROWS, COLUMNS)).items()},
    )  # fmt: skip


SPECS = [
    *(n for n, m in METHODS.items() if n != "none" and m.prune),
    "similarity:published", "hiprune:objects=1", "visionzip:contextual=0.5", "dart:pivots=1",
    "norm+ivc",
]  # fmt: skip
GOLDENS: dict[str, list[int]] = {
    "random": [2, 3, 4, 11, 20, 21, 26, 30, 34],
    "uniform": [0, 2, 4, 12, 14, 16, 24, 26, 28],
    "avgpool": [0, 2, 4, 12, 14, 16, 24, 26, 28],
    "tome": [0, 4, 8, 12, 16, 20, 24, 28, 32],
    "patch_norm": [6, 9, 14, 15, 16, 24, 27, 30, 32],
    "kq_norm": [1, 5, 8, 11, 15, 16, 21, 25, 32],
    "pixelprune": [0, 13, 17, 19, 20, 21, 22, 23, 25],
    "docprune": [3, 4, 5, 6, 13, 17, 19, 28, 33],
    "ipcv": [5, 7, 8, 16, 17, 18, 26, 27, 28],
    "illava_tower": [2, 4, 7, 12, 15, 18, 23, 26, 33],
    "illava_decoder": [1, 4, 7, 10, 13, 16, 19, 27, 32],
    "flowcut": [2, 3, 10, 14, 15, 16, 27, 31, 32],
    "window_merge": [2, 7, 8, 10, 12, 13, 14, 25, 28],
    "norm": [4, 5, 15, 16, 21, 22, 25, 26, 35],
    "similarity": [0, 1, 2, 3, 4, 5, 6, 7, 13],
    "received_attention": [2, 8, 9, 14, 19, 20, 24, 29, 33],
    "cls_attention": [2, 3, 4, 13, 14, 21, 22, 28, 34],
    "visionzip": [0, 3, 4, 13, 14, 21, 22, 28, 34],
    "vispruner": [3, 9, 10, 11, 21, 23, 28, 31, 34],
    "prumerge": [0, 2, 10, 14, 17, 19, 25, 30, 34],
    "prumerge_plus": [0, 3, 9, 17, 18, 19, 24, 30, 34],
    "hiprune": [2, 8, 9, 14, 19, 20, 24, 29, 33],
    "prunesid": [2, 3, 4, 13, 14, 15, 21, 28, 34],
    "holov": [3, 4, 12, 13, 20, 21, 28, 29, 34],
    "global_local": [3, 4, 11, 13, 21, 23, 28, 34, 35],
    "divprune": [9, 12, 14, 18, 19, 21, 24, 31, 33],
    "two_scales": [8, 9, 14, 18, 19, 20, 21, 31, 33],
    "salience_coverage": [2, 8, 9, 14, 15, 19, 24, 29, 33],
    "zoo_prune": [1, 2, 3, 9, 15, 16, 21, 30, 35],
    "cdpruner": [1, 2, 3, 7, 8, 17, 26, 31, 33],
    "scope": [2, 3, 4, 13, 15, 21, 27, 28, 34],
    "mmtok": [2, 3, 6, 8, 10, 14, 26, 30, 33],
    "apet": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "fastv": [1, 4, 7, 10, 13, 16, 19, 27, 32],
    "pyramiddrop": [1, 3, 6, 11, 16, 23, 25, 32, 34],
    "sparsevlm": [1, 3, 4, 14, 15, 22, 23, 29, 35],
    "dual_attention": [3, 4, 11, 18, 20, 24, 28, 34, 35],
    "lookahead": [1, 4, 7, 13, 17, 26, 27, 28, 35],
    "dart": [1, 2, 3, 4, 14, 26, 27, 28, 30],
    "v2drop": [5, 7, 8, 16, 17, 18, 26, 27, 28],
    "vtw": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "pact": [1, 3, 5, 17, 19, 21, 24, 30, 32],
    "twig": [10, 12, 14, 16, 18, 23, 25, 30, 35],
    "evs": [9, 11, 12, 14, 20, 21, 22, 29, 30],
    "vidcom2": [11, 12, 13, 14, 21, 22, 23, 29, 30],
    "flashvid": [1, 8, 9, 13, 14, 19, 24, 29, 33],
    "ivc_prune": [3, 4, 5, 10, 11, 17, 21, 26, 28],
    "norm+ivc": [3, 4, 5, 9, 11, 17, 22, 25, 26],
    "similarity:published": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "hiprune:objects=1": [12, 18, 19, 24, 26, 29, 31, 32, 33],
    "visionzip:contextual=0.5": [0, 3, 7, 13, 19, 21, 26, 28, 34],
    "dart:pivots=1": [4, 9, 10, 13, 18, 21, 25, 26, 27],
}


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_tokens_as_ever_are_kept(spec):
    kept = np.array(make_pruner(spec)(formula_signals(), 9).index_BK[0]).tolist()
    assert kept == GOLDENS.get(spec), f"{spec} keeps {kept}"
