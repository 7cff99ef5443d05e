"""Promises of a layer of Mamba: what mlx-lm's own computes, in pieces and with padding too.

Shapes: B prompts, L rows, D features.
"""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.mamba import MambaBlock, ModelArgs

from mlx_vlm_prune.models.language import mamba
from mlx_vlm_prune.models.language import selective_scan as scans
from mlx_vlm_prune.models.language.mamba import MambaState, mix

from .pruner_cases import close

D, BLOCK = 24, 8
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK + 3)


@pytest.fixture(params=["read_in_order", "read_in_chunks"], autouse=True)
def blocks(request, monkeypatch):
    function = getattr(scans, request.param)
    monkeypatch.setattr(scans, "_plan", lambda values: (BLOCK, function))


@pytest.fixture(scope="module", params=[True, False], ids=["biases", "no biases"])
def mixer(request):
    mx.random.seed(3)
    sizes = ModelArgs("mamba", 9, D, 2 * D, 5, 1, 4, request.param, request.param, 2)
    layer = MambaBlock(sizes)
    layer.D = mx.random.normal(layer.D.shape)
    layer.A_log = layer.A_log + 0.3 * mx.random.normal(layer.A_log.shape)
    layer.eval()
    mx.eval(layer.parameters())
    return layer


def rows(B: int, L: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(B, L, D)).astype("f4"))


@pytest.mark.parametrize("L", LENGTHS)
def test_a_layer_is_mlx_lms(L, mixer):
    x_BLD, cache, state = rows(2, L), ArraysCache(size=2), MambaState()
    close(np.array(mix(mixer, x_BLD, state)), np.array(mixer(x_BLD, cache)))
    close(np.array(state.inputs_BKE), np.array(cache[0]))
    close(np.array(state.scanned.swapaxes(1, 2)), np.array(cache[1]))
    assert state.nbytes == cache[0].nbytes + cache[1].nbytes


@pytest.mark.parametrize("sizes", [(1,) * 5, (2, 9, 1), (BLOCK, 1, BLOCK + 1)])
def test_pieces_give_what_all_rows_at_once_give(sizes, mixer):
    x_BLD, state = rows(2, sum(sizes)), MambaState()
    expected, begin, parts = mix(mixer, x_BLD, MambaState()), 0, []
    for size in sizes:
        parts.append(mix(mixer, x_BLD[:, begin : begin + size], state))
        begin += size
    close(np.array(mx.concatenate(parts, axis=1)), np.array(expected))


def test_it_reads_in_pieces_by_itself(mixer, monkeypatch):
    x_BLD, padding = rows(2, 13), [0, 7]
    expected = mix(mixer, x_BLD, MambaState(), padding)
    monkeypatch.setattr(mamba, "ROWS_CPU", 5)
    monkeypatch.setattr(mamba, "ROWS_GPU", 5)
    got = mix(mixer, x_BLD, MambaState(), padding)
    close(np.array(got)[0], np.array(expected)[0])
    close(np.array(got)[1, 7:], np.array(expected)[1, 7:])


@pytest.mark.parametrize("piece", (3, 5, 11, 32))
def test_padded_prompts_together_equal_each_alone(piece, mixer):
    """Padding on the left; in small pieces some prompts are nothing but padding at first."""
    lengths, L = (11, 7, 1, 4), 11
    alone = [rows(1, length, seed) for seed, length in enumerate(lengths)]
    widths = [[(0, 0), (L - length, 0), (0, 0)] for length in lengths]
    pairs = zip(alone, widths, strict=True)
    x_BLD = mx.concatenate([mx.pad(x, width, constant_values=7) for x, width in pairs])
    state, parts = MambaState(), []
    for begin in range(0, L, piece):
        part = x_BLD[:, begin : begin + piece]
        left = [max(0, L - length - begin) for length in lengths]
        parts.append(mix(mixer, part, state, left if any(left) else ()))
    got, new_B1D = mx.concatenate(parts, axis=1), rows(4, 1, seed=9)
    after = mix(mixer, new_B1D, state)
    for b, x in enumerate(alone):
        single = MambaState()
        close(np.array(got)[b, L - lengths[b] :], np.array(mix(mixer, x, single))[0])
        close(np.array(after)[b], np.array(mix(mixer, new_B1D[b : b + 1], single))[0])


def test_padding_behind_real_rows_changes_nothing_either(mixer):
    """As where a second turn of one prompt is shorter than its neighbour's."""
    first, second, state = rows(2, 6), rows(2, 5, seed=1), MambaState()
    mix(mixer, first, state)
    got = mix(mixer, second, state, [0, 3])
    joined = mx.concatenate([first[1:], second[1:, 3:]], axis=1)
    close(np.array(got)[1, 3:], np.array(mix(mixer, joined, MambaState()))[0, 6:])


def test_a_fork_reads_on_by_itself(mixer):
    x_BLD, state = rows(1, 6), MambaState()
    mix(mixer, x_BLD, state)
    fork = state.fork()
    expected = mix(mixer, x_BLD[:, :1], fork)
    mix(mixer, x_BLD[:, 3:], fork)
    assert mx.array_equal(mix(mixer, x_BLD[:, :1], state), expected)


def test_gradients_are_those_of_mlx_lms_layer(mixer):
    x_BLD = rows(2, BLOCK + 3)

    def loss(parameters, layer):
        mixer.update(parameters)
        return (layer(x_BLD) ** 2).sum()

    parameters = mixer.parameters()
    expected = mx.grad(loss)(parameters, lambda x: mixer(x, None))
    mixer.train()
    got = mx.grad(loss)(parameters, lambda x: mix(mixer, x, MambaState()))
    mixer.eval()
    for name in ("A_log", "D"):
        close(np.array(got[name]), np.array(expected[name]))
    for name in ("in_proj", "x_proj", "dt_proj", "conv1d", "out_proj"):
        close(np.array(got[name]["weight"]), np.array(expected[name]["weight"]))


def test_the_decays_rates_are_worked_out_once_a_request(mixer, monkeypatch):
    state, stock, shapes = MambaState(), mx.exp, []

    def exp(x):
        shapes.append(x.shape)
        return stock(x)

    monkeypatch.setattr(mamba.mx, "exp", exp)
    for begin in range(3):
        mix(mixer, rows(1, 5, begin), state)
    assert shapes.count(mixer.A_log.shape) == 1
