"""On-policy: what is sampled, who judges it, and the loss against two models in plain torch."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import families
import oracle
import pytest
import tiny
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from planning import KV_SHARING_MODES
from test_trainer import IMAGE_TOKEN, SHARED_VOCAB, TOLERANCE, Batch, difference, generalised_jsd, gradients_of

from hf_lingudistill import OnPolicyLinguDistillConfig, OnPolicyLinguDistillTrainer, on_policy
from hf_lingudistill.finite import NotFinite
from hf_lingudistill.hub.run_facts import read_run_facts
from hf_lingudistill.prompts import PromptCollator
from hf_lingudistill.scripts.distill import main

Make = Callable[..., Any]
UNSHARED = SHARED_VOCAB + 1  # a token of the VLM's own that stands for no image


@pytest.fixture
def make(make_trainer: Make) -> Make:
    return partial(make_trainer, OnPolicyLinguDistillTrainer)


def prompts(count: int = 4, **kwargs: Any) -> list[dict[str, Any]]:
    """Even rows with an image, not marked; odd rows of text, marked. No answers."""
    return [{k: v for k, v in row.items() if k != "completion"} for row in tiny.make_rows(count, **kwargs)]


def sampled(trainer: Any, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What TRL hands to `compute_loss`. Row 1, which is marked, says a token that the LM lacks."""
    torch.manual_seed(11)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions(trainer.data_collator(rows or prompts()))
    if rows is None:
        inputs["completion_ids"][1, 3] = UNSHARED
    return dict(inputs)


def step(trainer: Any, inputs: dict[str, Any]) -> tuple[float, Any]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.item(), gradients_of(trainer.model)


def two_models(
    model: Any,
    before: Any,
    batch: Batch,
    *,
    kv_sharing: str = "prompt",
    kv_source: str = "student",
    beta: float = 1.0,
    temperature: float = 1.0,
    distill_weight: float = 1.0,
    student: Any = None,
) -> tuple[torch.Tensor, dict[str, int]]:
    """The loss, token by token in float64, by full logits of plain models; and who judged how many tokens."""
    teacher = tiny.make_lm(1)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "distill")}
    logits = model(**inputs).logits.double()
    with torch.no_grad():
        of_before = before(**inputs).logits.double()
        hidden = oracle.oracle_hidden(
            teacher,
            before if kv_source == "before" else student or model,
            {k: v for k, v in batch.items() if k != "distill"},
            kv_sharing,
            unreadable_token_ids=(IMAGE_TOKEN,),
            shared_vocab_size=SHARED_VOCAB,
        )
        of_lm = torch.full_like(logits, -100.0)
        of_lm[..., :SHARED_VOCAB] = teacher.lm_head(hidden).double()
    labels, ids = batch["labels"], batch["input_ids"]
    loss, counts = torch.zeros(()).double(), {"lm": 0, "before": 0, "nobody": 0}
    for b, t in itertools.product(range(labels.shape[0]), range(labels.shape[1] - 1)):
        if labels[b, t + 1] == -100:
            continue
        judge, weight, logits_of_judge = "before", 1.0, of_before
        if batch["distill"][b]:
            judge, weight, logits_of_judge = "lm", distill_weight, of_lm
            if ids[b, t] >= SHARED_VOCAB or ids[b, t] == IMAGE_TOKEN:
                judge = "nobody"
        counts[judge] += 1
        if judge != "nobody":
            says = ((x[b, t] / temperature).log_softmax(-1) for x in (logits, logits_of_judge))
            loss = loss + weight * generalised_jsd(*says, beta)
    return loss / sum(counts.values()), counts


