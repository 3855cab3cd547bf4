"""Where an adapter goes if nobody says: to the linear layers of the text decoder, for a model that PEFT has no default for."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

logger = logging.getLogger(__name__)


def with_targets(
    peft_config: Any, student: Any, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A LoRA configuration that names what it adapts, where PEFT would ask for it; any other as it is.

    Args:
        peft_config: of PEFT, or None.
        student: the model that it is for, or its Hub id or folder, of which the config alone is read.
        revision, trust_remote_code: of the student on the Hub.
    """
    if peft_config is None or not _names_nothing(peft_config):
        return peft_config
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if isinstance(student, str):
        config = AutoConfig.from_pretrained(student, revision=revision, trust_remote_code=trust_remote_code)
        if config.model_type in DEFAULTS:
            return peft_config
        with torch.device("meta"):
            student = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    kind = student.config.model_type
    if kind in DEFAULTS:
        return peft_config
    decoder = student.get_decoder()
    place = next(name for name, module in student.named_modules() if module is decoder)
    layers = sorted(
        {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    )
    named = copy.copy(peft_config)
    named.target_modules = rf"{re.escape(place)}\..*\b({'|'.join(map(re.escape, layers))})"
    logger.warning(
        "The adapter names no layers, and PEFT has no default for %r: it goes to the linear layers of the text decoder (%s: %s). "
        "lora_target_modules chooses others.",
        kind,
        place,
        ", ".join(layers),
    )
    return named


def _names_nothing(peft_config: Any) -> bool:
    # `layers_to_transform` picks among layers that are named, and says nothing of a pattern
    wanted = ("target_modules", "target_parameters", "layers_to_transform")
    return getattr(peft_config, "peft_type", None) == "LORA" and not any(getattr(peft_config, n, None) for n in wanted)


def check_adapter_name(model: Any, args: Any) -> None:
    """Refuse an adapter of the caller's own that transformers saves where it does not look for it.

    Raises:
        ValueError: if the active adapter is not called `default`, and checkpoints are written.
    """
    active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]
    if active != ["default"] and args.save_strategy != "no":
        raise ValueError(
            f"The active adapter is called {', '.join(map(repr, active))}: transformers saves such a one into a folder of its own in each "
            "checkpoint, and neither resumes from there nor loads the best one from there. Call it 'default' (get_peft_model does), or set "
            "save_strategy='no'."
        )


def check_mergeable(model: Any) -> None:
    """Refuse to merge an adapter into an embedding that is the output head as well.

    Raises:
        ValueError: if merging would change what the model says: at the head, the adapter of the embedding has no part in training.
    """
    student = model.get_base_model()
    embeddings, head = student.get_input_embeddings(), student.get_output_embeddings()
    if isinstance(embeddings, BaseTunerLayer) and _weight_of(embeddings) is _weight_of(head):
        raise ValueError(
            "merge_adapter=True cannot merge an adapter of the input embeddings here: the output head has the same weights, and would be changed "
            "with them. Leave the embeddings out of lora_target_modules (modules_to_save takes them), or leave merge_adapter out."
        )


def _weight_of(layer: Any) -> Any:
    return getattr(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer, "weight", None)
