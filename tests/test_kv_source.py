"""Whose keys and values the teacher reads: against two models in plain torch, and what stands still while the student moves."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from families import FAMILY_NAMES, Family, build_family
from planning import plan_queries, teacher_pass
from test_anchor import WEIGHT, log_of, lora, make_batch, two_models
from test_trainer import TOLERANCE, counted, difference, gradients_of, mixed_batch, reference, step
from tiny import moved
from transformers.models.smolvlm import modeling_smolvlm

from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer
from hf_lingudistill.anchor import Before, can_be_cut, make_before
from hf_lingudistill.meter import LED_ASTRAY, Meter
from hf_lingudistill.student_kv import recording

MakeTrainer = Callable[..., Any]


def twin(trainer: Any) -> Any:
    """A plain copy of the trainer's student, with gradients of its own."""
    other = copy.deepcopy(tiny.make_vlm(0)).train()
    other.load_state_dict(trainer.model.state_dict())
    return other


@pytest.mark.parametrize("mode", ["full", "prompt", "vision"])
def test_loss_and_gradients_are_those_of_a_teacher_that_reads_the_vlm_before(
    make_trainer: MakeTrainer, mode: str
) -> None:
    trainer = moved(make_trainer(kv_source="before", kv_sharing=mode, distill_tokens="all"))
    batch = mixed_batch(trainer)
    other = twin(trainer)
    loss, gradients = step(trainer, batch)
    expected = reference(other, batch, student=tiny.make_vlm(0), kv_sharing=mode, distill_tokens="all")
    expected.loss.backward()
    assert loss == pytest.approx(expected.loss.item(), rel=1e-6)
    assert difference(gradients, gradients_of(other)) < TOLERANCE
    # Control: the student's own, as it is now
    theirs = moved(make_trainer(kv_source="student", kv_sharing=mode, distill_tokens="all"))
    its_loss, its_gradients = step(theirs, batch)
    assert its_loss != pytest.approx(loss, rel=1e-4) and difference(its_gradients, gradients) > 1e-3


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("mode", ["vision", "prompt"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_first_columns_lend_what_the_whole_rows_would(name: str, mode: str, padding: str) -> None:
    """The teacher's answers, from keys and values of the columns that it reads and the student's masks, against a whole record of the VLM
    before. Where a prompt sees what stands behind it, whole rows are needed, and that is found."""
    family = build_family(name)
    inputs = family.make_inputs(padding, seed=0)
    labels = inputs.pop("labels")
    plan = plan_queries(
        inputs["input_ids"], labels, kv_sharing=mode, shared_vocab_size=family.text_vocab_size,
        unreadable_token_ids=family.image_token_ids, attention_mask=inputs.get("attention_mask"),
    )  # fmt: skip
    before, student = Before(family.student, nullcontext, 0), moved_copy(family)
    columns = plan.columns_read
    assert 0 < columns < plan.length
    text = inputs["input_ids"][plan.rows[:8], plan.positions[:8]][None]
    assert before.can_lend(inputs, columns, text) == (name != "paligemma")
    if name == "paligemma":
        return
    with torch.no_grad():
        with recording(student, keep_kv=False) as shared:
            student.base_model(**inputs)
        before.lend(shared, inputs, columns)
        with recording(family.student) as whole:
            family.student.base_model(**inputs)
        teacher = family.make_teacher(identical=False)
        answers = [teacher_pass(teacher, record, plan) for record in (shared, whole)]
        with recording(student) as own:  # control: the student's own
            student.base_model(**inputs)
        control = teacher_pass(teacher, own, plan)
    size = answers[1].norm()
    assert (answers[0] - answers[1]).norm() < 1e-4 * size
    assert (control - answers[1]).norm() > 1e-2 * size


def moved_copy(family: Family) -> Any:
    """The student after some training: its masks and positions are those of the VLM before, its keys and values are not."""
    student = family.fresh_student()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.3 * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator))
    return student


