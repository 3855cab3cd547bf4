"""Every import of a TRL or transformers internal, and what is relied on beside it, so that an upgrade begins at one file.

Tested with the oldest and the newest releases that `pyproject.toml` allows (`make test-oldest`, `make test-newest`). What is used, and what it must do:

- `trl.trainer.utils.maybe_gather_lm_head_ctx`: the whole head under ZeRO-3.
- `SFTTrainer.compute_loss` calls `model(**inputs, fused_lm_head=True)`, sums `-outputs.log_probs`, divides by `num_items_in_batch`, and
  reads `entropy`, `is_top1`, `label_mask` and `aux_loss` of a `FusedCausalLMOutput`. `step.py` answers that call in place of TRL's fused
  head, and reaches the backbone as it does, through `model.base_model(...)`.
- `mixtral.load_balancing_loss_func`: the router's loss of every family, as TRL's fused head takes it. Text decoders give
  `router_logits` where they are called with `output_router_logits=True`, and list it in `_can_record_outputs` (used in `router.py`).
- `Trainer._get_grad_norm` runs once between backward pass and optimizer step; `_save_checkpoint` writes under `_get_output_dir`;
  `_tr_loss`, `_globalstep_last_logged` and `_total_loss_scalar` are its sums between logs, `_metrics` and `_total_train_tokens` those of
  `SFTTrainer` (overridden and restored in `resume.py`, `step_mixin.py` and `finite.py`).
- `trl.trainer.utils._ChunkedLogProbFunction`, the kernel of that head: TRL 1.15 has it for Triton alone, see `_LogProbs`.
- `DistillationTrainer.compute_loss` redirects the wrapped student's forward to `_compute_loss(student, inputs, num_items)`, which returns
  loss, summed entropy and number of tokens; `inputs` are those of `_generate_and_score_completions`, cut into batches by rows;
  `_get_train_sampler` returns a `RepeatSampler`, whose `generator` draws the order; `_generate_single_turn` samples, by
  `generation_config` and `generation_kwargs` (used in `on_policy.py`).
- `trl.scripts.utils.DatasetConfig`: one source of a mixture.
- `trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling`: collates texts (`text`, or `prompt` and `completion`) with their images.
- `trl.chat_template_utils.has_generation_markers` and `transformers.utils.chat_template_utils.render_jinja_template`: where a template
  marks the assistant's turns. `transformers.image_transforms.convert_to_rgb`: how processors convert an image
  (used in `rgb.py`, which the Space takes alone).
- `AttentionInterface` / `AttentionMaskInterface`: named attention functions, looked up by `config._attn_implementation`
  on every call.
- Decoders apply `decoder.rotary_emb(x, position_ids[, layer_type]) -> (cos, sin)` once per forward.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import transformers
import trl.trainer.utils as trl_utils
from accelerate import Accelerator
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers
from trl.import_utils import is_vllm_available
from trl.models.utils import prepare_deepspeed
from trl.scripts.utils import DatasetConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, maybe_gather_lm_head_ctx

__all__ = [
    "DataCollatorForVisionLanguageModeling",
    "CHECKPOINTING",
    "DatasetConfig",
    "FusedCausalLMOutput",
    "Head",
    "RepeatSampler",
    "attention_switched",
    "base_attention_function",
    "checkpoint_activations",
    "decoder_of",
    "deepspeed_inference",
    "gathered",
    "has_generation_markers",
    "head_of",
    "is_vllm_available",
    "keep_image_dtype",
    "load_balancing_loss_func",
    "loaded_by_every_process",
    "register_attention",
    "render_jinja_template",
    "drop_copied_forward",
    "use_new_names",
    "without_adapter",
]

# Options by the names that stay, and those that transformers v6 removes. Older releases know the second alone.
CHECKPOINTING = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

# What PEFT puts in place of a layer, or around it
_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_UNDER_ADAPTER = ("base_layer", "original_module", "token_adapter")  # the way to the model's own
_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def without_adapter(module: Any) -> Any:
    """The module under whatever PEFT put around it: itself, where that is nothing."""
    while isinstance(module, _ADAPTED):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module


def own_name(model: nn.Module, name: str) -> str | None:
    """The name that a tensor of a model has without what PEFT put around modules; None where it is PEFT's own. By the modules that lie on
    the way, not by their names: models have a `vision_adapter` and a `soft_emb_norm` of their own."""
    found: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        if not isinstance(module, _ADAPTED):
            found.append(part)
        elif part not in _UNDER_ADAPTER:
            return None
        module = None if module is None else module._modules.get(part)
    return ".".join(found)


def drop_copied_forward(model: nn.Module) -> None:
    """Take the forward off a deep copy of a model that TRL has trained: `add_fused_lm_head` leaves one on the model that calls the forward it
    found there, and in a copy that is still the original's."""
    forward = vars(model).get("forward")
    closure = inspect.getclosurevars(forward.__func__).nonlocals if inspect.ismethod(forward) else {}
    called = closure.get("original_forward")
    if inspect.ismethod(called) and called.__self__ is not model:
        del model.forward


