"""The plan and the pass by their plainest arguments, for tests that look at nothing else."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lingudistill import queries
from hf_lingudistill.queries import QueryPlan, Vocabulary
from hf_lingudistill.sharing import MODES, sharing
from hf_lingudistill.student_kv import SharedKV
from hf_lingudistill.teacher import Teacher
from hf_lingudistill.teacher import prepare_teacher as prepare

KV_SHARING_MODES = tuple(name for name, mode in MODES.items() if not mode.sees)  # those that take an LM


def plan_queries(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    distill: torch.Tensor | None = None,
    *,
    kv_sharing: str,
    shared_vocab_size: int,
    unreadable_token_ids: tuple[int, ...] = (),
    attention_mask: torch.Tensor | None = None,
    at_least_one: bool = False,
) -> QueryPlan:
    return queries.plan_queries(
        input_ids,
        labels,
        distill,
        sharing=sharing(kv_sharing),
        vocabulary=Vocabulary(1 << 20, shared_vocab_size, unreadable_token_ids),
        attention_mask=attention_mask,
        at_least_one=at_least_one,
    )


def teacher_pass(teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> torch.Tensor:
    """(N, H_t), in the mode that the plan was made for."""
    return plan.sharing.teacher_pass(teacher, shared, plan)


def prepare_teacher(
    model: PreTrainedModel,
    student: Any,
    *,
    shared_vocab_size: int,
    unreadable_token_ids: tuple[int, ...] = (),
    exact_vocab: bool = False,
) -> Teacher:
    size = student.get_output_embeddings().weight.shape[0]
    return prepare(model, Vocabulary(size, shared_vocab_size, unreadable_token_ids), exact_vocab=exact_vocab)
