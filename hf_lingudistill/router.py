"""The load-balancing loss of a mixture of experts, whose router's logits are taken at the text decoder.

Not at the VLM's output: many VLMs take an LM of any kind and know nothing of routers. Some drop its logits, others fail over them
(InternVL around Qwen3-MoE), so that the config must not ask for them either: a checkpoint saved with that flag could not be run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ._internals import decoder_of, load_balancing_loss_func

ASK = "output_router_logits"


def prepare_router(student: PreTrainedModel) -> None:
    """Take the request for router logits off the config, where TRL puts it: the step asks for them itself.

    Raises:
        ValueError: if they were asked for, and this model does not say how its tokens are routed.
    """
    config: Any = student.config.get_text_config()
    if not getattr(config, ASK, False):
        return
    recordable = getattr(decoder_of(student), "_can_record_outputs", None) or {}
    if "router_logits" not in recordable or not _experts_per_token(config):
        raise ValueError(
            f"The config of {type(student).__name__} asks for a router's load-balancing loss (router_aux_loss_coef="
            f"{config.router_aux_loss_coef:g}), and its language model ({config.model_type}) does not give out what that is computed "
            "from. Train without it: --router_aux_loss_coef 0."
        )
    setattr(config, ASK, False)


@contextmanager
def routed(student: PreTrainedModel, *, asked: bool) -> Iterator[list[torch.Tensor]]:
    """Collect the router's logits of the forwards inside the context: (B x T, E) for each layer that routes among E experts."""
    found: list[torch.Tensor] = []
    if not asked:
        yield found
        return

    def ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, ASK: True}

    def take(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        found.extend(logits.reshape(-1, logits.shape[-1]) for logits in output["router_logits"])
        return type(output)(**{name: value for name, value in output.items() if name != "router_logits"})

    decoder = decoder_of(student)
    hooks = [decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(take)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def router_loss(
    student: PreTrainedModel, logits: list[torch.Tensor], attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The load-balancing loss, (), as TRL's fused forward computes it; None where no logits were collected.

    logits: see `routed`. attention_mask: (B, T); padding is not routed.
    """
    if not logits:
        return None
    top_k = _experts_per_token(student.config.get_text_config())
    layers: Any = tuple(logits)
    return torch.as_tensor(load_balancing_loss_func(layers, logits[0].shape[-1], top_k, attention_mask))


def _experts_per_token(config: Any) -> int | None:
    found: int | None = getattr(config, "num_experts_per_tok", None)
    return found
