"""Muon where bfloat16 is multiplied slowly.

torch.optim.Muon does its matrix products in bfloat16. A processor without instructions for it does them in a plain loop: 1
GFLOP/s beside 88 in float32 (AMD EPYC with AVX2), which made a training step of the small model four times as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """torch.optim.Muon with its products in float32; rule, settings and state are the same."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step: momentum, orthogonalised, scaled by the square root of rows / columns where there are more rows."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                towards = parameter.grad.lerp(state["momentum_buffer"], group["momentum"])  # Nesterov's
                direction = orthogonal(towards, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Push a matrix's singular values towards 1 by Newton-Schulz iterations (Jordan et al. 2024).

    Args:
      matrix: (R, C) float32.
      coefficients: a, b and c of the polynomial a X + b XX'X + c (XX')^2 X.
      steps: of the iteration.
      eps: least norm that is divided by.
    Returns:
      (R, C) float32.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


def build_muon(groups: Iterable[dict[str, Any]], device: torch.device, **settings: float) -> torch.optim.Muon:
    """Return torch's Muon, or the one in float32 where the device has no fast products in bfloat16."""
    slow = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (Float32Muon if slow else torch.optim.Muon)(groups, **settings)
