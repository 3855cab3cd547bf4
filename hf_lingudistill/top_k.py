"""A distribution kept as its k most likely tokens, all others together as one event; and the divergence from it.

With r the probability outside of the k, KL(p || q) exceeds the divergence of these k + 1 events by r * KL(p || q, both given that the token
is outside), which is never negative. Its gradient takes what is outside for spread as the student spreads it: over all logits together
it is off by at most 2 r.

Shapes: n positions, V vocabulary entries; nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class TopK:
    """ids: (n, k) token ids. log_p: (n, k) fp32. log_rest: (n,) fp32, of all others together; -inf where there are none."""

    ids: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor

    def __getitem__(self, part: slice) -> TopK:
        return TopK(self.ids[part], self.log_p[part], self.log_rest[part])

    def to(self, device: Any, non_blocking: bool = False) -> TopK:
        return TopK(*(t.to(device, non_blocking=non_blocking) for t in (self.ids, self.log_p, self.log_rest)))

    def pin_memory(self) -> TopK:
        return TopK(*(t.pin_memory() for t in (self.ids, self.log_p, self.log_rest)))


def top_k(log_p: torch.Tensor, k: int) -> TopK:
    """What is kept of (n, V) log-probabilities."""
    kept, ids = log_p.topk(min(k, log_p.shape[1]), dim=-1)
    return TopK(ids, kept, log_p.scatter(1, ids, -torch.inf).logsumexp(-1))


def divergence_from(kept: TopK, log_s: torch.Tensor, p_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(kept || student) over k + 1 events, (n,), and its gradient in the student's logits, (n, V).

    log_s, p_s: (n, V) log-probabilities and probabilities of the student.
    """
    p, rest = kept.log_p.exp(), kept.log_rest.exp()
    outside = p_s.scatter(1, kept.ids, 0.0)
    q_rest = outside.sum(-1).clamp_min_(
        _TINY
    )  # summed, not 1 - the k: that would leave rounding where little is outside
    value = (p * (kept.log_p - log_s.gather(1, kept.ids))).sum(-1)
    value += torch.where(rest > 0, rest * (kept.log_rest - q_rest.log()), 0.0)
    gradient = outside.mul_((1 - rest / q_rest)[:, None]).scatter_(1, kept.ids, p_s.gather(1, kept.ids) - p)
    return value, gradient
