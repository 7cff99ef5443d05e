"""Names and shapes of the tensors of one layer, in every family of language models that mlx-lm has.

A function with a family's name takes a text_config of that family, and returns the shapes of all
tensors of a layer by their names.
"""

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]  # by a tensor's name, in one layer or in the model
Sizes = Mapping[str, Any]  # a text_config of ours


def linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def norm(name: str, size: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if bias else {})}


def attention(c: Sizes, qkv_bias: bool, out_bias: bool, out: str = "o_proj") -> Shapes:
    """The four projections; that of the output is called `out`."""
    D, head_dim = c["hidden_size"], c["head_dim"]
    q_rows, kv_rows = (c[f"num_{x}_heads"] * head_dim for x in ("attention", "key_value"))
    return {
        **linear("self_attn.q_proj", q_rows, D, qkv_bias),
        **linear("self_attn.k_proj", kv_rows, D, qkv_bias),
        **linear("self_attn.v_proj", kv_rows, D, qkv_bias),
        **linear(f"self_attn.{out}", D, q_rows, out_bias),
    }


def gated_mlp(name: str, D: int, inner: int, bias: bool = False) -> Shapes:
    """An MLP of three matrices."""
    return {
        **linear(f"{name}.gate_proj", inner, D, bias),
        **linear(f"{name}.up_proj", inner, D, bias),
        **linear(f"{name}.down_proj", D, inner, bias),
    }


def layer_norms(D: int) -> Shapes:
    """The norms before attention and before the MLP."""
    return norm("input_layernorm", D) | norm("post_attention_layernorm", D)


def qk_norms(head_dim: int) -> Shapes:
    return norm("self_attn.q_norm", head_dim) | norm("self_attn.k_norm", head_dim)


def _gated_mlp_and_norms(c: Sizes, bias: bool = False) -> Shapes:
    D = c["hidden_size"]
    return gated_mlp("mlp", D, c["intermediate_size"], bias) | layer_norms(D)


def llama(c: Sizes) -> Shapes:
    bias = c["attention_bias"]
    return attention(c, bias, bias) | _gated_mlp_and_norms(c, c["mlp_bias"])


def qwen2(c: Sizes) -> Shapes:
    return attention(c, True, False) | _gated_mlp_and_norms(c)


def qwen3(c: Sizes) -> Shapes:
    return attention(c, False, False) | qk_norms(c["head_dim"]) | _gated_mlp_and_norms(c)


def phi(c: Sizes) -> Shapes:
    D, inner = c["hidden_size"], c["intermediate_size"]
    return {
        **attention(c, True, True, "dense"),
        **linear("mlp.fc1", inner, D, True),
        **linear("mlp.fc2", D, inner, True),
        **norm("input_layernorm", D, True),
    }


def gemma(c: Sizes) -> Shapes:
    return attention(c, False, False) | _gated_mlp_and_norms(c)


def mamba(c: Sizes) -> Shapes:
    D, inner, state, rank = (
        c[k] for k in ("hidden_size", "intermediate_size", "state_size", "time_step_rank")
    )
    return {
        **linear("mixer.in_proj", 2 * inner, D, c["use_bias"]),
        **_convolution(c, inner),
        **linear("mixer.x_proj", rank + 2 * state, inner),
        **linear("mixer.dt_proj", inner, rank, True),
        "mixer.A_log": (inner, state), "mixer.D": (inner,),
        **linear("mixer.out_proj", D, inner, c["use_bias"]),
        **norm("norm", D),
    }  # fmt: skip


def mamba2(c: Sizes) -> Shapes:
    D, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_heads"]
    convolved = inner + 2 * c["n_groups"] * c["state_size"]
    return {
        **linear("mixer.in_proj", inner + convolved + heads, D, c["use_bias"]),
        **_convolution(c, convolved),
        "mixer.dt_bias": (heads,), "mixer.A_log": (heads,), "mixer.D": (heads,),
        **norm("mixer.norm", inner),
        **linear("mixer.out_proj", D, inner, c["use_bias"]),
        **norm("norm", D),
    }  # fmt: skip


def _convolution(c: Sizes, features: int) -> Shapes:
    shapes: Shapes = {"mixer.conv1d.weight": (features, c["conv_kernel"], 1)}
    return shapes | ({"mixer.conv1d.bias": (features,)} if c["use_conv_bias"] else {})
