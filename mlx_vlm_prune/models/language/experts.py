"""A mixture of experts: every token goes through the few of E networks that its router chooses.

MiniMind2 takes two of four and adds a shared one that reads all; MiniMind-3 takes one of four.

Shapes: R tokens, D features, I inner features, E experts, k chosen for each token.
"""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from ...machine.hardware import on_cpu

GATHERED = 16  # up to so many rows the experts' weights are gathered, on the device


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SiLU of the gate times x (arXiv:2002.05202), in one pass over memory."""
    return nn.silu(gate) * x


class ExpertLinear(nn.Module):
    """The matrices (E, out, in) of all experts, without biases."""

    def __init__(self, experts: int, dims: int, out: int):
        super().__init__()
        self.weight = mx.zeros((experts, out, dims))

    def __call__(self, x_R1D: mx.array, expert_R: mx.array, is_sorted: bool = False) -> mx.array:
        """Each row through the matrix of its own expert."""
        weight = self.weight.swapaxes(1, 2)
        return mx.gather_mm(x_R1D, weight, rhs_indices=expert_R, sorted_indices=is_sorted)

    def one_expert(self, x_RD: mx.array, expert: int) -> mx.array:
        """All rows through the matrix of one expert."""
        return x_RD @ self.weight[expert].T

    def to_lora(self, r: int, dropout: float, scale: float) -> nn.Module:
        """With an adapter for each expert; called by mlx-lm's tuner."""
        return LoRAExperts(self, self.weight.shape[2], r, dropout, scale)

    def to_quantized(self, group_size: int, bits: int, mode: str = "affine", **_: Any) -> nn.Module:
        """The same in fewer bits; called by nn.quantize."""
        quantized = QuantizedExpertLinear(group_size, bits, mode)
        quantized.weight, quantized.scales, *biases = mx.quantize(self.weight, **quantized.format)
        if biases:
            quantized.biases = biases[0]
        return quantized