def test_the_vlm_before_runs_over_the_columns_that_are_read_and_over_no_row_of_text(make_trainer: MakeTrainer) -> None:
    trainer = moved(make_trainer(kv_source="before", kv_sharing="vision", distill_tokens="all"))
    rows = tiny.make_rows(4)
    rows[0]["distill"] = True
    batch = mixed_batch(trainer, rows)
    plan = trainer.step.planner(batch)
    image = batch["input_ids"] >= len(
        tiny.make_tokenizer(extra=False)
    )  # with the marks around it, which the LM lacks too
    last = int((image & (batch["labels"] == -100)).any(dim=0).nonzero().max()) + 1
    assert plan.columns_read == last < batch["input_ids"].shape[1]
    with counted(trainer.before.model.base_model) as calls:
        step(trainer, batch)
        step(trainer, batch)
    lengths = [kwargs["input_ids"].shape[1] for _, kwargs in calls]
    assert lengths == [batch["input_ids"].shape[1], last, 16, 8, last, last]  # tried once, on the rows and on a text
    texts = mixed_batch(trainer, [row for row in rows if not row["images"]])
    with counted(trainer.before.model.base_model) as calls:
        step(trainer, texts)
    assert not calls
    # Control: a teacher that reads everything needs the whole rows
    reader = moved(make_trainer(kv_source="before", kv_sharing="full", distill_tokens="all"))
    with counted(reader.before.model.base_model) as calls:
        step(reader, texts)
    assert len(calls) == 1


def test_a_single_query_is_no_text_to_try_it_on(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(kv_source="before", kv_sharing="full", distill_tokens="all")
    rows = tiny.make_rows(4)
    rows[0]["distill"] = True
    batch = mixed_batch(trainer, [rows[0]])
    scored = (batch["labels"] != -100).nonzero()
    batch["labels"][:, int(scored[1, 1]) :] = -100  # one label, far from the end of the row
    plan = trainer.step.planner(batch)
    assert plan.num_queries == 1 and 0 < plan.columns_read < 0.9 * plan.length
    with counted(trainer.before.model.base_model) as calls:
        step(trainer, batch)
    assert trainer.step.lends is None and [kwargs["input_ids"].shape[1] for _, kwargs in calls] == [plan.length]


@pytest.mark.parametrize("name", ["moe_mm_token_type_ids", "position_ids", "cu_seq_lens_q"])
def test_rows_with_an_input_that_is_not_known_are_not_cut(name: str) -> None:
    family = build_family("smolvlm")
    inputs = {key: value for key, value in family.make_inputs("right", seed=0).items() if key != "labels"}
    ids, before = inputs["input_ids"], Before(family.student, nullcontext, 0)
    last = int(torch.isin(ids, torch.tensor(family.image_token_ids)).any(dim=0).nonzero().max()) + 1
    text = torch.arange(20, 28)[None]
    assert before.can_lend(inputs, last, text)  # control
    other = torch.tensor([0, 4]) if name == "cu_seq_lens_q" else torch.zeros_like(ids)
    assert not before.can_lend({**inputs, name: other}, last, text)
    assert not before.can_lend(inputs, last - 1, text)  # what cannot run on cut rows is not cut


def test_a_row_as_long_as_a_side_of_its_pixels_is_cut() -> None:
    """A name says what has a value per token; where none is known, the shape does: (B, T, ...), or (3, B, T) of M-RoPE."""
    ids = torch.arange(20, 52).expand(2, 32)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(2, 1, 3, 32, 32)}
    assert can_be_cut(given) and can_be_cut({**given, "pixel_attention_mask": torch.ones(2, 1, 32, 32)})
    assert not can_be_cut({**given, "position_ids": ids.expand(3, 2, 32)})
    assert not can_be_cut({**given, "visual_mask": torch.ones(2, 32, 5)})


