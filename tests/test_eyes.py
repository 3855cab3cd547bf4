"""Image features that the student and the VLM before share: the same teacher to the last bit, and a tower that is run once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import tiny
import torch
import transformers
from families import FAMILY_NAMES, build_family
from packaging.version import Version
from peft import LoraConfig
from test_kv_source import teacher_ce
from test_trainer import difference, mixed_batch, step
from tiny import moved
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer
from hf_lingudistill._internals import decoder_of
from hf_lingudistill.anchor import Before
from hf_lingudistill.eyes import Eyes, _light
from hf_lingudistill.step import DistillStep
from hf_lingudistill.vision import freeze_vision, trains_vision, vision_parameters

MakeTrainer = Callable[..., Any]
FROZEN: dict[str, Any] = {
    "kv_source": "before",
    "kv_sharing": "vision",
    "distill_tokens": "all",
    "freeze_vision": True,
}


@contextmanager
def looks(trainer: Any) -> Iterator[list[str]]:
    """Who runs a vision tower, in order: `student` or `before`."""
    seen: list[str] = []
    models = {"student": trainer.step.student, "before": trainer.before.model}
    hooks = [
        model.base_model.vision_model.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, model in models.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# --------------------------------------------------------------------------------------------------------------------
# The same teacher, one look
# --------------------------------------------------------------------------------------------------------------------
CASES = {
    "the image columns": {},
    "whole rows": {"kv_sharing": "full"},
    "as inputs": {"kv_sharing": "inputs"},
    "a judge": {"anchor": "before", "anchor_weight": 0.3},
    "a judge alone": {"anchor": "before", "kv_source": "student"},
    "twice": {"blind_weight": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_one_look_gives_the_loss_and_gradients_of_two(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    settings = {**FROZEN, **CASES[case]}
    results, towers = {}, {}
    for way in ("once", "twice"):
        if way == "twice":  # the oracle: each looks for itself
            monkeypatch.setattr(DistillStep, "_seen", lambda *_: None)
        trainer = moved(make_trainer(**settings, model=tiny.make_vlm(0)))
        batch = mixed_batch(trainer)
        step(trainer, batch)  # the first says whether it can be
        with looks(trainer) as towers[way]:
            results[way] = step(trainer, batch)
    assert sorted(towers["twice"]) == ["before", "student"] and len(towers["once"]) == 1
    assert results["once"][0] == results["twice"][0]
    assert difference(results["once"][1], results["twice"][1]) == 0.0


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_that_asks_for_its_image_features_takes_them(name: str) -> None:
    """The keys and values that the VLM before lends, of features that the student made, are bit for bit its own."""
    family = build_family(name)
    inputs = {key: value for key, value in family.make_inputs("right", seed=0).items() if key != "labels"}
    student, before = family.fresh_student(), Before(family.student, nullcontext, 0)
    freeze_vision(student)
    with torch.no_grad():
        for weight in decoder_of(student).parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    eyes = Eyes(student, before)
    seen = eyes.open()
    with torch.no_grad(), eyes.of_student(seen):
        student.base_model(**inputs)
    wanted = before.last_keys(inputs)
    features = family.student.base_model.get_image_features
    with counted_calls(family.student, features) as calls, eyes.of_before(seen, inputs):
        assert eyes.alike
        calls.clear()  # trying it took some
        assert torch.equal(before.last_keys(inputs), wanted) and not calls
    assert family.student.base_model.get_image_features == features  # nothing is left behind
    # Control: features that are not its own
    seen.kept[0] = seen.kept[0][0] if isinstance(seen.kept[0], tuple) else seen.kept[0]
    with torch.no_grad():
        for tensor in tensors_of(seen.kept[0]):
            tensor.mul_(0.5)
    with eyes.of_before(seen, inputs):
        assert not torch.equal(before.last_keys(inputs), wanted)


@contextmanager
def counted_calls(model: Any, features: Any) -> Iterator[list[int]]:
    calls: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return features(*args, **kwargs)

    model.base_model.__dict__["get_image_features"] = count
    try:
        yield calls
    finally:
        del model.base_model.__dict__["get_image_features"]


def tensors_of(output: Any) -> list[torch.Tensor]:
    found = getattr(output, "pooler_output", output)
    return [one for one in (found if isinstance(found, list | tuple) else [found]) if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize("adapter", [False, True], ids=["full training", "LoRA"])
def test_the_teacher_reads_what_it_read_while_the_decoder_moves(make_trainer: MakeTrainer, adapter: bool) -> None:
    """An adapter on the decoder alone leaves the tower as it is, without `freeze_vision`."""
    decoder = LoraConfig(r=2, target_modules=".*text_model.*proj")
    extra = {"peft_config": decoder, "freeze_vision": False} if adapter else {}
    trainer = make_trainer(**{**FROZEN, **extra})
    batch = mixed_batch(trainer)
    still = teacher_ce(trainer, batch)
    with looks(trainer) as towers:
        assert teacher_ce(moved(trainer), batch) == still
    assert len(towers) == (2 if adapter else 1)  # of an adapter's two models, both hooks are on one tower
    assert trainer.step.eyes.alike


def test_an_adapter_that_reaches_the_tower_makes_it_another(make_trainer: MakeTrainer) -> None:
    for where, alike in (("text_model.*q_proj", True), ("vision_model.*q_proj", None)):
        adapter = LoraConfig(r=2, target_modules=f".*{where}", init_lora_weights=False)
        trainer = make_trainer(**{**FROZEN, "freeze_vision": False}, peft_config=adapter)
        step(trainer, mixed_batch(trainer))
        assert trainer.step.eyes.alike is alike


def test_an_adapter_that_is_frozen_still_changes_the_tower(make_trainer: MakeTrainer) -> None:
    adapter = LoraConfig(r=2, target_modules=".*(vision|text)_model.*q_proj", init_lora_weights=False)
    trainer = make_trainer(**{**FROZEN, "freeze_vision": False}, peft_config=adapter)
    for name, weight in vision_parameters(trainer.step.student).items():
        weight.requires_grad_(False)
        if "lora_B" in name:  # a change that rounding could be taken for
            weight.data.mul_(1e-4)
    step(trainer, mixed_batch(trainer))
    assert trainer.step.eyes.alike is False


def test_of_texts_nothing_is_asked(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**FROZEN)
    texts = mixed_batch(trainer, [row for row in tiny.make_rows(8) if not row["images"]])
    with looks(trainer) as towers:
        step(trainer, texts)
    assert not towers and trainer.step.eyes is None
    step(trainer, mixed_batch(trainer))
    assert trainer.step.eyes.alike


# --------------------------------------------------------------------------------------------------------------------
# Where it is another tower
# --------------------------------------------------------------------------------------------------------------------
def test_a_tower_that_is_trained_is_looked_through_by_each(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**{**FROZEN, "freeze_vision": False})
    batch = mixed_batch(trainer)
    step(trainer, batch)
    with looks(trainer) as towers:
        step(trainer, batch)
    assert sorted(towers) == ["before", "student"]


def test_a_tower_that_was_trained_for_a_while_is_another(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**FROZEN)
    batch = mixed_batch(trainer)
    still = teacher_ce(trainer, batch)
    weights = list(vision_parameters(trainer.model).values())
    assert trainer.step.eyes.alike
    for weight in weights:  # control: thawed and not trained, it is the same
        weight.requires_grad_(True)
    step(trainer, batch)
    for weight in weights:
        weight.requires_grad_(False)
    step(trainer, batch)
    assert trainer.step.eyes.alike
    with torch.no_grad():
        weights[0].add_(0.3)
    with looks(trainer) as towers:
        assert teacher_ce(trainer, batch) == pytest.approx(still, rel=1e-6)
    assert sorted(towers) == ["before", "student"] and trainer.step.eyes.alike is False


@pytest.mark.parametrize("kind", ["Dropout", "attention_dropout", "BatchNorm"])
def test_a_tower_that_is_another_in_training_is_run_by_each(make_trainer: MakeTrainer, kind: str) -> None:
    """Control: dropout in the decoder is none of the tower's."""
    for where in ("decoder", "tower"):
        student = tiny.make_vlm(0)
        tower = student.model.vision_model if where == "tower" else decoder_of(student)
        if kind == "attention_dropout":
            layer = (tower.encoder.layers if where == "tower" else tower.layers)[0].self_attn
            layer.attention_dropout = layer.dropout = 0.1
        else:
            tower.extra = nn.Dropout(0.1) if kind == "Dropout" else nn.BatchNorm1d(3)
        trainer = make_trainer(**FROZEN, model=student)
        step(trainer, mixed_batch(trainer))
        assert trainer.step.eyes.alike is (where == "decoder")


