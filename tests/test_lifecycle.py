"""A trainer as it is used: what it leaves alone, and what it takes for what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_lingudistill import LinguDistillConfig

MakeTrainer = Callable[..., Any]


def test_parts_of_an_adapter_that_are_frozen_stay_so(make_trainer: MakeTrainer) -> None:
    """LoRA-FA by hand: the self-check switches the adapter off and on."""
    model = get_peft_model(tiny.make_vlm(0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    frozen = [weight for name, weight in model.named_parameters() if "lora_A" in name]
    for weight in frozen:
        weight.requires_grad_(False)
    was = [weight.detach().clone() for weight in frozen]
    trainer = make_trainer(model=model, max_steps=2)
    assert trainer.args.self_check and not any(weight.requires_grad for weight in frozen)
    trainer.train()
    assert all(torch.equal(*pair) for pair in zip(frozen, was, strict=True))


def test_a_teacher_over_the_students_memory_is_refused(make_trainer: MakeTrainer) -> None:
    student = tiny.make_vlm(0)
    teacher = tiny.make_lm(1)
    own = student.model.text_model.state_dict()
    shared = {
        name: own[name.removeprefix("model.")] for name in teacher.state_dict() if name.removeprefix("model.") in own
    }
    assert any("q_proj" in name for name in shared)
    shared = {name: weight for name, weight in shared.items() if "embed" not in name}
    teacher.load_state_dict(shared, assign=True, strict=False)
    with pytest.raises(ValueError, match="made of its weights, which training would change with it"):
        make_trainer(model=student, teacher_model=teacher)
    make_trainer(model=student, teacher_model=tiny.make_lm(1))  # control


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("student_ce", False),
        ("eval_anchor_kl", False),
        ("teacher_entropy", False),
        ("teacher_agreement", True),
        ("ce_loss", False),
    ],
)
def test_which_way_a_metric_is_better_follows_from_what_it_is(tmp_path: Path, metric: str, greater: bool) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "use_cpu": True, "bf16": False}
    config = LinguDistillConfig(
        output_dir=str(tmp_path), load_best_model_at_end=True, metric_for_best_model=metric, **options
    )
    assert config.greater_is_better is greater
    asked = LinguDistillConfig(
        output_dir=str(tmp_path),
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=not greater,
        **options,
    )
    assert asked.greater_is_better is not greater


class Stops(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def test_a_callback_may_stop_before_the_first_step_is_done(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        callbacks=[Stops()], gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=2
    )
    assert trainer.train().global_step == 0


def test_false_does_not_resume_whatever_the_options_say(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "output_dir": str(tmp_path / "out"),
    }
    make_trainer(**settings).train()
    again = make_trainer(**settings, resume_from_checkpoint="true", overwrite_output_dir=True)
    again.train(resume_from_checkpoint=False)
    assert sum("ce_loss" in entry for entry in again.state.log_history) == 2
