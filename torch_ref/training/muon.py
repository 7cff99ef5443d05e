"""Muon for CPUs: torch's, but for its matrix products, which are in float32.

torch.optim.Muon multiplies in bfloat16. A CPU without instructions for it is slow at that: on one
core of an AMD EPYC with AVX2, 1.2 GFLOP/s where float32 has 49.
"""

from math import sqrt
from typing import Any

import torch

STEADY = 0.2  # times the root of the longer side, so that a step is as long as one of AdamW


class Float32Muon(torch.optim.Muon):
    """Muon (arXiv:2502.16982) with steps as long as AdamW's. The state is torch.optim.Muon's."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; a closure is not supported. Matrices of one shape are multiplied together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), parameters in by_shape.items():
                ahead = torch.stack([self._ahead(p, group["momentum"]) for p in parameters])
                updates = orthogonal(
                    ahead, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                for p, update in zip(parameters, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * STEADY * sqrt(max(rows, columns)))

    def _ahead(self, p: torch.Tensor, momentum: float) -> torch.Tensor:
        """The gradient with its running mean, as Nesterov has it."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        mean: torch.Tensor = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)


def orthogonal(
    grad: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Matrices with the singular vectors of `grad`, (…, rows, columns), and singular values near 1,
    by steps of Newton and Schulz: X becomes a X + b (X X') X + c (X X')² X, where a, b, c are the
    coefficients.
    """
    a, b, c = coefficients
    x = grad / grad.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