def test_a_training_after_one_that_broke_off_trains_on_no_sample_of_it(make: Make) -> None:
    """TRL samples for several batches at once; what was left of a training that broke off was trained on first by the next one."""
    trainer = make(
        train_dataset=prompts(8, images=False),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    loss_of, generate, seen, made = trainer.compute_loss, trainer._generate_and_score_completions, [], []

    def breaks(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(made))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return loss_of(model, inputs, *args, **kwargs)

    def counted(inputs: Any) -> Any:
        made.append(1)
        return generate(inputs)

    trainer.compute_loss, trainer._generate_and_score_completions = breaks, counted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen == [1, 1] and trainer._buffered_inputs is not None
    trainer.train()
    assert seen[2:] == [2, 2, 3, 3]  # each step's batches are of one generation, and of its own


# --------------------------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kv_sharing", "settings"),
    [
        *((mode, {}) for mode in KV_SHARING_MODES),
        ("vision", {"beta": 0.0}),
        ("full", {"kv_source": "before"}),
        ("prompt", {"beta": 0.3, "temperature": 1.7, "distill_weight": 0.6}),
    ],
    ids=str,
)
def test_loss_and_every_gradient_equal_two_models_in_plain_torch(
    make: Make, kv_sharing: str, settings: dict[str, Any]
) -> None:
    rows = prompts()
    rows[2]["distill"] = True  # an image that the LM is asked about
    trainer = tiny.moved(make(train_dataset=rows, kv_sharing=kv_sharing, **settings))
    inputs = sampled(trainer, rows)
    inputs["completion_ids"][1, 3] = UNSHARED
    batch = trainer._batch(inputs)
    other = copy.deepcopy(tiny.make_vlm(0)).train()
    other.load_state_dict(trainer.model.state_dict())
    reference = partial(two_models, other, tiny.make_vlm(0), kv_sharing=kv_sharing)
    expected, counts = reference(batch, **settings)
    expected.backward()
    assert all(count > 0 for count in counts.values()), counts
    assert not batch["attention_mask"][:, 0].all(), "a prompt must be padded on the left"
    loss, gradients = step(trainer, inputs)
    assert loss == pytest.approx(expected.item(), rel=2e-6)
    assert difference(gradients, gradients_of(other)) < TOLERANCE
    trainer.meter.accepted()
    said = trainer.meter.read(training=True)
    assert (said["distilled_tokens"], said["anchored_tokens"]) == (counts["lm"], counts["before"])
    assert said["answer_tokens"] == sum(counts.values())
    # Controls: another mode, the other divergence, the judges exchanged
    elsewhere = "none" if kv_sharing != "none" else "vision"
    swapped = {**batch, "distill": ~batch["distill"]}
    for wrong in (
        two_models(other, tiny.make_vlm(0), batch, kv_sharing=elsewhere, **settings),
        reference(batch, **{**settings, "beta": 0.5}),
        reference(swapped, **settings),
        two_models(other, tiny.make_vlm(7), batch, kv_sharing=kv_sharing, **settings),
    ):
        assert wrong[0].item() != pytest.approx(loss, rel=1e-3)


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **kwargs)


def test_lora_is_judged_by_its_base_and_equals_two_models(make: Make) -> None:
    trainer = make(train_dataset=prompts(), peft_config=lora())
    assert trainer.before.footprint == 0 and trainer.before.model is trainer.step.student
    inputs = sampled(trainer)
    other = get_peft_model(tiny.make_vlm(0), lora()).train()
    other.load_state_dict(trainer.model.state_dict())
    batch = trainer._batch(inputs)
    expected, _ = two_models(other, tiny.make_vlm(0), batch, student=other.get_base_model())
    expected.backward()
    loss, gradients = step(trainer, inputs)
    assert loss == pytest.approx(expected.item(), rel=2e-6)
    assert difference(gradients, gradients_of(other)) < TOLERANCE
    # Control: with its adapter on, "before" is the student itself
    same, _ = two_models(other, other, batch, student=other.get_base_model())
    assert same.item() != pytest.approx(loss, rel=1e-3)


def test_sampled_and_judged_in_the_same_arithmetic(make: Make) -> None:
    """TRL's redirected forward bypasses accelerate's autocast."""
    trainer = make(train_dataset=prompts(), bf16=True)
    trainer.accelerator.prepare(trainer.model)
    found: list[torch.dtype] = []
    layer = trainer.step.student.get_decoder().layers[0].mlp.down_proj
    layer.register_forward_hook(lambda _, __, output: found.append(output.dtype))
    inputs = sampled(trainer)
    assert set(found) == {torch.bfloat16}
    found.clear()
    step(trainer, inputs)
    assert set(found) == {torch.bfloat16}


