"""The student's second parent: the VLM as it was before training, which sees.

It is asked about the rows that the LM does not teach (`anchor`), or lends its eyes to the LM (`kv_source`): what the teacher reads then
stands still while the student moves.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from ._internals import Head, decoder_of, gathered, head_of, keep_image_dtype, own_name
from .engines import SameModules, shard_model, sharding_of
from .mixers import mixers_of
from .sharing import Sharing
from .student_kv import SharedKV, recording

logger = logging.getLogger(__name__)

# Of a backbone's inputs, those with a column per token: (B, T)
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")

# PEFT's other ways to begin (PiSSA, OLoRA, CorDA, LoftQ, ...) take something out of the base weights and put it into the adapter
_BASE_STAYS = (True, False, "gaussian", "orthogonal", "eva")

# How a layer of PEFT's is switched: these set a flag, and freeze and thaw parameters beside
_FLAG_ALONE = tuple(
    kind.enable_adapters
    for kind in (BaseTunerLayer, AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper)
)


@dataclass
class Before:
    """The VLM before.

    model: a plain VLM, the student itself or a frozen copy. as_before: a context in which it answers as before. footprint: bytes
    of weights that this process holds of it beside the student's. sharded: it lies in pieces on all processes, so that every one runs
    it in every step; same_modules: its vision tower too (see `engines.py`).
    """

    model: PreTrainedModel
    as_before: Callable[[], AbstractContextManager[Any]]
    footprint: int
    sharded: bool = False
    same_modules: SameModules | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # modes and adapters are switched around it
    @torch.no_grad()
    def look(
        self, inputs: Mapping[str, Any], rows: torch.Tensor, positions: torch.Tensor, sharing: Sharing | None = None
    ) -> tuple[torch.Tensor, Head, SharedKV]:
        """One forward: what it says of the next token at some positions of a batch, and what a teacher reads of it.

        Args:
            inputs: of the student's backbone.
            rows, positions: (P,) indices into the batch.
            sharing: the mode whose record is kept; None = nothing is recorded.

        Returns:
            Hidden states (P, H), the head, and the record; raw logits (P, V) where the head is not one matrix (see `Head`).
        """
        recording = nullcontext(SharedKV()) if sharing is None else sharing.recording(self.model)
        towers = nullcontext() if self.same_modules is None else self.same_modules.for_batch(inputs)
        with self.as_before(), evaluating(self.model):
            with recording as shared, towers:
                states = self.model.base_model(**inputs).last_hidden_state[rows, positions]
            head = head_of(self.model).whole()
            if head.weight is None:
                states = self.model.get_output_embeddings()(states)
            return states, head, shared

    def can_lend(self, inputs: Mapping[str, Any], columns: int, text: torch.Tensor) -> bool:
        """Whether its first columns can be had without those behind them: rows can be cut, and no token sees a later one that is cut
        off, as the prompt of a prefix LM would. Tried on these inputs, and on text alone, (1, n) token ids, as a prompt. Not where
        positions are rotated by the length of their row: a cut row, longer than those tried, would be another."""
        decoder = decoder_of(self.model)
        if not can_be_cut(inputs) or mixers_of(decoder) or _rotates_by_length(decoder):
            return False
        kinds = {name: torch.zeros_like(text) for name in _COLUMNS[2:] if name in inputs}
        try:
            return self._same_without(inputs, columns) and self._same_without(
                {"input_ids": text, **kinds}, text.shape[1] // 2
            )
        except (ValueError, IndexError, RuntimeError) as error:  # whole rows then: they are what it was made for
            logger.info("The VLM before runs over whole rows, since it does not run on cut ones: %s", error)
            return False

    def _same_without(self, inputs: Mapping[str, Any], columns: int) -> bool:
        """Whether the last layer's keys of the first columns are the same without the others."""
        whole, cut = (self.last_keys(given) for given in (inputs, first_columns(inputs, columns)))
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, None, :columns, None].to(whole)
        gap = ((whole[:, :, :columns] - cut) * real).norm()
        return bool(gap <= 0.05 * (cut * real).norm())  # half precision rounds; a token more or less changes all

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def last_keys(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The keys of its last layer, (B, H_kv, T, D), in fp32. inputs: of the student's backbone."""
        with self.as_before(), evaluating(self.model), recording(self.model) as own:
            self.model.base_model(**inputs)
        return own.keys[max(own.keys)].float()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def lend(self, shared: SharedKV, inputs: Mapping[str, Any], columns: int) -> None:
        """Put its keys and values of the first columns into a record of the student that has masks and positions."""
        with self.as_before(), evaluating(self.model), recording(self.model) as own:
            self.model.base_model(**first_columns(inputs, columns))
        shared.keys, shared.values, shared.keep_kv = own.keys, own.values, True


def can_be_cut(inputs: Mapping[str, Any]) -> bool:
    """Whether every input with a value per token is known, and none speaks of packed documents."""
    shape = inputs["input_ids"].shape
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    # (B, T, ...), or (3, B, T) as of M-RoPE's positions; not any that has T somewhere, as pixels may
    per_token = {name for name, value in tensors.items() if shape in (value.shape[:2], value.shape[1:])}
    mask = inputs.get("attention_mask")
    packed = any(name.startswith("cu_seq_lens") for name in inputs)
    return per_token <= set(_COLUMNS) and not packed and (mask is None or mask.ndim == 2)


def first_columns(inputs: Mapping[str, Any], columns: int) -> dict[str, Any]:
    """Inputs of a backbone, cut behind their first columns."""
    return {name: value[:, :columns] if name in _COLUMNS else value for name, value in inputs.items()}


def make_before(
    model: nn.Module,
    student: PreTrainedModel,
    dtype: torch.dtype,
    *,
    accelerator: Accelerator | None = None,
    asked_by: str = "anchor",
    kept: bool = True,
    speaks: bool = True,
    adapted: bool = False,
) -> Before:
    """The VLM before: for a student with an adapter the same weights with the adapter off, else a frozen copy in memory, which lies in
    pieces on all processes where the engine keeps the student so.

    Call it before anything is trained or loaded from a checkpoint.

    Args:
        model: what is trained, a PEFT model or the student itself.
        student: the plain VLM.
        dtype: of the copy's parameters; buffers keep theirs.
        accelerator: of the run, whose engine says how weights are kept; None = on this process alone.
        asked_by: the option that asks for it, for error messages.
        kept: whether it is asked during training; else it is the student itself, until that is trained.
        speaks: whether its logits are asked for; else the copy goes without an output head of its own.
        adapted: whether the adapter came with the model, maybe trained, and was not made for this run.

    Raises:
        ValueError: if that cannot be the VLM before: a student without an adapter that is quantised, an adapter whose base weights
            change; or, before training, a student that the engine splits.
    """
    without = {"anchor": "anchor='none'", "kv_source": "kv_source='student'"}[asked_by]
    sharded = accelerator is not None and sharding_of(accelerator) is not None
    if sharded and not kept:
        raise ValueError(
            f"{asked_by}='before', asked before training, needs the whole student on every process, and FSDP2 and ZeRO-3 split it: leave "
            "the cache out, so that it is asked in each step, or train under DDP or ZeRO-2."
        )
    if model is not student:
        _check_adapter(model, student, asked_by, without)
        if adapted and _says_something(model):
            raise ValueError(
                f"{asked_by}='before' takes the student with its adapter off for the VLM before, and this adapter is trained already, so that "
                f"another model would be meant: merge it first (merge_and_unload) and train a new one, or set {without}."
            )
        return Before(student, lambda: adapter_off(model), 0, sharded)
    if not kept:
        return Before(student, nullcontext, 0)
    if getattr(student, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{asked_by}='before' needs a copy of the student, and packed (quantised) weights are not copied: train an adapter, whose "
            f"base is the VLM before, or set {without}."
        )
    # Each parameter is cast on its way, so that there is never a second copy in the student's dtype; tied ones stay tied
    memo: dict[int, Any] = {}
    unread = set() if speaks or sharded else _head_alone(student)
    for p in student.parameters():
        with gathered(p):
            # Pieces are cut on the CPU: the whole may not fit a device
            device = "meta" if id(p) in unread else "cpu" if sharded else p.device
            whole = p.detach().to(device, dtype, copy=True)
        memo[id(p)] = nn.Parameter(whole, requires_grad=False)
    frozen = copy.deepcopy(student, memo).eval()
    keep_image_dtype(frozen)
    if accelerator is not None and sharded:
        frozen, footprint = shard_model(frozen, accelerator, root=frozen.base_model)
        return Before(frozen, nullcontext, footprint, sharded)
    own = (p for p in frozen.parameters() if not p.is_meta)
    return Before(frozen, nullcontext, sum(p.numel() * p.element_size() for p in own))


def _head_alone(model: PreTrainedModel) -> set[int]:
    """The ids of the output head's parameters that no other module has."""
    head = model.get_output_embeddings()
    if head is None:
        return set()
    others = {id(p) for module in model.modules() if module is not head for p in module.parameters(recurse=False)}
    return {id(p) for p in head.parameters(recurse=False)} - others


def _check_adapter(model: Any, student: nn.Module, asked_by: str, without: str) -> None:
    """Raise ValueError where the weights under an adapter are not those of the VLM before."""
    for config in model.peft_config.values():
        begins = getattr(config, "init_lora_weights", True)
        if begins not in _BASE_STAYS:
            raise ValueError(
                f"{asked_by}='before' takes the student with its adapter off for the VLM before, and init_lora_weights={begins!r} changes "
                f"the weights under the adapter: use PEFT's default, or set {without}."
            )
    under = [name for name, p in student.named_parameters() if p.requires_grad and own_name(student, name) is not None]
    if under:
        raise ValueError(
            f"{asked_by}='before' takes the student with its adapter off for the VLM before, and {len(under)} parameters under the adapter "
            f"are trained too ({under[0]}): train them through modules_to_save, or set {without}."
        )


def _says_something(model: nn.Module) -> bool:
    """Whether an adapter changes what the model says: one as it was made does not."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            pairs = _trained_beside(module)
            if any(not a.equal(b.to(a)) for a, b in pairs):
                return True
        if isinstance(module, BaseTunerLayer):
            added = {name: weight for name, weight in module.named_parameters() if own_name(module, name) is None}
            ends = [weight for name, weight in added.items() if re.search(r"lora(_embedding)?_B\b", name)]
            if any(map(_any, ends)) or (added and not ends):  # of another type than LoRA, nobody knows how it begins
                return True
    return False


def _any(weight: torch.Tensor) -> bool:
    with gathered(weight):
        return bool(weight.detach().any())


def _trained_beside(module: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The weights of `modules_to_save`, each with the one that it stands in for."""
    if not hasattr(module, "modules_to_save"):
        return
    own = dict(module.original_module.named_parameters())
    for saved in module.modules_to_save.values():
        yield from ((weight.detach(), own[name].detach()) for name, weight in saved.named_parameters() if name in own)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The base model's answers: of every layer of PEFT's, the flag that its forward reads, and nothing else. PEFT's own way walks over all
    layers several times, freezes the adapter, and thaws all of it; it is taken where a layer does more to be switched off."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if not layers or any(type(layer).enable_adapters not in _FLAG_ALONE for layer in layers):
        with _adapter_off_by_peft(model):
            yield
        return
    on = [layer for layer in layers if not layer._disable_adapters]
    try:
        for layer in on:
            layer._disable_adapters = True
        yield
    finally:
        for layer in on:
            layer._disable_adapters = False


@contextmanager
def _adapter_off_by_peft(model: Any) -> Iterator[None]:
    """PEFT freezes the adapter with it, and thaws all of it: what is trained stays so throughout, since FSDP2 gathers a weight into
    another tensor, with the flag that it finds."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def restore() -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])

    try:
        with model.disable_adapter():
            restore()
            yield
    finally:
        restore()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards, each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        if any(
            type(module).train is not nn.Module.train for module in training
        ):  # which does more than to set the mode
            model.eval()
        else:
            _set_mode(training, False)
        yield
    finally:
        _set_mode(training, True)


def _set_mode(modules: list[nn.Module], training: bool) -> None:
    for module in modules:
        object.__setattr__(
            module, "training", training
        )  # past nn.Module's, which looks for parameters: thousands in each step


def _rotates_by_length(decoder: nn.Module) -> bool:
    """Whether the frequencies of its rotary embedding are chosen by how long a row is."""
    kinds = [getattr(module, "rope_type", None) for module in decoder.modules()]
    flat = {kind for one in kinds for kind in (one.values() if isinstance(one, Mapping) else (one,))}
    return not flat.isdisjoint(("dynamic", "longrope"))
