"""Checkpoints that appear whole or not at all, and runs that resume bit for bit, as a mixin for a trainer."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .checkpoints import (
    STATE,
    check_apart,
    check_output_dir,
    continues,
    go_on,
    has_written,
    keep_best,
    keep_edits,
    put_back,
    read_measured,
    rotate,
    staged,
    start_afresh,
    to_resume,
    wanted_checkpoint,
    write_measured,
)
from .engines import forget_evaluation
from .finite import StepPolicy
from .first_batch import FirstBatch
from .hub.run_facts import read_run_facts
from .meter import Meter
from .pace import NothingLeft, check_batches
from .same_run import check_same
from .step import DistillStep

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from trl import SFTTrainer as _Trainer
else:
    _Trainer = object  # at run time a trainer class stands behind the mixin


class ResumingMixin(_Trainer):
    """`Trainer`'s checkpoints, staged and with what was measured since the last log.

    Relies on the watchers and the teacher's name below, and on `_metrics` and `_total_train_tokens` of TRL's trainers. Call `_resuming` at the end of
    `__init__`.
    """

    args: Any
    meter: Meter
    policy: StepPolicy
    step: DistillStep
    first_batch: FirstBatch
    teacher_name_or_path: str
    decided: dict[str, Any]
    _staging: str | None = None
    _step_at_work: int | None = None  # the global step during which a batch was last trained on
    _before_step: dict[str, Any] | None = None
    _resumed_from: Path | None = None

    def _resuming(self) -> None:
        self.add_callback(_Restore(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, after checking that `output_dir` does not hold another run (unless this resumes it).

        A run that was killed between its last checkpoint and the saving of its model is resumed without a step: the model is as the checkpoint
        has it, and the train loss of the output is NaN.

        Raises:
            ValueError: if all parameters are frozen.
            NothingLeft: for a checkpoint of the last step, where `output_dir` holds the model already.
        """
        student: Any = self.model
        if not any(parameter.requires_grad for parameter in student.parameters()):
            of_vision = self.decided["freeze_vision"]
            raise ValueError(
                "Nothing can be trained: all parameters of the student are frozen (requires_grad=False)"
                f"{' but for those of the vision part, which freeze_vision leaves as they are' if of_vision else ''}. Set it to True for "
                f"those that are to be trained,{' set freeze_vision=False,' if of_vision else ''} or pass a peft_config."
            )
        out = str(self.args.output_dir)
        wanted = wanted_checkpoint(
            self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        )
        named = getattr(getattr(student, "config", None), "_name_or_path", None)
        check_apart(out, student=named, teacher=self.teacher_name_or_path)
        own = continues(wanted, out)
        if not own:
            check_output_dir(out, overwrite=self.args.overwrite_output_dir)
        elif self.accelerator.is_local_main_process:
            put_back(out)
        self.accelerator.wait_for_everyone()  # all have looked, and what was put aside is back
        checkpoint = None if wanted is None else to_resume(wanted, out)
        if checkpoint is not None and not hasattr(self.train_dataset, "__len__"):
            logger.warning(
                "The training set is a stream: the run goes on behind as many batches as it had, counted from the stream's start. If it had been at its "
                "end before, the rows are others than without the interruption."
            )
        if checkpoint is not None:
            check_same(self, Path(checkpoint), read_run_facts(checkpoint))
        if not own and self.accelerator.is_local_main_process:
            start_afresh(out)
        elif (
            checkpoint is not None and self.accelerator.is_local_main_process and (kept := keep_edits(out, checkpoint))
        ):
            logger.warning(
                "Settings in %s have been changed since they were saved, and are saved anew: %s", out, ", ".join(kept)
            )
        self._resumed_from = None if checkpoint is None else Path(checkpoint)
        forget_evaluation(self)
        try:
            return super().train(checkpoint, *args, **kwargs)
        except NothingLeft:
            # The first process decides: others may have a disk of their own
            (saved,) = broadcast_object_list([_saved_steps(out) == self.state.global_step])
            if saved or not own:
                raise
            return self._ended()

    def get_train_dataloader(self) -> Any:
        """`Trainer.get_train_dataloader`; without a batch, transformers would take it for a stream."""
        dataloader = super().get_train_dataloader()
        check_batches(dataloader, self.args)
        return dataloader

    def _ended(self) -> TrainOutput:
        """What follows the last step, of a run that a checkpoint brought there."""
        step = self.state.global_step
        if self.accelerator.is_main_process:
            logger.warning(
                "The checkpoint is at step %d of %d, and %s holds no model of that step: the run ends here without another step.",
                step, self.state.max_steps, self.args.output_dir,
            )  # fmt: skip
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(step, math.nan, {})

    def interrupted(self) -> str:
        """Where a training stood that Ctrl-C ended, and how it goes on."""
        return f"Interrupted at step {self.state.global_step}; {go_on(self.args.output_dir, self._resumed_from)}."

    def stopped(self) -> str:
        """Likewise of one that an error ended."""
        return f"Stopped in step {self.state.global_step + 1}; {go_on(self.args.output_dir, self._resumed_from)}"

    def _get_output_dir(self, trial: Any) -> str:
        """`Trainer._get_output_dir`; while a checkpoint is written, the folder beside its place."""
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """`Trainer._save_checkpoint`, whose folder appears whole or not at all; older ones are removed after it has.

        Raises:
            CheckpointError: if it could not be written; the message names the last good one.
        """
        run, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with staged(run, name, self.accelerator) as self._staging:
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
                written = Path(self._staging) / name
                write_measured(written, self.accelerator, self._measured())
                if self.state.best_model_checkpoint == str(written):
                    self.state.best_model_checkpoint = str(Path(run) / name)
                    if self.args.should_save:
                        self.state.save_to_json(str(written / STATE))
            finally:
                self._staging = None
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer._finalize_training`, which with `save_total_limit=1` removes whatever is called like a checkpoint, but the best: this run's
        own alone go."""
        limit = self.args.save_total_limit
        self.args.save_total_limit = None if limit == 1 else limit
        try:
            output = super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self.args.save_total_limit = limit
        if limit == 1 and self.args.should_save:
            keep_best(self._get_output_dir(None), self.state.best_model_checkpoint)
        return output

    def keep_checkpoint(self, model: Any) -> None:
        """Write the checkpoint of the last step that took place, unless this run has it already. Called by every process."""
        run, name = self._get_output_dir(None), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        (written,) = broadcast_object_list([has_written(run, name)])
        if not written:
            self._save_checkpoint(model, trial=None)

    def _measured(self) -> dict[str, Any]:
        """What this process has measured since the last log, and what it does only once: a checkpoint between two logs holds it,
        so that the run that resumes from it logs what the whole run would have."""
        sums = self._sums()
        if self._step_at_work == self.state.global_step and self._before_step is not None:
            # Within a step (`enable_jit_checkpoint`), which the run that resumes takes anew
            known = self._before_step["metrics"]
            sums |= {**self._before_step, "metrics": {k: v[: known.get(k, 0)] for k, v in sums["metrics"].items()}}
        return {
            "meter": self.meter.state(sums.pop("meter")),
            "first_batch": self.first_batch.state(),
            "lends": self.step.lends,
            "skipped_steps": self.policy.skipped_steps,
            **sums,
            "loss": sums["loss"].item(),
            "last_logged": self._globalstep_last_logged,
        }

    def _sums(self) -> dict[str, Any]:
        return {
            "metrics": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
            "loss": self._tr_loss.detach().clone(),
            "meter": self.meter.total(),
        }

    def note_step(self) -> None:
        """A step begins: what a checkpoint that is written within it will hold."""
        sums = self._sums()
        lengths = {name: len(values) for name, values in sums["metrics"].items()}
        self._before_step = {**sums, "metrics": lengths}

    def _restore_measured(self) -> None:
        if self._resumed_from is None:
            return
        kept = read_measured(self._resumed_from, self.accelerator)
        # Of steps before this call of `train`, whose mean loss leaves them out. A log adds the mean over processes: all take part
        of_this = torch.tensor(0.0 if kept is None else kept["loss"], device=self.accelerator.device)
        self._total_loss_scalar -= self.accelerator.reduce(of_this, reduction="mean").item()
        if kept is None:
            return
        self.meter.load(kept["meter"])
        self.first_batch.load(kept["first_batch"])
        self.step.lends = kept.get("lends")  # None: of an older version
        self.policy.skipped_steps = kept["skipped_steps"]
        self._metrics["train"].update(kept["metrics"])
        self._total_train_tokens = kept["tokens"]
        self._tr_loss += kept["loss"]
        self._globalstep_last_logged = kept["last_logged"]


class _Restore(TrainerCallback):
    """Begins every sum at zero, as `Trainer` does its own, and gives a resumed run what its checkpoint had measured."""

    def __init__(self, trainer: ResumingMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer: Any = self.trainer
        trainer.meter.begin()
        trainer.policy.begin_training()
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
        if hasattr(trainer, "_buffered_inputs"):  # on-policy: samples of a training that broke off are another model's
            trainer._step, trainer._buffered_inputs = 0, None
        trainer._restore_measured()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.note_step()


def _saved_steps(out: str) -> int | None:
    """The steps of the model that a run saved at its end, None before that: its facts are written after its weights."""
    try:
        steps: int | None = read_run_facts(out).get("training", {}).get("steps")
    except ValueError:  # cut off
        return None
    return steps
