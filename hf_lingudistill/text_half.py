"""A VLM's text half as a teacher: the VLM's own class, without what lies beside its decoder and head.

Many VLMs have no causal LM of their own in transformers, and their text half may differ from its namesake (M-RoPE, gates, norms): the
VLM's class alone is sure to compute it as the VLM does.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def without_tower(vlm: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A VLM's class whose models have no vision tower and no projector: `from_pretrained` does not load them, and the forward of a
    text is the VLM's."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        vlm.__init__(self, config, *args, **kwargs)
        for path in _drop_tower(self):
            self._keys_to_ignore_on_load_unexpected.add(rf"^{re.escape(path)}\.")

    # Under the name and module of the VLM's class: transformers looks up by them how to rename a checkpoint's weights
    return type(vlm.__name__, (vlm,), {"__init__": init, "__module__": vlm.__module__, "__doc__": vlm.__doc__})


def _drop_tower(model: PreTrainedModel) -> list[str]:
    """Put None in place of every module that text does not run through. -> their paths."""
    wanted = {id(m) for m in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())}
    dropped = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in list(module.named_children()):
            if id(child) in wanted:
                continue
            if any(id(part) in wanted for part in child.modules()):
                visit(child, f"{prefix}{name}.")
            else:
                setattr(module, name, None)
                dropped.append(f"{prefix}{name}")

    visit(model, "")
    return dropped