def test_accumulation_changes_nothing(make: Make, tmp_path: Path) -> None:
    """Greedy, so that what is said hangs on weights and prompts alone."""
    weights = []
    for accumulation in (1, 2, 4):
        trainer = make(
            train_dataset=prompts(8),
            output_dir=str(tmp_path / str(accumulation)),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            generation_kwargs={"do_sample": False},
            max_steps=2,
        )
        trainer.train()
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    start = dict(tiny.make_vlm(0).named_parameters())
    for name, weight in weights[0].items():
        moved_by = (weight - start[name]).norm()
        for other in weights[1:]:
            assert (other[name] - weight).norm() <= 1e-4 * moved_by + 1e-7, name
    assert any((weights[0][name] - start[name]).norm() > 1e-3 for name in weights[0])  # control: something was learnt


# --------------------------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------------------------
def asked(make: Make, dataset: Any, **settings: Any) -> str:
    """What the student is asked in the first row, as text."""
    trainer = make(train_dataset=dataset, **settings)
    rows = [next(iter(trainer.train_dataset))]
    ids = sampled(trainer, rows)["prompt_ids"][0]
    return str(trainer._tokenizer.decode(ids))


QUESTION, ANSWER = "tell me about the sea", "the sea is deep"
TEXT_ROWS: dict[str, dict[str, Any]] = {
    "a text": {"prompt": QUESTION},
    "turns": {"prompt": [{"role": "user", "content": QUESTION}]},
    "with its answer": {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
    },
    "a conversation": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "without an answer": {"messages": [{"role": "user", "content": QUESTION}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "pairs": {"texts": [{"user": QUESTION, "assistant": ANSWER}]},
}


@pytest.mark.parametrize("kind", TEXT_ROWS)
@pytest.mark.parametrize("as_list", [True, False], ids=["list", "dataset"])
def test_prompts_of_every_format_ask_the_same_and_never_the_answer(make: Make, kind: str, as_list: bool) -> None:
    row = TEXT_ROWS[kind]
    said = asked(make, [row, row] if as_list else Dataset.from_list([row, row]))
    assert said == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def test_earlier_answers_stay_and_images_stand_where_they_are_named(make: Make) -> None:
    picture = prompts()[0]["images"][0]
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]},
    ]
    said = asked(make, [{"messages": [*turns, {"role": "assistant", "content": ANSWER}]}])
    assert said.index("yes") < said.index("<image>") < said.index(QUESTION) and ANSWER not in said
    assert said.count("<image>") == 4
    image_column = [{"prompt": f"{QUESTION} <image>", "images": [picture]}]
    assert asked(make, image_column).index(QUESTION) < asked(make, image_column).index("<image>")


