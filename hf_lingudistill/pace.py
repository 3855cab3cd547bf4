"""The steps of a training, watched: none at all is an error, and in a log one line per minute says how far it is."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from transformers import TrainerCallback

from .progress import EVERY


class NothingLeft(ValueError):
    """The checkpoint to resume from is at the last step."""


class Pace(TrainerCallback):
    """Says once a minute how far a training is, where its bar is switched off; refuses one that takes no step.

    started: whether the first step has begun. What goes wrong before it is bad input.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.started = False
        self._stream = stream
        self._first_step = 0
        self._began = self._said = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self.started, self._first_step = False, state.global_step
        self._began = self._said = time.monotonic()
        if state.global_step >= state.max_steps:
            step, raised = state.global_step, "Raise max_steps or num_train_epochs."
            if not step:
                raise ValueError(f"0 steps: nothing is left to train. {raised}")
            raise NothingLeft(
                f"The checkpoint is at step {step} of {state.max_steps}: nothing is left to train. {raised}"
            )
        check_batches(train_dataloader, args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A stream, whose length only reading tells; before anything is saved. A resumed run may skip a whole pass on its way
        if state.global_step == self._first_step and control.should_training_stop and not self.started:
            raise ValueError("Not one step was trained: the training set gave no batch. Nothing was saved.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if not args.disable_tqdm or not state.is_world_process_zero or now - self._said < EVERY:
            return
        self._said = now
        done = state.global_step - self._first_step
        per_step = (now - self._began) / done
        left = per_step * (state.max_steps - state.global_step)
        text = f"step {state.global_step} of {state.max_steps}, {per_step:.2g} s per step, {_minutes(left)} left"
        print(text, file=self._stream or sys.stderr, flush=True)


def check_batches(dataloader: Any, args: Any) -> None:
    """Raise ValueError for a dataloader that has not one batch. args: of the training."""
    if _length(dataloader) == 0:
        rows = f"Not one batch: the training set has {_length(dataloader.dataset)} rows"
        batch = f"per_device_train_batch_size={args.per_device_train_batch_size}"
        if args.dataloader_drop_last:
            raise ValueError(
                f"{rows}, a batch takes {batch} per process, and dataloader_drop_last is set. Lower it, keep the last batch, or add rows."
            )
        # On-policy, a step samples answers to all of its prompts at once
        raise ValueError(
            f"{rows}, a step takes {batch} times gradient_accumulation_steps={args.gradient_accumulation_steps} per process, all or none. "
            "Lower them, or add rows."
        )


def _length(of: Any) -> int | None:
    try:
        return len(of)
    except TypeError:  # a stream, or nothing
        return None


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
