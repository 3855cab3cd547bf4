"""The frozen teacher: loading, quantisation, and a head over the student's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from ._internals import Head, head_of, loaded_by_every_process, without_adapter
from .compatibility import CompatibilityReport, is_vlm
from .quantization import choose_kernels, quantization_config
from .queries import Vocabulary
from .text_half import without_tower
from .weights import load_whole


@dataclass(frozen=True)
class Teacher:
    """A frozen LM (or VLM) whose head covers the student's vocabulary.

    model: eval mode, no gradient. head: (V_student, H_t). vocabulary: what the student's tokens mean to it. footprint: bytes of
    weights and buffers that this process holds.
    """

    model: PreTrainedModel
    head: Head
    vocabulary: Vocabulary
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
    sees: bool = False,
) -> PreTrainedModel:
    """Load the teacher from safetensors, quantised through bitsandbytes where asked for, frozen and in eval mode.

    Args:
        name_or_path: Hub id or folder of a causal LM, or of a VLM, whose text half is loaded then.
        dtype: the compute dtype, also of everything that is not quantised.
        init_kwargs: further keyword arguments for `from_pretrained`; they win over the ones set here.
        sees: load all of a VLM.

    Raises:
        OSError: if there are no such weights, or no safetensors among them (pickles are not loaded).
        BadWeights: if some are missing.
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
        config = AutoConfig.from_pretrained(
            name_or_path, revision=kwargs["revision"], trust_remote_code=kwargs["trust_remote_code"]
        )
        model: Any = load_whole(_class_of(config, sees=sees), name_or_path, **kwargs)
    if "quantization_config" not in kwargs and "device_map" not in kwargs:
        model = model.to(device)
    choose_kernels(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.dtype == dtype:
            tensor.data = tensor.data.clone()  # not a view of the mapped file, all of which would count as memory
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _class_of(config: PreTrainedConfig, *, sees: bool) -> Any:
    """What loads a teacher of this config."""
    if not is_vlm(config):
        return AutoModelForCausalLM
    if sees:
        return AutoModelForImageTextToText
    vlm: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return without_tower(vlm)


def vocabulary_of(student: PreTrainedModel, compatibility: CompatibilityReport) -> Vocabulary:
    """What the student's tokens mean to the teacher, by the report on the pair."""
    # Of the head: Molmo 2 embeds more tokens than it can say. Not by the weight's shape, which ZeRO-3 and bitsandbytes change
    head, embeddings = map(without_adapter, (student.get_output_embeddings(), student.get_input_embeddings()))
    return Vocabulary(
        size=int(getattr(head, "out_features", None) or embeddings.num_embeddings),
        shared_size=compatibility.shared_vocab_size,
        unreadable=compatibility.image_token_ids,
        aliases=compatibility.aliases,
    )


def prepare_teacher(model: PreTrainedModel, vocabulary: Vocabulary, *, exact_vocab: bool = False) -> Teacher:
    """Freeze `model` and give it a head over the student's vocabulary.

    A VLM has more tokens than its LM. The teacher's (tied or untied) embeddings grow to the student's size by zero rows,
    and the logits of every token that the two do not share are lowered by 100: the softmax over the shared ones is
    unchanged, and student mass on the others is penalised where a shared label is distilled. Padding rows that the teacher
    has beyond the student's vocabulary are left out of the head, or with `exact_vocab` out of the model too: then the head
    is the model's own parameter, which an engine may split and `on_device` may move.
    """
    size = vocabulary.size
    model.eval()
    model.requires_grad_(False)
    own_weight = head_of(model).weight
    if own_weight is None:
        raise ValueError(
            f"The teacher's head ({type(model.get_output_embeddings()).__name__}) is quantised or carries an adapter: the divergence "
            "needs it as one plain matrix. Leave lm_head out of the quantisation, and merge adapters."
        )
    own_vocab = own_weight.shape[0]
    if own_vocab < size or (exact_vocab and own_vocab != size):
        model.resize_token_embeddings(size, mean_resizing=False)
        embeddings: Any = model.get_input_embeddings()
        for weights in {embeddings.weight, model.get_output_embeddings().weight}:
            with torch.no_grad():
                weights[own_vocab:] = 0.0
        model.requires_grad_(False)
    head = head_of(model)
    assert head.weight is not None
    unshared = vocabulary.unshared()
    return Teacher(
        model=model,
        head=replace(
            head,
            weight=head.weight[:size] if head.weight.shape[0] > size else head.weight,
            bias=None if head.bias is None else head.bias[:size],
            unshared=torch.tensor(unshared, device=head.weight.device) if unshared else None,
            moved=vocabulary.aliases,
        ),
        vocabulary=vocabulary,
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
        assert teacher.head.weight is not None
        yield replace(teacher.head, weight=teacher.head.weight.detach())
    finally:
        torch.nn.Module.to(teacher.model, "cpu")


def head_alone(teacher: Teacher, device: torch.device, *, offload: bool) -> Teacher:
    """The teacher without its weights, but for the head: of the model, nothing is left but its class and config. For one that need
    not answer any more; whoever else holds the model still has it."""
    model = teacher.model
    with torch.device("meta"):
        shell: Any = type(model)(model.config)
    with on_device(teacher, device, offload=offload) as head:
        head = replace(head, weight=head.matrix.detach())
    kept = [t for t in (head.weight, head.bias) if t is not None]
    return replace(
        teacher,
        model=shell.to(model.dtype).eval(),
        head=head,
        footprint=sum(t.numel() * t.element_size() for t in kept),
    )


def compute_dtype_of(student: PreTrainedModel, *, bf16: bool, fp16: bool) -> torch.dtype:
    """The dtype that the student computes in: the autocast dtype where there is one, else that of its weights."""
    if bf16:
        return torch.bfloat16
    if fp16:
        return torch.float16
    return student.dtype
