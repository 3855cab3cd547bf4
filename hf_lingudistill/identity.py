"""What kept answers belong to: a model's weights and its config, the processor, and how a row becomes tokens, as facts for a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ._internals import own_name
from ._version import __version__

# Of a config, what changes no hidden state. `vocab_size`: a teacher takes on the student's
_VOLATILE = frozenset(
    ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict", "vocab_size")
    + ("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef")
    + ("id2label", "label2id", "problem_type", "bos_token_id", "eos_token_id", "pad_token_id")
)


def weights_digest(model: nn.Module, *, vocabulary: int | None = None, adapter_off: bool = False) -> str:
    """A hash of a model's weights and lasting buffers.

    vocabulary: rows of head and embeddings behind it are padding, and left out. adapter_off: what an adapter added is not asked, and left out.
    """
    found, padded = hashlib.sha256(), set()
    if vocabulary is not None:
        ends: Any = (model.get_output_embeddings(), model.get_input_embeddings())  # type: ignore[operator]
        rows = len(ends[0].weight)
        padded = {id(p) for end in ends for p in end.parameters() if len(p) == rows > vocabulary}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        own = own_name(model, name)
        if isinstance(tensor, torch.Tensor) and not (own is None and adapter_off):
            found.update(f"{own or name}{tensor.dtype}".encode())
            tensor = tensor.detach()[:vocabulary] if id(tensor) in padded else tensor.detach()
            found.update(tensor.to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)
    for name, module in model.named_modules():
        if (
            isinstance(module, BaseTunerLayer) and not adapter_off
        ):  # an adapter's own numbers, and which of several is on
            found.update(
                f"{name}{getattr(module, 'scaling', None)}{module.active_adapters}{module.disable_adapters}".encode()
            )
    return found.hexdigest()[:16]


def config_facts(of: str, config: Any) -> dict[str, Any]:
    """Every value of a model's config that its answers may depend on, one by one. of: whose config it is."""
    return _flat(of, config.to_dict())


def processor_facts(processing: Any) -> dict[str, Any]:
    """The same of what makes the images of a run; nothing of a tokenizer, whose tokens are in the rows."""
    return _flat("processor", processing.to_dict()) if hasattr(processing, "image_processor") else {}


def reading_digest(collator: Any, processing: Any) -> str | None:
    """A hash of what decides which tokens, labels and pixels a row becomes; None where a collator of the caller's own does.

    collator: a `DistillCollator`. processing: a processor or tokenizer.
    """
    if not type(collator.inner).__module__.startswith("trl."):
        return None
    found = {
        (type(one).__name__, f.name): getattr(one, f.name) for one in (collator, collator.inner) for f in fields(one)
    }
    settings = [[*key, value] for key, value in found.items() if isinstance(value, str | int | float | tuple | None)]
    tokenizer = getattr(processing, "tokenizer", processing)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    words |= {"padding": None, "truncation": None}  # left behind by the last call
    templates = [getattr(one, "chat_template", None) for one in (processing, tokenizer)]
    packages = [__version__, *map(version, ("transformers", "trl"))]
    return digest([settings, words, tokenizer.special_tokens_map, templates, processor_facts(processing), packages])


def digest(facts: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _flat(of: str, values: Mapping[Any, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} of "x" -> {"x: a.b": 1}, with JSON values, and without what is volatile, private or None."""
    found: dict[str, Any] = {}
    between = "." if ": " in of else ": "
    for name, value in values.items():
        if name in _VOLATILE or str(name).startswith("_") or value is None:
            continue
        if isinstance(value, Mapping):
            found |= _flat(f"{of}{between}{name}", value)
        else:
            found[f"{of}{between}{name}"] = json.loads(json.dumps(value, default=str))
    return found
