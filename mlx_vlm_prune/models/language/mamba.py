"""Layers of a selective state space, Mamba (arXiv:2312.00752), below pruned rows.

A layer reads its rows in order into a state of fixed size. There is no attention, and there are
no positions: `keep` and `renumber` are the same. A row that leaves between two layers is not in
the states of later ones. So a method saves operations, not memory.

mlx-lm's modules are called one by one; its own loop over rows is replaced by a scan in blocks.

Shapes: B prompts, L new rows, D features, E inner features, S states of each, K the kernel's width.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import mlx.core as mx

from ...checkpoints.errors import UserError
from ...machine.hardware import on_cpu
from .selective_scan import selective_scan, silu, softplus

ROWS_CPU, ROWS_GPU = 256, 2048  # of a piece
INSTALL = "install it with pip install 'mlx-vlm-prune[mlx-lm]'"


class MambaState:
    """What a layer goes on from: the convolution's last inputs and the scan's state."""

    def __init__(self) -> None:
        self.inputs_BKE: mx.array | None = None  # K - 1 of them
        self.scanned: mx.array | None = None  # (B, S, E); Mamba-2's (B, H, d, S)
        self.A_ES: mx.array | None = None  # of the layer, held from piece to piece

    def fork(self) -> "MambaState":
        """A copy; what either reads later is not in the other."""
        return copy.copy(self)  # arrays are never changed in place

    @classmethod
    def joined(cls, states: "Sequence[MambaState]", shared: dict[Any, Any]) -> "MambaState":
        """The states of several prompts as one batch."""
        joined = cls()
        joined.inputs_BKE = _joined(state.inputs_BKE for state in states)
        joined.scanned = _joined(state.scanned for state in states)
        joined.A_ES = states[0].A_ES
        return joined

    def of_prompts(self, prompts: Sequence[int], shared: dict[Any, Any]) -> "MambaState":
        """The states of some prompts of a batch."""
        assert self.inputs_BKE is not None and self.scanned is not None, "a prompt was read"
        part, index = self.fork(), mx.array(list(prompts))
        part.inputs_BKE, part.scanned = self.inputs_BKE[index], self.scanned[index]
        return part

    @property
    def nbytes(self) -> int:
        """Bytes of the states, however many rows were read."""
        return sum(x.nbytes for x in (self.inputs_BKE, self.scanned) if x is not None)


# Of a mixer, some rows (B, L, D), the state that they change, and how many rows of each prompt are
# padding or None: what the rows become.
MixPiece = Callable[[Any, mx.array, MambaState, mx.array | None], mx.array]


def _joined(parts: Iterable[mx.array | None]) -> mx.array:
    return mx.concatenate([part for part in parts if part is not None])


def block(layer: Any, x_BLD: mx.array, forward_pass: Any, state: MambaState) -> mx.array:
    """One layer."""
    return run_block(mix_piece, layer, x_BLD, forward_pass, state)


def run_block(
    mix_piece: MixPiece, layer: Any, x_BLD: mx.array, forward_pass: Any, state: MambaState
) -> mx.array:
    """One layer, whose rows are mixed by `mix_piece`."""
    wrapped = layer.wrapped
    padding = forward_pass.padding if forward_pass.padded else ()
    y_BLD = x_BLD + in_pieces(mix_piece, wrapped.mixer, wrapped.norm(x_BLD), state, padding)
    if not wrapped.training:  # whose gradients need the graph
        mx.async_eval(y_BLD)  # states follow one another: the graph of all layers would be long
    return y_BLD


def mix(mixer: Any, x_BLD: mx.array, state: MambaState, padding: Sequence[int] = ()) -> mx.array:
    """What mlx-lm's `MambaBlock` computes, from a state on."""
    return in_pieces(mix_piece, mixer, x_BLD, state, padding)


def in_pieces(
    mix_piece: MixPiece, mixer: Any, x_BLD: mx.array, state: MambaState, padding: Sequence[int]
) -> mx.array:
    """Rows go piece by piece, so that the arrays of a piece are in the cache and memory is bounded.

    So many rows of each prompt as `padding` says are padding, on the left: they change no state,
    and what they get is arbitrary.
    """
    step = ROWS_CPU if on_cpu() else ROWS_GPU
    pieces: list[mx.array] = []
    for begin in range(0, x_BLD.shape[1], step):
        piece_BLD = x_BLD[:, begin : begin + step]
        if pieces:  # MLX would compute the projections of all pieces at first
            (piece_BLD,) = mx.depends([piece_BLD], [pieces[-1]])
        rows = [min(max(n - begin, 0), piece_BLD.shape[1]) for n in padding]
        pieces.append(mix_piece(mixer, piece_BLD, state, mx.array(rows) if rows else None))
    return mx.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]


