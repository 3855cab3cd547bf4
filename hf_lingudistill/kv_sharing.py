"""Layer-wise KV sharing: the frozen teacher's queries attend to the student's keys and values.

Three steps, in this order:

    plan = plan_queries(input_ids, labels, distill, kv_sharing="prompt", ...)   # where is the loss, what must be queried
    with recording(student) as shared:                                          # the student's only forward
        outputs = student(...)
    teacher_hidden = teacher_pass(teacher, shared, plan)                        # (N, H_t), no gradient

The student's K/V are recorded post-RoPE inside a registered attention function, together with the attention-mask rows and
the rotary cos/sin, so that whatever a family does with masks (sliding windows, bidirectional images or prefixes) and
positions (M-RoPE, local and global RoPE) holds for the teacher as well. The teacher then runs on the queried positions only.

Shapes: B rows, T positions, L layers, H_kv key/value heads, D head size, R distilled rows, Q queries a row, N loss positions.

Source: arXiv 2604.00829 (layer-wise KV-cache sharing), with the teacher restricted to the positions whose loss is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from ._internals import attention_switched, base_attention_function, decoder_of, register_attention
from .config import KVSharing

KV_SHARING_MODES = get_args(KVSharing)

_RECORD_PREFIX = "lingudistill_record_"
_REPLAY = "lingudistill_replay"

# Attention functions are looked up by name and get the attention module only: the config object leads to the record.
_RECORDS: dict[int, SharedKV] = {}
_REPLAYS: dict[int, _Replay] = {}


# --------------------------------------------------------------------------------------------------------------------
# What is queried
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class QueryPlan:
    """Which positions of a batch the teacher is asked about.

    A *loss position* t is one whose next-token distribution is distilled: the row is distilled, `labels[t + 1]` counts,
    and the teacher can read both the token at t and the label.

    kv_sharing: the mode. input_ids: (B, T). rows: (R,) rows with at least one loss position. positions: (R, Q) queried
    positions, ascending, padded with the row's first. valid: (R, Q) not padding. own: (R, Q) the teacher's own K/V
    replace the student's here. loss: (R, Q) loss positions. loss_rows, loss_positions: (N,) the same as batch indices.
    """

    kv_sharing: KVSharing
    input_ids: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    own: torch.Tensor
    loss: torch.Tensor
    loss_rows: torch.Tensor
    loss_positions: torch.Tensor

    @property
    def num_loss(self) -> int:
        """N, the number of loss positions."""
        return self.loss_rows.numel()

    @property
    def num_queries(self) -> int:
        """R x Q, the number of positions the teacher computes, padding included."""
        return self.positions.numel()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to distil in this batch."""
        return self.num_loss == 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def plan_queries(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    distill: torch.Tensor | None = None,
    *,
    kv_sharing: KVSharing,
    shared_vocab_size: int,
    unreadable_token_ids: Sequence[int] = (),
    attention_mask: torch.Tensor | None = None,
) -> QueryPlan:
    """Decide where the teacher is queried, from token ids alone.

    Args:
        input_ids: (B, T) long.
        labels: (B, T) long, -100 where no loss is taken; `labels[:, t + 1]` is scored at position t.
        distill: (B,) bool, the rows to distil; None = every row.
        kv_sharing: which K/V the teacher reads from the student. `full`: everywhere. `prompt`: everywhere but at
            response tokens (those with a label). `vision`: only at tokens the teacher cannot read (image tokens and
            tokens of the VLM's own). `none`: nowhere; unreadable tokens are removed.
        shared_vocab_size: ids below it mean the same token to teacher and student.
        unreadable_token_ids: further ids the teacher cannot read: image placeholders that the LM's vocabulary holds.
        attention_mask: (B, T), 0 at padding; None = no padding.
    """
    unreadable = torch.tensor(list(unreadable_token_ids), device=input_ids.device, dtype=input_ids.dtype)

    def readable(ids: torch.Tensor) -> torch.Tensor:
        return (ids >= 0) & (ids < shared_vocab_size) & ~torch.isin(ids, unreadable)

    can_read = readable(input_ids)
    if attention_mask is not None:
        can_read = can_read & attention_mask.bool()
    loss = torch.zeros_like(can_read)
    # A label outside the shared vocabulary (say, the VLM's own end-of-turn token) has no honest teacher probability:
    # distilling it would teach the student never to stop. Those positions keep cross-entropy.
    loss[:, :-1] = can_read[:, :-1] & readable(labels[:, 1:])
    if distill is not None:
        loss = loss & distill.bool().to(loss.device)[:, None]

    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    # Nothing after a row's last loss position can reach it, so it is not queried.
    last = torch.where(loss, positions, -1).amax(dim=1, keepdim=True)
    if kv_sharing == "full":
        own = torch.zeros_like(loss)
    elif kv_sharing == "prompt":
        own = can_read & (labels != -100) & (positions <= last)
    else:
        own = can_read & (positions <= last)
    queried = loss | own

    rows = loss.any(dim=1).nonzero().flatten()
    queried, own, loss_in_rows = queried[rows], own[rows], loss[rows]
    count = queried.sum(dim=1)
    width = int(count.max()) if rows.numel() else 0
    # A stable sort brings queried positions to the front in ascending order.
    order = torch.argsort((~queried).to(torch.uint8), dim=1, stable=True)[:, :width]
    valid = torch.arange(width, device=order.device) < count[:, None]
    order = torch.where(valid, order, order[:, :1])
    loss_rows, loss_positions = loss.nonzero(as_tuple=True)
    return QueryPlan(
        kv_sharing=kv_sharing,
        input_ids=input_ids,
        rows=rows,
        positions=order,
        valid=valid,
        own=own.gather(1, order) & valid,
        loss=loss_in_rows.gather(1, order) & valid,
        loss_rows=loss_rows,
        loss_positions=loss_positions,
    )


