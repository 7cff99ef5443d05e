"""MiniMind's language models: grouped heads, half-rotation RoPE, tied embeddings.

MiniMind2 is Llama-like; MiniMind-3 is Qwen3-like, which adds normed queries and keys. Both
also come as mixtures of experts. With an output layer of its own it is Vicuna, with biases
of queries, keys and values Qwen2: the language models of LLaVA-style ones.

Every token carries its position: after pruning, positions have gaps, and what a
token sees is decided by positions alone.

Shapes: B prompts, L new tokens, S rows seen, D features, V words,
H heads, G key/value heads, d head size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from ...checkpoints.config import MiniMindConfig
from ...machine.hardware import on_cpu
from ..cache import PADDING, HeldRows, LayerCache
from .experts import MixtureOfExperts, swiglu
from .rotary import make_rotary, mean_rotation

Rotate = Callable[[mx.array], mx.array]  # queries or keys (B, H, L, d)


class Attention(nn.Module):
    def __init__(self, c: MiniMindConfig):
        super().__init__()
        self.head_dim, self.groups = c.head_dim, c.num_key_value_heads
        rows, bias = c.num_key_value_heads * c.head_dim, c.attention_bias
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, rows, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, rows, bias=bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)

    def split(self, x_BLD: mx.array) -> mx.array:
        B, L, _ = x_BLD.shape
        return x_BLD.reshape(B, L, -1, self.head_dim).swapaxes(1, 2)

    def __call__(self, x_BLD: mx.array, forward_pass: "ForwardPass", cache: LayerCache) -> mx.array:
        B, L, _ = x_BLD.shape
        q_BHLd = self.rotated_queries(x_BLD, forward_pass.rotary)
        k_BGLd = self.rotated_keys(x_BLD, forward_pass.rotary)
        v_BGLd = self.split(self.v_proj(x_BLD))
        k_BGSd, v_BGSd = cache.append(k_BGLd, v_BGLd, forward_pass)
        mask = forward_pass.mask(cache.held, x_BLD.dtype)
        y_BHLd = attend(q_BHLd, k_BGSd, v_BGSd, mask, forward_pass.fold)
        return self.o_proj(y_BHLd.swapaxes(1, 2).reshape(B, L, -1))

    def rotated(self, x_BHLd: mx.array, rotary: Rotate) -> mx.array:
        """Heads, rotated."""
        return rotary(x_BHLd)

    def rotated_queries(self, x_BLD: mx.array, rotary: Rotate) -> mx.array:
        """Rotated, (B, H, L, d)."""
        q_BHLd = self.split(self.q_proj(x_BLD))
        return rotary(self.q_norm(q_BHLd) if "q_norm" in self else q_BHLd)

    def rotated_keys(self, x_BLD: mx.array, rotary: Rotate) -> mx.array:
        """Rotated, (B, G, L, d)."""
        k_BGLd = self.split(self.k_proj(x_BLD))
        return rotary(self.k_norm(k_BGLd) if "k_norm" in self else k_BGLd)


def attend(
    q_BHLd: mx.array, k_BGSd: mx.array, v_BGSd: mx.array, mask: mx.array | str | None, fold: bool
) -> mx.array:
    """Grouped attention, (B, H, L, d). `fold` lays the queries of a group end to end.

    On a CPU MLX multiplies head by head, and waking its threads for such small products took
    longer than the products; folded, there is one per group. A single query wakes no threads
    while it is not folded (docs/log.md).
    """
    B, H, L, d = q_BHLd.shape
    G = k_BGSd.shape[1]
    if fold:
        assert not isinstance(mask, str), "the fused causal mask does not fold"
        q_BHLd = q_BHLd.reshape(B, G, H // G * L, d)
        mask = mask if mask is None else mx.tile(mask, (1, 1, H // G, 1))
    y = mx.fast.scaled_dot_product_attention(q_BHLd, k_BGSd, v_BGSd, scale=d**-0.5, mask=mask)
    return y.reshape(B, H, L, d)


def grouped(q_BHLd: mx.array, groups: int) -> mx.array:
    """Queries by the key/value heads that they read, (B, G, H/G, L, d)."""
    B, H, L, d = q_BHLd.shape
    return q_BHLd.reshape(B, groups, H // groups, L, d)


class MLP(nn.Module):
    def __init__(self, c: MiniMindConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _mlp(c: MiniMindConfig) -> nn.Module:
    if not c.num_experts:
        return MLP(c)
    shared: list[nn.Module] = [MLP(c) for _ in range(c.n_shared_experts)]
    sizes = (c.hidden_size, c.intermediate_size, c.num_experts, c.num_experts_per_tok)
    return MixtureOfExperts(*sizes, shared)


class DecoderLayer(nn.Module):
    def __init__(self, c: MiniMindConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = _mlp(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def __call__(self, x_BLD: mx.array, forward_pass: "ForwardPass", cache: LayerCache) -> mx.array:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), forward_pass, cache)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class ForwardPass:
    """What the layers of one forward pass share: positions, rotation, rows held, visibility."""

    def __init__(
        self,
        positions_BL: mx.array,
        rotary: Any,  # rotates queries and keys
        padding: Sequence[int],  # how many rows of each prompt are; none without
        bias_BL: mx.array | None = None,
    ):
        self.positions_BL, self.rotary = positions_BL, rotary
        self.padding, self.padded, self.bias_BL = padding, any(padding), bias_BL
        self.fold = on_cpu() and positions_BL.shape[1] > 1
        self._after: dict[HeldRows, HeldRows] = {}
        self._masks: dict[HeldRows, mx.array | str | None] = {}

    def rows_after(self, held: HeldRows) -> HeldRows:
        """The rows of a layer that held some and reads these."""
        if held not in self._after:
            self._after[held] = held.extended(self.positions_BL, self.padded, self.bias_BL)
        return self._after[held]

    def mask(self, held: HeldRows, dtype: mx.Dtype) -> mx.array | str | None:
        """The mask of a layer that holds these rows, among them those of this pass."""
        if held not in self._masks:
            self._masks[held] = self._mask(held, dtype)
        return self._masks[held]

    def _mask(self, held: HeldRows, dtype: mx.Dtype) -> mx.array | str | None:
        """A row sees those at its position or before; padding is seen by none.

        Rows are stored in the order of their positions, so without padding the fused
        causal kernel says the same, and a single new token sees all. A bias is added.
        """
        if held.bias_BS is not None:
            bias_B1LS, is_one_row = held.bias_BS[:, None, None], self.positions_BL.shape[1] == 1
            if is_one_row and not held.padded and held.distance_BP is None:
                return bias_B1LS.astype(dtype)
            visible_B1LS = self.visible(held.positions_BS)
            if held.distance_BP is not None:
                bias_B1LS = bias_B1LS + self._distance_bias(held.distance_BP, held.positions_BS)
            return mx.where(visible_B1LS, bias_B1LS, -mx.inf).astype(dtype)
        if not held.padded and self.positions_BL.shape[1] == 1:
            return None
        if not held.padded and not self.fold:
            return "causal"
        return self.visible(held.positions_BS)

    def _distance_bias(self, distance_BP: mx.array, seen_BS: mx.array) -> mx.array:
        """What is added for the distance of each new row to those before it, (B, 1, L, S)."""
        distance_BLS = mx.maximum(self.positions_BL[:, :, None] - seen_BS[:, None], 0)
        prompt_B11 = mx.arange(len(distance_BLS))[:, None, None]
        return distance_BP[prompt_B11, distance_BLS][:, None]

    def visible(self, seen_BS: mx.array) -> mx.array:
        """Which rows each new row sees, (B, 1, L, S)."""
        own_BL1 = self.positions_BL[:, :, None]
        visible_BLS = (seen_BS[:, None] != PADDING) & (seen_BS[:, None] <= own_BL1)
        return (visible_BLS | (own_BL1 == PADDING))[:, None]  # a padding query may see anything


class LayerStack(nn.Module):
    """Layers that are driven one by one, by positions."""

    forward_pass = ForwardPass  # what its layers share; training puts another in its place

    def make_cache(self) -> list[Any]:
        return [LayerCache() for _ in self.layers]

    def rotary(self, positions_BL: mx.array, contiguous: bool = False) -> Any:
        """What rotates the layers' queries and keys."""
        c = self.config
        return make_rotary(positions_BL, contiguous, c.head_dim, c.rope_theta)

    def run(
        self, numbers: range, x_BLD: mx.array, positions_BL: mx.array, cache: list[Any],
        *, contiguous: bool = False, padding: Sequence[int] = (), bias_BL: mx.array | None = None,
    ) -> mx.array:  # fmt: skip
        """Hidden states through some of the layers, whose caches grow by L rows.

        `positions_BL` ascend within each row, `contiguous` ones one by one. So many of a prompt
        as `padding` says are PADDING, on the left.
        """
        rotary, layers = self.rotary(positions_BL, contiguous), self.layers
        forward_pass = self.forward_pass(positions_BL, rotary, padding, bias_BL)
        for number in numbers:
            x_BLD = layers[number](x_BLD, forward_pass, cache[number])
        return x_BLD

    def rotated_queries(self, number: int, x_BLD: mx.array, positions_BL: mx.array) -> mx.array:
        """The queries (B, G, H/G, L, d) that a layer makes of its input, rotated."""
        layer = self.layers[number]
        normed_BLD, attention = layer.input_layernorm(x_BLD), layer.self_attn
        q_BHLd = attention.rotated_queries(normed_BLD, self.rotary(positions_BL))
        return grouped(q_BHLd, attention.groups)

    def rotated_keys(self, number: int, x_BLD: mx.array, positions_BL: mx.array) -> mx.array:
        """The keys (B, G, L, d) that a layer makes of its input, rotated."""
        layer = self.layers[number]
        normed_BLD = layer.input_layernorm(x_BLD)
        return layer.self_attn.rotated_keys(normed_BLD, self.rotary(positions_BL))

    def held_keys(self, layer_cache: LayerCache) -> mx.array:
        """(B, G, S, d)."""
        return layer_cache.keys

    def held_values(self, layer_cache: LayerCache) -> mx.array:
        """(B, G, S, d)."""
        return layer_cache.values

    def mean_rotation(self, number: int, positions_BL: mx.array) -> tuple[mx.array, mx.array]:
        """The means of the cosines and of the sines of its rotation, (B, L) each."""

        def rotate(x_BHLd: mx.array, positions_BL: mx.array) -> mx.array:
            return self.layers[number].self_attn.rotated(x_BHLd, self.rotary(positions_BL))

        return mean_rotation(rotate, positions_BL, self.config.head_dim)

    @property
    def depth(self) -> int:
        return len(self.layers)


class MiniMind(LayerStack):
    """Embeddings with positions to logits."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def check(self, pipeline: Any) -> None:
        """Every method works between these layers."""

    def logits(self, x_BLD: mx.array) -> mx.array:
        """Of the next word, from the last layer's hidden states."""
        x_BLD = self.norm(x_BLD)
        return self.lm_head(x_BLD) if "lm_head" in self else self.embed_tokens.as_linear(x_BLD)
