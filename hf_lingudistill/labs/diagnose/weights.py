"""How far the weights of a VLM's language model have moved from those of the original."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..._internals import decoder_of

_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.\w+$")

# Two copies of the same weights, one of them saved in bf16, differ by at most this much.
BF16_ROUNDING = 2**-9


@dataclass(frozen=True)
class WeightDrift:
    """Relative Frobenius distances ||W_student - W_original|| / ||W_original||.

    layers: per layer, by matrix group (`q_proj`, ..., all normalisations of a layer as `norms`), and `all` over the whole layer.
    outside: `embeddings`, `final norm`, and `head` where it is not tied. not_compared: parameters that one of the two lacks or that
    differ in shape.
    """

    layers: list[dict[str, float]]
    outside: dict[str, float]
    not_compared: list[str]

    @property
    def largest(self) -> float:
        """The largest distance of any group; 0 where nothing could be compared."""
        return max((value for group in (*self.layers, self.outside) for value in group.values()), default=0.0)

    @property
    def ranking(self) -> list[int]:
        """Layers with weights that could be compared, the one that moved most first."""
        compared = [layer for layer, groups in enumerate(self.layers) if groups]
        return sorted(compared, key=lambda layer: -self.layers[layer]["all"])

    @property
    def drifted(self) -> bool:
        """False only where every weight was compared and none has moved by more than the rounding of bf16."""
        return self.largest > BF16_ROUNDING or bool(self.not_compared)


@dataclass
class _Squares:
    """Sums of squares over the tensors of a group."""

    difference: float = 0.0
    reference: float = 0.0

    def add(self, student: torch.Tensor, original: torch.Tensor) -> None:
        def square(x: torch.Tensor) -> float:
            return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2

        self.difference += square(student.float() - original.float())
        self.reference += square(original)

    @property
    def distance(self) -> float:
        return float((self.difference / self.reference) ** 0.5) if self.reference else float(self.difference > 0)


@dataclass
class _Groups:
    """Squares by group, in order of appearance."""

    squares: dict[str, _Squares] = field(default_factory=dict)

    def add(self, group: str, student: torch.Tensor, original: torch.Tensor) -> None:
        self.squares.setdefault(group, _Squares()).add(student, original)

    def distances(self) -> dict[str, float]:
        return {group: squares.distance for group, squares in self.squares.items()}


@torch.no_grad()
def weight_drift(student: PreTrainedModel, original: PreTrainedModel, shared_vocab_size: int) -> WeightDrift:
    """Compare the text backbones parameter by parameter; of embedding and head, the rows of shared tokens.

    Called before `prepare_teacher`, which enlarges the original's embedding.
    """
    ours, theirs = (dict(decoder_of(model).named_parameters()) for model in (student, original))
    layers = [_Groups() for _ in range(decoder_of(original).config.num_hidden_layers)]
    outside, not_compared = _Groups(), sorted(ours.keys() ^ theirs.keys())
    for name in [name for name in theirs if name in ours]:
        mine, reference = ours[name].data, theirs[name].data
        if name.startswith("embed_tokens"):
            mine, reference = mine[:shared_vocab_size], reference[:shared_vocab_size]
        if mine.shape != reference.shape:
            not_compared.append(name)
        elif inside := _IN_LAYER.match(name):
            layer, module = layers[int(inside[1])], inside[2].rsplit(".", 1)[-1]
            layer.add("norms" if "norm" in module else module, mine, reference)
            layer.add("all", mine, reference)
        else:
            outside.add(
                {"embed_tokens.weight": "embeddings", "norm.weight": "final norm"}.get(name, name), mine, reference
            )
    _compare_heads(student, original, shared_vocab_size, outside)
    return WeightDrift([layer.distances() for layer in layers], outside.distances(), not_compared)


def _compare_heads(student: PreTrainedModel, original: PreTrainedModel, shared: int, outside: _Groups) -> None:
    def tied(model: Any) -> bool:
        return bool(model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr())

    heads = [model.get_output_embeddings().weight[:shared] for model in (student, original)]
    if heads[0].shape == heads[1].shape and not (tied(student) and tied(original)):
        outside.add("head", *heads)
