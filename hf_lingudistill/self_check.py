"""Before training: does this very pair do what KV sharing assumes? Measured on a few text tokens, because no list of families can know.

1. The teacher must be itself: reading its own recorded keys and values, it must give its plain forward.
2. The two must turn the same dimensions by cos and sin: the teacher's queries are turned by the student's.
3. The teacher's class must be the student's arithmetic: the student's weights in it, reading the student's keys and values, must
   give the student's hidden states.
4. The logits that the loss computes from hidden states and head must be each model's own.

It costs a few short forwards. The third borrows the student's tensors without a copy; neither model is changed.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ._internals import decoder_of, head_of, own_name
from .bad_rows import Row
from .documents import keeps_documents_apart
from .losses import head_error
from .queries import QueryPlan, Vocabulary, plan_queries
from .replay import replayed_pass
from .rotary import HALVES, PAIRS, order, reordered, shown, turned
from .sharing import sharing
from .student_kv import SharedKV, recording
from .weights import check_finite

logger = logging.getLogger(__name__)

TEXT = (
    "The sea is deep, wide and full of salt; in 1914 nobody had seen its floor. def area(r): return 3.14159 * r ** 2  "
    "Why do ships of steel float? Because the water that they push aside is heavier than they are."
)
TOKENS = 64
# Relative to the length of the hidden states. Queries turned another way are off by about 1; in bf16, another epsilon of the norms by 0.01
ALLOWED = {torch.float32: 0.02, torch.float64: 0.02}
ALLOWED_IN_HALF_PRECISION = 0.1
SWITCH = "(--self_check false trains without this check.)"

_WORDS = {HALVES: "the two halves", PAIRS: "neighbours"}


def text_ids(tokenizer: Any, vocabulary: Vocabulary) -> torch.Tensor:
    """(1, up to TOKENS) ids of a text that student and teacher both read; of a tokenizer that has no letters, ids spread over its
    vocabulary."""
    ids = torch.tensor(tokenizer(text=TEXT, add_special_tokens=False)["input_ids"], dtype=torch.long).flatten()
    ids = ids[vocabulary.readable(ids)][:TOKENS]
    if ids.numel() < TOKENS // 4:
        ids = torch.linspace(0, vocabulary.shared_size - 1, TOKENS).long()
        ids = ids[vocabulary.readable(ids)]
    return ids[None]


def self_check(student: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor) -> None:
    """Refuse a pair whose shared keys and values would mean something else to the teacher.

    Args:
        student: the plain VLM, without active adapters. teacher: the LM. Both whole on this process, on the device of `ids`.
        ids: (1, T) tokens that both know.

    Raises:
        ValueError: with what was measured, if one of the checks fails.
    """
    plan = _plan(ids)
    try:
        with torch.no_grad(), _undisturbed(student), recording(student) as theirs:
            student_logits = _text_forward(student, ids)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # whatever a family raises that wants an image in every row
        why = f"{type(failure).__name__}: {failure}"
        logger.warning("Self-check left out: the student does not run on text alone (%s)", why)
        return
    assert theirs.last_hidden_state is not None
    # Any distance from NaN is NaN, and says nothing of the teacher's class
    if not torch.isfinite(theirs.last_hidden_state).all():
        check_finite(student.named_parameters(), "the student")
        raise ValueError(
            f"The student's hidden states on a short text are not finite: they overflow in its precision. Compute in bf16 or fp32. {SWITCH}"
        )
    with torch.no_grad(), recording(teacher) as own:
        teacher_logits = _text_forward(teacher, ids)
    error = _error(replayed_pass(teacher, own, plan), own, plan)
    if not math.isfinite(error):
        raise ValueError(
            "The teacher's hidden states on a short text are not finite: its weights are broken, or overflow in its precision. Load "
            f"other weights, or compute in bf16 or fp32. {SWITCH}"
        )
    if not error <= (allowed := _allowed(teacher)):
        raise ValueError(
            f"The teacher is not itself under KV sharing: reading its own keys and values, its hidden states are off by {error:.2g} of "
            f"their length (at most {allowed:g} is rounding). {type(teacher).__name__} mixes tokens in a way that keys and values do not "
            f"carry: use an LM with plain softmax attention. {SWITCH}"
        )
    logger.info("Self-check: the teacher on its own keys and values is off by %.1e of its plain forward", error)
    _check_rotary(theirs, own, (_turns(student, ids), _turns(teacher, ids)))
    _check_arithmetic(student, teacher, theirs, plan)
    _check_head("teacher", teacher, own, teacher_logits)
    _check_head("student", student, theirs, student_logits)


def head_check(role: str, model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Refuse a model whose logits are not what the loss makes of its hidden states: the fourth check alone.

    Args:
        role: `student` or `teacher`. model: on the device of `ids`. ids: (1, T) tokens that it knows.

    Raises:
        ValueError: with what was measured.
    """
    seen = SharedKV()

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.last_hidden_state = output[0]

    hook = model.base_model.register_forward_hook(keep)
    try:
        with torch.no_grad(), _undisturbed(model):
            logits = _text_forward(model, ids)
    finally:
        hook.remove()
    _check_head(role, model, seen, logits)


