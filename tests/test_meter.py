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
        plan: Any = SimpleNamespace(label_rows=torch.zeros(len(ce), dtype=torch.long), batch=1)
        meter.scored({}, plan, None, scored(ce), training)  # type: ignore[arg-type]
        meter.accepted()
        return meter

    device, one = torch.device("cpu"), {"gradient_state": SimpleNamespace(end_of_dataloader=False)}
    elsewhere = seen(SimpleNamespace(device=device, **one), ce_elsewhere)
    theirs = elsewhere._train if training else elsewhere._eval
    reduce = lambda ours, reduction: ours + theirs[: len(ours)] if reduction == "sum" else ours  # noqa: E731
    return seen(SimpleNamespace(device=device, reduce=reduce, **one), [1.0, 3.0])


@pytest.mark.parametrize("training", [True, False])
def test_means_are_over_the_tokens_of_all_processes(training: bool) -> None:
    meter = meter_beside([7.0, 7.0, 7.0], training=training)
    if not training:
        assert meter.evaluated_ce() == pytest.approx(5.0)
    read = meter.read(training=training)
    assert read["ce_loss"] == pytest.approx(5.0) and read["answer_tokens"] == 5
    assert meter_beside([], training=training).read(training=training)["ce_loss"] == pytest.approx(2.0)  # control


@pytest.mark.parametrize(
    ("state", "process", "counted"),
    [
        ({"end_of_dataloader": True, "remainder": 3}, 0, [True, True]),
        ({"end_of_dataloader": True, "remainder": 3}, 1, [True, False]),
        ({"end_of_dataloader": True, "remainder": 1}, 1, [False, False]),
        ({"end_of_dataloader": True, "remainder": 0}, 1, [True, True]),
        ({"end_of_dataloader": True, "remainder": -1}, 1, [True, True]),
        ({"end_of_dataloader": False, "remainder": 1}, 1, [True, True]),
    ],
)
def test_rows_that_fill_the_last_batch_do_not_count(state: dict[str, Any], process: int, counted: list[bool]) -> None:
    """Two processes with batches of two rows; the second row has two labels."""
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), gradient_state=SimpleNamespace(**state), num_processes=2, process_index=process
    )
    plan: Any = SimpleNamespace(label_rows=torch.tensor([0, 1, 1]), batch=2)
    of_labels = [counted[0], counted[1], counted[1]]
    assert Meter(accelerator, distill_tokens=None)._counted(plan).tolist() == of_labels
    assert (
        Meter(accelerator, distill_tokens=None, joins_rows=True)._counted(plan).all()
    )  # which row is which is not known there
    alone: Any = SimpleNamespace(**{**vars(accelerator), "num_processes": 1})
    assert Meter(alone, distill_tokens=None)._counted(plan).all()  # control


def test_an_evaluation_leaves_out_the_rows_that_fill_its_last_batch() -> None:
    def evaluated(*, end: bool) -> dict[str, float]:
        accelerator: Any = SimpleNamespace(
            device=torch.device("cpu"),
            gradient_state=SimpleNamespace(end_of_dataloader=end, remainder=1),
            num_processes=2,
            process_index=0,
            reduce=lambda sums, reduction: sums,
        )
        meter = Meter(accelerator, distill_tokens="all")
        # Labels of rows 0, 1 and 1; the first two are distilled, the third is judged by the VLM before
        scores: Any = SimpleNamespace(
            cross_entropy=torch.tensor([1.0, 3.0, 8.0]),
            divergence=torch.tensor([0.5, 0.7]),
            chosen=torch.tensor([True, True]),
            teacher_log_prob=torch.tensor([-2.0, -4.0]),
            agrees=torch.tensor([True, False]),
            teacher_entropy=torch.tensor([1.0, 2.0]),
            anchored=torch.tensor([True]),
            anchor_kl=torch.tensor([0.9]),
        )
        plan: Any = SimpleNamespace(label_rows=torch.tensor([0, 1, 1]), batch=2)
        meter.scored({}, plan, None, scores, False)  # type: ignore[arg-type]
        return meter.read(training=False)

    assert evaluated(end=True) == pytest.approx(
        {
            "ce_loss": 1.0,
            "answer_tokens": 1.0,
            "distilled_tokens": 1.0,
            "kd_loss": 0.5,
            "teacher_ce": 2.0,
            "student_ce": 1.0,
            "teacher_agreement": 1.0,
            "teacher_entropy": 1.0,
            "confident_share": 1.0,
        }
    )
    whole = evaluated(end=False)  # control
    assert (
        whole["answer_tokens"] == 3
        and whole["ce_loss"] == pytest.approx(4.0)
        and whole["anchor_kl"] == pytest.approx(0.9)
    )