def test_a_stream_and_text_without_images(make: Make) -> None:
    rows = tiny.make_dataset(8, images=False).remove_columns("completion")
    for dataset in (rows, rows.to_iterable_dataset()):
        trainer = make(train_dataset=dataset)
        trainer.train()
        assert not trainer.data_collator.vision and trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"text": "running text"},
            "Row 0 has the columns text: expected 'prompt' or 'messages'. Rename the column of the questions.",
        ),
        ({"prompt": "  "}, "Row 0 asks nothing: its prompt is empty."),
        ({"messages": [{"role": "assistant", "content": ANSWER}]}, "Row 0 asks nothing: its prompt is empty."),
        ({"messages": [{"who": "me"}]}, "Row 0, 'messages', turn 0: expected a 'role'"),
        ({"prompt": "<image> <image> what?", "images": [], "distill": True}, "its text names 2 images"),
    ],
    ids=["text", "empty", "answer alone", "no role", "no image"],
)
def test_rows_that_ask_nothing_are_refused_or_skipped(make: Make, row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", "[(]")):
        make(train_dataset=[row, *prompts(3)] if "prompt" in row else [row]).train()
    if "prompt" in row:
        trainer = make(train_dataset=[row, *prompts(3)], skip_bad_rows=True)
        assert len(trainer.train_dataset) == 3 and sum(trainer.skipped_rows.values()) == 1


def test_pictures_go_with_their_rows_however_many_a_row_has(make: Make) -> None:
    rows = prompts(2)
    rows[0]["images"] = rows[0]["images"] * 2
    rows[0]["prompt"] = [{"role": "user", "content": "<image> <image> what?"}]
    trainer = make(train_dataset=rows, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer.model.train()
    trainer._prepare_inputs(trainer.data_collator(rows))
    seen = [trainer._batch(part) for part in trainer._buffered_inputs]
    for batch in seen:
        images = int((batch["input_ids"] == IMAGE_TOKEN).sum()) // 4
        assert (images == 0) == ("pixel_values" not in batch)
        if images:
            assert batch["pixel_values"].shape[:2] == (1, 2) and bool(batch["pixel_values"].flatten(2).any(-1).all())
    assert len(seen) == 2


# --------------------------------------------------------------------------------------------------------------------
# The end of an answer
# --------------------------------------------------------------------------------------------------------------------
def test_the_end_is_among_what_is_judged(make: Make) -> None:
    trainer = make(train_dataset=prompts())
    inputs = sampled(trainer)
    inputs["completion_ids"][:, 5] = end = trainer._tokenizer.eos_token_id
    inputs["completion_mask"][:, 6:] = 0
    batch = trainer._batch(inputs)
    plan = trainer.step.planner(batch)
    at = batch["labels"][plan.label_rows, plan.label_positions + 1]
    judged = at[: plan.num_loss]
    assert (judged == end).sum() == 2 and (at[plan.num_loss :] == end).sum() == 2
    assert plan.num_labels == 4 * 6


def pair_with_two_ends(*, teacher_tells: bool) -> dict[str, Any]:
    """The VLM ends its turns with a token of its own, the LM with `<|im_end|>`, which it says often."""
    processor, student, teacher = tiny.make_processor(), tiny.make_vlm(0), tiny.make_lm(1)
    processor.tokenizer.eos_token = "<end_of_utterance>"
    processor.chat_template = processor.tokenizer.chat_template = tiny.CHATML.replace(
        "<|im_end|>", "<end_of_utterance>"
    )
    student.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    teacher.get_input_embeddings().weight.data[2] *= 4
    tokenizer = tiny.make_tokenizer(extra=False)
    if not teacher_tells:
        tokenizer.chat_template = None
    return {"processing_class": processor, "model": student, "teacher_model": teacher, "teacher_tokenizer": tokenizer}


@pytest.mark.parametrize("aliased", [True, False], ids=["one event", "control: two events"])
def test_where_the_models_name_the_end_differently_it_is_one_event(
    make: Make, monkeypatch: pytest.MonkeyPatch, aliased: bool
) -> None:
    """The student learns how often its teacher ends an answer; taken for two events, never to end one."""
    pair = pair_with_two_ends(teacher_tells=aliased)
    if not aliased:
        with pytest.raises(
            ValueError, match="ends an answer with '<end_of_utterance>', which the language model does not know"
        ):
            make(train_dataset=prompts(4, images=False), **pair)
        monkeypatch.setattr(OnPolicyLinguDistillTrainer, "_check_ends", lambda self: None)
    trainer = make(
        train_dataset=prompts(4, images=False), kv_sharing="none", **pair_with_two_ends(teacher_tells=aliased)
    )
    assert bool(trainer.teacher.vocabulary.aliases) == aliased
    rows = [{**row, "distill": True} for row in prompts(4, images=False)]
    inputs = sampled(trainer, rows)
    batch = trainer._batch(inputs)
    plan = trainer.step.planner(batch)
    readable = oracle.readable_tokens(batch, unreadable_token_ids=(IMAGE_TOKEN,), shared_vocab_size=SHARED_VOCAB)
    if aliased:  # as the teacher reads them
        readable |= batch["attention_mask"].bool() & (batch["input_ids"] == trainer._tokenizer.eos_token_id)
    read = trainer.teacher.vocabulary.to_teacher(batch["input_ids"])
    with torch.no_grad():
        hidden = oracle._text_only_hidden(trainer.teacher.model, read, readable)[plan.loss_rows, plan.loss_positions]
        of_teacher = trainer.teacher.model.lm_head(hidden)[:, :SHARED_VOCAB].softmax(-1)[:, 2].mean().item()

    def says_end() -> float:
        with torch.no_grad():
            own = {name: value for name, value in batch.items() if name not in ("labels", "distill")}
            said = trainer.model(**own).logits.softmax(-1)[plan.loss_rows, plan.loss_positions]
        return float(said[:, trainer._tokenizer.eos_token_id].mean())

    before = says_end()
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=3e-3)
    for _ in range(60):
        step(trainer, inputs)
        optimizer.step()
    print(before, says_end(), of_teacher)
    assert of_teacher > 0.05
    if aliased:
        assert says_end() == pytest.approx(of_teacher, rel=0.3)
    else:
        assert says_end() < 0.02 * of_teacher


def test_an_end_that_the_lm_knows_beside_one_that_it_does_not_is_said(make: Make, caplog: Any) -> None:
    pair = pair_with_two_ends(teacher_tells=False)
    pair["model"].generation_config.eos_token_id = [2, pair["processing_class"].tokenizer.eos_token_id]
    make(train_dataset=prompts(), **pair)
    assert "does not know '<end_of_utterance>'" in caplog.text


def test_no_image_is_ever_sampled_and_what_the_user_suppresses_stays(make: Make) -> None:
    trainer = make(train_dataset=prompts(), generation_kwargs={"suppress_tokens": [5]})
    assert (
        trainer.generation_config.suppress_tokens == [5, IMAGE_TOKEN] == trainer.generation_kwargs["suppress_tokens"]
    )
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([IMAGE_TOKEN]), 1e4))
    inputs = sampled(trainer, prompts())
    assert (inputs["completion_ids"] != IMAGE_TOKEN).all()
    trainer.generation_config.suppress_tokens = trainer.generation_kwargs["suppress_tokens"] = None  # control
    assert (sampled(trainer, prompts())["completion_ids"] == IMAGE_TOKEN).all()