def document_check(student: PreTrainedModel, collate: Callable[[list[Row]], dict[str, Any]]) -> None:
    """Refuse to join rows for a student that reads them as one.

    collate: of the training; nothing is checked where it does not join rows.

    Raises:
        ValueError: if a document changes what is made of the one behind it.
    """

    def read(documents: list[torch.Tensor]) -> torch.Tensor:
        inputs = joined(documents)
        hidden: torch.Tensor = student.base_model(**inputs, use_cache=False)[0]
        return hidden[0]

    def joined(documents: list[torch.Tensor]) -> dict[str, Any]:
        rows = [{"input_ids": one.tolist(), "labels": one.tolist(), "seq_lengths": [len(one)]} for one in documents]
        batch = {name: value for name, value in collate(rows).items() if name != "labels"}
        return {
            name: value.to(student.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    embeddings: Any = student.get_input_embeddings()
    if joined([torch.arange(3), torch.arange(4)])["input_ids"].shape[0] != 1:
        return
    with torch.no_grad(), _undisturbed(student):
        if keeps_documents_apart(read, embeddings.num_embeddings, student.device):
            return
    raise ValueError(
        f"{type(student).__name__} reads packed documents as one with attn_implementation={student.config._attn_implementation!r}: what stands "
        f"before a document would change it. Set packing=False and padding_free=False, or try 'flash_attention_2'. {SWITCH}"
    )


def _plan(ids: torch.Tensor) -> QueryPlan:
    """Every third token is asked about: with all of them, whatever mixes neighbouring tokens would find its neighbours."""
    asked = torch.arange(ids.shape[1], device=ids.device) % 3 == 0
    vocabulary = Vocabulary(size=int(ids.max()) + 1, shared_size=int(ids.max()) + 1)
    plan: QueryPlan = plan_queries(ids, ids.where(asked, -100), sharing=sharing("full"), vocabulary=vocabulary)
    return plan


def _text_forward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """-> the logits of its own forward, (1, T, V)."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits


def _error(hidden: torch.Tensor, shared: SharedKV, plan: QueryPlan) -> float:
    """How far hidden (N, H) is from the recorded model's own at the loss positions, relative to their length."""
    assert shared.last_hidden_state is not None
    wanted = shared.last_hidden_state[plan.loss_rows, plan.loss_positions].float()
    return float((hidden.float() - wanted).norm() / wanted.norm())


def _allowed(model: PreTrainedModel) -> float:
    device = next(model.parameters()).device.type
    half = torch.is_autocast_enabled(device) or model.dtype not in ALLOWED
    return ALLOWED_IN_HALF_PRECISION if half else ALLOWED[model.dtype]


# --------------------------------------------------------------------------------------------------------------------
# Rotary embeddings
# --------------------------------------------------------------------------------------------------------------------
def _check_rotary(student: SharedKV, teacher: SharedKV, turns: tuple[set[str], set[str]]) -> None:
    """turns: which dimensions the student's and the teacher's keys turn together, see `rotary.turned`."""
    known = all(len(found) == 1 for found in turns)
    if known and turns[0] != turns[1]:
        raise ValueError(
            f"Student and teacher turn other dimensions of a head together: the student {_WORDS[turns[0].pop()]}, the teacher "
            f"{_WORDS[turns[1].pop()]}. The teacher's queries would be turned by wrong angles, and what it teaches would be noise. Use an "
            f"LM whose class turns them as the student's does. {SWITCH}"
        )
    for kind, theirs in teacher.rotary.items():
        if kind not in student.rotary and len(student.rotary) != 1:
            raise ValueError(
                f"The teacher asks for the rotary embedding of {kind!r} layers, the student computes "
                f"{sorted(map(str, student.rotary))}: the two are not of one family. Use the LM that the student was built from."
            )
        ours = student.rotary[kind if kind in student.rotary else next(iter(student.rotary))]
        alike = reordered(ours, order(ours), order(theirs)) if known else ours
        if shown(alike) != shown(theirs):
            raise ValueError(
                f"Student and teacher order their rotary embedding differently: the student's is {shown(ours)}, the teacher's "
                f"{shown(theirs)}. The teacher's queries would be turned by wrong angles, and what it teaches would be noise. Use an LM "
                f"whose class orders it as the student's does. {SWITCH}"
            )
        parts = zip(*(part if isinstance(part, tuple) else (part,) for part in (alike, theirs)), strict=True)
        if off := max(float((a[0] - b[0]).abs().max()) for a, b in parts):
            logger.info(
                "Self-check: cos and sin of the student's RoPE differ from the teacher's own by up to %.1e", off
            )


def _turns(model: PreTrainedModel, ids: torch.Tensor) -> set[str]:
    """Which dimensions the keys of a model's first layer turn together, seen on one token at several positions."""
    with torch.no_grad(), _undisturbed(model), recording(model) as shared:
        _text_forward(model, ids[:, -1:].expand(-1, 8))
    sizes = {part[0].shape[-1] for part in shared.rotary.values() if isinstance(part, tuple)}
    return turned(shared.keys[0], sizes.pop()) if 0 in shared.keys and len(sizes) == 1 else set()


# --------------------------------------------------------------------------------------------------------------------
# The teacher's class on the student's weights
# --------------------------------------------------------------------------------------------------------------------
def _check_arithmetic(student: PreTrainedModel, teacher: PreTrainedModel, shared: SharedKV, plan: QueryPlan) -> None:
    borrowed = _with_weights_of(student, teacher)
    if isinstance(borrowed, str):
        logger.info("Self-check: the student's weights were not tried in the teacher's class: %s", borrowed)
        return
    error = _error(replayed_pass(borrowed, shared, plan), shared, plan)
    if not error <= (allowed := _allowed(student)):
        raise ValueError(
            f"The student's own weights, computed by the teacher's class ({type(teacher).__name__}) with the teacher's config, do not "
            f"give the student's hidden states: they are off by {error:.2g} of their length (at most {allowed:g} is rounding). The two "
            "disagree about norms, activations or how queries are rotated, and what the teacher reads would be noise to it. Use the "
            f"LM that the student was built from. {SWITCH}"
        )
    logger.info("Self-check: the student's weights in the teacher's class are off by %.1e", error)


def _with_weights_of(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel | str:
    """A model of the teacher's class and config around the tensors of the student's decoder; or why there is none. No tensor is
    copied. Its head is empty."""
    config: Any = copy.deepcopy(teacher.config)
    config.pad_token_id = config.get_text_config().pad_token_id = 0  # its own may lie beyond the student's vocabulary
    embeddings: Any = student.get_input_embeddings()
    config.get_text_config().vocab_size = int(embeddings.weight.shape[0])
    with torch.device("meta"):
        shell: PreTrainedModel = type(teacher)(config)
    decoder, state = decoder_of(shell), decoder_of(student).state_dict()
    wanted = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    owned = {name: own_name(decoder_of(student), name) for name in state}
    found = {own: state[name] for name, own in owned.items() if own is not None}
    if odd := sorted(wanted.keys() ^ found.keys()):
        return f"only one of the two has {odd[0]} ({len(odd)} such)"
    for name, shape in wanted.items():
        if found[name].shape != shape:
            return f"{name} is {tuple(found[name].shape)} in the student, {tuple(shape)} in the teacher's class"
    decoder.load_state_dict(found, assign=True)
    buffers = dict(decoder_of(teacher).named_buffers())
    for name, buffer in list(decoder.named_buffers()):
        if buffer.is_meta and name in buffers:  # not saved with the weights: scales, frequencies
            path, _, attribute = name.rpartition(".")
            decoder.get_submodule(path).register_buffer(attribute, buffers[name], persistent=False)
    shell.eval()
    return shell


# --------------------------------------------------------------------------------------------------------------------
# The head
# --------------------------------------------------------------------------------------------------------------------
def _check_head(role: str, model: PreTrainedModel, shared: SharedKV, own: torch.Tensor) -> None:
    """own: (1, T, V), the logits of the model's own forward."""
    declared, hidden = head_of(model), shared.last_hidden_state
    if declared.weight is None or hidden is None:  # an adapter on the head, which the step calls as the model does
        return
    error = head_error(declared, hidden[0], own[0])
    if error <= (allowed := _allowed(model)) or not math.isfinite(
        error
    ):  # weights that are not finite: the first step names them
        return
    plain = replace(declared, scale=1.0, softcap=None)
    if role == "student" and head_error(plain, hidden[0], own[0]) <= allowed:
        scaled = f"multiplies logits by {declared.scale:g}" if declared.softcap is None else "scales and caps logits"
        logger.warning(
            "The student's config %s, as its LM does, and the forward of %s in transformers leaves that out. It is trained with "
            "it, as the LM was and as TRL trains it; what transformers samples from it is %s.",
            scaled,
            type(model).__name__,
            f"as at a temperature of {declared.scale:g}" if declared.softcap is None else "more peaked",
        )
        return
    raise ValueError(
        f"The {role}'s own logits are not what its head gives: they are off by {error:.2g} of the largest (at most {allowed:g} is "
        f"rounding). {type(model).__name__} does more to its hidden states or logits than scale and soft-cap them, which the loss would "
        f"leave out: use another model. {SWITCH}"
    )


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode inside; afterwards every module is as it was, and so is what a forward of M-RoPE remembers for `generate`."""
    modes = [(module, module.training) for module in model.modules()]
    remembers = [module for module in model.modules() if hasattr(module, "rope_deltas")]
    deltas = [module.rope_deltas for module in remembers]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, delta in zip(remembers, deltas, strict=True):
            module.rope_deltas = delta
