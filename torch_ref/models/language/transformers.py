"""Language models of transformers', through the same layers with fewer rows: the twin of mlx-lm's.

transformers' own layers are called with explicit positions and masks. Their attention goes
through a function of ours, which computes it whole and hands out what it was given.

Shapes: B rows, L new tokens, S tokens with the cached ones, D features, H heads, G key/value heads,
d head size.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModel

from mlx_vlm_prune.checkpoints.config import MlxLmConfig

from .minimind import causal_visible

ATTENTION = "mlx_vlm_prune_whole"  # the name of `whole_attention` in transformers
NORMS = ("norm", "final_layernorm", "norm_f")


def whole_attention(
    module: nn.Module, q_BHLd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, mask: Tensor | None,
    *, scaling: float, noted: list | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention (B, L, H, d) and its matrix; queries, keys and values are appended to
    `noted`."""
    if noted is not None:
        noted += [q_BHLd, k_BGSd, v_BGSd]
    times = q_BHLd.shape[1] // k_BGSd.shape[1]
    k_BHSd, v_BHSd = (t.repeat_interleave(times, dim=1) for t in (k_BGSd, v_BGSd))
    logits_BHLS = (q_BHLd @ k_BHSd.mT) * scaling
    if mask is not None:
        forbids = mask.dtype == torch.bool
        logits_BHLS = logits_BHLS.masked_fill(~mask, -torch.inf) if forbids else logits_BHLS + mask
    share_BHLS = logits_BHLS.softmax(-1)
    return (share_BHLS @ v_BHSd).transpose(1, 2), share_BHLS


AttentionInterface.register(ATTENTION, whole_attention)


class ListCache:
    """A layer's keys and values, kept in a list that the caller holds."""

    def __init__(self, rows: list):
        self.rows = rows

    def update(self, k_BGLd: Tensor, v_BGLd: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        held = self.rows or [k_BGLd[:, :, :0], v_BGLd[:, :, :0]]
        new = zip(held, (k_BGLd, v_BGLd), strict=True)
        self.rows[:] = [torch.cat(pair, dim=2) for pair in new]
        return self.rows[0], self.rows[1]


def cache_name(module: nn.Module) -> str:
    """What a module of transformers calls its cache: another name since 5.24."""
    names = inspect.signature(module.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class AttentionLayer:
    """A layer with attention."""

    def __init__(self, stock: nn.Module):
        self.stock = stock

    def __call__(self, x: Tensor, rotary, visible: Tensor | None, rows: list | None) -> Tensor:
        held = None if rows is None else ListCache(rows)
        return self._call(x, rotary, attention_mask=visible, **{cache_name(self.stock): held})

    def rotated(self, x_1LD: Tensor, rotary) -> tuple[Tensor, Tensor]:
        """Queries (H, L, d) and keys (G, L, d) of the layer's input, with their positions."""
        noted: list[Tensor] = []
        self._call(x_1LD, rotary, attention_mask=None, noted=noted)
        return noted[0][0], noted[1][0]

    def values(self, x_1LD: Tensor, rotary) -> Tensor:
        """The values (L, G, d) of the layer's input."""
        noted: list[Tensor] = []
        self._call(x_1LD, rotary, attention_mask=None, noted=noted)
        return noted[2][0].transpose(0, 1)

    def _call(self, x: Tensor, rotary, **options: Any) -> Tensor:
        out = self.stock(x, position_embeddings=rotary, **options)
        return out[0] if isinstance(out, tuple) else out


class MambaLayer:
    """A layer that scans. Rows are read again from the first one on: nothing is remembered."""

    def __init__(self, stock: nn.Module):
        self.stock = stock

    def __call__(self, x: Tensor, rotary, visible: Tensor | None, rows: list | None) -> Tensor:
        x_BSD = torch.cat([*(rows or []), x], dim=1)
        if rows is not None:
            rows[:] = [x_BSD]
        return self.stock(x_BSD)[:, -x.shape[1] :]


class TextModel(nn.Module):
    """Embeddings with explicit positions to hidden states, as the reference's own models."""

    def __init__(self, config: MlxLmConfig, published: Mapping[str, Any]):
        """`published` is the text_config of a LLaVA's config.json."""
        super().__init__()
        # Mamba-2's infinity, which transformers writes as no number, is its default.
        sizes = {name: value for name, value in published.items() if name != "time_step_limit"}
        stock = AutoConfig.for_model(**sizes)
        self.stock = AutoModel.from_config(
            stock, attn_implementation=ATTENTION, dtype=torch.float32
        )
        if not config.text_config["tie_word_embeddings"]:
            bias = config.text_config["lm_head_bias"]
            self.lm_head = nn.Linear(config.hidden_size, stock.vocab_size, bias=bias)

    @property
    def embed_tokens(self) -> Any:
        return self.stock.get_input_embeddings()

    @property
    def attends(self) -> bool:
        return hasattr(self.stock.layers[0], "self_attn")

    @property
    def layers(self) -> list[AttentionLayer | MambaLayer]:
        kind = AttentionLayer if self.attends else MambaLayer
        return [kind(layer) for layer in self.stock.layers]

    @property
    def norm(self) -> nn.Module:
        return next(getattr(self.stock, name) for name in NORMS if hasattr(self.stock, name))

    def rotary(self, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every position, as the layers take them; of no layer that scans."""
        if not self.attends:
            return positions_BL, positions_BL
        like = torch.zeros(1, device=positions_BL.device)
        return self.stock.rotary_emb(like, positions_BL)

    def forward(
        self,
        embeds_BLD: Tensor,
        positions_BL: Tensor,
        visible_BLS: Tensor | None = None,
        cache: list[list] | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) after the final norm; arguments as of the reference's own."""
        if visible_BLS is None:
            visible_BLS = causal_visible(embeds_BLD, cache if self.attends else None)
        if not self.attends and len(embeds_BLD) > 1:
            return self._one_by_one(embeds_BLD, positions_BL, visible_BLS)
        x, rotary = embeds_BLD, self.rotary(positions_BL)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, visible_BLS[:, None], None if cache is None else cache[i])
        return self.norm(x)

    def _one_by_one(self, embeds_BLD: Tensor, positions_BL: Tensor, visible_BLS: Tensor) -> Tensor:
        """Prompts one by one, what pads them left out: the last row sees all real ones."""
        out = torch.zeros_like(embeds_BLD)
        for b, real_L in enumerate(visible_BLS[:, -1]):
            one = slice(b, b + 1)
            out[b, real_L] = self(embeds_BLD[one, real_L], positions_BL[one, real_L])[0]
        return out

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Scores of the next token."""
        if hasattr(self, "lm_head"):
            return self.lm_head(hidden_BLD)
        return F.linear(hidden_BLD, self.embed_tokens.weight)