# --------------------------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------------------------
RESUMED: dict[str, Any] = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


def test_a_resumed_run_ends_where_the_whole_one_does_bit_for_bit(make: Make, tmp_path: Path) -> None:
    """8 prompts, 2 steps an epoch: step 3 is in the second epoch, whose order must not begin anew."""
    dataset = tiny.make_dataset(8).remove_columns("completion")
    whole = make(train_dataset=dataset, output_dir=str(tmp_path / "whole"), **RESUMED)
    whole.train()
    kept = str(tmp_path / "whole/checkpoint-3")
    resumed = make(train_dataset=dataset, output_dir=str(tmp_path / "cut"), **RESUMED)
    resumed.train(resume_from_checkpoint=kept)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    timed = (
        "step_time",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "total_flos",
        "train_loss",
    )
    first, second = (
        [{k: v for k, v in log.items() if k not in timed} for log in run.state.log_history] for run in (whole, resumed)
    )
    assert first == second and any("anchor_kl" in log for log in first)
    # Control: other random numbers
    other = make(train_dataset=dataset, output_dir=str(tmp_path / "other"), **RESUMED)
    other._load_rng_state = lambda checkpoint: torch.manual_seed(99)
    other.train(resume_from_checkpoint=kept)
    assert not all(torch.equal(a, b) for a, b in zip(other.model.parameters(), whole.model.parameters(), strict=True))


