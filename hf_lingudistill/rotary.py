"""Rotary embeddings: in which order a module gives its angles, and which dimensions attention turns by them.

Each angle turns two dimensions of a query or key, and is given twice. Attention pairs either the two halves of a head (Llama, Qwen) or
neighbours (GLM, ERNIE), and a module need not give its angles in that order: GLM-4's gives halves, which its attention puts in pairs; that
of GLM-4.1V, which was built on it, gives pairs. The keys of the two are turned alike, so that the angles alone have to be reordered.

Shapes: B rows, T positions, H heads, D head size, D_rot dimensions that are turned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

Rotary = tuple[torch.Tensor, ...] | torch.Tensor  # (cos, sin), each (B or 1, T, D_rot), or complex numbers

HALVES, PAIRS = "halves", "pairs"
_REORDERED = {HALVES, PAIRS}
# Looked at once for each module: to compare values, a device must have computed them
_ORDERS: WeakKeyDictionary[nn.Module, dict[str | None, str]] = WeakKeyDictionary()


def order(rotary: Rotary) -> str:
    """`halves` (0, 1, ..., 0, 1, ...), `pairs` (0, 0, 1, 1, ...), `once`, `complex`; empty where nothing is turned, and all are alike."""
    if not isinstance(rotary, tuple):
        return "complex"
    parts = torch.stack([part.float() for part in rotary])
    size = parts.shape[-1]
    if size % 2:
        return "once"
    in_halves = torch.equal(parts[..., : size // 2], parts[..., size // 2 :])
    in_pairs = torch.equal(parts[..., 0::2], parts[..., 1::2])
    if in_halves and in_pairs:
        return ""
    return HALVES if in_halves else PAIRS if in_pairs else "once"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def order_of(module: nn.Module, layer_type: str | None, output: Callable[[], Rotary]) -> str:
    """`order` of what a rotary module gives. output: called where it is not known yet."""
    known = _ORDERS.setdefault(module, {})
    if layer_type not in known:
        if not (found := order(output())):
            return ""
        known[layer_type] = found
    return known[layer_type]


def reordered(rotary: Rotary, given: str, wanted: str) -> Rotary:
    """Angles in another order; as they are where the two orders are not halves and pairs."""
    if {given, wanted} != _REORDERED or not isinstance(rotary, tuple):
        return rotary
    if given == PAIRS:
        return tuple(torch.cat([part[..., 0::2]] * 2, dim=-1) for part in rotary)
    return tuple(part[..., : part.shape[-1] // 2].repeat_interleave(2, dim=-1) for part in rotary)


def turned(keys: torch.Tensor, size: int) -> set[str]:
    """Which dimensions are turned together. Empty: not to be told.

    keys: (1, H, T, D) of one token at T positions, before which nothing mixed tokens: a rotation keeps the length of each two dimensions.
    size: D_rot.
    """
    rotated = keys[..., :size].float().square()
    lengths = {
        HALVES: rotated[..., : size // 2] + rotated[..., size // 2 :],
        PAIRS: rotated[..., 0::2] + rotated[..., 1::2],
    }
    return {name for name, kept in lengths.items() if _still(kept)}


def _still(lengths: torch.Tensor) -> bool:
    """(1, H, T, pairs): whether nothing changes along T, rounding of half precision aside."""
    mean = lengths.mean(dim=2, keepdim=True)
    return bool((lengths - mean).abs().mean() <= 0.02 * mean.mean())


def shown(rotary: Any) -> str:
    """The order in words, for an error."""
    if not isinstance(rotary, tuple):
        return f"{rotary.shape[-1]} complex numbers"
    words = {HALVES: "in halves (0, 1, ..., 0, 1, ...)", PAIRS: "in pairs (0, 0, 1, 1, ...)"}
    return f"{rotary[0].shape[-1]} values{' ' if (found := order(rotary)) in words else ', '}{words.get(found, 'each once')}"