class QuantizedExpertLinear(nn.Module):
    """The matrices of all experts in few bits, with a scale for each group of inputs."""

    def __init__(self, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight = self.scales = mx.zeros(0)
        self.freeze()

    def to_lora(self, r: int, dropout: float, scale: float) -> nn.Module:
        """With an adapter for each expert; called by mlx-lm's tuner."""
        return LoRAExperts(self, self.scales.shape[2] * self.group_size, r, dropout, scale)

    @property
    def format(self) -> dict[str, Any]:
        """As MLX's quantized products take it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __call__(self, x_R1D: mx.array, expert_R: mx.array, is_sorted: bool = False) -> mx.array:
        options = {**self.format, "rhs_indices": expert_R, "sorted_indices": is_sorted}
        return mx.gather_qmm(x_R1D, self.weight, self.scales, self.get("biases"), **options)

    def one_expert(self, x_RD: mx.array, expert: int) -> mx.array:
        biases = self.get("biases")
        bias = None if biases is None else biases[expert]
        weight, scale = self.weight[expert], self.scales[expert]
        return mx.quantized_matmul(x_RD, weight, scale, bias, **self.format)


class LoRAExperts(nn.Module):
    """LoRA of all experts' matrices: mlx-lm's LoRASwitchLinear, for matrices called as ours are."""

    def __init__(self, linear: nn.Module, dims: int, rank: int, dropout: float, scale: float):
        super().__init__()
        experts, out, _ = linear.weight.shape
        bound = dims**-0.5
        self.linear, self.dropout, self.scale = linear, nn.Dropout(dropout), scale
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, dims))
        self.lora_b = mx.zeros((experts, out, rank))

    def __call__(self, x_R1D: mx.array, expert_R: mx.array) -> mx.array:
        z = mx.gather_mm(self.dropout(x_R1D), self.lora_a.swapaxes(1, 2), rhs_indices=expert_R)
        z = mx.gather_mm(z, self.lora_b.swapaxes(1, 2), rhs_indices=expert_R)
        return self.linear(x_R1D, expert_R) + (self.scale * z).astype(x_R1D.dtype)

    def one_expert(self, x_RD: mx.array, expert: int) -> mx.array:
        z = self.dropout(x_RD) @ self.lora_a[expert].T @ self.lora_b[expert].T
        return self.linear.one_expert(x_RD, expert) + (self.scale * z).astype(x_RD.dtype)

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The matrices with their adapters; always full ones."""
        base, fused = self.linear, ExpertLinear(1, 1, 1)
        weight = base.weight
        if "scales" in base:
            weight = mx.dequantize(weight, base.scales, base.get("biases"), **base.format)
        fused.weight = weight + (self.scale * self.lora_b @ self.lora_a).astype(weight.dtype)
        return fused


class Experts(nn.Module):
    """SwiGLU networks (arXiv:2002.05202), all of one size."""

    def __init__(self, experts: int, dims: int, inner: int):
        super().__init__()
        self.gate_proj = ExpertLinear(experts, dims, inner)
        self.up_proj = ExpertLinear(experts, dims, inner)
        self.down_proj = ExpertLinear(experts, inner, dims)

    def __call__(self, x_RD: mx.array, expert_R: mx.array) -> mx.array:
        """Row r through expert `expert_R[r]`."""
        if len(x_RD) <= GATHERED:
            return self.gathered(x_RD, expert_R)
        if not on_cpu():
            order_R = mx.argsort(expert_R)
            y_RD = self.gathered(x_RD[order_R], expert_R[order_R], is_sorted=True)
            return y_RD[mx.argsort(order_R)]
        # Of many rows, those of one expert make one product: on a CPU four to six times as fast.
        chosen = np.array(expert_R).tolist()
        rows = [[r for r, e in enumerate(chosen) if e == expert] for expert in sorted(set(chosen))]
        order = [r for group in rows for r in group]
        parts = [self.one_expert(x_RD[mx.array(group)], chosen[group[0]]) for group in rows]
        return mx.concatenate(parts)[mx.argsort(mx.array(order))]

    def gathered(self, x_RD: mx.array, expert_R: mx.array, is_sorted: bool = False) -> mx.array:
        """The same, where nothing is read on the host; `is_sorted` says that experts ascend."""
        x_R1D = x_RD[:, None]
        gate_R1I = self.gate_proj(x_R1D, expert_R, is_sorted)
        inner = swiglu(gate_R1I, self.up_proj(x_R1D, expert_R, is_sorted))
        return self.down_proj(inner, expert_R, is_sorted)[:, 0]

    def one_expert(self, x_RD: mx.array, expert: int) -> mx.array:
        inner = swiglu(
            self.gate_proj.one_expert(x_RD, expert), self.up_proj.one_expert(x_RD, expert)
        )
        return self.down_proj.one_expert(inner, expert)


class MixtureOfExperts(nn.Module):
    """What stands in place of the MLP: a router (`gate`), its experts, and shared ones."""

    def __init__(self, dims: int, inner: int, experts: int, chosen: int, shared: list[nn.Module]):
        super().__init__()
        self.chosen = chosen
        self.gate = nn.Linear(dims, experts, bias=False)
        self.experts = Experts(experts, dims, inner)
        if shared:
            self.shared_experts = shared

    def __call__(self, x_BLD: mx.array) -> mx.array:
        """The chosen experts' answers, weighted by the router's shares, which sum to one."""
        x_RD = x_BLD.reshape(-1, x_BLD.shape[-1])
        share_RE = mx.softmax(self.gate(x_RD).astype(mx.float32), axis=-1)
        order_RE = mx.argsort(-mx.stop_gradient(share_RE), axis=-1)  # stable: ties to the lower
        expert_Rk = order_RE[:, : self.chosen]
        share_Rk = mx.take_along_axis(share_RE, expert_Rk, axis=-1)
        share_Rk = share_Rk / share_Rk.sum(axis=-1, keepdims=True)
        each = mx.repeat(x_RD, self.chosen, axis=0)
        answer = self.experts(each, expert_Rk.flatten()).reshape(*expert_Rk.shape, -1)
        y_RD = (answer * share_Rk[..., None].astype(answer.dtype)).sum(axis=1)
        for expert in self.get("shared_experts", []):
            y_RD = y_RD + expert(x_RD)
        return y_RD.reshape(x_BLD.shape)


def stacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Weights in which the experts' matrices, numbered one by one in a file, are one array."""
    apart = {name: name.split(".experts.") for name in weights if ".mlp.experts." in name}
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for name, (layer, rest) in apart.items():
        number, _, parameter = rest.partition(".")
        groups.setdefault((layer, parameter), {})[int(number)] = name
    joined = {name: array for name, array in weights.items() if name not in apart}
    for (layer, parameter), numbered in groups.items():
        arrays = [weights[numbered[e]] for e in sorted(numbered)]
        joined[f"{layer}.experts.{parameter}"] = mx.stack(arrays)
    return joined


def unstacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Weights as in a file: the experts' matrices one by one."""
    apart: dict[str, mx.array] = {}
    for name, array in weights.items():
        layer, of_experts, parameter = name.partition(".mlp.experts.")
        if of_experts:
            apart |= {f"{layer}{of_experts}{e}.{parameter}": x for e, x in enumerate(array)}
        else:
            apart[name] = array
    return apart
