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
    """Every 25 steps after the warm-up: what a run holds on to. leak: what to lose in each step (the controls)."""

    def __init__(self, trainer: Any, warm_up: int = WARM_UP, leak: Callable[[], Any] | None = None) -> None:
        self.models = (trainer._plain_student(), trainer.teacher.model)
        self.warm_up, self.leak = warm_up, leak
        self.lost: list[Any] = []
        self.hooks_before = self.count_hooks()
        self.steps: list[int] = []
        self.kib: list[float] = []
        self.tensors: list[float] = []
        self.objects: list[float] = []
        self.hooks: list[int] = []
        self.attention: list[tuple[int, str, str]] = []

    def count_hooks(self) -> int:
        return sum(hooks_of(model) for model in self.models)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.leak is not None:
            self.lost.append(self.leak())
        if state.global_step > self.warm_up and state.global_step % EVERY == 0:
            self.steps.append(state.global_step)
            self.kib.append(resident_kib())
            alive = gc.get_objects()
            self.objects.append(len(alive))
            self.tensors.append(sum(isinstance(thing, torch.Tensor) for thing in alive))
            del alive
            self.hooks.append(self.count_hooks())
            names = [decoder_of(model).config._attn_implementation for model in self.models]
            self.attention.append((len(AttentionInterface().valid_keys()), *names))

    def slope(self, values: list[float]) -> tuple[float, float]:
        return slope(self.steps, values)

    def grown(self) -> set[str]:
        """What grows: memory by more than noise and 1 KiB a step; tensors and objects by more than one in ten steps; hooks and
        registered attention functions at all, or another attention implementation left in place."""
        found = set()
        for name, values, limit in (
            ("memory", self.kib, 1.0),
            ("tensors", self.tensors, 0.1),
            ("objects", self.objects, 0.1),
        ):
            value, error = self.slope(values)
            if value > limit and value > 3 * error:
                found.add(name)
        if set(self.hooks) != {self.hooks_before}:
            found.add("hooks")
        if len(set(self.attention)) != 1 or set(self.attention[0][1:]) != {"sdpa"}:
            found.add("attention")
        return found

    def __str__(self) -> str:
        measured = {"KiB": self.kib, "tensors": self.tensors, "objects": self.objects}
        lines = []
        for name, values in measured.items():
            value, error = self.slope(values)
            lines.append(f"{name}: {value:+.4f} a step, standard error {error:.4f} ({min(values)} to {max(values)})")
        return (
            "; ".join(lines) + f"; hooks {self.hooks_before}, then {set(self.hooks)}; attention {set(self.attention)}"
        )


def dataset() -> Dataset:
    """Rows of 24 lengths, half of them with an image."""
    rows = tiny.make_rows(24)
    for index, row in enumerate(rows):
        row["completion"][0]["content"] += " the cat sat on the mat." * (index % 12)
    return Dataset.from_list(rows, features=tiny.make_dataset(1).features)


def soak(make_trainer: MakeTrainer, steps: int, **of_watch: Any) -> tuple[Any, Watch]:
    trainer = make_trainer(
        train_dataset=dataset(), per_device_train_batch_size=2, max_steps=steps, logging_steps=100, learning_rate=1e-3
    )
    assert trainer.args.kv_sharing == "prompt"
    watch = Watch(trainer, **of_watch)
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


@pytest.mark.slow
def test_two_thousand_steps_leave_nothing_behind(make_trainer: MakeTrainer) -> None:
    trainer, watch = soak(make_trainer, 2000)
    print(watch)
    assert len(watch.steps) == 60
    assert watch.grown() == set(), str(watch)
    assert watch.count_hooks() == watch.hooks_before
    assert len(trainer.state.log_history) == 21 and trainer.state.log_history[-2]["loss"] < 1.0


@pytest.mark.slow
def test_a_leak_of_four_kib_a_step_is_found(make_trainer: MakeTrainer) -> None:
    """The control, at the size that the slope has to tell from noise."""
    _, watch = soak(make_trainer, 1000, leak=lambda: torch.ones(1024))
    print(watch)
    assert {"memory", "tensors"} <= watch.grown(), str(watch)


def registered_anew() -> None:
    AttentionInterface.register(f"lost_{len(AttentionInterface().valid_keys())}", lambda *_: None)


@pytest.mark.parametrize("kind", ["nothing", "hooks", "tensors", "objects", "attention"])
def test_each_kind_of_leak_is_found_in_few_steps(make_trainer: MakeTrainer, kind: str) -> None:
    """The controls of what is counted rather than measured; and a short run, which loses nothing."""
    student: list[torch.nn.Module] = []
    leaks: dict[str, Callable[[], Any] | None] = {
        "nothing": None,
        "hooks": lambda: student[0].register_forward_hook(lambda *_: None),
        "tensors": lambda: torch.ones(1),
        "objects": list,
        "attention": registered_anew,
    }
    registered = dict(AttentionInterface._global_mapping)
    try:
        trainer = make_trainer(
            train_dataset=dataset(), per_device_train_batch_size=2, max_steps=125, logging_steps=100
        )
        student.append(trainer._plain_student())
        watch = Watch(trainer, warm_up=25, leak=leaks[kind])
        trainer.add_callback(watch)
        trainer.train()
    finally:
        for name in set(AttentionInterface._global_mapping) - set(registered):
            if name.startswith("lost_"):
                del AttentionInterface._global_mapping[name]
    grown = watch.grown() - {"memory"}  # too few steps to tell from noise
    assert grown == set() if kind == "nothing" else kind in grown, str(watch)
