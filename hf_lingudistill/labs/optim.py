"""Muon and AdamW for small models that are trained from nothing on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class _Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024) in fp32: momentum, then the nearest orthogonal matrix as the step of a weight matrix.

    It needs about half the tokens that AdamW needs here. torch.optim.Muon computes in bf16, which is slow on the
    processors this demo is for.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = torch.lerp(weight.grad, average, group["momentum"])
                rows, columns = weight.shape
                update = _orthogonal(update) * max(1.0, rows / columns) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards U V^T of the matrix's singular value decomposition; singular values about 1."""
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide.T if matrix.size(0) > matrix.size(1) else wide


class SmallModelOptimizer:
    """Muon for the weight matrices of a model, AdamW for its embeddings, vectors and `extra`; warm-up, then linear to zero.

    Gradients are dropped after each step.
    """

    def __init__(
        self, model: nn.Module, *, muon_lr: float, adamw_lr: float, steps: int, extra: Sequence[nn.Parameter] = ()
    ) -> None:
        named = list(model.named_parameters())
        matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
        self.others = [weight for name, weight in named if weight.ndim != 2 or "embed" in name] + list(extra)
        self.parts: list[torch.optim.Optimizer] = [
            _Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.1),
            torch.optim.AdamW(self.others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
            for optimizer in self.parts
        ]

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer, scheduler in zip(self.parts, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[Any]:
        """Optimizers, then schedules; for `load_state_dict` of one that was made with the same arguments."""
        return [part.state_dict() for part in self.parts] + [part.state_dict() for part in self.schedulers]

    def load_state_dict(self, saved: list[Any]) -> None:
        for part, state in zip(self.parts, saved[: len(self.parts)], strict=True):
            part.load_state_dict(state)
        for schedule, state in zip(self.schedulers, saved[len(self.parts) :], strict=True):
            schedule.load_state_dict(state)
