"""A run is resumed as the run that it was: with its teacher, its start, its adapter, its rows and its optimizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from peft import LoraConfig

from hf_lingudistill.weights import glance

MakeTrainer = Callable[..., Any]

STEPS: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Folders of (student, teacher), by seed, and the first moved elsewhere."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {}
    for seed in (0, 7):
        place = folder / str(seed)
        place.mkdir()
        student, teacher = tiny.save_pair(place)
        if seed:
            tiny.make_vlm(seed).save_pretrained(student)
            tiny.make_lm(seed).save_pretrained(teacher)
        made[str(seed)] = (student, teacher)
    shutil.copytree(folder / "0", folder / "moved")
    student, teacher = made["0"]
    made["moved"] = (folder / "moved" / student.name, folder / "moved" / teacher.name)
    return made


def test_a_glance_tells_models_apart_and_knows_one_that_was_moved(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    of = {name: [glance(str(path)) for path in pair] for name, pair in pairs.items()}
    assert of["0"] == of["moved"] and None not in of["0"]
    assert len({*of["0"], *of["7"]}) == 4
    assert glance(str(tmp_path)) is None and glance("ORG/nobody-has-this") is None and glance("no name/at/all") is None


def test_a_glance_at_the_hubs_cache_is_at_the_revision_that_is_named(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--ORG--LM"
    for revision, name in (("main", "0"), ("v2", "7")):
        commit = name * 40
        shutil.copytree(pairs[name][1], repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    assert glance("ORG/LM") == glance("ORG/LM", "main") == glance(str(pairs["0"][1]))
    assert glance("ORG/LM", "v2") == glance(str(pairs["7"][1])) != glance("ORG/LM")
    assert glance("ORG/LM", "v3") is None


def test_a_run_is_resumed_with_the_models_it_had(
    pairs: dict[str, tuple[Path, Path]], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Controls: the same models in another place; and another student where the VLM before is not asked, whose weights are the
    checkpoint's anyhow."""

    def run(student: str, teacher: str, **options: Any) -> Any:
        models = {"model": str(pairs[student][0]), "teacher_model": str(pairs[teacher][1])}
        return make_trainer(**STEPS, **models, **options)

    out = {"output_dir": str(tmp_path / "with"), "kv_sharing": "vision", "kv_source": "before"}
    run("0", "0", **out).train()
    shutil.rmtree(tmp_path / "with/checkpoint-2")
    for student, teacher, role in (("0", "7", "teacher"), ("7", "0", "student")):
        with pytest.raises(
            ValueError, match=rf"was trained with {role}='\w+ \(files \w{{8}}\)'; found {role}='\w+ \(files"
        ):
            run(student, teacher, **out).train(resume_from_checkpoint=True)
    run("moved", "moved", **out).train(resume_from_checkpoint=True)
    alone = {"output_dir": str(tmp_path / "without"), "kv_sharing": "vision", "kv_source": "student"}
    run("0", "0", **alone).train()
    shutil.rmtree(tmp_path / "without/checkpoint-2")
    run("7", "0", **alone).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ({"r": 2, "lora_alpha": 4}, None, "trained with an adapter=True; found an adapter=False"),
        (None, {"r": 2, "lora_alpha": 4}, "trained with an adapter=False; found an adapter=True"),
        ({"r": 2, "lora_alpha": 4}, {"r": 4, "lora_alpha": 4}, "trained with lora_r=2; found lora_r=4"),
        ({"r": 2, "lora_alpha": 4}, {"r": 2, "lora_alpha": 8}, "trained with lora_alpha=4; found lora_alpha=8"),
        ({"r": 2, "lora_alpha": 4}, {"r": 2, "lora_alpha": 4, "use_rslora": True}, "use_rslora=False; found use_rslora=True"),
        ({"r": 2, "lora_alpha": 4}, {"r": 2, "lora_alpha": 4}, None),
        (None, None, None),
    ],
)  # fmt: skip
def test_a_run_is_resumed_with_the_adapter_it_had(
    make_trainer: MakeTrainer,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    sentence: str | None,
) -> None:
    def run(adapter: dict[str, Any] | None, **options: Any) -> Any:
        config = None if adapter is None else LoraConfig(**adapter, target_modules=r".*text_model.*(q|v)_proj")
        return make_trainer(**STEPS | options, kv_source="student", peft_config=config)

    run(before).train()
    trainer = run(after, max_steps=3)
    if sentence is None:
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3
    else:
        with pytest.raises(ValueError, match=sentence):
            trainer.train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------------ options that are set afterwards
@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("label_smoothing_factor", 0.1, "label_smoothing_factor must be 0"),
        ("loss_type", "dft", "loss_type must be 'nll'"),
        ("distill_tokens", "confidant", "distill_tokens must be one of"),
        ("anchor_weight", 3.0, "anchor_weight must be in"),
        ("temperature", -1.0, "temperature must be a positive number"),
        ("beta", 7.0, "beta must be in"),
        ("freeze_vision", "yes", "freeze_vision must be true or false"),
        ("max_steps", 0, "max_steps must be above 0"),
        ("teacher_cache", True, "teacher_cache=True"),
    ],
)
def test_options_that_are_set_after_the_config_was_made_are_checked(
    make_trainer: MakeTrainer, option: str, value: Any, sentence: str
) -> None:
    """As notebooks do it. The control trains."""
    args = make_trainer(kv_sharing="full", kv_source="student").args
    setattr(args, option, value)
    with pytest.raises(ValueError, match=sentence):
        trainer_of(args)


def test_what_was_left_out_follows_what_is_set_later() -> None:
    from hf_lingudistill import LinguDistillConfig

    args = LinguDistillConfig(output_dir="out", bf16=False)
    assert (args.kv_sharing, args.kv_source) == ("vision", "before")
    for mode, source in (("full", "student"), ("vision", "before"), ("none", "student"), ("vision", "before")):
        args.kv_sharing = mode
        args.check()
        assert args.kv_source == source, mode
    # The control: what was named stays, and is refused where it cannot be
    named = LinguDistillConfig(output_dir="out", bf16=False, kv_source="before")
    named.kv_sharing = "full"
    named.check()
    assert named.kv_source == "before"
    named.kv_sharing = "none"
    with pytest.raises(ValueError, match="leave kv_source out"):
        named.check()


def trainer_of(args: Any) -> Any:
    from hf_lingudistill import LinguDistillTrainer

    return LinguDistillTrainer(
        model=tiny.make_vlm(0),
        args=args,
        teacher_model=tiny.make_lm(1),
        train_dataset=tiny.make_dataset(4),
        processing_class=tiny.make_processor(),
        teacher_tokenizer=tiny.make_tokenizer(extra=False),
    )