def mix_piece(
    mixer: Any, x_BLD: mx.array, state: MambaState, padding_B: mx.array | None
) -> mx.array:
    """Some rows of Mamba's."""
    x_BLE, gate_BLE = mx.split(mixer.in_proj(x_BLD), 2, axis=-1)
    inner_BLE = silu(convolve(mixer.conv1d, x_BLE, state, padding_B))
    low = mixer.x_proj(inner_BLE.astype(x_BLD.dtype))
    rank, S = mixer.time_step_rank, mixer.ssm_state_size
    delta_BLR, B_BLS, C_BLS = mx.split(low, [rank, rank + S], axis=-1)
    delta_BLE = softplus(mixer.dt_proj(delta_BLR))
    if padding_B is not None:
        delta_BLE = mx.where(is_real(padding_B, x_BLD.shape[1])[..., None], delta_BLE, 0)
    if state.A_ES is None or mixer.training:  # an array that is held has no gradients
        state.A_ES = -mx.exp(mixer.A_log.astype(mx.float32))
    y_BLE, state.scanned = selective_scan(
        inner_BLE, delta_BLE, state.A_ES, B_BLS, C_BLS, state.scanned, recompute=mixer.training
    )
    y_BLE = (y_BLE + mixer.D * inner_BLE) * silu(gate_BLE)
    return mixer.out_proj(y_BLE.astype(x_BLD.dtype))


def is_real(padding_B: mx.array, L: int) -> mx.array:
    """Which of L rows are no padding, (B, L)."""
    return mx.arange(L) >= padding_B[:, None]


def random_mixer(hidden_size: int, state_size: int, seed: int = 0) -> Any:
    """mlx-lm's `MambaBlock` with random weights, as wide inside as Mamba's own, to be timed."""
    module = stock_module("mamba")
    sizes = module.ModelArgs(
        model_type="mamba", vocab_size=1, hidden_size=hidden_size, num_hidden_layers=1,
        intermediate_size=2 * hidden_size, state_size=state_size, conv_kernel=4, use_bias=False,
        use_conv_bias=True, time_step_rank=-(-hidden_size // 16),
    )  # fmt: skip
    mx.random.seed(seed)
    return to_be_timed(module.MambaBlock(sizes))


def stock_module(name: str) -> Any:
    """A module of mlx-lm's models; UserError without mlx-lm."""
    try:
        return import_module(f"mlx_lm.models.{name}")
    except ImportError as problem:
        raise UserError(f"a layer of Mamba needs mlx-lm: {INSTALL} ({problem})") from None


def to_be_timed(layer: Any) -> Any:
    """With its weights computed."""
    layer.eval()
    mx.eval(layer.parameters())
    return layer


def convolve(conv: Any, x_BLE: mx.array, state: MambaState, padding_B: mx.array | None) -> mx.array:
    """Each feature's causal convolution, (B, L, E) in float32, as a sum of shifted rows: MLX's own
    takes four times as long on a CPU."""
    B, L, E = x_BLE.shape
    K = conv.weight.shape[1]
    before_BKE = state.inputs_BKE
    if before_BKE is None:
        before_BKE = mx.zeros((B, K - 1, E), x_BLE.dtype)
    joined = mx.concatenate([before_BKE, x_BLE], axis=1)
    if padding_B is not None:  # earlier rows come next to the first real one
        place_BL1 = _without_padding(padding_B, K, L)[..., None]
        joined = mx.take_along_axis(joined, place_BL1, axis=1)
    state.inputs_BKE = joined[:, L:]
    weight_EK = conv.weight[..., 0].astype(mx.float32)
    rows = [joined[:, k : k + L].astype(mx.float32) * weight_EK[:, k] for k in range(K)]
    return sum(rows[1:], rows[0] + conv.bias if "bias" in conv else rows[0])


def _without_padding(padding_B: mx.array, K: int, L: int) -> mx.array:
    """Where each of K - 1 earlier and L new rows is taken from, (B, K - 1 + L): the earlier ones
    stand behind the padding, and before them what no real row reads."""
    place_1L, padding_B1 = mx.arange(K - 1 + L)[None], padding_B[:, None]
    earlier_BL = mx.maximum(place_1L - padding_B1, 0)
    return mx.where(place_1L < padding_B1 + K - 1, earlier_BL, place_1L)