@pytest.mark.parametrize("fault", ["raises", "reads more"])
def test_a_family_that_reads_more_of_its_tower_runs_it(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    trainer = make_trainer(**FROZEN)
    batch = mixed_batch(trainer)
    still = teacher_ce(make_trainer(**FROZEN), batch)
    backbone = trainer.before.model.base_model
    kind = type(backbone)

    class Other(kind):  # type: ignore[misc, valid-type]
        def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
            output = super().get_image_features(*args, **kwargs)
            self.scale = 1.0
            return output

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if fault == "raises" and not hasattr(self, "scale"):
                raise ValueError("no scale")
            scale = self.__dict__.pop("scale", 3.0)
            return output if scale == 1.0 else kind.forward(self, *args, **{**kwargs, "pixel_values": None})

    backbone.__class__ = Other
    assert teacher_ce(trainer, batch) == still
    assert trainer.step.eyes.alike is False


@pytest.mark.parametrize("compiled", [True, False])
def test_of_a_compiled_student_each_looks_for_itself(make_trainer: MakeTrainer, compiled: bool) -> None:
    """Else every step would be traced anew. Control: a student that is not compiled."""
    given = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    trainer = make_trainer(**FROZEN, **given)
    batch = mixed_batch(trainer)
    step(trainer, batch)
    with looks(trainer) as towers:
        step(trainer, batch)
    assert len(towers) == (2 if compiled else 1)


@pytest.mark.parametrize("anchor", ["none", "before"])
def test_between_two_dtypes_the_student_keeps_its_own(make_trainer: MakeTrainer, anchor: str) -> None:
    """The VLM before is held in the dtype of autocast: it takes the student's features, which are more exact, and gives none."""
    trainer = make_trainer(**FROZEN, bf16=True, anchor=anchor)
    assert {weight.dtype for weight in trainer.before.model.parameters()} == {torch.bfloat16}
    batch = mixed_batch(trainer)
    step(trainer, batch)
    with looks(trainer) as towers:
        step(trainer, batch)
    # Older releases write image features among the embeddings by an index, which takes no other dtype
    once = anchor == "none" and Version(transformers.__version__) >= Version("5.21")
    assert sorted(towers) == (["student"] if once else ["before", "student"])


def test_the_states_of_a_towers_layers_are_not_kept() -> None:
    output = BaseModelOutputWithPooling(
        last_hidden_state=torch.ones(1), pooler_output=torch.zeros(1), hidden_states=(torch.ones(1),)
    )
    late = BaseModelOutput(last_hidden_state=torch.ones(1))
    late.pooler_output = torch.zeros(1)  # set on the object alone, as older releases do
    assert _light(late).pooler_output is late.pooler_output
    light = _light(output)
    assert type(light) is type(output) and light.hidden_states is None and light.pooler_output is output.pooler_output
    assert output.hidden_states is not None and _light((1, 2)) == (1, 2)


# --------------------------------------------------------------------------------------------------------------------
# freeze_vision
# --------------------------------------------------------------------------------------------------------------------
def test_left_out_the_tower_stays_as_it_is_unless_an_adapter_reaches_it(
    make_trainer: MakeTrainer, tmp_path: Any
) -> None:
    cases = {
        "all weights": (None, True),
        "decoder": (LoraConfig(r=2, target_modules=".*text_model.*q_proj"), True),
        "everything": (LoraConfig(r=2, target_modules="all-linear"), False),
        "projector": (LoraConfig(r=2, target_modules=".*text_model.*q_proj", modules_to_save=["connector"]), False),
    }
    for adapter, frozen in cases.values():
        config = LinguDistillConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, teacher_quantization="none"
        )
        trainer = LinguDistillTrainer(
            model=tiny.make_vlm(0),
            processing_class=tiny.make_processor(),
            teacher_model=tiny.make_lm(1),
            teacher_tokenizer=tiny.make_tokenizer(extra=False),
            train_dataset=tiny.make_dataset(8),
            args=config,
            peft_config=adapter,
        )
        assert trainer.decided["freeze_vision"] is frozen and trains_vision(trainer.step.student) is not frozen
        assert config.freeze_vision is None  # another trainer's as well
        assert any(weight.requires_grad for weight in decoder_of(trainer.step.student).parameters())


