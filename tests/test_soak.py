"""Two thousand steps of a tiny model: nothing grows, nothing stays behind."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AttentionInterface, TrainerCallback

from hf_lingudistill._internals import decoder_of

MakeTrainer = Callable[..., Any]
WARM_UP = 500  # steps in which caches, pools and Python's own arenas fill
EVERY = 25


def resident_kib() -> int:
    """After garbage and freed blocks have gone back: what is really held."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def hooks_of(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def slope(steps: list[int], values: list[float]) -> tuple[float, float]:
    """Least squares: (slope, its standard error)."""
    n, mean_x, mean_y = len(steps), sum(steps) / len(steps), sum(values) / len(values)
    spread = sum((x - mean_x) ** 2 for x in steps)
    fitted = sum((x - mean_x) * (y - mean_y) for x, y in zip(steps, values, strict=True)) / spread
    left = sum((y - mean_y - fitted * (x - mean_x)) ** 2 for x, y in zip(steps, values, strict=True))
    return fitted, math.sqrt(left / (n - 2) / spread)


class Watch(TrainerCallback):
    """Every 25 steps after the warm-up: resident memory, live tensors, hooks. leak: bytes to lose in each step (the control)."""

    def __init__(self, student: torch.nn.Module, leak: int = 0) -> None:
        self.student, self.leak, self.lost = student, leak, []
        self.steps: list[int] = []
        self.kib: list[float] = []
        self.tensors: list[int] = []
        self.hooks: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.leak:
            self.lost.append(torch.ones(self.leak // 4))
        if state.global_step > WARM_UP and state.global_step % EVERY == 0:
            self.steps.append(state.global_step)
            self.kib.append(resident_kib())
            self.tensors.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
            self.hooks.append(hooks_of(self.student))

    def grows(self) -> bool:
        """By more than noise and by more than 1 KiB a step."""
        value, error = slope(self.steps, self.kib)
        return value > 1.0 and value > 3 * error


def dataset() -> Dataset:
    """Rows of 24 lengths, half of them with an image."""
    rows = tiny.make_rows(24)
    for index, row in enumerate(rows):
        row["completion"][0]["content"] += " the cat sat on the mat." * (index % 12)
    return Dataset.from_list(rows, features=tiny.make_dataset(1).features)


def soak(make_trainer: MakeTrainer, steps: int, leak: int = 0) -> tuple[Any, Watch]:
    trainer = make_trainer(
        train_dataset=dataset(), per_device_train_batch_size=2, max_steps=steps, logging_steps=100, learning_rate=1e-3
    )
    watch = Watch(trainer._plain_student(), leak)
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


@pytest.mark.slow
def test_two_thousand_steps_leave_nothing_behind(make_trainer: MakeTrainer) -> None:
    registered = len(AttentionInterface().valid_keys())
    trainer, watch = soak(make_trainer, 2000)
    value, error = slope(watch.steps, watch.kib)
    print(f"{value:+.3f} KiB a step, standard error {error:.3f}; tensors {min(watch.tensors)} to {max(watch.tensors)}")
    assert not watch.grows(), (value, error)
    assert max(watch.tensors) - min(watch.tensors) < 20  # the batch in hand
    assert len(set(watch.hooks)) == 1
    decoder = decoder_of(trainer._plain_student())
    assert decoder.config._attn_implementation == "sdpa"
    assert decoder_of(trainer.teacher.model).config._attn_implementation == "sdpa"
    assert len(AttentionInterface().valid_keys()) - registered <= 3  # the recorder's and the replay's, registered once
    assert len(trainer.state.log_history) == 21 and trainer.state.log_history[-2]["loss"] < 1.0


@pytest.mark.slow
def test_a_leak_of_four_kib_a_step_is_found(make_trainer: MakeTrainer) -> None:
    """The control."""
    _, watch = soak(make_trainer, 1000, leak=4096)
    assert watch.grows()
    assert max(watch.tensors) - min(watch.tensors) > 400
