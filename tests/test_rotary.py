"""Orders of rotary embeddings, and the dimensions that attention turns by them."""

from __future__ import annotations

import torch
from torch import nn

from hf_lingudistill.rotary import order, order_of, reordered, shown, turned

ANGLES = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0))
HALVES, PAIRS = torch.cat([ANGLES, ANGLES], -1), ANGLES.repeat_interleave(2, -1)


def cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return angles.cos(), angles.sin()


def test_orders_are_told_apart() -> None:
    given = [cos_sin(x) for x in (HALVES, PAIRS, ANGLES, torch.zeros(1, 3, 8))] + [torch.polar(ANGLES, ANGLES)]
    assert [order(x) for x in given] == ["halves", "pairs", "once", "", "complex"]
    assert [shown(x).split(" (")[0] for x in given if order(x)] == [
        "8 values in halves",
        "8 values in pairs",
        "4 values, each once",
        "4 complex numbers",
    ]


def test_each_order_becomes_the_other_and_no_third() -> None:
    halves, pairs, once = map(cos_sin, (HALVES, PAIRS, ANGLES))
    for ours, theirs, wanted in ((halves, pairs, "pairs"), (pairs, halves, "halves")):
        for got, expected in zip(reordered(ours, order(ours), wanted), theirs, strict=True):
            assert torch.equal(got, expected)
    assert reordered(once, "once", "pairs") is once
    assert reordered(halves, "halves", "halves") is halves
    assert reordered(halves, "halves", "") is halves  # not known: as it is


def test_a_module_is_looked_at_once_and_not_at_position_0() -> None:
    module, calls = nn.Module(), []

    def giving(angles: torch.Tensor) -> str:
        return order_of(module, None, lambda: calls.append(1) or cos_sin(angles))  # type: ignore[func-returns-value]

    assert [giving(torch.zeros(1, 1, 8)), giving(PAIRS), giving(PAIRS)] == ["", "pairs", "pairs"]
    assert len(calls) == 2


def test_turned_dimensions_are_seen_in_the_keys() -> None:
    key = torch.randn(1, 2, 1, 12, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])

    def rotate(x: torch.Tensor, one: slice, other: slice) -> torch.Tensor:
        found = x.expand(-1, -1, 6, -1).clone()
        a, b = found[..., :8][..., one].clone(), found[..., :8][..., other].clone()
        found[..., :8][..., one] = a * positions.cos() - b * positions.sin()
        found[..., :8][..., other] = b * positions.cos() + a * positions.sin()
        return found

    halves = rotate(key, slice(0, 4), slice(4, 8))
    neighbours = rotate(key, slice(0, 8, 2), slice(1, 8, 2))
    assert turned(halves, 8) == turned(halves.bfloat16(), 8) == {"halves"}
    assert turned(neighbours, 8) == turned(neighbours.bfloat16(), 8) == {"pairs"}
    assert turned(key.expand(-1, -1, 6, -1), 8) == {"halves", "pairs"}  # not turned at all: nothing to be told
    assert turned(torch.randn(1, 2, 6, 12, generator=torch.Generator().manual_seed(2)), 8) == set()