def test_a_frozen_tower_and_projector_end_as_they_began(make_trainer: MakeTrainer) -> None:
    for frozen in (True, False):  # control: else they move
        trainer = make_trainer(**{**FROZEN, "freeze_vision": frozen}, max_steps=2)
        assert trains_vision(trainer.model) is not frozen
        start = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        moved_weights = {name for name, weight in trainer.model.state_dict().items() if not weight.equal(start[name])}
        assert any("text_model" in name for name in moved_weights)
        assert any("vision_model" in name for name in moved_weights) is not frozen
        assert any("connector" in name for name in moved_weights) is not frozen


@pytest.mark.parametrize("where", ["vision_model", "connector"])
def test_an_adapter_on_a_frozen_tower_is_refused(make_trainer: MakeTrainer, where: str) -> None:
    targets = f".*({where}|text_model).*(q_proj|proj)"
    with pytest.raises(ValueError, match=rf"the adapter reaches it \(.*{where}.*lora_target_modules"):
        make_trainer(**FROZEN, peft_config=LoraConfig(r=2, target_modules=targets))
    make_trainer(**FROZEN, peft_config=LoraConfig(r=2, target_modules=".*text_model.*q_proj"))


def test_a_run_is_resumed_with_the_tower_it_had(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    rows = [{**row, "distill": True} for row in tiny.make_rows(8)]  # else the VLM before has no picture to look at
    settings = {**FROZEN, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_dataset": rows}
    whole = make_trainer(**settings)
    whole.train()
    checkpoint = str(tmp_path / "out/checkpoint-2")
    again = make_trainer(**settings, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    assert again.step.eyes.alike
    other = make_trainer(**{**settings, "freeze_vision": False}, output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="was trained with freeze_vision=True; found freeze_vision=False"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_tower_that_an_earlier_trainer_froze_is_trained_when_asked_for(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """The two arms of a comparison in one notebook. Control: what its owner froze stays frozen, and a warning says so."""
    model = tiny.make_vlm(0)
    make_trainer(model=model, freeze_vision=True)
    assert not trains_vision(model)
    trainer = make_trainer(model=model, freeze_vision=False)
    before = {name: weight.clone() for name, weight in vision_parameters(model).items()}
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in vision_parameters(model).items())
    assert "their requires_grad is False" not in caplog.text
    for weight in vision_parameters(model).values():
        weight.requires_grad_(False)
    make_trainer(model=model, freeze_vision=True)
    make_trainer(model=model, freeze_vision=False)
    assert not trains_vision(model) and "their requires_grad is False" in caplog.text


def test_nothing_left_to_train_names_what_froze_it(make_trainer: MakeTrainer) -> None:
    model = tiny.make_vlm(0)
    for name, weight in model.named_parameters():
        weight.requires_grad_("connector" in name)
    with pytest.raises(ValueError, match="but for those of the vision part.* set freeze_vision=False"):
        make_trainer(model=model, freeze_vision=True).train()
    model = tiny.make_vlm(0)
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"\(requires_grad=False\). Set it to True for those that are to be trained, or pass"
    ):
        make_trainer(model=model, freeze_vision=False).train()
