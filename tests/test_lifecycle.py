"""A trainer as it is used: what it leaves alone, and what it takes for what."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hf_lingudistill import LinguDistillConfig, OnPolicyLinguDistillConfig, OnPolicyLinguDistillTrainer
from hf_lingudistill.cli import main
from hf_lingudistill.row_cache import StaleCache
from hf_lingudistill.sharing import MODES

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


# --------------------------------------------------------------------------------------------------------------------
# Adapters of the caller's own
# --------------------------------------------------------------------------------------------------------------------
def adapted(*, trained: bool, name: str = "default", kind: str = "LoRA", **settings: Any) -> Any:
    """A VLM with an adapter; trained: as another training has left it."""
    layers: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **settings}
    config: Any = LoraConfig(r=4, **layers) if kind == "LoRA" else LoHaConfig(r=4, **layers)
    if kind == "IA3":
        config = IA3Config(feedforward_modules=[], **layers)
    model = get_peft_model(tiny.make_vlm(0), config, adapter_name=name)
    generator = torch.Generator().manual_seed(3)
    for parameter_name, weight in model.named_parameters():
        if trained and ("lora_B" in parameter_name or "modules_to_save" in parameter_name):
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["connector"]}])
def test_an_adapter_that_is_trained_already_is_of_the_vlm_before(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    """Switched off, it leaves another model than the one that was given."""
    asked = {"kv_sharing": "vision", "freeze_vision": None}
    for option in ({"kv_source": "before"}, {"anchor": "before", "kv_source": "student"}):
        with pytest.raises(ValueError, match="this adapter is trained already.* merge it first"):
            make_trainer(model=adapted(trained=True, **settings), **asked, **option)
        make_trainer(model=adapted(trained=False, **settings), **asked, **option)  # control: as it was made
    given_way = make_trainer(model=adapted(trained=True, **settings), **asked, kv_source=None)
    assert given_way.decided["kv_source"] == "student" and "trained already" in caplog.text
    # Of the run's own adapter, the VLM before is the VLM, also where it begins with noise
    noise = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    assert make_trainer(peft_config=noise, **asked, kv_source="before").before is not None


@pytest.mark.parametrize("kind", ["LoHa", "IA3"])
def test_an_adapter_of_another_type_that_came_with_the_model_counts_as_trained(
    make_trainer: MakeTrainer, kind: str
) -> None:
    with pytest.raises(ValueError, match="this adapter is trained already"):
        make_trainer(
            model=adapted(trained=True, kind=kind), kv_sharing="vision", kv_source="before", freeze_vision=None
        )
    made = make_trainer(
        model=adapted(trained=True, kind=kind), kv_sharing="vision", kv_source=None, freeze_vision=None
    )
    assert made.decided["kv_source"] == "student"


def test_with_a_cache_the_source_gives_way_as_without(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    pissa = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    common: dict[str, Any] = {"kv_sharing": "vision", "teacher_cache": True, "peft_config": pissa}
    assert make_trainer(kv_source=None, **common).decided["kv_source"] == "student"
    with pytest.raises(ValueError, match="changes the weights under the adapter"):
        make_trainer(kv_source="before", **common)


def test_merged_its_own_anchor_is_at_0(make_trainer: MakeTrainer) -> None:
    """What the refusal above advises."""
    merged = adapted(trained=True).merge_and_unload().requires_grad_(True)
    trainer = make_trainer(model=merged, kv_sharing="vision", kv_source="before", anchor="before", anchor_weight=0.5)
    trainer.train()
    assert trainer.state.log_history[0]["anchor_kl"] == pytest.approx(0.0, abs=1e-5)


def test_an_adapter_of_another_name_is_refused_where_checkpoints_would_not_find_it(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="The active adapter is called 'sight'.* Call it 'default'"):
        make_trainer(model=adapted(trained=False, name="sight"), save_strategy="steps")
    make_trainer(model=adapted(trained=False, name="sight")).train()  # nothing is saved on the way
    make_trainer(model=adapted(trained=False), save_strategy="steps")


# --------------------------------------------------------------------------------------------------------------------
# Models and options that were another trainer's
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["TRL", "us"])
@pytest.mark.parametrize("kv_sharing", ["vision", "none"])
def test_a_copy_of_a_model_that_was_trained_is_a_model_of_its_own(
    make_trainer: MakeTrainer, by: str, kv_sharing: str
) -> None:
    more: dict[str, Any] = {
        "trainer_class": SFTTrainer,
        "train_dataset": tiny.make_dataset(4).remove_columns("distill"),
    }
    first = make_trainer(**(more if by == "TRL" else {}))
    first.train()
    copied = copy.deepcopy(first.model)
    seen: list[torch.Tensor] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(torch.tensor(prediction.predictions).sum())
        return {}

    trainer = make_trainer(model=copied, kv_sharing=kv_sharing, compute_metrics=compute_metrics, max_steps=2)
    rows = tiny.make_dataset(4)
    trainer.evaluate(rows)
    trainer.train()
    trainer.evaluate(rows)
    assert not torch.isclose(seen[0], seen[1])  # the copy's logits, which training has moved
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        moved, original = (model(input_ids=ids).logits for model in (trainer.model, first.model))
        again = type(copied).forward(copied, input_ids=ids).logits
    torch.testing.assert_close(moved, again)
    assert not torch.allclose(moved, original)


def test_a_trainer_that_is_given_another_model_says_so(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.model_init = lambda: tiny.make_vlm(1)
    with pytest.raises(ValueError, match="or the trainer was given another model"):
        trainer.train()


@pytest.mark.parametrize("mode", ["vision", "prompt", "full", "inputs", "none"])
@pytest.mark.parametrize("how", ["replace", "deepcopy", "pickle", "fields"])
def test_a_config_made_of_another_chooses_for_itself(tmp_path: Path, mode: str, how: str) -> None:
    fresh = LinguDistillConfig(output_dir=str(tmp_path), kv_sharing=mode)
    base = LinguDistillConfig(output_dir=str(tmp_path))
    if how == "replace":
        made = dataclasses.replace(base, kv_sharing=mode)
    elif how == "fields":
        given = {field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.init}
        made = LinguDistillConfig(**{**given, "kv_sharing": mode})
    else:
        made = copy.deepcopy(base) if how == "deepcopy" else pickle.loads(pickle.dumps(base))
        made.kv_sharing = mode
        made.check()
    assert (made.kv_source, made.blind_weight) == (fresh.kv_source, fresh.blind_weight)
    # Control: what was asked for stays
    other = "student" if MODES[mode].source == "before" else "before"
    if mode != "none":
        asked = LinguDistillConfig(output_dir=str(tmp_path), kv_source=other)
        assert dataclasses.replace(asked, kv_sharing=mode).kv_source == other
    json.dumps(made.to_dict())
    assert yaml.safe_load(
        yaml.safe_dump({"kv_source": made.to_dict()["kv_source"], "blind_weight": made.to_dict()["blind_weight"]})
    )


def test_both_names_of_checkpointing_are_heard_whenever_they_are_set(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        for value in (False, True):
            config = LinguDistillConfig(output_dir=str(tmp_path), activation_checkpointing=not value)
            setattr(config, name, value)
            config.check()
            assert config.gradient_checkpointing is config.activation_checkpointing is value, (name, value)


@pytest.mark.parametrize("limits", [(None, 40), (45, 40), (40, 45), (40, None)])
def test_a_collator_of_the_callers_own_keeps_its_length(make_trainer: MakeTrainer, limits: tuple[Any, Any]) -> None:
    ours, theirs = limits
    processor = tiny.make_processor()
    collator = DataCollatorForVisionLanguageModeling(processor, max_length=theirs)
    trainer = make_trainer(data_collator=collator, processing_class=processor, max_length=ours)
    rows = [row for row in trainer.train_dataset if row["images"]]
    assert trainer.data_collator(rows)["input_ids"].shape[1] <= 40 and collator.max_length == theirs
    assert make_trainer(max_length=None).data_collator(rows)["input_ids"].shape[1] > 45  # control


# --------------------------------------------------------------------------------------------------------------------
# Going on
# --------------------------------------------------------------------------------------------------------------------
OPTIMIZERS: dict[str, Any] = {"weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3}
ROWS: list[dict[str, Any]] = [
    {"gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 1},
    {"per_device_train_batch_size": 4},
]


@pytest.mark.parametrize("changed", [*({name: value} for name, value in OPTIMIZERS.items()), *ROWS], ids=str)
def test_a_run_goes_on_with_the_optimizer_and_the_rows_that_it_had(
    make_trainer: MakeTrainer, tmp_path: Path, changed: dict[str, Any]
) -> None:
    common: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 1,
    }
    out = {"output_dir": str(tmp_path / "run"), "optim": "adamw_torch"}
    make_trainer(**common, **out).train()
    (name,) = changed
    with pytest.raises(ValueError, match=f"was trained with {name}=.*; found {name}="):
        make_trainer(**{**common, **out, "max_steps": 2, **changed}).train(resume_from_checkpoint=True)
    # Control: as many rows in a step, in other parts
    same = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(**{**common, **out, **same, "max_steps": 2})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("when", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_checkpoint_in_the_middle_of_a_step_counts_nothing_twice(
    make_trainer: MakeTrainer, tmp_path: Path, when: str
) -> None:
    """`enable_jit_checkpoint`: a job that is told to end writes a checkpoint, be it between a loss and its update, and takes that step anew."""
    common: dict[str, Any] = {
        "max_steps": 4,
        "logging_steps": 4,
        "save_strategy": "steps",
        "save_steps": 100,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }

    class Told(TrainerCallback):
        def told(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for callback in interrupted.callback_handler.callbacks:
                if isinstance(callback, JITCheckpointCallback) and state.global_step == 2 and callback.jit_manager:
                    callback.jit_manager.is_checkpoint_requested = True

    setattr(Told, {"on_pre_optimizer_step": "on_substep_end"}.get(when, when), Told.told)
    out = str(tmp_path / "run")
    interrupted = make_trainer(output_dir=out, enable_jit_checkpoint=True, **common)
    interrupted.callback_handler.callbacks.insert(0, Told())
    interrupted.train()
    (saved,) = Path(out).glob("*checkpoint-*")
    assert saved.name == "checkpoint-2" and not (saved / "checkpoint-is-incomplete.txt").exists()
    again = make_trainer(output_dir=out, **common)
    again.train(resume_from_checkpoint=True)
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    ours, theirs = ([log for log in one.state.log_history if "loss" in log][-1] for one in (again, whole))
    for name in ("loss", "ce_loss", "kd_loss", "entropy", "num_tokens", "answer_tokens", "distilled_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name


def test_one_process_on_several_gpus_says_what_to_type(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="sees 2 GPUs.* CUDA_VISIBLE_DEVICES=0 .*accelerate launch --num_processes 2"):
        make_trainer()
    student, teacher = tiny.save_pair(tmp_path)
    command = ["distill", "--student", str(student), "--teacher", str(teacher), "--dataset_name", "nowhere"]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--report_to", "none"]) == 2
    assert "This process sees 2 GPUs" in capsys.readouterr().err


def test_a_teacher_with_an_adapter_answers_with_it_from_a_cache_too(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """And a cache of one adapter is not another's."""

    def teacher(seed: int) -> Any:
        model = get_peft_model(tiny.make_lm(1), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data += torch.randn(weight.shape, generator=generator)
        return model

    def loss(seed: int, *, whole: bool, **more: Any) -> float:
        made = teacher(seed)
        trainer = make_trainer(
            teacher_model=made if whole else made.get_base_model(), kv_sharing="none", distill_tokens="all", **more
        )
        trainer.train()
        return float(trainer.state.log_history[0]["kd_loss"])

    cache: dict[str, Any] = {"teacher_cache": True, "cache_dir": str(tmp_path / "cache")}
    for whole in (True, False):
        assert loss(1, whole=whole, **cache) == pytest.approx(loss(1, whole=whole), rel=1e-4)
    assert loss(2, whole=True) != pytest.approx(loss(1, whole=True), rel=1e-3)
    with pytest.raises(StaleCache):
        loss(2, whole=True, **cache)


def test_the_best_samples_are_those_nearest_to_the_parents(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for metric, greater in (("anchor_kl", False), ("eval_entropy", False), ("teacher_agreement", True)):
        config = OnPolicyLinguDistillConfig(
            output_dir=str(tmp_path), metric_for_best_model=metric, load_best_model_at_end=True, eval_strategy="steps",
            save_strategy="steps", eval_steps=1, save_steps=1,
        )  # fmt: skip
        assert config.greater_is_better is greater, metric
    best: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best |= {"load_best_model_at_end": True, "eval_dataset": tiny.make_dataset(4)}
    with pytest.raises(
        ValueError, match="metric_for_best_model='eval_losss' is none of the values .* did you mean 'loss'"
    ):
        make_trainer(OnPolicyLinguDistillTrainer, metric_for_best_model="eval_losss", **best)
    make_trainer(OnPolicyLinguDistillTrainer, metric_for_best_model="completions/mean_length", **best)


def test_several_answers_to_a_prompt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_return_sequences=2, and each prompt has one answer here"):
        OnPolicyLinguDistillConfig(output_dir=str(tmp_path), generation_kwargs={"num_return_sequences": 2})
    OnPolicyLinguDistillConfig(output_dir=str(tmp_path), generation_kwargs={"num_return_sequences": 1})