def use_new_names(config: Any) -> None:
    """Take what was given under a name that goes away, TRL's own default among it, over to the name that stays, and the other way
    round where the installed release reads the old name alone. Before the config checks itself, which warns of old names."""
    known: dict[str, Any] = vars(config).setdefault("_checkpointing", {})  # as they were when this was last asked
    for new, old in CHECKPOINTING.items():
        value, given = getattr(config, new), getattr(config, old, None)
        if value is None or (hasattr(config, old) and new in known and value == known[new] != given):
            setattr(config, new, given)  # the old name has been set, or set anew
        elif hasattr(config, old):
            setattr(config, old, value)
        known[new] = getattr(config, new)


class _LogProbs:
    """TRL 1.15's fused head off Triton's devices, where it has no kernel: the same arguments, results and memory, in torch."""

    kernel: Any = getattr(trl_utils, "_ChunkedLogProbFunction", None)

    @classmethod
    def apply(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: float,
        tile: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """hidden: (N, H); labels: (N,). -> log-probability, entropy, two that nobody asks for here, and is_top1; each (N,)."""
        if hidden.device.type in ("cuda", "xpu"):
            given = (hidden, weight, bias, labels, temperature, tile, softcap, scale, outputs)
            return cls.kernel.apply(*given)  # type: ignore[no-any-return]

        def score(rows: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = nn.functional.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
            logits = logits.float() * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            log_p = (logits / temperature).log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1).detach()
            top1 = (log_p.argmax(-1) == wanted).float()
            return log_p.gather(-1, wanted[:, None])[:, 0], entropy, top1

        # At least one tile, even if empty, so that the result depends on the model's parameters
        tiles = zip(hidden.split(256), labels.split(256), strict=True)
        parts = [checkpoint(score, *part, use_reentrant=False) for part in tiles]
        log_probs, entropy, top1 = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_probs, entropy if "entropy" in outputs else None, None, None, top1 if "is_top1" in outputs else None


if not hasattr(trl_utils, "_use_triton"):
    trl_utils._ChunkedLogProbFunction = _LogProbs  # type: ignore[assignment, misc]


def checkpoint_activations(model: PreTrainedModel, kwargs: dict[str, Any] | None = None) -> None:
    """Switch activation checkpointing on, by whichever name the installed transformers has. kwargs: such as `use_reentrant`."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)


def keep_image_dtype(student: PreTrainedModel) -> None:
    """Before transformers 5.21, SmolVLM and Idefics3 write image features among the embeddings by an index, which takes no other
    dtype: under autocast the connector's is another."""
    connector = getattr(student.base_model, "connector", None)
    if connector is None or Version(transformers.__version__) >= Version("5.21"):
        return
    embeddings: Any = student.get_input_embeddings()
    connector.register_forward_hook(lambda _module, _inputs, features: features.to(embeddings.weight.dtype))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The text backbone of a VLM, or the backbone of a plain LM.

    Raises:
        ValueError: if the backbone applies no rotary embedding at its top, which KV sharing relies on.
    """
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no rotary embedding in its text backbone ({type(decoder).__name__}): KV sharing "
            "needs a decoder with RoPE and softmax attention. Run `lingudistill check` on the pair."
        )
    return decoder  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Head:
    """A language-model head as the loss takes it: logits = softcap(scale * (hidden @ weight.T + bias)).

    weight: (V, H); None where the head is more than one matrix (an adapter on it): then its raw logits stand for the hidden
    states. bias: (V,) or None. softcap: cap * tanh(x / cap) where a cap is set. unshared: ids whose tokens the other model
    does not share. moved: (target, source) ids: the event `target` of the other model is this one's `source`.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    unshared: torch.Tensor | None = None
    moved: tuple[tuple[int, int], ...] = ()

    @property
    def matrix(self) -> torch.Tensor:
        """(V, H), where nothing but one matrix will do.

        Raises:
            ValueError: if the head is quantised or carries an adapter.
        """
        if self.weight is None:
            raise ValueError(
                "The head is quantised or carries an adapter: one plain matrix is needed. Merge the adapter first."
            )
        return self.weight

    @property
    def vocab_size(self) -> int:
        """V; 0 where the logits alone tell."""
        return 0 if self.weight is None else int(self.weight.shape[0])

    def whole(self) -> Head:
        """The same head with sharded (FSDP2) parameters gathered, by all processes at once."""
        weight = _whole(self.weight)
        unshared = self.unshared if self.unshared is None or weight is None else self.unshared.to(weight.device)
        return replace(self, weight=weight, bias=_whole(self.bias), unshared=unshared)


def _whole(parameter: torch.Tensor | None) -> torch.Tensor | None:
    if not isinstance(parameter, DTensor):
        return parameter
    # Pieces that are offloaded to the CPU must come to the device whose processes gather them
    return cast(DTensor, parameter.to(parameter.device_mesh.device_type)).full_tensor()


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a model, with the logit scaling that its text config declares (as TRL's fused head reads it).

    Where an adapter makes the head more than one matrix, the weight is None: call `model.get_output_embeddings()`.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: a model with a language-model head is needed."
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = getattr(config, "output_multiplier", None)
    if scale is None:
        scale = getattr(config, "lm_head_multiplier", None)
    scaling = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    plain = isinstance(head, nn.Linear) and head.weight.is_floating_point() and not isinstance(head, _ADAPTED)
    return Head(
        weight=head.weight if plain else None,
        bias=head.bias if plain else None,
        scale=1.0 if scale is None else float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def gathered(*parameters: Any) -> AbstractContextManager[Any]:
    """A context in which these parameters are whole under ZeRO-3; nothing elsewhere. None, and whatever ZeRO-3 does not
    manage (a replicated teacher), is ignored."""
    return maybe_gather_lm_head_ctx(*(p for p in parameters if hasattr(p, "ds_status")))  # type: ignore[no-any-return]


@contextmanager
def loaded_by_every_process() -> Iterator[None]:
    """`from_pretrained` gives every process all the weights.

    For the student, transformers leaves them out of all processes but the first under FSDP (accelerate hands them out
    later), and partitions them under ZeRO-3. Nobody would hand them out to the teacher.
    """
    fsdp, zero = os.environ.get(_FSDP_LOADING), deepspeed_integration._hf_deepspeed_config_weak_ref
    os.environ[_FSDP_LOADING] = "false"
    deepspeed_integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = zero
        if fsdp is None:
            del os.environ[_FSDP_LOADING]
        else:
            os.environ[_FSDP_LOADING] = fsdp


def deepspeed_inference(model: PreTrainedModel, accelerator: Accelerator, *, offload: bool) -> PreTrainedModel:
    """Partition a frozen model with ZeRO-3, by the student's DeepSpeed config. -> the model without its engine.

    offload: keep the partitions in CPU memory.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    before = zero.get("offload_param")
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    try:
        return prepare_deepspeed(model, accelerator).module  # type: ignore[no-any-return]
    finally:
        if offload and before is None:
            del zero["offload_param"]
        elif offload:
            zero["offload_param"] = before


class FsdpUnit:
    """A unit of a model under FSDP2, whose weights can be kept whole through many forwards without a backward pass.

    torch has no public way back from `set_reshard_after_forward`, and notes every forward for the order of the next backward pass.

    groups: its parameter groups, which several units may share. resharded: what each does after a forward, None to stay gathered.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        state = module._get_fsdp_state()
        group = getattr(state, "_fsdp_param_group", None)  # one per unit before torch 2.13
        self.groups: list[Any] = list(getattr(state, "_fsdp_param_groups", [group] if group else []))
        self.resharded = [one.post_forward_mesh_info for one in self.groups]

    def keep_gathered(self) -> None:
        """Gather its weights, by all processes at once; forwards leave them so."""
        for group in self.groups:
            group.post_forward_mesh_info = None
        self.module.unshard()

    def scatter(self) -> None:
        """Cut them again, and forget the forwards in between."""
        for group, resharded in zip(self.groups, self.resharded, strict=True):
            group.post_forward_mesh_info = resharded
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()
        self.module.reshard()


def fsdp_units(model: nn.Module) -> list[FsdpUnit]:
    """The units of a model that FSDP2 splits, the root first; none of any other."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return []
    model._get_fsdp_state()._lazy_init()  # the first forward tells which unit is the root, and sampling comes before it
    return [FsdpUnit(module) for module in model.modules() if isinstance(module, FSDPModule)]


def register_attention(name: str, function: AttentionFunction, *, masks_of: str | None) -> None:
    """Register `function` as attention implementation `name`.

    masks_of: the implementation whose masks the models should build for it; None = models build no mask at all.
    """
    AttentionInterface.register(name, function)
    # Without a name in the mask interface, models pass `None` instead of a mask (wanted for replay, fatal for recording).
    if masks_of is not None and masks_of in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_of])


def base_attention_function(implementation: str, module: nn.Module) -> AttentionFunction:
    """The attention function behind `implementation`; `eager` lives in the modelling file of the attention module."""
    if implementation == "eager":
        function: AttentionFunction = sys.modules[type(module).__module__].eager_attention_forward
        return function
    return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]


def _attention_configs(decoder: nn.Module) -> list[Any]:
    """The distinct configs that the attention layers of a decoder look their implementation up in."""
    found: dict[int, Any] = {}
    for module in decoder.modules():
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def attention_switched(decoder: nn.Module, name_for: Callable[[str], str]) -> Iterator[list[Any]]:
    """Switch a decoder's attention implementation for the length of the context, also when the forward raises.

    name_for: maps the implementation in use to the name to switch to. Yields the switched configs.
    """
    before = [(config, config._attn_implementation) for config in _attention_configs(decoder)]
    try:
        for config, implementation in before:
            config._attn_implementation = name_for(implementation or "eager")
        yield [config for config, _ in before]
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