def test_a_resumed_run_keeps_what_the_first_batch_decided(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows and cut ones differ in rounding, and a resumed run's first batch is another."""
    rows = [row for row in tiny.make_rows(16) if row["images"]]
    settings = {
        "kv_source": "before",
        "kv_sharing": "vision",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    settings |= {"train_dataset": [{**row, "distill": True} for row in rows], "per_device_train_batch_size": 2}
    with monkeypatch.context() as patched:
        patched.setattr(Before, "can_lend", lambda *_: False)
        whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
        whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "cut"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert resumed.step.lends is False
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # Control: decided anew, it is another run
    kept = tmp_path / "whole/checkpoint-2/lingudistill_measured_0.json"
    facts = json.loads(kept.read_text())
    assert facts["lends"] is False
    kept.write_text(json.dumps({name: value for name, value in facts.items() if name != "lends"}))
    anew = make_trainer(output_dir=str(tmp_path / "anew"), **settings)
    anew.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert anew.step.lends is True


def test_no_row_loses_an_image_token(make_trainer: MakeTrainer) -> None:
    """Of a row that is not marked the teacher reads nothing; its image must still have all its places."""
    trainer = make_trainer(kv_source="before", kv_sharing="vision", distill_tokens="all")
    rows = tiny.make_rows(4)
    late = copy.deepcopy(next(row for row in rows if row["images"]))
    text = [{"type": "text", "text": "wait and see what comes behind all of this text " * 2}]
    late["prompt"] = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "image"}, *text]},
    ]
    late["distill"] = False
    rows[0]["distill"] = True
    batch = mixed_batch(trainer, [rows[0], late])
    plan = trainer.step.planner(batch)
    image = batch["input_ids"] >= len(tiny.make_tokenizer(extra=False))
    last = [int((image[row] & (batch["labels"][row] == -100)).nonzero().max()) + 1 for row in (0, 1)]
    assert last[1] > last[0] and plan.columns_read == max(last)
    step(trainer, batch)


@pytest.mark.parametrize("mode", ["vision", "prompt"])
def test_pictures_that_the_teacher_is_not_asked_about_are_not_looked_at(
    make_trainer: MakeTrainer, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mixture of marked texts and unmarked questions about pictures: with `vision` the teacher reads nothing of the VLM before. Loss
    and gradients are those of a step that runs it all the same. Control: `prompt` reads the texts' prompts."""
    trainer = moved(make_trainer(kv_source="before", kv_sharing=mode, distill_tokens="all"))
    batch = mixed_batch(trainer, tiny.make_rows(4))
    plan = trainer.step.planner(batch)
    assert plan.num_queries and plan.has_image.any() and (plan.columns_read == 0) == (mode == "vision")
    with counted(trainer.before.model.base_model) as calls:
        loss, gradients = step(trainer, batch)
    assert bool(calls) == (mode == "prompt")
    with counted(trainer.before.model.base_model) as calls:
        whole = step(trainer, {**batch, "queries": replace(plan, columns_read=plan.length)})
    assert calls and loss == whole[0]
    assert difference(gradients, whole[1]) <= (0.0 if mode == "vision" else TOLERANCE)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "default"])
def test_rows_whose_positions_are_rotated_by_their_length_are_not_cut(kind: str) -> None:
    """On the first batch cut rows lend the same keys, on a longer one others. Control: ordinary positions."""
    given = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        given |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 32}
    long = {"max_position_embeddings": 32} if kind == "dynamic" else {}
    vlm = tiny.make_vlm(0, rope_parameters=given, **long)
    before, text = Before(vlm, nullcontext, 0), torch.arange(8, 16)[None]
    short, later = (
        {"input_ids": torch.randint(8, 60, (1, length)), "attention_mask": torch.ones(1, length, dtype=torch.long)}
        for length in (24, 48)
    )
    assert before._same_without(short, 10)
    assert before._same_without(later, 10) == (kind == "default")
    assert before.can_lend(short, 10, text) == (kind == "default")


@pytest.mark.parametrize("kind", ["running text", "every turn"])
def test_an_image_that_is_trained_on_keeps_its_places(make_trainer: MakeTrainer, kind: str) -> None:
    """Its tokens are labels, as in plain SFT. The first batch says that rows can be cut; in the second, a row that is not marked has its
    image late."""
    text = "wait and see what comes behind all of this text "

    def row(late: bool, marked: bool) -> dict[str, Any]:
        images = [row["images"][0] for row in tiny.make_rows(4) if row["images"]][:1]
        if kind == "running text":
            parts = [text * 2, "<image>", text] if late else ["<image>", text * 3]
            return {"text": "".join(parts), "images": images, "distill": marked}
        asked = [{"type": "image"}, {"type": "text", "text": "what?"}]
        turns = [
            {"role": "user", "content": [{"type": "text", "text": text * 2}, *asked] if late else asked},
            {"role": "assistant", "content": [{"type": "text", "text": text * 2}]},
        ]
        return {"messages": turns, "images": images, "distill": marked}

    rows = [
        row(late=False, marked=True),
        row(late=False, marked=False),
        row(False, True),
        row(late=True, marked=False),
    ]
    given = {
        "kv_source": "before",
        "kv_sharing": "vision",
        "distill_tokens": "all",
        "answers_only": kind != "every turn",
    }
    trainer = make_trainer(train_dataset=rows, **given)
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in pair]) for pair in ((0, 1), (2, 3))]
    images = torch.isin(batches[1]["input_ids"], torch.tensor(trainer.compatibility.image_token_ids))
    assert (batches[1]["labels"][images] != -100).all() and images.any(dim=1).all()
    last = int(images.any(dim=0).nonzero().max()) + 1
    assert last <= batches[1]["queries"].columns_read < 0.9 * images.shape[1]
    for batch in batches:
        batch.pop("lingudistill_row", None)
        step(trainer, batch)
    assert trainer.step.lends
    # Control: the places of images that are labels are left out
    cut = int(images[0].nonzero().max()) + 2
    assert cut < last
    if "Image features and image tokens do not match" in inspect.getsource(
        modeling_smolvlm
    ):  # older releases cut in silence
        batches[1]["queries"] = replace(batches[1]["queries"], columns_read=cut)
        with pytest.raises(ValueError, match="[Ii]mage"):
            step(trainer, batches[1])


