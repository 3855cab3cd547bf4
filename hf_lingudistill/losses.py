"""The loss, from tensors alone. N distilled positions, V vocabulary entries, H hidden size; losses in nats per token.

One pass over both heads gives everything: the divergence and its gradient, and what the gate and the metrics need. Logits
exist for a chunk of `CHUNK_ELEMENTS` entries at a time; no `[N, V]` matrix outlives its chunk, except the gradient
of small batches, which then needs no second product in the backward pass. (TRL's `ChunkedDivergenceFunction` computes the
same divergence, but projects both models again in the backward pass and knows neither labels nor the teacher's
probabilities, so that gate and metrics would need products of their own: eight in a step instead of four. It is the oracle
in `tests/test_losses.py`.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ._internals import Head, gathered

CHUNK_ELEMENTS = 2**22  # logits per chunk and model: 16 MiB in fp32
KEEP_ELEMENTS = 2**24  # logit gradients kept for the backward pass: at most 64 MiB


@dataclass(frozen=True)
class Distilled:
    """The divergence at N loss positions, and what the teacher says there.

    divergence: (N,) nats with gradient, zero where not `chosen`. chosen: (N,) bool, the positions that are distilled.
    teacher_log_prob: (N,) log-probability of the label at temperature 1. teacher_entropy: (N,) nats. agrees: (N,) bool,
    whether teacher and student have the same most likely token.
    """

    divergence: torch.Tensor
    chosen: torch.Tensor
    teacher_log_prob: torch.Tensor
    teacher_entropy: torch.Tensor
    agrees: torch.Tensor


def confident_tokens(
    teacher_log_prob: torch.Tensor, student_log_prob: torch.Tensor, margin: float = 0.0
) -> torch.Tensor:
    """(N,) bool: the teacher gives the label at least the student's probability, by `margin` nats.

    Where it does not, the teacher knows less about this token than the student does (it cannot see the image), and its
    distribution would erase what the student has learnt.
    """
    return teacher_log_prob >= student_log_prob + margin


def distil(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    labels: torch.Tensor,
    student_log_prob: torch.Tensor | None = None,
    *,
    margin: float | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> Distilled:
    """Generalised JSD between the next-token distributions, differentiable in the student's hidden states and head.

    Args:
        student_hidden: (N, H_s). teacher_hidden: (N, H_t). Both heads have the same V.
        labels: (N,) token ids.
        student_log_prob: (N,) the student's log-probability of the label; needed with a margin.
        margin: distil only `confident_tokens` with this margin in nats; None = all.
        beta: 0 = KL(teacher || student), 1 = KL(student || teacher), between: beta-mixture JSD (TRL's meaning, without a
            factor of temperature squared).
        temperature: divides both models' logits in the divergence.
    """
    outputs = _Distil.apply(  # type: ignore[no-untyped-call]
        student_hidden,
        student_head.weight,
        student_head.bias,
        teacher_hidden.detach(),
        student_head,
        teacher_head,
        labels,
        student_log_prob,
        margin,
        beta,
        temperature,
    )
    return Distilled(*outputs)


@torch.no_grad()
def divergence(
    student_hidden: torch.Tensor, student_head: Head, teacher_hidden: torch.Tensor, teacher_head: Head
) -> torch.Tensor:
    """KL(teacher || student) in nats, (N,), without gradient."""
    labels = torch.zeros(student_hidden.shape[0], dtype=torch.long, device=student_hidden.device)
    return distil(student_hidden, student_head, teacher_hidden, teacher_head, labels).divergence


@torch.no_grad()
def label_nll(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    """-log p(label) in nats, (N,), in chunks. hidden: (N, H), labels: (N,)."""
    found = [
        torch.nn.functional.cross_entropy(
            _finish(_raw_logits(hidden[rows], head.weight, head.bias), head), labels[rows], reduction="none"
        )
        for rows in _chunks(labels.numel(), head.weight.shape[0])
    ]
    return torch.cat(found)


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _raw_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(n, H) x (V, H) -> (n, V) in fp32; the product runs in the dtype of its inputs."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return logits if bias is None else logits.add_(bias.float())


def _finish(raw: torch.Tensor, head: Head) -> torch.Tensor:
    """Logit scale and soft-capping."""
    scaled = raw if head.scale == 1.0 else raw * head.scale
    return scaled if head.softcap is None else head.softcap * torch.tanh(scaled / head.softcap)


def _divergence_and_gradient(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, V) finished logits -> divergence (n,) and its gradient in the student's finished logits (n, V)."""
    log_s = torch.log_softmax(student_logits / temperature if temperature != 1.0 else student_logits, dim=-1)
    log_t = torch.log_softmax(teacher_logits / temperature if temperature != 1.0 else teacher_logits, dim=-1)
    if beta == 0.0:
        p_t = log_t.exp()
        value = (p_t * (log_t - log_s)).sum(dim=-1)
        gradient = log_s.exp_().sub_(p_t)
    elif beta == 1.0:
        gap = log_s - log_t
        p_s = log_s.exp_()
        value = (p_s * gap).sum(dim=-1)
        gradient = p_s.mul_(gap.sub_(value[:, None]))
    else:
        log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
        p_s = log_s.exp()
        gap = log_s - log_m
        kl_student = (p_s * gap).sum(dim=-1)
        value = beta * (log_t.exp() * (log_t - log_m)).sum(dim=-1) + (1 - beta) * kl_student
        gradient = (1 - beta) * p_s * (gap - kl_student[:, None])
    return value, gradient if temperature == 1.0 else gradient / temperature


