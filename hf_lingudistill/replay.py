"""The teacher's pass: its queries attend to the student's keys and values, under the student's masks and rotary embeddings.

Q queries of all rows run through the layers as one row of Q tokens, so that a short row does not pay for a long one beside it.
Only attention needs rows: there they are unpacked to (R, W), and packed again after it.

Shapes: as in `queries.py`; H heads, H_kv key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ._internals import attention_switched, decoder_of, register_attention
from .documents import decoder_keeps_apart
from .mixers import mixers_of, mixers_replayed
from .queries import QueryPlan
from .rotary import order_of, reordered
from .student_kv import LayerMask, SharedKV

_REPLAY = "lingudistill_replay"
_REPLAYS: dict[int, _Replay] = {}  # by the id of the config that an attention module carries


@dataclass
class _Replay:
    """What the teacher's attention function needs during one pass.

    shared: the record of the student's forward. plan: of the same batch. own_rows, own_positions: where the teacher's own keys and
    values belong, as (asked row, position), each of the length of `QueryPlan.own`. masks: additive mask rows, by the student's mask.
    """

    shared: SharedKV
    plan: QueryPlan
    own_rows: torch.Tensor = field(init=False)
    own_positions: torch.Tensor = field(init=False)
    masks: dict[tuple[int, int | None, int], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plan = self.plan
        own = plan.own
        width = max(plan.slots.shape[1], 1)
        self.own_rows = torch.div(plan.flat[own], width, rounding_mode="floor")
        self.own_positions = plan.positions[own]

    def states(
        self, recorded: tuple[torch.Tensor, torch.Tensor] | None, own: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the queries see them: the student's, with the teacher's own written over them.

        recorded: each (B, H_kv, T, D), or of the first columns alone; None where nothing of the student's is read. own: each
        (1, H_kv, Q, D). -> each (R, H_kv, T, D).
        """
        if not self.plan.own.numel():
            assert recorded is not None
            keys, values = (self._whole(self._asked(states).to(own[0].dtype)) for states in recorded)
            return keys, values
        if own[0].shape[3] != own[1].shape[3]:  # latent attention: keys are wider than values
            keys, values = (self._with_own([mine], recorded and [recorded[i]]) for i, mine in enumerate(own))
            return keys, values
        both = self._with_own(list(own), recorded and list(recorded))
        heads = own[0].shape[1]
        return both[:, :heads], both[:, heads:]

    def _with_own(self, own: list[torch.Tensor], recorded: list[torch.Tensor] | None) -> torch.Tensor:
        """Keys and values side by side, so that both are copied and written to at once: the recorded ones are those that the
        student's backward pass needs. -> (R, len(own) x H_kv, T, D)."""
        plan = self.plan
        mine = torch.cat(own, dim=1)[0].transpose(0, 1)  # (Q, heads, D)
        if recorded is None:
            states = mine.new_zeros(plan.asked_rows.numel(), mine.shape[1], plan.length, mine.shape[2])
        else:
            states = self._whole(torch.cat([self._asked(part).to(mine.dtype) for part in recorded], dim=1))
            if len(recorded) == 1 and plan.asked_rows.numel() == plan.batch and recorded[0].dtype == mine.dtype:
                states = states.clone()  # torch.cat of one tensor may be that tensor
        if plan.own.numel() < plan.num_queries:
            mine = mine.index_select(0, plan.own)
        states[self.own_rows, :, self.own_positions] = mine
        return states

    def _asked(self, states: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (R, ...), without a copy where every row is asked about."""
        rows = self.plan.asked_rows
        return states if rows.numel() == self.plan.batch else states.index_select(0, rows)

    def _whole(self, states: torch.Tensor) -> torch.Tensor:
        """(R, heads, C, D) of the first C columns -> (R, heads, T, D), with zeros behind them."""
        behind = self.plan.length - states.shape[2]
        return nn.functional.pad(states, (0, 0, 0, behind)) if behind else states

    def mask(self, layer_idx: int, dtype: torch.dtype, groups: int) -> torch.Tensor:
        """(R, 1 or heads, groups x W, T) mask rows of the queries, 0 where visible; built once, not once per layer."""
        layer = self.shared.masks[layer_idx]
        key = (id(layer.mask), layer.sliding_window, groups)
        if key not in self.masks:
            rows = mask_rows(layer, self.plan.asked_rows, self.plan.positions[self.plan.slots], self.plan.length)
            if rows.dtype == torch.bool:
                rows = torch.zeros(rows.shape, device=rows.device, dtype=dtype).masked_fill_(~rows, -torch.inf)
            self.masks[key] = (
                rows.to(dtype) if groups == 1 or rows.shape[1] > 1 else rows.to(dtype).repeat(1, 1, groups, 1)
            )
        return self.masks[key]


def mask_rows(layer: LayerMask, rows: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
    """The student's attention-mask rows at the queries.

    Args:
        layer: what the student's layer saw: a 4-D mask (sdpa, eager), a 2-D padding mask or None (flash), or a
            flex-attention `BlockMask`.
        rows: (R,) batch rows. positions: (R, W) query positions. length: T.

    Returns:
        (R, 1 or heads, W, T): boolean (True = visible) or additive float, as the student's mask was.
    """
    mask = layer.mask
    batch = rows[:, None]
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        if mask.shape[0] == 1:  # one mask for all rows
            batch = torch.zeros_like(batch)
        return mask.transpose(1, 2)[batch, positions][..., :length].transpose(1, 2)
    keys = torch.arange(length, device=positions.device)
    queries = positions[:, :, None]
    if mask is not None and hasattr(mask, "mask_mod"):  # flex attention: the rule itself, evaluated on the queries
        zero = torch.zeros((), dtype=torch.long, device=positions.device)
        seen: torch.Tensor = mask.mask_mod(rows[:, None, None], zero, queries, keys[None, None])
        return seen.expand(rows.numel(), positions.shape[1], length)[:, None]
    # sdpa passes None for "causal, no padding"; flash attention passes None or (B, T) and the rest as arguments.
    seen = torch.ones((rows.numel(), positions.shape[1], length), dtype=torch.bool, device=positions.device)
    if layer.is_causal:
        seen &= keys <= queries
        if layer.sliding_window is not None:
            seen &= keys > queries - layer.sliding_window
    if mask is not None:
        seen &= mask[rows].bool()[:, None, :]
    if layer.cu_seq_lens is not None:  # packed documents in one row
        document = torch.searchsorted(layer.cu_seq_lens.to(keys.dtype), keys, right=True)
        seen &= document[queries] == document
    return seen[:, None]


def folds(query: torch.Tensor, key: torch.Tensor) -> int:
    """How many query heads share a key head, if they become further queries of it; 1 if the keys are repeated for them. (With a mask,
    CUDA has no fused kernel for grouped queries.) The first repeats mask rows, the second keys and values: whichever is less.
    query: (1, H, Q, D), key: (1, H_kv, Q, D)."""
    groups = query.shape[1] // key.shape[1]
    return groups if query.shape[2] <= 2 * key.shape[1] * key.shape[3] else 1


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of (R, H, W, D) queries to (R, H_kv, T, D) keys and values. -> (R, H, W, D).

    mask: additive, (R, 1 or H, W, T), or (R, 1, H / H_kv x W, T): then the query heads that share a key head become queries of
    it. softcap: cap * tanh(scores / cap). sinks: (H,) logits that take part in the softmax and carry no value.
    """
    R, H, W, D = query.shape
    if softcap is not None or sinks is not None:
        return _eager(query, key, value, mask, scale, softcap, sinks)
    groups = H // key.shape[1]
    if groups > 1 and mask.shape[2] == groups * W:
        query = query.reshape(R, key.shape[1], groups * W, D)
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    seen = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # Some of CUDA's kernels return heads and queries in another order of memory. Latent attention: values are narrower than queries
    return seen.reshape(R, H, W, value.shape[3])


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attend` with what SDPA lacks, as families compute it: softmax in fp32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def _replay_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The teacher's attention: queries (1, H, Q, D) of all rows, to the student's K/V or its own as the plan says."""
    replay = _REPLAYS[id(module.config)]
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    shared = replay.shared
    recorded = (shared.keys[layer_idx], shared.values[layer_idx]) if shared.keep_kv else None
    if recorded is not None:
        if (
            value.shape[3] < key.shape[3]
        ):  # latent attention: the student's values may be padded to the keys' size, for flash kernels
            recorded = recorded[0], recorded[1][..., : value.shape[3]]
        _check_layer(layer_idx, recorded[0], key)
    keys, values = (states.to(query.dtype) for states in replay.states(recorded, (key, value)))
    groups = 1 if softcap is not None or s_aux is not None else folds(query, key)
    seen = attend(
        replay.plan.unpack(query),
        keys,
        values,
        replay.mask(layer_idx, query.dtype, groups),
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return replay.plan.pack(seen), None


register_attention(_REPLAY, _replay_attention, masks_of=None)


def _check_layer(layer_idx: int, recorded: torch.Tensor, own: torch.Tensor) -> None:
    if (recorded.shape[1], recorded.shape[3]) != (own.shape[1], own.shape[3]):
        raise ValueError(
            f"Layer {layer_idx}: the teacher has {own.shape[1]} key/value heads of size {own.shape[3]}, the student's language "
            f"model has {recorded.shape[1]} of size {recorded.shape[3]}: the teacher cannot read them. Use the LM that the "
            "student was built from."
        )


def _check_layers(decoder: PreTrainedModel, shared: SharedKV) -> None:
    layers = len(shared.masks.keys() | set(shared.mixer_layers))
    if decoder.config.num_hidden_layers != layers:
        raise ValueError(
            f"Teacher has {decoder.config.num_hidden_layers} layers, the student's language model has {layers}: KV sharing pairs "
            "layers one to one. Use the LM that the student was built from."
        )


@contextmanager
def _rotary_replayed(decoder: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> Iterator[None]:
    """Let the teacher's rotary module return what the student's did, at the queries, in the order that the teacher's attention expects."""

    def at_queries(rotary: Any) -> Any:
        if isinstance(rotary, tuple):
            return tuple(at_queries(part) for part in rotary)
        return rotary.expand(plan.batch, -1, -1)[plan.rows, plan.positions][None]

    gathered = {kind: at_queries(rotary) for kind, rotary in shared.rotary.items()}

    def forward(x: torch.Tensor, position_ids: Any = None, layer_type: str | None = None) -> Any:
        asked = layer_type
        if layer_type not in gathered and len(gathered) == 1:
            layer_type = next(iter(gathered))
        if layer_type not in gathered:
            raise ValueError(
                f"The teacher asks for the rotary embedding of {layer_type!r} layers, the student computed "
                f"{sorted(map(str, gathered))}: the two are not of one family. Run `lingudistill check` on the pair."
            )
        found = gathered[layer_type]
        if not isinstance(found, tuple):
            return found
        found = reordered(found, shared.rotary_orders.get(layer_type, ""), own_order(x, position_ids, asked))
        return tuple(part.to(x.dtype) for part in found)

    def own_order(x: torch.Tensor, position_ids: Any, layer_type: str | None) -> str:
        given = () if layer_type is None else (layer_type,)
        plain: Any = type(rotary_emb).forward
        found: str = order_of(rotary_emb, layer_type, lambda: plain(rotary_emb, x, position_ids, *given))
        return found

    rotary_emb: Any = decoder.rotary_emb
    rotary_emb.forward = forward
    try:
        yield
    finally:
        del rotary_emb.forward  # the instance attribute; the class's own forward shows again


@torch.compiler.disable  # type: ignore[untyped-decorator]
def replayed_pass(
    teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan, inputs_embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """The teacher's last hidden state where the loss is taken, reading the student.

    Args:
        teacher: the frozen LM (a `...ForCausalLM`), in eval mode.
        shared: the record of the student's forward on the same batch. plan: of the same batch.
        inputs_embeds: (1, Q, H_t), in place of the embeddings of the plan's tokens.

    Returns:
        (N, H_t), ordered like the plan's loss positions, without gradient.

    Raises:
        ValueError: if teacher and student K/V differ in layers, heads or head size.
    """
    if not plan.num_queries:
        return _no_hidden(teacher, plan)
    decoder = decoder_of(teacher)
    _check_layers(decoder, shared)
    inputs: dict[str, Any] = {"position_ids": _positions(shared, plan), "use_cache": False}
    if inputs_embeds is None:
        inputs["input_ids"] = plan.token_ids[None]
    else:
        inputs["inputs_embeds"] = inputs_embeds
    replay = _Replay(shared, plan)
    with (
        inference(teacher),
        attention_switched(decoder, lambda _: _REPLAY) as configs,
        _rotary_replayed(decoder, shared, plan),
        mixers_replayed(decoder, shared.mixed if shared.keep_kv else None, shared.mixed_documents, plan),
    ):
        for config in configs:
            _REPLAYS[id(config)] = replay
        try:
            hidden = decoder(**inputs)[0]
        finally:
            for config in configs:
                _REPLAYS.pop(id(config), None)
        return hidden[0].index_select(0, plan.loss)  # type: ignore[no-any-return]


def _positions(shared: SharedKV, plan: QueryPlan) -> torch.Tensor:
    """(1, Q): the student's text positions of the queries. The rotary embedding is replayed, but some families scale queries too."""
    positions = shared.position_ids
    if positions is None:
        return plan.positions[None]
    if positions.ndim == 3:  # M-RoPE: time, height, width
        positions = positions[0]
    return positions.expand(plan.batch, -1)[plan.rows, plan.positions][None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def plain_pass(teacher: PreTrainedModel, plan: QueryPlan) -> torch.Tensor:
    """The teacher's own forward on the queries alone, each row compacted. -> (N, H_t), ordered like the plan's loss positions."""
    if not plan.num_queries:
        return _no_hidden(teacher, plan)
    decoder = decoder_of(teacher)
    (rows, width), queries = plan.slots.shape, plan.num_queries
    with inference(teacher):
        if (
            queries < 0.8 * rows * width
            and queries**2 <= 4 * rows * width**2
            and packs_rows(teacher, plan.flat.device)
        ):
            # One packed row, whose documents are told apart by positions that start anew: no padding
            begins = plan.slots[:, :1].flatten()
            slots = torch.arange(queries, device=begins.device)
            slots -= begins[torch.div(plan.flat, width, rounding_mode="floor")]
            hidden = decoder(input_ids=plan.token_ids[None], position_ids=slots[None], use_cache=False)[0][0]
            return hidden.index_select(0, plan.loss)  # type: ignore[no-any-return]
        real = None
        if not plan.rectangular:
            real = torch.zeros(rows * width, dtype=torch.long, device=plan.flat.device)
            real = real.index_fill_(0, plan.flat, 1).view(rows, width)
        hidden = decoder(input_ids=plan.token_ids[plan.slots], attention_mask=real, use_cache=False)[0]
        return hidden.flatten(0, 1).index_select(0, plan.flat[plan.loss])  # type: ignore[no-any-return]


def packs_rows(teacher: PreTrainedModel, device: torch.device) -> bool:
    """Whether `plain_pass` may join rows. Tried at the first call, by all processes at once where an engine shards the teacher."""
    decoder = decoder_of(teacher)
    # A state does not end where positions start anew, and the decoders of VLMs take such positions for other things
    if teacher.config.get_text_config() is not teacher.config or mixers_of(decoder):
        return False
    embeddings: Any = teacher.get_input_embeddings()
    with inference(teacher):
        return decoder_keeps_apart(decoder, embeddings.num_embeddings, device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def whole_pass(teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> torch.Tensor:
    """A VLM's own forward on the student's inputs, images included. -> (N, H_t), ordered like the plan's loss positions.

    Rows that nobody asks about run too: which pixels belong to which row, each family says in its own way.
    """
    if not plan.num_queries:
        return _no_hidden(teacher, plan)
    assert shared.inputs is not None
    with inference(teacher):
        hidden: torch.Tensor = teacher.base_model(**shared.inputs)[0]
        return hidden[plan.loss_rows, plan.loss_positions]


def inference(teacher: PreTrainedModel) -> AbstractContextManager[Any]:
    """No gradient and, where no engine shards the weights, no bookkeeping for one: what it costs is felt where launches are."""
    weight = next(teacher.parameters())
    sharded = isinstance(weight, DTensor) or hasattr(weight, "ds_status")
    return torch.no_grad() if sharded else torch.inference_mode()


def _no_hidden(teacher: PreTrainedModel, plan: QueryPlan) -> torch.Tensor:
    width = teacher.config.get_text_config().hidden_size
    return torch.empty(0, width, device=plan.rows.device, dtype=teacher.dtype)