def test_inputs_are_those_of_the_vlm_before(make_trainer: MakeTrainer) -> None:
    """Its tower's features, while the student's tower moves."""
    readings = {}
    for source in ("before", "student"):
        trainer = make_trainer(kv_source=source, kv_sharing="inputs", distill_tokens="all")
        batch = mixed_batch(trainer)
        still = teacher_ce(trainer, batch)
        readings[source] = (still, teacher_ce(moved(trainer), batch))
    assert readings["before"][0] == pytest.approx(readings["before"][1], rel=1e-6)
    assert readings["student"][0] != pytest.approx(readings["student"][1], rel=1e-3)
    assert readings["before"][0] == pytest.approx(readings["student"][0], rel=1e-6)


def teacher_ce(trainer: Any, batch: dict[str, Any]) -> float:
    step(trainer, batch)
    return log_of(trainer)["teacher_ce"]


@pytest.mark.parametrize("adapter", [False, True], ids=["full training", "LoRA"])
def test_the_teacher_stands_still_while_the_student_moves(make_trainer: MakeTrainer, adapter: bool) -> None:
    readings = {}
    for source in ("before", "student"):
        extra = {"peft_config": lora(init_lora_weights=True)} if adapter else {}
        trainer = make_trainer(kv_source=source, kv_sharing="vision", distill_tokens="all", **extra)
        assert (trainer.before is not None) == (source == "before")
        batch = mixed_batch(trainer)
        still = teacher_ce(trainer, batch)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    parameter.add_(0.3 * parameter.std().clamp_min(0.05) * noise)
        readings[source] = (still, teacher_ce(trainer, batch))
    assert readings["before"][0] == pytest.approx(readings["before"][1], rel=1e-6)
    assert readings["student"][0] != pytest.approx(readings["student"][1], rel=1e-4)
    # They begin alike
    assert readings["before"][0] == pytest.approx(readings["student"][0], rel=1e-5)


def test_both_parents_take_one_forward_of_the_vlm_before(make_trainer: MakeTrainer) -> None:
    trainer = moved(make_trainer(anchor="before", anchor_weight=WEIGHT, kv_source="before"))
    batch = make_batch(trainer)
    other = twin(trainer)
    with counted(trainer.before.model.base_model) as calls:
        loss, gradients = step(trainer, batch)
    assert len(calls) == 1
    expected, _ = two_models(other, tiny.make_vlm(0), batch, WEIGHT, student=tiny.make_vlm(0))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert difference(gradients, gradients_of(other)) < TOLERANCE
    # Nothing to distil and nothing to anchor: it is not asked
    alone = make_trainer(kv_source="before")
    batch["distill"] = torch.zeros_like(batch["distill"])
    with counted(alone.before.model.base_model) as calls:
        step(alone, batch)
    assert not calls


def test_what_cannot_be_is_refused_by_its_own_name() -> None:
    with pytest.raises(ValueError, match="with kv_sharing='none' it reads none: set another kv_sharing"):
        LinguDistillConfig(output_dir="out", kv_source="before", kv_sharing="none")
    with pytest.raises(ValueError, match="kv_source must be one of student, before; got 'after'"):
        LinguDistillConfig(output_dir="out", kv_source="after")
    packed = tiny.make_vlm(0)
    packed.hf_quantizer = SimpleNamespace()
    with pytest.raises(ValueError, match=r"kv_source='before' needs a copy of the student.* set kv_source='student'"):
        make_before(packed, packed, torch.float32, asked_by="kv_source")


