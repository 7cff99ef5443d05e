"""SigLIP's head (arXiv:2303.15343): one learned query reads all tokens of an image.

Attribute names equal Hugging Face's, and PyTorch's within `attention`.

Shapes: B images, N tokens, D features.
"""

import mlx.core as mx
from mlx import nn

from ...checkpoints.config import EncoderConfig
from .vit import MLP, Activation, key_mask


class ProbeAttention(nn.Module):
    """Attention of other tokens than those it reads, its three projections in one matrix."""

    def __init__(self, c: EncoderConfig):
        super().__init__()
        D = c.hidden_size
        self.num_heads, self.scale = c.num_attention_heads, (D // c.num_attention_heads) ** -0.5
        self.in_proj_weight, self.in_proj_bias = mx.zeros((3 * D, D)), mx.zeros((3 * D,))
        self.out_proj = nn.Linear(D, D)

    def __call__(self, x_BQD: mx.array, y_BND: mx.array, bias_BN: mx.array | None) -> mx.array:
        """What each of x reads of y, (B, Q, D); `bias_BN` is added to the logits."""
        B, Q, D = x_BQD.shape
        weights, biases = self.in_proj_weight.reshape(3, D, D), self.in_proj_bias.reshape(3, D)
        q_BHQd, k_BHNd, v_BHNd = (
            self._split(x @ weight.T + bias)
            for x, weight, bias in zip((x_BQD, y_BND, y_BND), weights, biases, strict=True)
        )
        read_BHQd = mx.fast.scaled_dot_product_attention(
            q_BHQd, k_BHNd, v_BHNd, scale=self.scale, mask=key_mask(bias_BN, x_BQD.dtype)
        )
        return self.out_proj(read_BHQd.swapaxes(1, 2).reshape(B, Q, D))

    def _split(self, x_BSD: mx.array) -> mx.array:
        B, S, _ = x_BSD.shape
        return x_BSD.reshape(B, S, self.num_heads, -1).swapaxes(1, 2)


class PoolingHead(nn.Module):
    """Tokens (B, N, D) to embeddings (B, D); N may be any number."""

    def __init__(self, c: EncoderConfig, act: Activation):
        super().__init__()
        self.probe = mx.zeros((1, 1, c.hidden_size))
        self.attention = ProbeAttention(c)
        self.layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c, act)

    def __call__(self, x_BND: mx.array, bias_BN: mx.array | None = None) -> mx.array:
        """`bias_BN` is the log of how many tokens each is."""
        B, _, D = x_BND.shape
        x_B1D = self.attention(mx.broadcast_to(self.probe, (B, 1, D)), x_BND, bias_BN)
        return (x_B1D + self.mlp(self.layernorm(x_B1D)))[:, 0]
