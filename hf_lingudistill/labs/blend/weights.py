"""Weights between two VLMs of one build: (1 - w) * before + w * after, with one w or one for each layer."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from ...identity import digest
from ...weights import check_finite, load_whole

SHARES = ("uniform", "drift")
_LAYER = re.compile(r"layers\.(\d+)\.")


class NotBlendable(ValueError):
    """Two models that are not of one build."""


@dataclass(frozen=True)
class Blend:
    """One point between two VLMs. weight: the share of the VLM after, 0 to 1. shares: `uniform`, or `drift`: of layers whose weights have
    moved further from the original, more. drift: by layer of the decoder, and by `embeddings`, `head` and `final norm`: distances as
    `diagnose` measures them; empty for uniform."""

    weight: float
    shares: str
    drift: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.shares}-{self.weight:g}"

    def share(self, group: str) -> float:
        """Of the VLM after, in a group of weights: weight ** (mean drift / drift of the group).

        0 and 1 stay 0 and 1, the average layer has the weight itself, and a layer that has not moved is left as it was before.
        """
        drift = dict(self.drift)
        if group not in drift or self.weight in (0.0, 1.0):
            return self.weight
        mean = sum(drift.values()) / len(drift)
        if mean == 0.0:
            return self.weight
        return 0.0 if drift[group] == 0.0 else float(self.weight ** (mean / drift[group]))

    def fingerprint(self, before: str, after: str) -> str:
        """Changes with the weights of the blend, as those of files do."""
        return digest(["blend", before, after, self.weight, self.shares, self.drift])


def drift_of(report: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The shares of `Blend` from weights that `weight_drift` compared. report: `{"layers": [...], "outside": {...}}`.

    Raises:
        NotBlendable: if not every layer could be compared.
    """
    layers = [(str(number), layer.get("all")) for number, layer in enumerate(report["layers"])]
    if any(distance is None for _, distance in layers):
        raise NotBlendable("Not every layer has the shape of the original's: use --shares uniform.")
    return (*((name, float(distance or 0.0)) for name, distance in layers), *report["outside"].items())


def group_of(name: str, decoder: str) -> str:
    """The group of a parameter, as `weight_drift` calls them; `outside` for the vision tower and whatever lies beside the decoder."""
    if not name.startswith(decoder):
        return "head" if re.search(r"(^|\.)lm_head\.", name) else "outside"
    inner = name[len(decoder) :]
    if match := _LAYER.match(inner):
        return match[1]
    return {"embed_tokens.weight": "embeddings", "norm.weight": "final norm"}.get(inner, "outside")


@torch.no_grad()
def blend_into(model: Any, after_path: str, blend: Blend, *, trust_remote_code: bool = False) -> None:
    """Move a loaded VLM before towards the VLM after, in place; computed in fp32, kept in the dtype of the model.

    Raises:
        NotBlendable: if the two differ in class, in names or shapes of weights, or in whether the head is tied.
        BadWeights: if some of those of the VLM after are missing or not finite.
    """
    after = load_whole(
        AutoModelForImageTextToText,
        after_path,
        dtype=model.dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    check_alike(model, after)
    check_finite(after.named_parameters(), after_path)
    theirs = dict(after.named_parameters())
    decoder = decoder_prefix(model)
    for name, weight in model.named_parameters():
        share = blend.share(group_of(name, decoder))
        mine = weight.float()
        # lerp is exact at both ends
        weight.copy_(torch.lerp(mine, theirs[name].to(weight.device).float(), share))
    del after, theirs
    gc.collect()


def decoder_prefix(model: Any) -> str:
    """How the names of the text decoder's parameters begin."""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder), "")


def check_alike(before: Any, after: Any) -> None:
    """Raise NotBlendable where a weight of one has no counterpart in the other."""

    def tied(model: Any) -> bool:
        return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)

    if type(before) is not type(after):
        raise NotBlendable(
            f"before is a {type(before).__name__} and after a {type(after).__name__}: expected two VLMs of one build."
        )
    if tied(before) is not tied(after):
        raise NotBlendable(
            f"The head of {'before' if tied(before) else 'after'} is tied to its embeddings, the other's is not: save both alike."
        )
    ours, theirs = dict(before.named_parameters()), dict(after.named_parameters())
    for name in sorted({*ours, *theirs}):
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one.shape != other.shape:
            raise NotBlendable(f"{name}: {_shape(one)} before, {_shape(other)} after. Expected two VLMs of one build.")


def _shape(weight: torch.Tensor | None) -> str:
    return "missing" if weight is None else str(tuple(weight.shape))
