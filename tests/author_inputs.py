"""Inputs by formula on which the authors' own code was run, outside this repository.

Waves whose scores have no near ties, so that the order of a sum decides nothing.

Shapes: N tokens in rows x columns, D features in HEADS heads, T words; one image.
"""

import numpy as np

HEADS, T = 2, 4
VECTORS = ("x", "pixels", "patches", "before", "normed", "keys", "next_keys", "features")
ROWS = ("cls", "local", "received", "object", "last", "next", "mean", "twig", "prompt", "layer")


def wave(count: int, width: int, a: float, b: float) -> np.ndarray:
    """(1, count, width) values from -1 to 1, no two alike."""
    i, d = np.meshgrid(np.arange(count), np.arange(width), indexing="ij")
    return np.sin(a * i + b * d + 0.37 * i * d + 0.01 * i * i)[None].astype(np.float32)


def groups(count: int, width: int, a: float, b: float) -> np.ndarray:
    """The same in seven groups of tokens that are nearly alike."""
    of_group = wave(7, width, a, b)[:, np.arange(count) * 5 % 7]
    return of_group + np.float32(0.1) * wave(count, width, 1.3 * a, b)


def shares(count: int, a: float) -> np.ndarray:
    """(1, count) positive numbers with sum 1."""
    share = np.exp(2 * wave(count, 1, a, 0)[..., 0])
    return (share / share.sum()).astype(np.float32)


def rotary_means(N: int, d: int, start: int = 3) -> dict:
    """The means of RoPE's cosines and sines, at base 10,000, of N tokens from `start` on."""
    angle_Nh = (start + np.arange(N))[:, None] * 1e4 ** (-np.arange(0, d, 2) / d)
    return {
        "rotary_cosine_BN": np.cos(angle_Nh).mean(axis=-1)[None].astype(np.float32),
        "rotary_sine_BN": np.sin(angle_Nh).mean(axis=-1)[None].astype(np.float32),
    }


def arrays(grid: tuple[int, int], D: int, kind: str, phase: float) -> dict:
    """Every signal there is by its name in the contract; `kind` is `wave` or `groups`."""
    N, of = grid[0] * grid[1], {"wave": wave, "groups": groups}[kind]
    heads = (1, N, HEADS, D // HEADS)
    x, text = of(N, D, 0.3 + phase, 1.1)[0], wave(T, D, 0.7, 1.3 + phase)[0]
    word_share = np.exp(x @ text[:-1].T)
    word_share = (word_share / word_share.sum(axis=1, keepdims=True)).mean(axis=0)
    text_attention = np.stack([shares(N, 0.1 * t + 0.4 + phase) for t in range(T)], axis=1)
    return {
        "grid": grid,
        **{
            f"{name}_BND": of(N, D, 0.3 + 0.21 * k + phase, 1.1 - 0.13 * k)
            for k, name in enumerate(VECTORS)
        },
        "queries_BNHd": of(N, D, 0.9 + phase, 0.4).reshape(heads),
        "keys_BNHd": of(N, D, 1.7 + phase, 0.6).reshape(heads),
        "cls_query_BHd": wave(1, D, 0.5, 0.8 + phase).reshape(1, HEADS, -1),
        "cls_key_BHd": wave(1, D, 0.8, 0.3 + phase).reshape(1, HEADS, -1),
        "values_BNHd": of(N, D, 1.2 + phase, 0.7).reshape(heads),
        "cls_value_BHd": wave(1, D, 0.6, 0.9 + phase).reshape(1, HEADS, -1),
        "cls_row_BN": shares(N, 0.75 + phase),
        "entrance_BND": of(N, D, 2.1 + phase, 0.2),
        "cls_rank_BN": (np.argsort(np.argsort(-shares(N, 0.45 + phase))) / N).astype(np.float32),
        "text_share_BT": np.append(word_share, 0)[None].astype(np.float32),
        "text_BTD": wave(T, D, 0.7, 1.3 + phase),
        "text_keys_BTD": wave(T, D, 1.9, 0.2 + phase),
        "text_real_BT": np.array([[True, True, True, False]]),
        "held_values_BNHd": of(N, D, 1.3 + phase, 0.7).reshape(heads),
        "text_values_BTHd": wave(T, D, 0.6 + phase, 1.7).reshape(1, T, HEADS, D // HEADS),
        **rotary_means(N, D // HEADS),
        "text_attention_BTN": text_attention,
        **{
            f"{name}_attention_BN": shares(N, 0.45 + 0.31 * k + phase)
            for k, name in enumerate(ROWS)
        },
        "sensitivity_BN": shares(N, 0.77 + phase),
    }
