"""Steps whose loss or gradient is not finite: found before the weights change, and traced to their rows.

The loss is judged per row inside the student's forward and the gradient by its norm, both on the device; one small sum over the
processes per optimizer step makes all of them decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

NAMED_ROWS = 8  # in a message; the others are counted
IN_A_ROW = 10  # skipped steps after which no single row can be at fault


class NotFinite(FloatingPointError):
    """Training stopped at a loss, a gradient or a teacher that is not finite. The message names the rows and what to do."""


@dataclass
class _Batch:
    """input_ids: (B, T). row: (B,) row numbers, -1 where unknown. loss, teacher: (B,) bool, not finite."""

    input_ids: torch.Tensor
    row: torch.Tensor | None
    loss: torch.Tensor
    teacher: torch.Tensor


@dataclass(frozen=True)
class Problem:
    """What is not finite in an optimizer step, over all processes. rows: names of the rows at fault.

    in_weights: whether the student was broken before this step.
    """

    loss: bool
    teacher: bool
    gradient: bool
    rows: tuple[str, ...]
    in_weights: bool

    def __str__(self) -> str:
        named = ", ".join(self.rows[:NAMED_ROWS])
        if len(self.rows) > NAMED_ROWS:
            named += f" and {len(self.rows) - NAMED_ROWS} more"
        if self.in_weights:
            return "the student's weights are not finite: they were broken before this step"
        if self.loss:
            return f"the loss is not finite at {named}"
        if self.teacher:
            return f"the teacher's probabilities are not a number at {named}"
        return f"the gradient is not finite, although every loss is, in the step of {named}"


@dataclass
class FiniteWatch:
    """The batches since the last optimizer step, and which of their rows are not finite. tokenizer: to quote a row."""

    accelerator: Accelerator
    tokenizer: Any
    _batches: list[_Batch] = field(default_factory=list)

    @property
    def starts_step(self) -> bool:
        """Whether no batch has been seen since the last verdict."""
        return not self._batches

    def open(self, input_ids: torch.Tensor, row: torch.Tensor | None) -> None:
        """Begin a batch. input_ids: (B, T). row: (B,) row numbers, -1 where unknown."""
        fine = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self._batches.append(_Batch(input_ids, row, fine, fine.clone()))

    def judge_teacher(self, log_prob: torch.Tensor, rows: torch.Tensor) -> None:
        """log_prob, rows: (N,) the teacher's log-probability of each label, and the row of the batch it is in.

        Called before `judge_loss`: a teacher that reads keys and values of NaN is not at fault itself.
        """
        if self._batches:
            batch = self._batches[-1]
            found = torch.zeros_like(batch.teacher, dtype=torch.int32)
            batch.teacher |= found.index_add_(0, rows, torch.isnan(log_prob).int()) > 0

    def judge_loss(self, student_ce: torch.Tensor, per_token: torch.Tensor | None = None) -> None:
        """student_ce: (B, T - 1) cross-entropies of the batch that was begun last. per_token: (B, T - 1) its losses."""
        if self._batches:
            batch = self._batches[-1]
            batch.loss |= ~torch.isfinite(student_ce.detach()).all(dim=1)
            batch.teacher &= ~batch.loss
            if per_token is not None:
                batch.loss |= ~torch.isfinite(per_token.detach()).all(dim=1) & ~batch.teacher

    def verdict(self, model: torch.nn.Module, grad_norm: Any = None) -> Problem | None:
        """End the optimizer step: None if loss, teacher and gradient were finite on every process. Called by all of them."""
        batches, self._batches = self._batches, []
        device = self.accelerator.device
        flags = torch.zeros(3, dtype=torch.int32, device=device)
        for batch in batches:
            flags[0] += batch.loss.any()
            flags[1] += batch.teacher.any()
        if grad_norm is not None:
            flags[2] += ~torch.isfinite(torch.as_tensor(_whole(grad_norm), device=device))
        loss, teacher, gradient = (count > 0 for count in self.accelerator.reduce(flags, reduction="sum").tolist())
        if gradient and not (loss or teacher) and self._scaler_copes():
            return None
        if not (loss or teacher or gradient):
            return None
        broken = torch.zeros(1, dtype=torch.int32, device=device)
        for parameter in model.parameters():
            broken += ~torch.isfinite(_local(parameter.detach())).all()
        in_weights = bool(self.accelerator.reduce(broken, reduction="sum").item())
        rows = gather_object([name for batch in batches for name in self._names(batch, loss, teacher)])
        return Problem(loss, teacher, gradient, tuple(dict.fromkeys(rows)), in_weights)

    def _scaler_copes(self) -> bool:
        """An fp16 gradient overflows until the loss scale fits, and the scaler skips such steps; below 1 it never will."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1.0

    def _names(self, batch: _Batch, loss: bool, teacher: bool) -> list[str]:
        at_fault = batch.loss if loss else batch.teacher if teacher else torch.ones_like(batch.loss)
        return [self._name(batch, int(index)) for index in at_fault.nonzero().flatten()]

    def _name(self, batch: _Batch, index: int) -> str:
        text = " ".join(self.tokenizer.decode(batch.input_ids[index], skip_special_tokens=True).split())
        number = -1 if batch.row is None or len(batch.row) != len(batch.input_ids) else int(batch.row[index])
        return f"row {number} ({text[:60]!r})" if number >= 0 else f"the row that begins {text[:60]!r}"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