def test_sampled_answers_are_logged_and_another_runs_are_not_written_over(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    settings = {"train_dataset": prompts(), "log_completions": True, "output_dir": str(tmp_path / "run")}
    make(**settings).train()
    (file,) = (tmp_path / "run/completions").iterdir()
    table = load_dataset("parquet", data_files=str(file), split="train")
    assert set(table.column_names) == {"step", "prompt", "completion"} and len(table) == 4
    assert {"what shape is in the image?", QUESTION} == {row["prompt"].split("\n")[1] for row in table}
    with pytest.raises(ValueError, match="holds 'completions_00001.parquet', which a run may write over"):
        make(**settings).train()


def test_evaluation_samples_as_well(make: Make) -> None:
    trainer = make(train_dataset=prompts(), eval_dataset=prompts(), load_best_model_at_end=False)
    found = trainer.evaluate()
    assert found["eval_loss"] > 0 and found["eval_completions/mean_length"] > 0
    assert trainer.evaluate(prompts(6))["eval_loss"] > 0
    texts = make(train_dataset=prompts(4, images=False))
    with pytest.raises(ValueError, match="evaluation set has images and the training set has none"):
        texts.evaluate(prompts())


def test_rows_of_an_evaluation_that_are_not_marked_have_a_judge(make: Make) -> None:
    """All rows of the training set are marked. The control is a training set that has both: the same judges, the same loss."""
    marked, unmarked = (
        [{**row, "distill": True} for row in prompts()],
        [row for row in prompts(8) if not row["distill"]],
    )

    def evaluated(train: list[dict[str, Any]], evaluation: Any) -> dict[str, float]:
        trainer = tiny.moved(make(train_dataset=train, eval_dataset=evaluation))
        torch.manual_seed(5)
        found: dict[str, float] = trainer.evaluate()
        return found

    alone, control = evaluated(marked, unmarked), evaluated(prompts(), unmarked)
    assert alone["eval_loss"] == pytest.approx(control["eval_loss"], rel=1e-6) and alone["eval_loss"] > 0
    assert make(train_dataset=marked, eval_dataset={"one": marked, "two": unmarked}).step.judge is not None
    trainer = make(train_dataset=marked, eval_dataset=marked)
    assert trainer.step.judge is None
    with pytest.raises(
        ValueError, match="marks false, and no VLM before is there to judge them, .* pass it as eval_dataset"
    ):
        trainer.evaluate(unmarked)
    trainer.evaluate(marked)


def test_what_is_wrong_with_an_evaluation_set_is_said_before_the_first_step(make: Make, caplog: Any) -> None:
    each = {"eval_strategy": "steps", "eval_steps": 1}
    bad = prompts()
    bad[2] = {**bad[2], "images": ["no image"]}
    with pytest.raises(ValueError, match="^In evaluation set 'b': .*an image cannot be read"):
        make(train_dataset=prompts(), eval_dataset={"a": prompts(), "b": bad}, **each)
    strings = [{**row, "distill": "true"} for row in prompts()]
    with pytest.raises(
        ValueError, match="Column 'distill' of evaluation set 'b' must hold true or false in every row"
    ):
        make(train_dataset=prompts(), eval_dataset={"b": strings})
    make(train_dataset=prompts(), eval_dataset={"a": prompts()}, **each)  # control
    assert "which the training set has" not in caplog.text
    unmarked = [{k: v for k, v in row.items() if k != "distill"} for row in prompts()]
    trainer = make(train_dataset=prompts(), eval_dataset={"b": unmarked})
    trainer.evaluate({"b": unmarked})
    said = [record.getMessage() for record in caplog.records if "which the training set has" in record.getMessage()]
    assert len(said) == 2 and all(message.startswith("Evaluation set 'b' has no column 'distill'") for message in said)


def test_the_vlm_before_is_there_for_rows_that_need_it_alone(make: Make, caplog: Any) -> None:
    unmarked = [{k: v for k, v in row.items() if k != "distill"} for row in prompts()]
    trainer = make(train_dataset=unmarked)
    assert trainer.before is None and "the language model judges every row" in caplog.text
    assert make(train_dataset=[{**row, "distill": True} for row in unmarked], anchor="none").before is None
    with pytest.raises(ValueError, match="anchor='none' leaves 50% of the rows without a judge"):
        make(train_dataset=prompts(), anchor="none")
    stream = tiny.make_dataset(4).remove_columns("completion").to_iterable_dataset()
    with pytest.raises(
        ValueError, match="is marked false in column 'distill', and with anchor='none' nobody judges it"
    ):
        make(train_dataset=stream, anchor="none").train()


@pytest.mark.parametrize(
    ("kv_sharing", "marked", "sentence"),
    [
        (
            "none",
            True,
            "kv_sharing='none', and rows with images are marked for the language model, which does not see them",
        ),
        ("vision", True, "of an image it knows only what it reads of the student"),
        ("none", False, None),
    ],
)
def test_a_blind_judge_of_images_is_warned_of(
    make: Make, caplog: Any, kv_sharing: str, marked: bool, sentence: str | None
) -> None:
    rows = [{**row, "distill": row["distill"] or marked} for row in prompts()]
    make(train_dataset=rows, kv_sharing=kv_sharing)
    assert (sentence in caplog.text) if sentence else ("rows with images" not in caplog.text.lower())


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_step_that_is_not_finite_is_skipped_or_ends_the_run_naming_its_prompt(make: Make, on_nan: str) -> None:
    trainer = make(train_dataset=prompts(), on_nan=on_nan, max_steps=2)
    says, first = trainer.step._before, [True]

    def broken(*args: Any) -> Any:
        said, shared = says(*args)
        if said and first and first.pop():
            said = dataclasses.replace(said, hidden=said.hidden * float("nan"))
        return said, shared

    trainer.step._before = broken
    if on_nan == "stop":
        with pytest.raises(NotFinite, match="the loss is not finite at row [02] [(]'user what shape is in the image?"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.skipped_steps == 1 and trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"ce_weight": 0.5},
            "ce_weight has no meaning on-policy, where answers are sampled and nothing is a label; got 0.5.",
        ),
        ({"distill_tokens": "confident"}, "distill_tokens has no meaning on-policy"),
        ({"anchor_weight": 0.5}, "anchor_weight has no meaning on-policy"),
        ({"answers_only": False}, "answers_only has no meaning on-policy"),
        ({"distill_weight": 0.0}, "distill_weight and ce_weight are both 0"),
        ({"beta": 2.0}, "beta must be in"),
        ({"max_completion_length": 0}, "max_completion_length must be a number of tokens of at least 1; got 0."),
        ({"anchor": "after"}, "anchor must be one of none, before; got 'after'."),
    ],
    ids=str,
)
def test_settings_are_checked(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        OnPolicyLinguDistillConfig(output_dir=str(tmp_path), **settings)


def test_a_student_that_would_be_judged_wrongly_is_refused(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make(train_dataset=prompts()).step.student  # control: taken, without a word about routers
    assert "load-balancing" not in caplog.text
    monkeypatch.setattr(student.config.get_text_config(), "output_router_logits", True, raising=False)
    on_policy.check_student(student)
    assert "load-balancing loss is left out" in caplog.text
    with pytest.raises(ValueError, match="PaliGemma reads a prompt in both directions"):
        on_policy.check_student(families._paligemma())
    # The trainer asks
    monkeypatch.setattr(
        on_policy, "check_student", lambda student: pytest.fail(f"asked about {type(student).__name__}")
    )
    with pytest.raises(pytest.fail.Exception, match="asked about SmolVLM"):
        make(train_dataset=prompts())


def test_what_cannot_be_had_is_refused_in_a_sentence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_policy, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match="use_vllm=True needs the package vllm, which is not installed"):
        make(train_dataset=prompts(), use_vllm=True)
    with pytest.raises(ValueError, match="Row 0 has tools of its own"):
        PromptCollator()([{**prompts()[0], "tools": "[]x", "lingudistill_row": 0}])
    with pytest.raises(TypeError, match="args must be an OnPolicyLinguDistillConfig"):
        OnPolicyLinguDistillTrainer(model=tiny.make_vlm(0), args=object())  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------------
# The command, the facts and the card
# --------------------------------------------------------------------------------------------------------------------
QUIET = ("--report_to", "none", "--bf16", "false", "--teacher_quantization", "none", "--log_completions", "false")
SHORT = ("--max_steps", "1", "--max_completion_length", "4", "--per_device_train_batch_size", "4")


def run(pair: tuple[Path, Path], out: Path, *flags: str) -> int:
    models = ["--student", str(pair[0]), "--teacher", str(pair[1])]
    return main([*models, "--output_dir", str(out), *QUIET, *SHORT, *flags])


def test_the_command_trains_on_a_mixture_of_prompts_and_says_so_in_facts_and_card(
    saved_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.make_dataset(8).remove_columns(["completion", "distill"])
    for name, part in (("texts", range(1, 8, 2)), ("pictures", range(0, 8, 2))):
        rows.select(part).save_to_disk(tmp_path / name)
    sources = [
        {"path": str(tmp_path / "texts"), "distill": True},
        {"path": str(tmp_path / "pictures"), "distill": False},
    ]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"on_policy": True, "top_k": 20, "datasets": sources}))
    out = tmp_path / "out"
    assert run(saved_pair, out, "--config", str(tmp_path / "recipe.yaml")) == 0
    said = capsys.readouterr().out
    assert (
        "1 x divergence (beta=1, temperature=1) to the teacher on marked rows, to the VLM before on the others" in said
    )
    facts = read_run_facts(out)
    assert facts["sampling"]["max_completion_length"] == 4 and facts["sampling"]["top_k"] == 20
    assert facts["recipe"]["on_policy"] is True and facts["anchor"]["model"] == "before"
    assert 0 < facts["training"]["anchored_tokens_share"] < 1
    card = (out / "README.md").read_text()
    assert "the student's own, sampled with transformers (at most 4 tokens, top\\_p 1.0, top\\_k 20)" in card
    assert (
        "1.0 x D(teacher, student) on marked rows, D(VLM before, student) on the others (beta 1.0, temperature 1.0)"
        in card
    )
    assert "judged by the VLM before" in card and "CE elsewhere" not in card and "cross-entropy" not in card
    assert json.loads((out / "config.json").read_text())["model_type"] == "smolvlm"


