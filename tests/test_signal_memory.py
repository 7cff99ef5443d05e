"""Promises of memory: no signal that a method needs costs an N x N array, in a tower or in the
decoder.

Counted is MLX's peak above what is held; a control of each shows that N x N numbers of one head
would be seen.

Shapes: N tokens, S with CLS, H heads, d head size, L rows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_vlm_prune.models import decoder, layers
from mlx_vlm_prune.models.language.minimind import MiniMind, MiniMindConfig
from mlx_vlm_prune.models.language.twig import Twig
from mlx_vlm_prune.models.splice import ImageSlots, splice
from mlx_vlm_prune.models.towers import signals as tower_signals
from mlx_vlm_prune.pruners import METHODS, Pruner, Reduction, Signals, Stage
from mlx_vlm_prune.pruners.contract import identity
from mlx_vlm_prune.pruners.zoo_prune import probe

GRID = (48, 48)
N, H, d = GRID[0] * GRID[1], 4, 8
SQUARE = N * N * 4  # bytes of one head's attention in float32
CONFIG = MiniMindConfig(
    hidden_size=H * d,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=H,
    num_key_value_heads=2,
    vocab_size=16,
)
IN_TOWER = sorted(
    {name for m in METHODS.values() if m.stage < Stage.DECODER for name in m.needs}
    - {"grid", "text", "pixels", "grey", "patches", "features", "sensitivity"}
)
IN_DECODER = sorted({n for m in METHODS.values() if m.stage == Stage.DECODER for n in m.needs})


def peak(run: Callable[[], Any]) -> int:
    """Bytes that a call takes above what is held before."""
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    run()
    return mx.get_peak_memory() - held


def tower(name: str, has_cls: bool, windows: int = 1) -> int:
    """Peak of one signal of one layer; `windows` share its tokens out."""
    S = N + has_cls
    q_1HSd, k_1HSd = (mx.random.normal((1, H, S, d)) for _ in range(2))
    x_1ND = mx.zeros((1, N, 1))
    within = None if windows == 1 else mx.split(mx.arange(N), windows)
    mx.eval(q_1HSd, k_1HSd, x_1ND)
    want = {name: 0, "values": 0} if name == "cls_value" else {name: 0}  # which brings both
    layer = tower_signals.TowerPass(Signals(x_1ND, GRID), want, 1, (), has_cls)

    received = within and partial(tower_signals.received_attention_in_windows, within)

    def read() -> None:
        keys = layer.read(0, q_1HSd, k_1HSd, received, v_BHSd=q_1HSd)
        seen = vars(layer.signals) | keys
        computed = [value for key, value in seen.items() if key.startswith(f"{name}_B")]
        assert computed, name
        mx.eval(computed)

    return peak(read)


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("name", IN_TOWER)
def test_no_signal_of_a_tower_costs_n_times_n(name, has_cls):
    assert tower(name, has_cls) < SQUARE / 4


def test_nor_does_one_of_a_layer_with_windows():
    assert tower("received_attention", has_cls=False, windows=2) < SQUARE / 4


def test_all_queries_at_once_would_be_seen_in_a_tower(monkeypatch):
    monkeypatch.setattr(tower_signals, "QUERY_CHUNK", N + 1)
    assert tower("received_attention", has_cls=True) > H * SQUARE


@pytest.mark.parametrize("directions", [1, 64])
def test_a_projector_that_is_probed_takes_a_few_times_its_answer(directions):
    features_1ND, matrix_DE = mx.random.normal((1, N, 8)), mx.random.normal((8, 64))
    mx.eval(features_1ND, matrix_DE)
    bytes_taken = peak(
        lambda: mx.eval(probe(lambda x: x @ matrix_DE, features_1ND, directions=directions))
    )
    assert bytes_taken < 12 * 4 * 8192 * 64


def prefill(name: str) -> int:
    """Peak of a prompt that is read in pieces, its signal included."""
    mx.random.seed(0)
    language, weights = MiniMind(CONFIG), Twig(CONFIG, 1, 1)
    ids = [1, 2, *[0] * N, 3, 4]
    row = SimpleNamespace(ids=ids, runs=[(2, N)])
    image = ImageSlots(mx.random.normal((N, H * d)), mx.arange(N), rank_K=mx.arange(N) / N)
    rows = splice(language.embed_tokens, [row], [image], "keep")
    mx.eval(language.parameters(), weights.parameters(), rows.x_BLD, rows.positions_BL)

    def first(signals: Signals, K: int) -> Reduction:
        mx.eval([value for value in vars(signals).values() if isinstance(value, mx.array)])
        return identity(signals.x_BND[:, :K])

    method = replace(METHODS["fastv"], needs={name: None}, prune=first)
    pruner, twig = Pruner("first", method, weights=weights), layers.TwigReader(weights)
    cuts = decoder.Cuts(pruner, [{1: N // 2}], [GRID], twig=twig)

    def read() -> None:
        done = decoder.Decoder(language, language.make_cache(), cuts)(rows)
        mx.eval(language.logits(done.spliced.x_BLD[:, -1:]))

    return peak(read)


@pytest.mark.parametrize("name", IN_DECODER)
def test_no_signal_of_the_decoder_costs_n_times_n(name, monkeypatch):
    monkeypatch.setattr(layers, "PREFILL_STEP_SIZE", 64)
    assert prefill(name) < SQUARE / 4


def test_all_rows_at_once_would_be_seen_in_the_decoder(monkeypatch):
    monkeypatch.setattr(layers, "PREFILL_STEP_SIZE", N + 4)
    assert prefill("before") > H * SQUARE