def placeholder_plan(plan: QueryPlan) -> QueryPlan:
    """One query at the first token of the first row, for a batch with nothing to distil on a process whose teacher runs
    all the same (see `engines.py`). The caller gives its position no weight."""
    device = plan.input_ids.device
    zero, yes = torch.zeros(1, dtype=torch.long, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
    return QueryPlan(
        kv_sharing=plan.kv_sharing,
        input_ids=plan.input_ids,
        rows=zero,
        positions=zero[None],
        valid=yes,
        own=yes if plan.kv_sharing in ("vision", "none") else ~yes,
        loss=yes,
        loss_rows=zero,
        loss_positions=zero,
    )


# --------------------------------------------------------------------------------------------------------------------
# Recording the student
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class _LayerMask:
    """What a layer of the student saw: its mask argument and the keyword arguments that shape visibility."""

    mask: Any
    is_causal: bool
    sliding_window: int | None
    cu_seq_lens: torch.Tensor | None


@dataclass
class SharedKV:
    """What one student forward leaves for the teacher.

    keys, values: layer_idx -> (B, H_kv, T, D), detached, post-RoPE. rotary: layer type (None where the family has one) ->
    (cos, sin), each (B or 1, T, D_rot). last_hidden_state: (B, T, H_s) with gradient.
    """

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    masks: dict[int, _LayerMask] = field(default_factory=dict)
    rotary: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    last_hidden_state: torch.Tensor | None = None
    _documents: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def documents(self, position_ids: torch.Tensor | None, batch_size: int) -> torch.Tensor | None:
        """Where the documents of one packed row begin and the last one ends, (documents + 1,), as flash attention reads it from
        positions that start anew; None where they do not. Looked at once a forward: it is the same in every layer."""
        if position_ids is None or batch_size != 1 or position_ids.ndim != 2 or position_ids.shape[-1] == 1:
            return None
        if self._documents is None or self._documents[0] is not position_ids:
            starts = position_ids[0] == position_ids.min()
            ends = torch.tensor([position_ids.shape[1]], device=position_ids.device)
            boundaries = torch.cat([starts.nonzero().flatten(), ends])
            self._documents = (position_ids, boundaries if len(boundaries) > 2 else None)
        return self._documents[1]

    def release(self) -> None:
        """Drop K/V, masks and rotary (the hidden states stay): they must not live through the backward pass."""
        self.keys.clear()
        self.values.clear()
        self.masks.clear()
        self.rotary.clear()
        self._documents = None

    def nbytes(self) -> int:
        """Bytes held by the recorded keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys.values(), *self.values.values()))


def _as_attended(states: torch.Tensor) -> torch.Tensor:
    """Detached K or V in the dtype that attention computes in: under autocast, RoPE leaves the keys in fp32."""
    states, device = states.detach(), states.device.type
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
            shared.keys[layer_idx], shared.values[layer_idx] = _as_attended(key), _as_attended(value)
            is_causal = kwargs.get("is_causal")
            boundaries = kwargs.get("cu_seq_lens_q")
            if boundaries is None and attention_mask is None and "flash" in base_name:
                boundaries = shared.documents(kwargs.get("position_ids"), key.shape[0])
            shared.masks[layer_idx] = _LayerMask(
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
def recording(student: PreTrainedModel) -> Iterator[SharedKV]:
    """Record what the student's text backbone computes in the forwards run inside the context.

    The context must end before `backward()`: the recomputation of gradient checkpointing then runs with the attention
    implementation in use before, and records nothing. Everything is undone when the forward raises.

    Args:
        student: the plain VLM (not its PEFT or distributed wrapper).

    Raises:
        ValueError: on leaving, if some layer of the text backbone produced no K/V.
    """
    decoder = decoder_of(student)
    shared = SharedKV()

    def on_rotary(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
        shared.rotary[layer_type] = output

    def on_backbone(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        shared.last_hidden_state = output[0]

    hooks = [
        decoder.rotary_emb.register_forward_hook(on_rotary, with_kwargs=True),  # type: ignore[union-attr]
        student.base_model.register_forward_hook(on_backbone),
    ]
    try:
        with attention_switched(decoder, _record_name) as configs:
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
    layers = decoder.config.num_hidden_layers
    missing = [layer for layer in range(layers) if layer not in shared.keys]
    if shared.last_hidden_state is not None and missing:
        raise ValueError(
            f"Layers {missing} of {type(student).__name__} produced no keys and values ({layers} layers expected): KV sharing "
            "needs softmax self-attention in every layer. Run `lingudistill check` on the pair."
        )


# --------------------------------------------------------------------------------------------------------------------
# Replaying for the teacher
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class _Replay:
    """What the teacher's attention function needs during one pass. mask_rows: cache of rows by the student's mask."""

    shared: SharedKV
    plan: QueryPlan
    batch_size: int
    own_rows: torch.Tensor
    own_positions: torch.Tensor
    mask_rows: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def select_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (R, ...), without a copy where every row is distilled."""
        if self.plan.rows.numel() == self.batch_size:
            return tensor
        return tensor[self.plan.rows]

    def additive_mask(self, layer_idx: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """(R, 1 or heads, Q, T) mask rows of the queries, 0 where visible."""
        layer = self.shared.masks[layer_idx]
        key = (id(layer.mask), layer.sliding_window)
        if key not in self.mask_rows:
            rows = mask_rows(layer, self.plan.rows, self.plan.positions, length)
            if rows.dtype == torch.bool:  # additive once, not once a layer inside SDPA
                rows = torch.zeros(rows.shape, device=rows.device, dtype=dtype).masked_fill_(~rows, -torch.inf)
            self.mask_rows[key] = rows.to(dtype)
        return self.mask_rows[key]


def mask_rows(layer: _LayerMask, rows: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
    """The student's attention-mask rows at the queries.

    Args:
        layer: what the student's layer saw: a 4-D mask (sdpa, eager), a 2-D padding mask or None (flash), or a
            flex-attention `BlockMask`.
        rows: (R,) batch rows. positions: (R, Q) query positions. length: T.

    Returns:
        (R, 1 or heads, Q, T): boolean (True = visible) or additive float, as the student's mask was.
    """
    mask = layer.mask
    batch = rows[:, None]
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        size = int(rows.max()) + 1 if mask.shape[0] == 1 else mask.shape[0]
        return mask.expand(size, -1, -1, -1).transpose(1, 2)[batch, positions][..., :length].transpose(1, 2)
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


def _eager_with_softcap(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float, softcap: float
) -> torch.Tensor:
    """softmax(cap * tanh(scores / cap) + mask) @ V for (R, H, Q, D) queries; SDPA has no soft-capping. -> (R, Q, H, D)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def _replay_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the teacher's queries (R, H, Q, D) to the student's K/V, or its own where the plan says so."""
    replay = _REPLAYS[id(module.config)]
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    student_key = replay.select_rows(replay.shared.keys[layer_idx]).to(key.dtype)
    student_value = replay.select_rows(replay.shared.values[layer_idx]).to(value.dtype)
    if replay.own_rows.numel():
        positions = replay.plan.positions[replay.own_rows, replay.own_positions]
        # A copy: the recorded tensors are the ones the student's backward pass needs.
        student_key, student_value = student_key.clone(), student_value.clone()
        student_key[replay.own_rows, :, positions] = key.transpose(1, 2)[replay.own_rows, replay.own_positions]
        student_value[replay.own_rows, :, positions] = value.transpose(1, 2)[replay.own_rows, replay.own_positions]
    mask = replay.additive_mask(layer_idx, student_key.shape[2], query.dtype)
    if softcap is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _eager_with_softcap(query, student_key, student_value, mask, scale, softcap), None
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        student_key.to(query.dtype),
        student_value.to(query.dtype),
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != student_key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


register_attention(_REPLAY, _replay_attention, masks_of=None)


@contextmanager
def _rotary_replayed(decoder: PreTrainedModel, replay: _Replay) -> Iterator[None]:
    """Let the teacher's rotary module return the student's cos/sin at the queried positions."""
    plan = replay.plan

    def at_queries(rotary: torch.Tensor) -> torch.Tensor:
        rotary = rotary.expand(replay.batch_size, -1, -1)
        return rotary[plan.rows[:, None], plan.positions]

    gathered = {kind: (at_queries(cos), at_queries(sin)) for kind, (cos, sin) in replay.shared.rotary.items()}

    def forward(x: torch.Tensor, position_ids: Any = None, layer_type: str | None = None) -> tuple[torch.Tensor, ...]:
        if layer_type not in gathered and len(gathered) == 1:
            layer_type = next(iter(gathered))
        if layer_type not in gathered:
            raise ValueError(
                f"The teacher asks for the rotary embedding of {layer_type!r} layers, the student computed "
                f"{sorted(map(str, gathered))}: the two are not of one family. Run `lingudistill check` on the pair."
            )
        return tuple(part.to(x.dtype) for part in gathered[layer_type])

    rotary_emb: Any = decoder.rotary_emb
    rotary_emb.forward = forward
    try:
        yield
    finally:
        del rotary_emb.forward  # the instance attribute; the class's own forward shows again


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def teacher_pass(teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> torch.Tensor:
    """The teacher's last hidden state where the loss is taken.

    Args:
        teacher: the frozen LM (a `...ForCausalLM`), in eval mode.
        shared: the record of the student's forward on the same batch (unused with `kv_sharing="none"`).
        plan: from `plan_queries` on the same batch.

    Returns:
        (N, H_t), ordered like `plan.loss_rows` / `plan.loss_positions`, without gradient.

    Raises:
        ValueError: if the plan is empty, or if teacher and student K/V differ in layers, heads or head size.
    """
    if plan.empty:
        raise ValueError("There is no position to distil in this batch: check `plan.empty` before the teacher's pass.")
    decoder = decoder_of(teacher)
    token_ids = plan.input_ids[plan.rows[:, None], plan.positions]
    if plan.kv_sharing == "none":
        # Queried are exactly the tokens the teacher reads: its plain forward on the compacted rows.
        hidden = decoder(input_ids=token_ids, attention_mask=plan.valid.long(), use_cache=False)[0]
        return hidden[plan.loss]  # type: ignore[no-any-return]
    _check_shapes(decoder, shared)
    own_rows, own_slots = plan.own.nonzero(as_tuple=True)
    replay = _Replay(shared, plan, plan.input_ids.shape[0], own_rows, own_slots)
    slots = torch.arange(token_ids.shape[1], device=token_ids.device)[None].expand_as(token_ids)
    with attention_switched(decoder, lambda _: _REPLAY) as configs, _rotary_replayed(decoder, replay):
        for config in configs:
            _REPLAYS[id(config)] = replay
        try:
            # position_ids only shape the (replaced) rotary embedding
            hidden = decoder(input_ids=token_ids, position_ids=slots, use_cache=False)[0]
        finally:
            for config in configs:
                _REPLAYS.pop(id(config), None)
    return hidden[plan.loss]  # type: ignore[no-any-return]


def _check_shapes(decoder: PreTrainedModel, shared: SharedKV) -> None:
    config = decoder.config
    layers = len(shared.keys)
    if config.num_hidden_layers != layers:
        raise ValueError(
            f"Teacher has {config.num_hidden_layers} layers, the student's language model has {layers}: KV sharing pairs "
            "layers one to one. Use the LM that the student was built from."
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = shared.keys[0].shape
    if (heads, head_dim) != (shape[1], shape[3]):
        raise ValueError(
            f"Teacher has {heads} key/value heads of size {head_dim}, the student's language model has {shape[1]} of size "
            f"{shape[3]}: the teacher cannot read them. Use the LM that the student was built from."
        )