@pytest.mark.parametrize(
    ("mode", "source"), [("vision", "before"), ("full", "student"), ("prompt", "student"), ("none", "student")]
)
def test_left_out_it_is_what_was_measured_to_be_better(make_trainer: MakeTrainer, mode: str, source: str) -> None:
    trainer = make_trainer(kv_sharing=mode, kv_source=None)
    assert trainer.decided["kv_source"] == source
    assert (trainer.before is not None) == (source == "before") == (trainer.step.source is not None)


def test_left_out_it_gives_way_to_an_adapter_that_changes_the_weights_under_it(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    pissa = lora(init_lora_weights="pissa")
    trainer = make_trainer(kv_sharing="vision", kv_source=None, peft_config=pissa)
    assert trainer.decided["kv_source"] == "student" and trainer.step.source is None and trainer.meter.follows_student
    assert "The teacher reads the student's own keys and values, which training moves" in caplog.text
    with pytest.raises(ValueError, match="changes the weights under the adapter"):  # control: where it was asked for
        make_trainer(kv_sharing="vision", kv_source="before", peft_config=pissa)
    # The same options in another trainer: what gave way to the adapter holds for that trainer alone
    models = {"processing_class": tiny.make_processor(), "teacher_tokenizer": tiny.make_tokenizer(extra=False)}
    again = LinguDistillTrainer(
        tiny.make_vlm(0), trainer.args, teacher_model=tiny.make_lm(1), train_dataset=tiny.make_dataset(4), **models
    )
    assert again.decided["kv_source"] == "before" and again.step.source is not None


def test_a_teacher_that_is_led_astray_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), reduce=lambda total, reduction: total)

    def log(meter: Meter, teacher_ce: float, behind: float = 0.0) -> None:
        sums = dict.fromkeys(("labels", "candidates", "distilled"), 10.0)
        sums |= {"teacher_ce": 10 * teacher_ce, "student_ce": 10 * (teacher_ce - behind)}
        from hf_lingudistill.meter import _SUMS

        meter._train += torch.tensor([sums.get(name, 0.0) for name in _SUMS])
        meter.read(training=True)

    def warned(readings: list[float], *, follows: bool, resumed: bool = False) -> bool:
        caplog.clear()
        meter = Meter(accelerator, distill_tokens="all", follows_student=follows)
        for reading in readings:
            if resumed:
                state = meter.state()
                meter = Meter(accelerator, distill_tokens="all", follows_student=follows)
                meter.load(state)
            log(meter, reading)
        return any("kv_source='before'" in record.getMessage() for record in caplog.records)

    with caplog.at_level(logging.WARNING):
        astray = [3.2, 3.1, 3.1 + LED_ASTRAY + 0.1]
        assert warned(astray, follows=True)
        assert warned(astray, follows=True, resumed=True)
        assert not warned(astray, follows=False)
        # A teacher that was called the poorer one before is still watched
        meter = Meter(accelerator, distill_tokens="all", follows_student=True)
        log(meter, 3.1, behind=1.0)
        assert meter.worse_teacher_warned and not meter.astray_warned
        log(meter, astray[-1])
        assert meter.astray_warned
        assert not warned([3.2, 3.9, 3.1, 4.0], follows=True)
        assert not warned([8.0, 3.0, 3.1], follows=True), "getting better is no fault"


def test_a_deep_copy_of_a_student_is_a_model_of_its_own(make_trainer: MakeTrainer) -> None:
    """The step takes the place of its student's forward, and a copy takes that along."""
    trainer = make_trainer()
    batch = mixed_batch(trainer)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "distill")}
    twin_of_it = copy.deepcopy(trainer.step.student).eval()
    with torch.no_grad():
        before = twin_of_it(**inputs).logits
        for parameter in trainer.step.student.parameters():
            parameter.mul_(1.5)
        assert torch.equal(twin_of_it(**inputs).logits, before)
        assert not torch.equal(trainer.step.student.eval()(**inputs).logits, before), "control"
