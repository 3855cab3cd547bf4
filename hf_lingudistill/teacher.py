"""The frozen teacher: loading, quantisation, and a head over the student's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ._internals import Head, head_of, loaded_by_every_process
from .quantization import choose_kernels, quantization_config

# Added to the teacher's logits of tokens it does not share with the student: e^-100 is nothing beside a real token, and
# finite (-inf gives a NaN divergence), and small enough that reverse KL charges 1 nat for 1 % of student mass on them.
UNSHARED_BIAS = -100.0


@dataclass(frozen=True)
class Teacher:
    """A frozen LM whose head covers the student's vocabulary.

    model: eval mode, no gradient. head: (V_student, H_t) with a bias of -100 on tokens that teacher and student do not
    share. shared_vocab_size: ids below it mean the same token to both. unreadable_token_ids: image placeholders.
    footprint: bytes of weights and buffers that this process holds.
    """

    model: PreTrainedModel
    head: Head
    shared_vocab_size: int
    unreadable_token_ids: tuple[int, ...]
    footprint: int


def load_teacher_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    init_kwargs: dict[str, Any] | None = None,
    quantization: str = "nf4",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the teacher from safetensors, quantised through bitsandbytes where asked for, frozen and in eval mode.

    Args:
        name_or_path: Hub id or folder of a causal LM.
        dtype: the compute dtype, also of everything that is not quantised.
        init_kwargs: further keyword arguments for `from_pretrained`; they win over the ones set here.

    Raises:
        OSError: if there are no such weights, or no safetensors among them (pickles are not loaded).
    """
    kwargs: dict[str, Any] = {
        "revision": revision,
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
        "quantization_config": quantization_config(quantization, dtype),
        **(init_kwargs or {}),
    }
    if kwargs["quantization_config"] is None:
        del kwargs["quantization_config"]
    else:
        kwargs.setdefault("device_map", {"": device})
    with loaded_by_every_process():
        model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    if "quantization_config" not in kwargs and "device_map" not in kwargs:
        model = model.to(device)
    choose_kernels(model)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def prepare_teacher(
    model: PreTrainedModel,
    student: PreTrainedModel,
    *,
    shared_vocab_size: int,
    unreadable_token_ids: tuple[int, ...] = (),
    exact_vocab: bool = False,
) -> Teacher:
    """Freeze `model` and give it a head over the student's vocabulary.

    A VLM has more tokens than its LM. The teacher's (tied or untied) embeddings grow to the student's size by zero rows,
    and the logits of every token that the two do not share get a bias of -100: the softmax over the shared ones is
    unchanged, and student mass on the others is penalised where a shared label is distilled. Padding rows that the teacher
    has beyond the student's vocabulary are left out of the head, or with `exact_vocab` out of the model too: then the head
    is the model's own parameter, which an engine may split and `on_device` may move.
    """
    student_weight: Any = head_of(student).weight
    # ZeRO-3 partitions the weight; its whole shape is kept in `ds_shape`
    student_vocab = getattr(student_weight, "ds_shape", student_weight.shape)[0]
    model.eval()
    model.requires_grad_(False)
    own_vocab = head_of(model).weight.shape[0]
    if own_vocab < student_vocab or (exact_vocab and own_vocab != student_vocab):
        model.resize_token_embeddings(student_vocab, mean_resizing=False)
        embeddings: Any = model.get_input_embeddings()
        for weights in {embeddings.weight, head_of(model).weight}:
            with torch.no_grad():
                weights[own_vocab:] = 0.0
        model.requires_grad_(False)
    head = head_of(model)
    weight = head.weight[:student_vocab] if head.weight.shape[0] > student_vocab else head.weight
    bias = head.bias
    if shared_vocab_size < student_vocab:
        unshared = torch.zeros(student_vocab, device=weight.device, dtype=weight.dtype)
        unshared[shared_vocab_size:] = UNSHARED_BIAS
        bias = unshared if bias is None else bias[:student_vocab] + unshared
    elif bias is not None:
        bias = bias[:student_vocab]
    return Teacher(
        model=model,
        head=Head(weight, bias, head.scale, head.softcap),
        shared_vocab_size=shared_vocab_size,
        unreadable_token_ids=unreadable_token_ids,
        footprint=int(model.get_memory_footprint()),
    )


@contextmanager
def on_device(teacher: Teacher, device: torch.device, *, offload: bool) -> Iterator[Head]:
    """The teacher's weights on `device` inside the context and, with `offload`, in CPU memory after it.

    Yields the head on the device. It stays there for as long as it is referred to, which the loss does until its backward
    pass is over. Needs a teacher prepared with `exact_vocab`.
    """
    if not offload:
        yield teacher.head
        return
    # Not PreTrainedModel.to, which refuses bitsandbytes models whatever is asked of it
    torch.nn.Module.to(teacher.model, device)
    try:
        # An alias: moving the parameter back leaves the memory that this one points to
        yield replace(teacher.head, weight=teacher.head.weight.detach())
    finally:
        torch.nn.Module.to(teacher.model, "cpu")


def compute_dtype_of(student: PreTrainedModel, *, bf16: bool, fp16: bool) -> torch.dtype:
    """The dtype that the student computes in: the autocast dtype where there is one, else that of its weights."""
    if bf16:
        return torch.bfloat16
    if fp16:
        return torch.float16
    return student.dtype
