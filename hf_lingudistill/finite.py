"""Steps whose loss or gradient is not finite: found before the weights change, traced to their rows, skipped or the end.

The loss is judged per row inside the student's forward and the gradient by its norm, both on the device; one small sum over the
processes per optimizer step makes all of them decide alike.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from ._internals import Head
from .losses import Scores
from .queries import QueryPlan
from .watcher import Watcher

logger = logging.getLogger(__name__)

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
class FiniteWatch(Watcher):
    """The batches since the last optimizer step, and which of their rows are not finite. tokenizer: to quote a row."""

    accelerator: Accelerator
    tokenizer: Any
    _batches: list[_Batch] = field(default_factory=list)

    @property
    def starts_step(self) -> bool:
        """Whether no batch has been seen since the last verdict."""
        return not self._batches

    def begin(self) -> None:
        """A training begins: batches of one before it, that was broken off, are not of it."""
        self._batches = []

    def open(self, input_ids: torch.Tensor, row: torch.Tensor | None) -> None:
        """Begin a batch. input_ids: (B, T). row: (B,) row numbers, -1 where unknown."""
        fine = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self._batches.append(_Batch(input_ids, row, fine, fine.clone()))

    def scored(
        self, inputs: dict[str, Any], plan: QueryPlan, teacher_head: Head, scores: Scores, training: bool
    ) -> None:
        """A teacher that reads keys and values of NaN is not at fault itself: where the student's loss is not finite, that is it."""
        if not (training and self._batches):
            return
        batch = self._batches[-1]
        lost = _rows_with(~torch.isfinite(scores.cross_entropy), plan.label_rows, batch.loss)
        taught = _rows_with(torch.isnan(scores.teacher_log_prob), plan.loss_rows, batch.loss) & ~lost
        batch.teacher |= taught
        batch.loss |= lost | (_rows_with(~torch.isfinite(scores.loss), plan.label_rows, batch.loss) & ~taught)

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


class StepPolicy:
    """What becomes of a step: it takes place, it is left out, or it ends the run, as `on_nan` says.

    watch: what looked on at its batches. skipped_steps: how many were left out.
    """

    def __init__(self, watch: FiniteWatch, on_nan: str) -> None:
        self.watch, self.on_nan = watch, on_nan
        self.begin_training()

    def begin_training(self) -> None:
        self.skipped_steps = self._in_a_row = 0
        self._metrics_before: dict[str, list[float]] = {}
        self._before: dict[str, Any] = {}
        self.watch.begin()

    def begin(self, trainer: Any, input_ids: torch.Tensor, rows: torch.Tensor | None) -> None:
        """A batch of a training step begins. input_ids: (B, T). rows: (B,) row numbers, -1 where unknown."""
        if self.watch.starts_step:
            self._metrics_before = {name: list(values) for name, values in trainer._metrics["train"].items()}
            # The sums that this step's batches go into before it is judged
            self._before = {
                name: copy.deepcopy(getattr(trainer, name, None)) for name in ("_tr_loss", "_total_train_tokens")
            }
        self.watch.open(input_ids, rows)

    def judge(self, trainer: Any, model: torch.nn.Module, grad_norm: Any = None) -> None:
        """Between the backward pass and the optimizer, on every process.

        Raises:
            NotFinite: if the run ends here.
        """
        problem = self.watch.verdict(model, grad_norm)
        if problem is None:
            trainer.meter.accepted()
            self._in_a_row = 0
            return
        trainer.meter.dropped()
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(self._metrics_before)
        trainer.optimizer.zero_grad(
            set_to_none=True
        )  # without gradients the optimizer leaves weights and moments alone
        self._in_a_row += 1
        if self.on_nan == "stop" or problem.in_weights or self._in_a_row > IN_A_ROW:
            self._stop(trainer, model, problem)
        self._put_back(trainer)
        # It is no step to divide a sum of losses by
        trainer._globalstep_last_logged += 1
        trainer._initial_global_step = (
            getattr(trainer, "_initial_global_step", 0) + 1
        )  # not in transformers' oldest releases
        self.skipped_steps += 1
        logger.warning("Step %d skipped: %s.", trainer.state.global_step + 1, problem)

    def _put_back(self, trainer: Any) -> None:
        """Take what the step's batches have added out of the sums."""
        for name, value in self._before.items():
            setattr(trainer, name, value)

    def _stop(self, trainer: Any, model: torch.nn.Module, problem: Problem) -> None:
        step = trainer.state.global_step
        message = f"Training stopped in step {step + 1}: {problem}. "
        if problem.in_weights:
            raise NotFinite(message + "Go back to a checkpoint from before, or load another model.")
        saved = trainer.args.save_strategy != "no" and step > 0
        if saved:
            trainer.keep_checkpoint(model)  # of the sums before this step
        message += f"The weights are those of step {step}{f', saved in checkpoint-{step}' if saved else ''}. "
        persists = self._in_a_row > IN_A_ROW
        if persists:
            message += f"The {IN_A_ROW} steps before it were skipped as well. "
        if problem.teacher and not problem.loss:
            message += "Try teacher_quantization='none', or bf16"
        elif problem.loss and not persists:
            message += "Repair or remove what is named"
        else:
            message += "Lower learning_rate, or use bf16 in place of fp16"
        raise NotFinite(message + ("." if persists else ", or pass --on_nan skip to leave such steps out."))


def _rows_with(found: torch.Tensor, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) bool: rows of the batch in which something was found. found, rows: (M,) and the row of each."""
    return torch.zeros_like(like, dtype=torch.int32).index_add_(0, rows, found.int()) > 0


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
