"""What quantisation costs the teacher is a divergence from the whole one, in the direction that the card names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_lingudistill._internals import Head
from hf_lingudistill.first_batch import FirstBatch


def test_the_cost_of_quantisation_is_kl_of_the_whole_teacher_to_the_quantised_one_and_measured_once() -> None:
    quantised, whole, head = torch.randn(5, 4), torch.randn(5, 4), Head(torch.randn(9, 4), None, 1.0, None)
    log_q, log_p = ((hidden @ head.matrix.T).log_softmax(dim=-1) for hidden in (quantised, whole))
    passes: list[Any] = []
    mode: Any = SimpleNamespace(reads_student=True, teacher_pass=lambda *of: passes.append(of) or whole)
    teacher: Any = SimpleNamespace(head=head, model=None)
    plan: Any = SimpleNamespace(num_loss=5)
    first = FirstBatch(mode, teacher, whole_teacher=lambda: teacher, compare_sharing=False)
    first.answered(None, plan, quantised)  # type: ignore[arg-type]
    first.answered(None, plan, whole)  # type: ignore[arg-type]
    expected, other = (float((a.exp() * (a - b)).sum(-1).mean()) for a, b in ((log_p, log_q), (log_q, log_p)))
    assert first.quantization_kl == pytest.approx(expected, rel=1e-5) != pytest.approx(other, rel=1e-2)
    assert len(passes) == 1
