"""Muon: momentum whose matrix update is replaced by the nearest orthogonal matrix (Jordan et al. 2024).

torch.optim.Muon does its matrix products in bfloat16, which a CPU without bf16 units emulates: there it took 46% of a
training step. This one keeps float32 and batches matrices of equal shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                directions = torch.stack([self._momentum(p, group["momentum"]) for p in params])  # [n,rows,columns]
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5  # a tall matrix moves as far per output
                for p, direction in zip(params, orthogonal(directions), strict=True):
                    p.sub_(direction, alpha=scale)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient."""
        state: dict[str, Any] = self.state[p]
        average = state.setdefault("momentum", torch.zeros_like(p))
        assert p.grad is not None
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """About U V^T of x = U S V^T, for each matrix of [n,rows,columns], by Newton-Schulz: no SVD needed.

    The quintic's coefficients trade exactness (singular values end within 0.7 to 1.2) for a steep start.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x
