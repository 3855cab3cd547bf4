"""Keys, values and hidden states of a student and of its original at the same tokens, and how far apart they are.

B rows, T positions, P queries, L layers, H_kv key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..._internals import attention_switched, decoder_of
from ...queries import QueryPlan
from ...student_kv import SharedKV, recording

STATES = ("keys", "values", "hidden")
LayerOutputs = dict[int, torch.Tensor]


@contextmanager
def layer_outputs(model: PreTrainedModel) -> Iterator[LayerOutputs]:
    """layer -> (B, T or Q, H), what each decoder layer hands on in the forward inside the context."""
    found: LayerOutputs = {}

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    layers: Any = decoder_of(model).layers
    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording_own(teacher: PreTrainedModel) -> Iterator[SharedKV]:
    """Record the keys and values that the teacher itself computes inside `teacher_pass`.

    The pass switches the decoder's attention to the student's K/V. The record has to stand around that one, so it begins when the
    decoder is called.
    """
    own = SharedKV()
    decoder = decoder_of(teacher)
    record = ExitStack()

    def begin(*_: Any) -> None:
        recorded = record.enter_context(recording(teacher))
        own.keys, own.values = recorded.keys, recorded.values

    def end(*_: Any) -> None:
        record.close()

    with ExitStack() as stack:
        # When the forward raises, `record` closes after the pass has switched back, and would switch to the pass's attention again
        stack.enter_context(attention_switched(decoder, lambda implementation: implementation))
        stack.enter_context(record)
        stack.callback(decoder.register_forward_pre_hook(begin).remove)
        stack.callback(decoder.register_forward_hook(end).remove)
        yield own


def state_drift(
    shared: SharedKV, student_hidden: LayerOutputs, own: SharedKV, teacher_hidden: LayerOutputs, plan: QueryPlan
) -> torch.Tensor:
    """(L, 3, 2): per layer and state, relative distance and cosine, averaged over the P tokens that the teacher computed. NaN for keys and
    values of a layer that has none.

    Averaged per token, not over all numbers at once: in many LMs the first token's hidden state is far larger than the others', and
    would hide them.
    """

    def of_student(states: torch.Tensor) -> torch.Tensor:  # (B, T, ...) -> (P, W)
        return states[plan.rows, plan.positions].flatten(1)

    def of_teacher(states: torch.Tensor) -> torch.Tensor:  # (1, P, ...) -> (P, W)
        return states[0].flatten(1)

    layers = []
    for layer in range(len(student_hidden)):
        pairs = [(student_hidden[layer], teacher_hidden[layer])]
        if layer in shared.keys:  # (B, H_kv, T, D) -> (B, T, H_kv, D)
            kept = (shared.keys, own.keys), (shared.values, own.values)
            pairs = [*((a[layer].transpose(1, 2), b[layer].transpose(1, 2)) for a, b in kept), *pairs]
        found = [_compare(of_student(ours), of_teacher(theirs)) for ours, theirs in pairs]
        missing = [torch.full_like(found[0], torch.nan)] * (
            3 - len(found)
        )  # a layer without softmax attention has none
        layers.append(torch.stack([*missing, *found]))
    return torch.stack(layers).cpu()


def _compare(student: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """(P, W) and (P, W) -> (2,): means over positions of ||s - o|| / ||o|| and of their cosine; NaN if the widths differ."""
    if student.shape != original.shape:
        return torch.full((2,), torch.nan, device=student.device)
    student, original = student.float(), original.float()
    norm = original.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    distance = (student - original).norm(dim=1) / norm
    return torch.stack([distance.mean(), F.cosine_similarity(student, original, dim=1).mean()])
