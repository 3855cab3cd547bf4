"""What the student's forward leaves for its teacher: keys, values, masks, rotary embeddings.

Recorded inside a registered attention function, after the rotary embedding, together with the arguments that shape visibility, so that
whatever a family does with masks (sliding windows, bidirectional images or prefixes) and positions (M-RoPE, local and global RoPE)
holds for the teacher as well.

Shapes: B rows, T positions, L layers, H_kv key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ._internals import attention_switched, base_attention_function, decoder_of, register_attention
from .mixers import Recorded, mixers_recorded
from .rotary import order_of

_RECORD_PREFIX = "lingudistill_record_"

# Attention functions are looked up by name and get the attention module only: the config object leads to the record.
_RECORDS: dict[int, SharedKV] = {}


@dataclass
class LayerMask:
    """What a layer of the student saw: its mask argument and the keyword arguments that shape visibility."""

    mask: Any
    is_causal: bool
    sliding_window: int | None
    cu_seq_lens: torch.Tensor | None


@dataclass
class SharedKV:
    """What one student forward leaves for the teacher.

    keys, values: layer_idx -> (B, H_kv, T, D), detached, post-RoPE; of the first columns alone where the VLM before lends them. rotary:
    layer type (None where the family has one) -> what the family's rotary module returns: (cos, sin), each (B or 1, T, D_rot), or one
    complex tensor. rotary_orders: in which order (see `rotary.py`). position_ids: (B or 1, T), or
    (axes, B or 1, T). mixed, mixed_documents: what layers without attention write, and what they are told of documents; mixer_layers:
    which these are: see `mixers.py`. inputs_embeds: (B, T, H_s), detached. inputs: what the student's backbone was called with.
    last_hidden_state: (B, T, H_s) with gradient.
    """

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    masks: dict[int, LayerMask] = field(default_factory=dict)
    rotary: dict[str | None, Any] = field(default_factory=dict)
    rotary_orders: dict[str | None, str] = field(default_factory=dict)
    mixed: Recorded = field(default_factory=dict)
    mixed_documents: dict[str, Any] = field(default_factory=dict)
    mixer_layers: list[int] = field(default_factory=list)
    position_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    inputs: dict[str, Any] | None = None
    last_hidden_state: torch.Tensor | None = None
    keep_kv: bool = True
    _documents: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def documents(self, position_ids: torch.Tensor | None, batch_size: int) -> torch.Tensor | None:
        """Where the documents of one packed row begin and the last one ends, (documents + 1,), as flash attention reads it from
        positions that start anew; None where they do not. Looked at once per forward: it is the same in every layer."""
        if position_ids is None or batch_size != 1 or position_ids.ndim != 2 or position_ids.shape[-1] == 1:
            return None
        if self._documents is None or self._documents[0] is not position_ids:
            starts = position_ids[0] == position_ids.min()
            ends = torch.tensor([position_ids.shape[1]], device=position_ids.device)
            boundaries = torch.cat([starts.nonzero().flatten(), ends])
            self._documents = (position_ids, boundaries if len(boundaries) > 2 else None)
        return self._documents[1]

    def release(self) -> None:
        """Drop everything but the last hidden states: it must not live through the backward pass."""
        self.keys.clear()
        self.values.clear()
        self.masks.clear()
        self.rotary.clear()
        self.mixed.clear()
        self.position_ids = self.inputs_embeds = self.inputs = self._documents = None

    def nbytes(self) -> int:
        """Bytes held by the recorded keys and values, and by what other mixers write."""
        kept = (*self.keys.values(), *self.values.values(), *self.mixed.values())
        return sum(t.numel() * t.element_size() for t in kept)


def _as_attended(states: torch.Tensor) -> torch.Tensor:
    """K or V in the dtype that attention computes in: under autocast, RoPE leaves the keys in fp32."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def _recording_attention(base_name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config: Any = module.config
        shared = _RECORDS.get(id(config))
        if shared is not None:
            layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
            if shared.keep_kv:
                # Cast here, once: attention and record share the copy
                key, value = _as_attended(key), _as_attended(value)
                shared.keys[layer_idx], shared.values[layer_idx] = key.detach(), value.detach()
            is_causal = kwargs.get("is_causal")
            boundaries = kwargs.get("cu_seq_lens_q")
            if boundaries is None and attention_mask is None and "flash" in base_name:
                boundaries = shared.documents(kwargs.get("position_ids"), key.shape[0])
            shared.masks[layer_idx] = LayerMask(
                mask=attention_mask,
                is_causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
                sliding_window=kwargs.get("sliding_window"),
                cu_seq_lens=boundaries,
            )
        # Flash kernels read the implementation's name from the config again: they must find their own.
        recording_name, config._attn_implementation = config._attn_implementation, base_name
        try:
            return base_attention_function(base_name, module)(module, query, key, value, attention_mask, **kwargs)
        finally:
            config._attn_implementation = recording_name

    return attention  # type: ignore[no-any-return]


def _record_name(implementation: str) -> str:
    name = _RECORD_PREFIX + implementation
    register_attention(name, _recording_attention(implementation), masks_of=implementation)
    return name


@contextmanager
def recording(student: PreTrainedModel, *, keep_kv: bool = True, keep_inputs: bool = False) -> Iterator[SharedKV]:
    """Record what the student's text backbone computes in the forwards run inside the context.

    The context must end before `backward()`: the recomputation of gradient checkpointing then runs with the attention
    implementation in use before, and records nothing. Everything is undone when the forward raises.

    Args:
        student: the plain VLM (not its PEFT or distributed wrapper).
        keep_kv: keep keys and values. Masks and rotary embeddings are always kept.
        keep_inputs: keep the embeddings that the decoder reads, image features included.

    Raises:
        ValueError: on leaving, if some layer of the text backbone ran no attention that could be recorded.
    """
    decoder = decoder_of(student)
    shared = SharedKV(keep_kv=keep_kv)

    def on_rotary(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
        shared.rotary[layer_type] = output
        shared.position_ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)

    def on_decoder(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shared.inputs_embeds = kwargs["inputs_embeds"].detach()

    def on_backbone(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        shared.last_hidden_state = output[0]

    hooks = [
        decoder.rotary_emb.register_forward_hook(on_rotary, with_kwargs=True),  # type: ignore[union-attr]
        student.base_model.register_forward_hook(on_backbone),
    ]
    if keep_inputs:
        hooks.append(decoder.register_forward_pre_hook(on_decoder, with_kwargs=True))
    try:
        with (
            attention_switched(decoder, _record_name) as configs,
            mixers_recorded(decoder, shared.mixed if keep_kv else None, shared.mixed_documents) as shared.mixer_layers,
        ):
            for config in configs:
                _RECORDS[id(config)] = shared
            try:
                yield shared
            finally:
                for config in configs:
                    _RECORDS.pop(id(config), None)
    finally:
        for hook in hooks:
            hook.remove()
    rotary_emb: Any = decoder.rotary_emb
    for kind, output in shared.rotary.items():
        shared.rotary_orders[kind] = order_of(rotary_emb, kind, lambda given=output: given)
    layers = decoder.config.num_hidden_layers
    missing = [layer for layer in range(layers) if layer not in shared.masks and layer not in shared.mixer_layers]
    if shared.last_hidden_state is not None and missing:
        raise ValueError(
            f"Layers {missing} of {type(student).__name__} produced no keys and values ({layers} layers expected): KV sharing "
            "needs softmax self-attention, or a mixer that it can follow, in every layer. Run `lingudistill check` on the pair."
        )
