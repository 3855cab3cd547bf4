"""Checkpoints that appear whole or not at all, and runs that resume bit for bit, as a mixin for a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import (
    STATE,
    check_apart,
    check_output_dir,
    continues,
    go_on,
    put_back,
    read_measured,
    rotate,
    staged,
    start_afresh,
    to_resume,
    wanted_checkpoint,
    write_measured,
)
from .finite import StepPolicy
from .first_batch import FirstBatch
from .meter import Meter

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
    first_batch: FirstBatch
    teacher_name_or_path: str
    _staging: str | None = None
    _resumed_from: Path | None = None

    def _resuming(self) -> None:
        self.add_callback(_Restore(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, after checking that `output_dir` does not hold another run (unless this resumes it)."""
        out = str(self.args.output_dir)
        wanted = wanted_checkpoint(resume_from_checkpoint or self.args.resume_from_checkpoint)
        student = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        check_apart(out, student=student, teacher=self.teacher_name_or_path)
        own = continues(wanted, out)
        if not own:
            check_output_dir(out, overwrite=self.args.overwrite_output_dir)
        elif self.accelerator.is_local_main_process:
            put_back(out)
        self.accelerator.wait_for_everyone()  # all have looked, and what was put aside is back
        checkpoint = None if wanted is None else to_resume(wanted, out)
        if not own and self.accelerator.is_local_main_process:
            start_afresh(out)
        self._resumed_from = None if checkpoint is None else Path(checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def interrupted(self) -> str:
        """Where a training stood that Ctrl-C ended, and how it goes on."""
        return f"Interrupted at step {self.state.global_step}; {go_on(self.args.output_dir, self._resumed_from)}."

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

    def _measured(self) -> dict[str, Any]:
        """What this process has measured since the last log, and what it does only once: a checkpoint between two logs holds it,
        so that the run that resumes from it logs what the whole run would have."""
        return {
            "meter": self.meter.state(),
            "first_batch": self.first_batch.state(),
            "skipped_steps": self.policy.skipped_steps,
            "metrics": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
        }

    def _restore_measured(self) -> None:
        if self._resumed_from is None or (kept := read_measured(self._resumed_from, self.accelerator)) is None:
            return
        self.meter.load(kept["meter"])
        self.first_batch.load(kept["first_batch"])
        self.policy.skipped_steps = kept["skipped_steps"]
        self._metrics["train"].update(kept["metrics"])
        self._total_train_tokens = kept["tokens"]
        self._tr_loss += kept["loss"]
        # Of steps before this call of `train`, whose mean loss leaves them out
        self._total_loss_scalar -= kept["loss"]
        self._globalstep_last_logged = kept["last_logged"]


class _Restore(TrainerCallback):
    """Gives a resumed run what its checkpoint had measured, after `Trainer` has begun its own sums at zero."""

    def __init__(self, trainer: ResumingMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._restore_measured()
