"""The vision part of a VLM: which weights it is, and whether they are trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ._internals import decoder_of, own_name

_BY_US = "_frozen_by_lingudistill"


def vision_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters of a VLM outside of its language model, by name: tower and projector."""
    language = [decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings()]
    known = {id(weight) for module in language if module is not None for weight in module.parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) not in known}


def trains_vision(model: PreTrainedModel) -> bool:
    """Whether a parameter outside of the language model is trained."""
    return any(weight.requires_grad for weight in vision_parameters(model).values())


def adapted(model: PreTrainedModel) -> str | None:
    """The first parameter outside of the language model that is an adapter's."""
    return next((name for name in vision_parameters(model) if own_name(model, name) is None), None)


def freeze_vision(model: PreTrainedModel) -> None:
    """Leave everything outside of the language model as it is.

    Raises:
        ValueError: if an adapter reaches it.
    """
    if (name := adapted(model)) is not None:
        raise ValueError(
            f"freeze_vision leaves the vision tower as it is, and the adapter reaches it ({name}): name the decoder's layers with "
            "lora_target_modules, or leave freeze_vision out."
        )
    for weight in vision_parameters(model).values():
        if weight.requires_grad:
            weight.requires_grad_(False)
            setattr(weight, _BY_US, True)


def thaw_vision(model: PreTrainedModel) -> bool:
    """Undo `freeze_vision`, of an earlier trainer of the same model; what its owner has frozen stays so. -> whether some of it is trained."""
    for weight in vision_parameters(model).values():
        if getattr(weight, _BY_US, False):
            weight.requires_grad_(True)
            delattr(weight, _BY_US)
    return trains_vision(model)
