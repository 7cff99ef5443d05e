"""MiniMind's language models: grouped heads, half-rotation RoPE, tied embeddings.

MiniMind2 is Llama-like; MiniMind-3 is Qwen3-like, which adds normed queries and keys. Both
also come as mixtures of experts. With an output layer of its own it is Vicuna, with biases
of queries, keys and values Qwen2.

Module names are those of the published .pth, so its `model.*` weights load unrenamed.

Shapes: B rows, L new tokens, S tokens with the cached ones, D features,
H heads, G key/value heads, d head size, R rows of all prompts, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlx_vlm_prune.checkpoints.config import MiniMindConfig


class RMSNorm(nn.Module):
    """Normalised in float32, cast back, then scaled: the order matters in half precision."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dims))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.type_as(x)


def rotary_table(positions_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (B, 1, L, d), float32."""
    steps = torch.arange(0, head_dim, 2, device=positions_BL.device).float()
    angle_BLd = positions_BL[..., None].float() * theta ** (-steps / head_dim)
    angle_B1Ld = torch.cat([angle_BLd, angle_BLd], dim=-1)[:, None]
    return angle_B1Ld.cos(), angle_B1Ld.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cos + rotated * sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, c: MiniMindConfig):
        super().__init__()
        self.d, self.H, self.G = c.head_dim, c.num_attention_heads, c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.d, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.G * self.d, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.G * self.d, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.H * self.d, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.d, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.d, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def queries(self, x_BLD: Tensor) -> Tensor:
        """(B, H, L, d), not yet rotated."""
        return self.q_norm(self.q_proj(x_BLD).unflatten(-1, (-1, self.d))).transpose(1, 2)

    def keys(self, x_BLD: Tensor) -> Tensor:
        """(B, G, L, d), not yet rotated."""
        return self.k_norm(self.k_proj(x_BLD).unflatten(-1, (-1, self.d))).transpose(1, 2)

    def forward(self, x_BLD: Tensor, rotary, visible: Tensor | None, rows: list | None) -> Tensor:
        v_BGLd = self.v_proj(x_BLD).unflatten(-1, (-1, self.d)).transpose(1, 2)
        q_BHLd = rotate(self.queries(x_BLD), *rotary)
        k_BGLd = rotate(self.keys(x_BLD), *rotary)
        if rows is not None:
            if rows:
                k_BGLd = torch.cat([rows[0], k_BGLd], dim=2)
                v_BGLd = torch.cat([rows[1], v_BGLd], dim=2)
            rows[:] = [k_BGLd, v_BGLd]
        k_BHSd, v_BHSd = (t.repeat_interleave(self.H // self.G, dim=1) for t in (k_BGLd, v_BGLd))
        y_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BHSd, v_BHSd, attn_mask=visible)
        return self.o_proj(y_BHLd.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: MiniMindConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """A router chooses k of E networks for every token; shared ones read all of them."""

    def __init__(self, c: MiniMindConfig):
        super().__init__()
        self.k = c.num_experts_per_tok
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(c) for _ in range(c.num_experts))
        self.shared_experts = nn.ModuleList(MLP(c) for _ in range(c.n_shared_experts))

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).float().softmax(-1)
        rank = share.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        share = share.where(rank < self.k, 0)
        share = (share / share.sum(-1, keepdim=True)).type_as(x)
        each = [share[..., e, None] * expert(x) for e, expert in enumerate(self.experts)]
        return sum(each + [expert(x) for expert in self.shared_experts], torch.zeros_like(x))


class Layer(nn.Module):
    def __init__(self, c: MiniMindConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MixtureOfExperts(c) if c.num_experts else MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def rotated(self, x_1LD: Tensor, rotary) -> tuple[Tensor, Tensor]:
        """Queries (H, L, d) and keys (G, L, d) of the layer's input, with their positions."""
        attend, x_1LD = self.self_attn, self.input_layernorm(x_1LD)
        q_HLd, k_GLd = (rotate(p(x_1LD), *rotary)[0] for p in (attend.queries, attend.keys))
        return q_HLd, k_GLd

    def values(self, x_1LD: Tensor, rotary) -> Tensor:
        """The values (L, G, d) of the layer's input."""
        attend = self.self_attn
        return attend.v_proj(self.input_layernorm(x_1LD))[0].unflatten(-1, (-1, attend.d))

    def forward(self, x: Tensor, rotary, visible: Tensor | None, rows: list | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, visible, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


def causal_visible(embeds_BLD: Tensor, cache: list[list] | None) -> Tensor:
    """Every token sees those cached and those before it, (1, L, S)."""
    L, past = embeds_BLD.shape[1], cache[0][0].shape[2] if cache and cache[0] else 0
    return torch.ones(1, L, past + L, dtype=torch.bool, device=embeds_BLD.device).tril(past)


class MiniMind(nn.Module):
    """Embeddings with explicit positions to hidden states."""

    attends = True  # there is attention to read

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        embeds_BLD: Tensor,
        positions_BL: Tensor,
        visible_BLS: Tensor | None = None,
        cache: list[list] | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) after the final norm.

        `visible_BLS` says which tokens each new token sees; by default those cached and
        those before it. `cache` is one list per layer, empty at first, changed in place.
        """
        rotary = self.rotary(positions_BL)
        if visible_BLS is None:
            visible_BLS = causal_visible(embeds_BLD, cache)
        x = embeds_BLD
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, visible_BLS[:, None], None if cache is None else cache[i])
        return self.norm(x)

    def rotary(self, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every position, as the layers take them."""
        return rotary_table(positions_BL, self.config.head_dim, self.config.rope_theta)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Scores of the next token; the output layer may be the embedding itself."""
        tied = self.config.tie_word_embeddings
        return F.linear(hidden_BLD, (self.embed_tokens if tied else self.lm_head).weight)