class _Distil(torch.autograd.Function):
    """See `distil`. Tensors the gradient flows to come first; heads are passed again for their scaling."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        student_bias: torch.Tensor | None,
        teacher_hidden: torch.Tensor,
        student_head: Head,
        teacher_head: Head,
        labels: torch.Tensor,
        student_log_prob: torch.Tensor | None,
        margin: float | None,
        beta: float,
        temperature: float,
    ) -> tuple[torch.Tensor, ...]:
        count, vocab = student_hidden.shape[0], int(teacher_head.weight.shape[0])
        s_dtype, t_dtype = _compute_dtype(student_hidden), _compute_dtype(teacher_hidden)
        value = torch.zeros(count, device=student_hidden.device)
        log_prob, entropy = torch.empty_like(value), torch.empty_like(value)
        chosen = torch.ones(count, dtype=torch.bool, device=value.device)
        agrees = torch.empty_like(chosen)
        gradients: list[torch.Tensor] = []
        keep = count * vocab <= KEEP_ELEMENTS
        with (
            gathered(student_weight, student_bias),
            gathered(teacher_head.weight, teacher_head.bias),
            torch.autocast(value.device.type, enabled=False),
        ):
            s_weight, t_weight = student_weight.to(s_dtype), teacher_head.weight.to(t_dtype)
            for part in _chunks(count, vocab):
                raw = _raw_logits(student_hidden[part].to(s_dtype), s_weight, student_bias)
                logits = _finish(raw, student_head)
                teacher = _finish(
                    _raw_logits(teacher_hidden[part].to(t_dtype), t_weight, teacher_head.bias), teacher_head
                )
                log_t = torch.log_softmax(teacher, dim=-1)
                log_prob[part] = log_t.gather(1, labels[part, None])[:, 0]
                agrees[part] = log_t.argmax(dim=-1) == logits.argmax(dim=-1)
                entropy[part] = -(log_t.exp() * log_t).sum(dim=-1)
                del log_t
                if margin is not None:
                    assert student_log_prob is not None
                    chosen[part] = confident_tokens(log_prob[part], student_log_prob[part], margin)
                    inside = chosen[part]
                    raw, logits, teacher = raw[inside], logits[inside], teacher[inside]
                part_value, gradient = _divergence_and_gradient(logits, teacher, beta, temperature)
                value[part] = value[part].masked_scatter(chosen[part], part_value)
                if keep:
                    gradients.append(_through_finish(gradient, raw, student_head))
        ctx.save_for_backward(student_hidden, student_weight, student_bias, teacher_hidden, chosen)
        # the logits' gradient of the chosen rows, where it is small; otherwise computed again
        ctx.kept = torch.cat(gradients).to(s_dtype) if keep and gradients else None
        ctx.heads, ctx.beta, ctx.temperature, ctx.dtypes = (
            (student_head, teacher_head),
            beta,
            temperature,
            (s_dtype, t_dtype),
        )
        ctx.mark_non_differentiable(chosen, log_prob, entropy, agrees)
        return value, chosen, log_prob, entropy, agrees

    @staticmethod
    def backward(ctx: Any, grad_value: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        student_hidden, student_weight, student_bias, teacher_hidden, chosen = ctx.saved_tensors
        student_head, teacher_head = ctx.heads
        s_dtype, t_dtype = ctx.dtypes
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = chosen.nonzero().flatten()
        hidden = student_hidden[rows].to(s_dtype)
        upstream = grad_value[rows].float()[:, None]
        grad_rows = torch.zeros(hidden.shape, device=hidden.device)
        grad_weight = torch.zeros(student_weight.shape, device=hidden.device) if needs_weight else None
        grad_bias = torch.zeros(student_bias.shape, device=hidden.device) if needs_bias else None
        with (
            gathered(student_weight, student_bias),
            gathered(teacher_head.weight, teacher_head.bias),
        ):
            s_weight, vocab = student_weight.to(s_dtype), int(teacher_head.weight.shape[0])
            gradient: torch.Tensor
            parts = [slice(0, rows.numel())] if ctx.kept is not None else _chunks(rows.numel(), vocab)
            for part in parts:
                if ctx.kept is not None:
                    gradient = ctx.kept
                else:
                    raw = _raw_logits(hidden[part], s_weight, student_bias)
                    teacher = _raw_logits(
                        teacher_hidden[rows[part]].to(t_dtype), teacher_head.weight.to(t_dtype), teacher_head.bias
                    )
                    _value, gradient = _divergence_and_gradient(
                        _finish(raw, student_head), _finish(teacher, teacher_head), ctx.beta, ctx.temperature
                    )
                    gradient = _through_finish(gradient, raw, student_head)
                gradient = (gradient * upstream[part]).to(s_dtype)
                if needs_hidden:
                    grad_rows[part] = (gradient @ s_weight).float()
                if grad_weight is not None:
                    grad_weight += (gradient.t() @ hidden[part]).float()
                if grad_bias is not None:
                    grad_bias += gradient.float().sum(dim=0)
        ctx.kept = None
        grad_hidden = None
        if needs_hidden:
            grad_hidden = torch.zeros_like(student_hidden).index_copy(0, rows, grad_rows.to(student_hidden.dtype))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(student_weight.dtype),
            None if grad_bias is None else grad_bias.to(student_bias.dtype),
            *(None,) * 8,
        )


def _chunks(count: int, vocab: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(vocab, 1))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _through_finish(gradient: torch.Tensor, raw: torch.Tensor, head: Head) -> torch.Tensor:
    """From the gradient in the finished logits to that in the raw ones."""
    if head.softcap is not None:
        gradient = gradient * (1 - torch.tanh(raw * head.scale / head.softcap).square())
    return gradient if head.scale == 1.0 else gradient * head.scale


def combine(
    cross_entropy: torch.Tensor,
    divergence: torch.Tensor,
    chosen: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    ce_weight: float,
    distill_weight: float,
) -> torch.Tensor:
    """Per-token loss: `ce_weight * CE + distill_weight * divergence` at the chosen positions, CE everywhere else.

    cross_entropy: (B, T - 1), zero at ignored positions. divergence, chosen: (N,) at (rows, positions), each (N,).
    Returns (B, T - 1); its sum over the number of labels in the *global* batch is the loss.
    """
    weight = torch.ones_like(cross_entropy)
    weight[rows, positions] = torch.where(chosen, ce_weight, 1.0).to(weight.dtype)
    added = distill_weight * divergence.to(cross_entropy.dtype)
    return (weight * cross_entropy).index_put((rows, positions), added, accumulate=True)
