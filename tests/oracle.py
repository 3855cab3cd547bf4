"""What the teacher pass must compute, written a second time, the slow and plain way, without hf_lingudistill.

The teacher runs over the *full* length of every row (image placeholders included, whatever it makes of them), and a
`Cache` whose `update()` picks, position by position, the teacher's own K/V or the student's. Rotary embeddings come
from a hook on the student, masks are built by hand from each family's rules. Nothing here depends on attention
functions, on gathering queries, or on a recorded mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers renames it; older releases know the second name alone
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

Inputs = dict[str, torch.Tensor]
Rotary = dict[str | None, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StudentKV:
    """keys, values: per layer (B, H_kv, T, D), post-RoPE. rotary: (cos, sin) by layer type (None if there is one)."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    last_hidden_state: torch.Tensor
    rotary: Rotary


class SubstitutingCache(DynamicCache):
    """Gives each layer the teacher's own K/V where `own`, the student's elsewhere.

    own: (B, T) bool. student: see `StudentKV`.
    """

    def __init__(self, own: torch.Tensor, student: StudentKV) -> None:
        super().__init__()
        self.own = own[:, None, :, None]
        self.student = student

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.student.keys[layer_idx], self.student.values[layer_idx]
        if key_states.shape != keys.shape:
            raise ValueError(
                f"Layer {layer_idx}: teacher K is {tuple(key_states.shape)}, student's {tuple(keys.shape)}."
            )
        return torch.where(self.own, key_states, keys), torch.where(self.own, value_states, values)


@torch.no_grad()
def student_kv(student: PreTrainedModel, inputs: Inputs) -> StudentKV:
    """Run the student with `use_cache=True` and read the cache.

    The cache is made here, without a config: the default one keeps only the last `sliding_window - 1` positions of
    sliding layers.
    """
    rotary: Rotary = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rotary[_layer_type(args, kwargs)] = output

    hook = student.get_decoder().rotary_emb.register_forward_hook(keep, with_kwargs=True)
    try:
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        cache = DynamicCache()
        output = student.base_model(**inputs, use_cache=True, **{CACHE: cache})
    finally:
        hook.remove()
    layers = cache.layers
    return StudentKV(
        keys=[layer.keys for layer in layers],
        values=[layer.values for layer in layers],
        last_hidden_state=output.last_hidden_state,
        rotary=rotary,
    )


@torch.no_grad()
def student_inputs(student: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """(B, T, H_s): what the student's decoder reads, image features included."""
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["inputs_embeds"])

    hook = student.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        student.base_model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
    finally:
        hook.remove()
    return found[0]


def readable_tokens(inputs: Inputs, *, unreadable_token_ids: tuple[int, ...], shared_vocab_size: int) -> torch.Tensor:
    """(B, T) bool: real tokens that the plain LM knows and that are not image placeholders."""
    ids = inputs["input_ids"]
    placeholder = torch.isin(ids, torch.tensor(unreadable_token_ids))
    return inputs["attention_mask"].bool() & (ids < shared_vocab_size) & ~placeholder


def own_positions(inputs: Inputs, mode: str, readable: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: where the teacher uses its own K/V."""
    if mode == "full":
        return torch.zeros_like(readable)
    if mode == "prompt":
        return readable & (inputs["labels"] != -100)
    if mode == "vision":
        return readable
    if mode == "inputs":
        return torch.ones_like(readable)
    raise ValueError(f"mode must be full, prompt or vision, got {mode!r}.")


def loss_mask(inputs: Inputs, readable: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: positions t that predict a response token, both tokens readable."""
    mask = torch.zeros_like(readable)
    mask[:, :-1] = (inputs["labels"][:, 1:] != -100) & readable[:, :-1] & readable[:, 1:]
    return mask


def visible(student: PreTrainedModel, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Who sees whom, by layer type: (B, T, T) bool, [b, q, k]. Built from the family's rules, not from its code."""
    real = inputs["attention_mask"].bool()
    length = real.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = (key <= query).expand(real.shape[0], -1, -1)
    model_type = student.config.model_type
    has_types = "token_type_ids" in inputs  # text-only batches come without
    if has_types and model_type == "paligemma":  # image and prompt see each other in both directions
        prefix = inputs["token_type_ids"] == 0
        seen = seen | (prefix[:, :, None] & prefix[:, None, :])
    elif has_types and model_type == "gemma3":  # the tokens of one image see each other in both directions
        block = _image_blocks(inputs["token_type_ids"] == 1)
        seen = seen | ((block[:, :, None] == block[:, None, :]) & (block[:, :, None] > 0))
    seen = seen & real[:, None, :]
    if model_type == "gemma3":
        window = student.config.text_config.sliding_window
        return {"full_attention": seen, "sliding_attention": seen & (key > query - window)}
    return {"full_attention": seen}


def _image_blocks(is_image: torch.Tensor) -> torch.Tensor:
    """(B, T) long: 1, 2, ... in the row's first, second, ... run of image tokens, 0 elsewhere."""
    blocks = torch.zeros_like(is_image, dtype=torch.long)
    for row in range(is_image.shape[0]):
        count = 0
        for position in range(is_image.shape[1]):
            if is_image[row, position]:
                count += position == 0 or not bool(is_image[row, position - 1])
                blocks[row, position] = count
    return blocks


@torch.no_grad()
def oracle_hidden(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    inputs: Inputs,
    mode: str,
    *,
    unreadable_token_ids: tuple[int, ...],
    shared_vocab_size: int,
) -> torch.Tensor:
    """The teacher's last hidden state at every position of every row, (B, T, H_t).

    Meaningful at readable positions only. In mode `none`, unreadable positions and padding are NaN: the teacher never
    sees them.
    """
    readable = readable_tokens(inputs, unreadable_token_ids=unreadable_token_ids, shared_vocab_size=shared_vocab_size)
    if mode == "none":
        return _text_only_hidden(teacher, inputs["input_ids"], readable)

    shared = student_kv(student, inputs)
    # The teacher may not have an embedding for a token it cannot read. What stands there does not matter: its K/V is
    # replaced by the student's.
    embeddings = teacher.get_input_embeddings()(inputs["input_ids"].masked_fill(~readable, 0))
    if mode == "inputs":
        embeddings = torch.where(readable[..., None], embeddings, student_inputs(student, inputs))
    masks: Any = {
        kind: torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
        for kind, seen in visible(student, inputs).items()
    }
    if len(masks) == 1:
        masks = masks["full_attention"]
    with _rotary_from(teacher, shared.rotary):
        output = teacher.model(
            inputs_embeds=embeddings,
            attention_mask=masks,
            **{CACHE: SubstitutingCache(own_positions(inputs, mode, readable), shared)},
            use_cache=True,
        )
    return output.last_hidden_state


def _text_only_hidden(teacher: PreTrainedModel, input_ids: torch.Tensor, readable: torch.Tensor) -> torch.Tensor:
    hidden = torch.full((*input_ids.shape, teacher.config.hidden_size), torch.nan)
    for row in range(input_ids.shape[0]):
        text = input_ids[row, readable[row]][None]
        hidden[row, readable[row]] = teacher.model(input_ids=text).last_hidden_state[0]
    return hidden


@contextmanager
def _rotary_from(teacher: PreTrainedModel, rotary: Rotary) -> Iterator[None]:
    """Make the teacher rotate its queries and keys with the student's cos/sin."""

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return rotary[_layer_type(args, kwargs)]

    hook = teacher.model.rotary_emb.register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _layer_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Gemma3 calls its rotary embedding once per layer type, as the third argument."""
    layer_type: str | None = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
    return layer_type
