"""Promises of a layer of Mamba-2: its definition's values, in pieces and with padding too.

The oracles are the reference's loop over rows, with a norm for each group of heads, and mlx-lm's
own layer where there is one group.

Shapes: B prompts, L rows, D features, E inner features in H heads of d, G groups, S states, C
features of the convolution.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.mamba2 import Mamba2Block, ModelArgs

from mlx_vlm_prune.models.language import mamba
from mlx_vlm_prune.models.language.mamba import MambaState
from mlx_vlm_prune.models.language.mamba2 import ANY_STEP, mix
from torch_ref.models.language.selective_scan import scan_by_heads

from .pruner_cases import close

D, H, d, S, K = 24, 4, 12, 5, 4
E = H * d


@pytest.fixture(scope="module", params=[1, 2], ids=["one group", "two groups"])
def mixer(request):
    mx.random.seed(3)
    sizes = ModelArgs(
        "mamba2", H, d, 9, D, E, S, 1, 1e-5, K, request.param, True, True, True, ANY_STEP, "auto"
    )
    layer = Mamba2Block(sizes, 0)
    layer.D, layer.dt_bias = mx.random.normal((H,)), mx.random.normal((H,))
    layer.norm.weight = mx.random.normal((E,))
    layer.eval()
    mx.eval(layer.parameters())
    return layer


def rows(B: int, L: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(B, L, D)).astype("f4"))


def by_definition(mixer: Mamba2Block, x_BLD: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the last state, row by row in float64."""

    def tensor(x: mx.array) -> torch.Tensor:
        return torch.tensor(np.array(x)).double()

    def linear(layer, x: torch.Tensor) -> torch.Tensor:
        return x @ tensor(layer.weight).T + tensor(layer.bias)

    (B, L), G = x_BLD.shape[:2], mixer.n_groups
    gate, convolved_BLC, step = linear(mixer.in_proj, tensor(x_BLD)).split(
        [E, E + 2 * G * S, H], dim=-1
    )
    before = F.pad(convolved_BLC, (0, 0, K - 1, 0))
    weight_CK = tensor(mixer.conv1d.weight)[..., 0]
    taps = sum(before[:, k : k + L] * weight_CK[:, k] for k in range(K))
    x, into, out = F.silu(taps + tensor(mixer.conv1d.bias)).split([E, G * S, G * S], dim=-1)
    x_BLHd = x.reshape(B, L, H, d)
    y_BLHd, state = scan_by_heads(
        x_BLHd, F.softplus(step + tensor(mixer.dt_bias)), -tensor(mixer.A_log).exp(),
        into.reshape(B, L, G, S), out.reshape(B, L, G, S),
    )  # fmt: skip
    y_BLHd = y_BLHd + tensor(mixer.D)[:, None] * x_BLHd
    groups = (y_BLHd.flatten(2) * F.silu(gate)).reshape(B, L, G, -1)
    normed = groups / (groups.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    y = linear(mixer.out_proj, normed.flatten(2) * tensor(mixer.norm.weight))
    return y.numpy(), state.numpy()


@pytest.mark.parametrize("piece", (256, 2048))  # mlx-lm's own chunks have 256 rows
@pytest.mark.parametrize("L", (1, 2, K, 33, 256, 300))
def test_a_layer_is_its_definition(L, piece, mixer, monkeypatch):
    for name in ("ROWS_CPU", "ROWS_GPU"):
        monkeypatch.setattr(mamba, name, piece)
    x_BLD, state = rows(2, L), MambaState()
    expected, last = by_definition(mixer, x_BLD)
    close(np.array(mix(mixer, x_BLD, state)), expected)
    close(np.array(state.scanned), last)


def test_with_one_group_it_is_mlx_lms_and_with_two_mlx_lm_has_another_norm(mixer):
    x_BLD = rows(2, 9)
    got, theirs = mix(mixer, x_BLD, MambaState()), mixer(x_BLD, None, ArraysCache(size=2))
    if mixer.n_groups == 1:
        close(np.array(got), np.array(theirs))
    else:
        assert np.abs(np.array(got - theirs)).max() > 1e-2


@pytest.mark.parametrize("sizes", [(1,) * 5, (2, 9, 1), (256, 1, 40)])
def test_pieces_give_what_all_rows_at_once_give(sizes, mixer):
    x_BLD, state = rows(2, sum(sizes)), MambaState()
    expected, begin, parts = by_definition(mixer, x_BLD)[0], 0, []
    for size in sizes:
        parts.append(mix(mixer, x_BLD[:, begin : begin + size], state))
        begin += size
    close(np.array(mx.concatenate(parts, axis=1)), expected)


@pytest.mark.parametrize("step", (5, 256))
@pytest.mark.parametrize("piece", (1, 3, 5, 11, 32))
def test_padded_prompts_together_equal_each_alone(piece, step, mixer, monkeypatch):
    """Padding on the left; in small pieces some prompts are nothing but padding at first."""
    for name in ("ROWS_CPU", "ROWS_GPU"):
        monkeypatch.setattr(mamba, name, step)
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
        joined = mx.concatenate([x, new_B1D[b : b + 1]], axis=1)
        expected = by_definition(mixer, joined)[0][0]
        close(np.array(got)[b, L - lengths[b] :], expected[:-1])
        close(np.array(after)[b, 0], expected[-1])


def test_padding_behind_real_rows_changes_nothing_either(mixer):
    """As where a second turn of one prompt is shorter than its neighbour's."""
    first, second, state = rows(2, 6), rows(2, 5, seed=1), MambaState()
    mix(mixer, first, state)
    got = mix(mixer, second, state, [0, 3])
    joined = mx.concatenate([first[1:], second[1:, 3:]], axis=1)
    close(np.array(got)[1, 3:], by_definition(mixer, joined)[0][0, 6:])


def test_a_fork_reads_on_by_itself(mixer):
    x_BLD, state = rows(1, 6), MambaState()
    mix(mixer, x_BLD, state)
    fork = state.fork()
    expected = mix(mixer, x_BLD[:, :1], fork)
    mix(mixer, x_BLD[:, 3:], fork)
    assert mx.array_equal(mix(mixer, x_BLD[:, :1], state), expected)


def test_gradients_are_those_of_mlx_lms_layer(mixer):
    if mixer.n_groups > 1:
        pytest.skip("mlx-lm has another norm")
    x_BLD = rows(2, 9)

    def loss(parameters, layer):
        mixer.update(parameters)
        return (layer(x_BLD) ** 2).sum()

    parameters = mixer.parameters()
    expected = mx.grad(loss)(parameters, lambda x: mixer(x, None, None))
    mixer.train()
    got = mx.grad(loss)(parameters, lambda x: mix(mixer, x, MambaState()))
    mixer.update(parameters)
    mixer.eval()
    for name in ("A_log", "D", "dt_bias"):
        close(np.array(got[name]), np.array(expected[name]))
    for name in ("in_proj", "conv1d", "out_proj", "norm"):
        close(np.array(got[name]["weight"]), np.array(expected[name]["weight"]))
