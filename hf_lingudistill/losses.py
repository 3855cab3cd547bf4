"""The loss, from tensors alone. N distilled positions, V vocabulary entries, H hidden size; losses in nats per token.

No `[N, V]` matrix outlives a chunk: the divergence is TRL's chunked kernel, and the teacher's statistics are taken over
chunks of at most `CHUNK_ELEMENTS` logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._internals import ChunkedDivergenceFunction, Head, maybe_gather_lm_head_ctx

CHUNK_ELEMENTS = 2**24  # logits in memory at once per model: 64 MiB in fp32


@dataclass(frozen=True)
class TeacherOpinion:
    """What the teacher says at N positions, without gradient.

    log_prob: (N,) log-probability of the label in nats. entropy: (N,) in nats. agrees: (N,) bool, whether teacher and
    student have the same most likely token.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    agrees: torch.Tensor


def _logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """(n, H) -> (n, V) in fp32, the matrix product in the autocast dtype where autocast is on."""
    logits = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float() * head.scale
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap is not None else logits


@torch.no_grad()
def teacher_opinion(
    student_hidden: torch.Tensor, student_head: Head, teacher_hidden: torch.Tensor, teacher_head: Head, labels: torch.Tensor
) -> TeacherOpinion:
    """Score the labels with the teacher and compare most likely tokens, chunk by chunk.

    student_hidden: (N, H_s). teacher_hidden: (N, H_t). labels: (N,) token ids. Both heads have the same V.
    """
    vocab = student_head.weight.shape[0]
    step = max(1, CHUNK_ELEMENTS // max(vocab, 1))
    log_probs, entropies, agreements = [], [], []
    with (
        maybe_gather_lm_head_ctx(student_head.weight, student_head.bias),
        maybe_gather_lm_head_ctx(teacher_head.weight, teacher_head.bias),
    ):
        for start in range(0, labels.numel(), step):
            part = slice(start, start + step)
            log_p = torch.log_softmax(_logits(teacher_hidden[part], teacher_head), dim=-1)
            log_probs.append(log_p.gather(1, labels[part, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(dim=-1))
            agreements.append(log_p.argmax(dim=-1) == _logits(student_hidden[part], student_head).argmax(dim=-1))
    return TeacherOpinion(torch.cat(log_probs), torch.cat(entropies), torch.cat(agreements))


def confident_tokens(
    teacher_log_prob: torch.Tensor, student_log_prob: torch.Tensor, margin: float = 0.0
) -> torch.Tensor:
    """(N,) bool: the teacher gives the label at least the student's probability, by `margin` nats.

    Where it does not, the teacher knows less about this token than the student does (it cannot see the image), and its
    distribution would erase what the student has learnt.
    """
    return teacher_log_prob >= student_log_prob + margin


def divergence(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Generalised JSD between the next-token distributions, (N,) nats, differentiable in the student's hidden and head.

    beta: 0 = KL(teacher || student), 1 = KL(student || teacher), between: beta-mixture JSD (TRL's meaning; no factor of
    temperature squared). student_hidden: (N, H_s). teacher_hidden: (N, H_t). Both heads have the same V.
    """
    per_token, _entropy = ChunkedDivergenceFunction.apply(
        student_hidden,
        student_head.weight,
        student_head.bias,
        teacher_hidden.detach(),
        teacher_head.weight.detach(),
        None if teacher_head.bias is None else teacher_head.bias.detach(),
        beta,
        temperature,
        student_head.scale,
        student_head.softcap,
        teacher_head.scale,
        teacher_head.softcap,
    )
    return per_token  # type: ignore[no-any-return]


def combine(
    cross_entropy: torch.Tensor,
    distilled: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    ce_weight: float,
    distill_weight: float,
) -> torch.Tensor:
    """Per-token loss: `ce_weight * CE + distill_weight * KD` at the distilled positions, CE everywhere else.

    cross_entropy: (B, T - 1), zero at ignored positions. distilled: (n,) divergence at (rows, positions), each (n,).
    Returns (B, T - 1); its sum over the number of labels in the *global* batch is the loss.
    """
    weight = torch.ones_like(cross_entropy)
    weight[rows, positions] = ce_weight
    return (weight * cross_entropy).index_put(
        (rows, positions), distill_weight * distilled.to(cross_entropy.dtype), accumulate=True
    )