def test_the_command_with_lora_and_all_rows_marked(saved_pair: tuple[Path, Path], tmp_path: Path) -> None:
    tiny.make_dataset(8, images=False).remove_columns(["completion", "distill"]).save_to_disk(tmp_path / "texts")
    flags = (
        "--on_policy",
        "--dataset_name",
        str(tmp_path / "texts"),
        "--use_peft",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
    )
    assert run(saved_pair, tmp_path / "out", *flags) == 0
    facts = read_run_facts(tmp_path / "out")
    assert facts["anchor"] is None and facts["training"]["anchored_tokens_share"] == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("recipe", "flags", "sentence"),
    [
        (
            {"on_policy": True, "packing": True},
            [],
            "has the key 'packing' and trains on-policy, which has no such option.",
        ),
        ({"top_k": 3}, [], "has the key 'top_k' and trains on given answers: it belongs to on_policy: true."),
        ({"on_policy": True}, ["--packing", "true"], "Unknown option '--packing'"),
        ({"on_policy": True}, ["--demo"], "--demo trains on given answers: drop --on_policy"),
        ({"on_policy": "perhaps"}, [], "on_policy"),
        (
            {"on_policy": True},
            ["--use_vllm", "true", "--dataset_name", "DATA"],
            "use_vllm=True needs the package vllm",
        ),
        ({"on_policy": True}, ["--ce_weight", "0.5", "--dataset_name", "DATA"], "ce_weight has no meaning on-policy"),
        ({"on_policy": True}, ["--dataset_name", "DATA"], "has the columns text: expected 'prompt' or 'messages'"),
    ],
    ids=str,
)
def test_what_the_command_cannot_do_is_one_sentence(
    saved_pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: dict[str, Any],
    flags: list[str],
    sentence: str,
) -> None:
    Dataset.from_list([{"text": "running text"}] * 4).save_to_disk(tmp_path / "data")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = [flag.replace("DATA", str(tmp_path / "data")) for flag in flags]
    models = [] if "--demo" in flags else ["--student", str(saved_pair[0]), "--teacher", str(saved_pair[1])]
    given = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    quiet = ["--teacher_quantization", "none", "--bf16", "false"]
    assert main([*models, *given, *quiet, *flags]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in error


def test_a_compiled_student_is_refused_where_gradients_would_not_be_joined(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under DDP each process went its own way, without a word: `test_engines.py` found it."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    make(train_dataset=prompts(), **compiled)  # control: one process
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="^torch_compile on-policy on several processes needs an engine that shards"):
        make(train_dataset=prompts(), **compiled)
