"""What is logged is that of all processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_lingudistill.meter import Meter


def meter_beside(ce_elsewhere: list[float], *, training: bool) -> Meter:
    """A meter that has seen two tokens of 1 and 3 nats, on one of two processes; the other saw tokens of these."""

    def scored(ce: list[float]) -> Any:
        nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        return SimpleNamespace(
            cross_entropy=torch.tensor(ce),
            divergence=nothing,
            chosen=none,
            teacher_log_prob=nothing,
            agrees=none,
            teacher_entropy=nothing,
            anchored=none,
            anchor_kl=nothing,
        )

    def seen(accelerator: Any, ce: list[float]) -> Meter:
        meter = Meter(accelerator, distill_tokens="all")
        meter.scored({}, None, None, scored(ce), training)  # type: ignore[arg-type]
        meter.accepted()
        return meter

    device = torch.device("cpu")
    elsewhere = seen(SimpleNamespace(device=device), ce_elsewhere)
    theirs = elsewhere._train if training else elsewhere._eval
    reduce = lambda ours, reduction: ours + theirs[: len(ours)] if reduction == "sum" else ours  # noqa: E731
    return seen(SimpleNamespace(device=device, reduce=reduce), [1.0, 3.0])


@pytest.mark.parametrize("training", [True, False])
def test_means_are_over_the_tokens_of_all_processes(training: bool) -> None:
    meter = meter_beside([7.0, 7.0, 7.0], training=training)
    if not training:
        assert meter.evaluated_ce() == pytest.approx(5.0)
    read = meter.read(training=training)
    assert read["ce_loss"] == pytest.approx(5.0) and read["answer_tokens"] == 5
    assert meter_beside([], training=training).read(training=training)["ce_loss"] == pytest.approx(2.0)  # control
