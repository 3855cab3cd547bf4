"""What users of `SFTTrainer` rely on keeps working beside a teacher; what cannot work is refused in a sentence."""

from __future__ import annotations

import gc
import io
import json
import logging
import pickle
import re
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from packaging.version import Version
from peft import PrefixTuningConfig, PromptTuningConfig
from planning import KV_SHARING_MODES
from transformers import TrainerCallback, TrainerControl
from trl import SFTTrainer

import hf_lingudistill.teacher_mixin as teacher_module
from hf_lingudistill import LinguDistillTrainer, OnPolicyLinguDistillTrainer, check_compatibility, losses
from hf_lingudistill.hub.run_facts import gather_run_facts
from hf_lingudistill.step_mixin import EVALUATED

MakeTrainer = Callable[..., Any]

TRAINING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] if m['content'] is string else "
    "m['content'][0]['text'] }}<|im_end|>{% endgeneration %}\n{% else %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def as_messages(rows: list[dict]) -> list[dict]:
    """Prompt-completion rows as conversations of the language modeling type."""
    return [
        {"messages": row["prompt"] + row["completion"], **{k: row[k] for k in ("images", "distill") if k in row}}
        for row in rows
    ]


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logs_with(trainer: Any, name: str) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if name in entry]


def first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def trained_text(trainer: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    tokenizer = trainer.processing_class.tokenizer
    return [
        tokenizer.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def assert_distils(trainer: Any, *, steps: int = 1) -> None:
    """Train, and see that both the loss and the teacher took part, and that the weights moved."""
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == steps
    logs = logs_with(trainer, "kd_loss")
    assert len(logs) == steps and all(log["kd_loss"] > 0 and log["loss"] > 0 for log in logs)
    after = weights(trainer)
    assert torch.isfinite(after).all() and not torch.equal(before, after)


# --------------------------------------------------------------------------------------------------------------------
# Kinds of rows
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("images", [True, False], ids=["vision", "text-only"])
@pytest.mark.parametrize("kind", ["prompt-completion", "whole sequence", "messages", "all turns", "assistant only"])
def test_conversations_are_trained_where_the_config_says(
    make_trainer: MakeTrainer, tmp_path: Path, kind: str, images: bool
) -> None:
    rows = tiny.make_rows(4, images=images)
    settings: dict[str, Any] = {"train_sampling_strategy": "sequential", "distill_tokens": "all"}
    if kind == "whole sequence":
        settings["completion_only_loss"] = False
    if kind == "all turns":
        settings["answers_only"] = False
    if kind == "assistant only":
        (tmp_path / "template.jinja").write_text(TRAINING_TEMPLATE, encoding="utf-8")
        settings |= {"assistant_only_loss": True, "chat_template_path": str(tmp_path / "template.jinja")}
    dataset = Dataset.from_list(rows if kind in ("prompt-completion", "whole sequence") else as_messages(rows))
    if kind == "assistant only" and images and Version(transformers.__version__) < Version("5.18"):
        with pytest.raises(ValueError, match="requires transformers>=5.18"):
            make_trainer(train_dataset=dataset, **settings)
        return
    trainer = make_trainer(train_dataset=dataset, **settings)
    batch = first_batch(trainer)
    assert batch["distill"].tolist() == [row["distill"] for row in rows]
    for row, text in zip(rows, trained_text(trainer, batch), strict=True):
        answer, question = row["completion"][0]["content"], row["prompt"][0]["content"]
        assert answer + "<|im_end|>" in text
        assert (question in text) == (kind in ("whole sequence", "all turns"))
    assert_distils(trainer)


@pytest.mark.parametrize("kind", ["text", "prompt-completion"])
def test_plain_text_rows_train_a_vlm(make_trainer: MakeTrainer, kind: str) -> None:
    sentence = "the sea is deep, wide and full of salt."
    row = {"text": sentence} if kind == "text" else {"prompt": sentence[:11], "completion": sentence[11:]}
    trainer = make_trainer(train_dataset=Dataset.from_list([{**row, "distill": index % 2 == 0} for index in range(4)]))
    batch = first_batch(trainer)
    assert "pixel_values" not in batch and sorted(batch["distill"].tolist()) == [False, False, True, True]
    assert_distils(trainer)


def test_first_token_of_a_sequence_has_a_label_but_does_not_count(make_trainer: MakeTrainer) -> None:
    """Nothing predicts it."""
    trainer = make_trainer(
        train_dataset=tiny.make_dataset(4, images=False), completion_only_loss=False, ce_weight=1.0, distill_weight=0.0
    )
    batch = first_batch(trainer)
    assert (batch["labels"][:, 0] != -100).all()
    counted = int(trainer._get_num_items_in_batch([batch], torch.device("cpu")))
    assert counted == int((batch["labels"] != -100).sum()) - 4
    trainer.train()
    logs = logs_with(trainer, "kd_loss")[0]
    assert logs["loss"] == pytest.approx(logs["ce_loss"], rel=1e-6)


def test_image_column_gives_what_images_gives(make_trainer: MakeTrainer) -> None:
    rows = [row for row in tiny.make_rows(8) if row["images"]]
    for index, row in enumerate(rows):
        row["distill"] = index % 2 == 0
    single = [{**{k: v for k, v in row.items() if k != "images"}, "image": row["images"][0]} for row in rows]
    several, one = (make_trainer(train_dataset=Dataset.from_list(r)) for r in (rows, single))
    assert_distils(several)
    assert_distils(one)
    assert torch.equal(weights(several), weights(one))


def test_text_rows_of_a_vision_dataset_may_have_no_images_at_all(make_trainer: MakeTrainer) -> None:
    dataset = tiny.make_dataset(4)
    rows = [{**row, "images": row["images"] or None} for row in tiny.make_rows(4)]
    with_null = Dataset.from_list(rows, features=dataset.features)
    empty, null = make_trainer(train_dataset=dataset), make_trainer(train_dataset=with_null)
    assert_distils(empty)
    assert_distils(null)
    assert torch.equal(weights(empty), weights(null))


def test_custom_collator_keeps_working_and_gets_no_flag_column(make_trainer: MakeTrainer) -> None:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    seen: list[set[str]] = []
    inner = DataCollatorForVisionLanguageModeling(tiny.make_processor(), completion_only_loss=True)

    def collator(rows: list[dict]) -> Any:
        seen.extend(set(row) for row in rows)
        return inner(rows)

    custom, default = make_trainer(data_collator=collator), make_trainer()
    assert_distils(custom)
    assert_distils(default)
    assert torch.equal(weights(custom), weights(default))
    assert seen and all(columns == {"prompt", "completion", "images"} for columns in seen)


# --------------------------------------------------------------------------------------------------------------------
# Streams and workers
# --------------------------------------------------------------------------------------------------------------------
def _from_generator() -> IterableDataset:
    def rows() -> Iterator[dict]:
        yield from tiny.make_rows(8)

    return IterableDataset.from_generator(rows)  # its columns are not known


@pytest.mark.parametrize("columns_known", [True, False])
def test_stream_with_max_steps_equals_the_same_rows_in_order(
    make_trainer: MakeTrainer, columns_known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stream = tiny.make_dataset(8).to_iterable_dataset() if columns_known else _from_generator()
    with caplog.at_level(logging.WARNING):
        streamed = make_trainer(train_dataset=stream, max_steps=2)
        assert_distils(streamed, steps=2)
    in_order = make_trainer(max_steps=2, train_sampling_strategy="sequential")
    assert_distils(in_order, steps=2)
    assert torch.equal(weights(streamed), weights(in_order))
    assert "every row is distilled" not in caplog.text, "the flag was there and was used"


@pytest.mark.parametrize("stream", [False, True], ids=["map-style", "stream"])
def test_worker_processes_change_nothing(make_trainer: MakeTrainer, stream: bool) -> None:
    dataset = tiny.make_dataset(8)
    common = {"train_sampling_strategy": "sequential", "max_steps": 2, "dataloader_persistent_workers": False}
    alone = make_trainer(train_dataset=dataset, **common)
    if stream:
        # Two shards of whole batches: the workers take turns
        dataset = Dataset.from_list([dataset[i] for i in range(8)], features=dataset.features)
        workers = make_trainer(
            train_dataset=dataset.to_iterable_dataset(num_shards=2), dataloader_num_workers=2, **common
        )
    else:
        workers = make_trainer(train_dataset=dataset, dataloader_num_workers=2, **common)
    assert_distils(alone, steps=2)
    assert_distils(workers, steps=2)
    assert torch.equal(weights(alone), weights(workers))


@pytest.mark.slow
@pytest.mark.parametrize("kv_sharing", KV_SHARING_MODES)
def test_compiled_student_is_trained_as_the_eager_one(
    make_trainer: MakeTrainer, kv_sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is not compiled with it: it has another number of labels in each batch, and would be for each of them."""
    traced, chunks = [], losses._chunks

    def spied(*args: Any) -> Any:
        traced.append(torch.compiler.is_compiling())
        return chunks(*args)

    monkeypatch.setattr(losses, "_chunks", spied)
    eager = make_trainer(kv_sharing=kv_sharing, max_steps=2)
    compiled = make_trainer(kv_sharing=kv_sharing, max_steps=2, torch_compile=True, torch_compile_backend="eager")
    start = weights(eager)
    assert_distils(eager, steps=2)
    assert_distils(compiled, steps=2)
    moved = (weights(eager) - start).abs().max()
    assert (weights(compiled) - weights(eager)).abs().max() < 1e-5 * moved
    assert traced and not any(traced)


# --------------------------------------------------------------------------------------------------------------------
# Packing
# --------------------------------------------------------------------------------------------------------------------
PACKED = {
    "one packed row": {"packing": True, "max_length": 512},
    "two packed rows in a batch": {"packing": True, "max_length": 128, "per_device_train_batch_size": 2},
    "padding-free": {"padding_free": True, "max_length": None},
    "padding-free, accumulated": {
        "padding_free": True,
        "max_length": None,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
    },
}


def _text_without_flag(count: int = 4) -> Dataset:
    return tiny.make_dataset(count, images=False).remove_columns("distill")


@pytest.mark.parametrize(
    ("way", "kv_sharing"),
    [*((way, "prompt") for way in PACKED), ("one packed row", "full"), ("one packed row", "vision")],
)
def test_packed_documents_do_not_see_each_other(make_trainer: MakeTrainer, way: str, kv_sharing: str) -> None:
    """The same four texts, joined and padded: the same loss, weights and metrics."""
    common = {"train_dataset": _text_without_flag(), "kv_sharing": kv_sharing, "train_sampling_strategy": "sequential"}
    packed, padded = make_trainer(**common, **PACKED[way]), make_trainer(**common)
    batch = first_batch(packed)
    assert batch["input_ids"].shape[0] == 1 and "position_ids" in batch, "joined into one row"
    start = weights(padded)
    assert_distils(packed)
    assert_distils(padded)
    ours, theirs = logs_with(packed, "kd_loss")[0], logs_with(padded, "kd_loss")[0]
    for name in ("loss", "ce_loss", "kd_loss", "teacher_ce", "student_ce", "confident_share", "distilled_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    moved = (weights(padded) - start).abs().max()
    assert (weights(packed) - weights(padded)).abs().max() < 1e-4 * moved


@pytest.mark.parametrize(
    ("way", "kv_sharing"),
    [("one packed row", "full"), ("two packed rows in a batch", "prompt"), ("padding-free", "vision")],
)
def test_control_joined_documents_that_see_each_other_change_the_loss(
    make_trainer: MakeTrainer, way: str, kv_sharing: str
) -> None:
    trainer = make_trainer(train_dataset=_text_without_flag(), kv_sharing=kv_sharing, **PACKED[way])
    batch = first_batch(trainer)
    with torch.no_grad():
        apart = trainer.compute_loss(trainer.model, dict(batch)).item()
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        assert abs(trainer.compute_loss(trainer.model, dict(batch)).item() - apart) > 1e-3


@pytest.mark.parametrize("way", PACKED)
def test_packing_is_refused_where_the_teacher_would_read_across_documents(make_trainer: MakeTrainer, way: str) -> None:
    """With kv_sharing='none' the teacher makes its own masks, from a row of compacted tokens."""
    with pytest.raises(ValueError, match="kv_sharing='none'"):
        make_trainer(train_dataset=_text_without_flag(), kv_sharing="none", **PACKED[way])


@pytest.mark.parametrize("way", ["one packed row", "two packed rows in a batch", "padding-free"])
def test_packing_rows_of_different_flags_is_refused(make_trainer: MakeTrainer, way: str) -> None:
    flags = [True, False, True, False]
    dataset = _text_without_flag().add_column("distill", flags)
    with pytest.raises(ValueError, match="column 'distill' .*drop the column"):
        make_trainer(train_dataset=dataset, **PACKED[way]).train()


# --------------------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------------------
TEACHER_METRICS = ("kd_loss", "ce_loss", "teacher_ce", "student_ce", "teacher_agreement", "confident_share")


def test_evaluation_has_its_own_metrics_and_leaves_those_of_training_alone(make_trainer: MakeTrainer) -> None:
    common = {"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0}
    evaluated = make_trainer(eval_dataset=tiny.make_dataset(6, seed=1), eval_strategy="steps", eval_steps=1, **common)
    plain = make_trainer(**common)
    evaluated.train()
    plain.train()
    (train_logs,), (plain_logs,) = logs_with(evaluated, "kd_loss"), logs_with(plain, "kd_loss")
    for name in (*TEACHER_METRICS, "distilled_tokens", "loss"):
        assert train_logs[name] == plain_logs[name], f"{name}: an evaluation in between changed it"

    first, second = logs_with(evaluated, "eval_kd_loss")
    for name in (*TEACHER_METRICS, "distilled_tokens"):
        assert first[f"eval_{name}"] == second[f"eval_{name}"], "nothing was learnt, and nothing is carried over"
    assert first["eval_kd_loss"] != train_logs["kd_loss"] and first["eval_ce_loss"] != train_logs["ce_loss"]
    assert evaluated.evaluate()["eval_kd_loss"] == first["eval_kd_loss"]
    assert not set(TEACHER_METRICS) & set(first)


def test_evaluation_loss_is_the_combined_loss(make_trainer: MakeTrainer) -> None:
    """All in one batch: the trainer averages batches, as it does for SFT."""
    dataset = tiny.make_dataset(4)
    trainer = make_trainer(eval_dataset=dataset, train_sampling_strategy="sequential", train_dataset=dataset)
    metrics = trainer.evaluate()
    trainer.train()
    logs = logs_with(trainer, "kd_loss")[0]
    for name in (*TEACHER_METRICS, "loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(logs[name], rel=1e-6), name


def test_several_evaluation_sets_are_measured_each_for_itself(make_trainer: MakeTrainer) -> None:
    sets = {"first": tiny.make_dataset(4, seed=1), "second": tiny.make_dataset(6, seed=2, images=True)}
    trainer = make_trainer(eval_dataset=sets, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    trainer.train()
    logs = {name: logs_with(trainer, f"eval_{name}_loss") for name in sets}
    values = {}
    for name, dataset in sets.items():
        (entry,) = logs[name]
        alone = make_trainer(eval_dataset=dataset).evaluate()
        for metric in TEACHER_METRICS:
            assert entry[f"eval_{name}_{metric}"] == alone[f"eval_{metric}"], (name, metric)
        assert entry[f"eval_{name}_ce_loss"] == alone["eval_ce_loss"] and "eval_ce_loss" not in entry
        values[name] = entry[f"eval_{name}_kd_loss"]
    assert values["first"] != values["second"]


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not re.search("runtime|per_second|flos|step_time", name)}


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize(
    "when",
    [
        {
            "logging_strategy": "epoch",
            "eval_strategy": "steps",
            "eval_steps": 1,
        },  # the epoch ends behind an evaluation
        {
            "logging_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 5,
        },  # so does the training, with steps that are not logged yet
    ],
)
def test_an_evaluation_takes_nothing_of_the_trainings_log(
    make_trainer: MakeTrainer, when: dict[str, Any], on_policy: bool
) -> None:
    """It leaves the model in evaluation mode, and the log that follows is the training's nevertheless."""
    more: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 5, "seed": 3}
    if on_policy:
        more |= {
            "trainer_class": OnPolicyLinguDistillTrainer,
            "temperature": 1e-4,
        }  # greedy: samples are the same with and without
    evaluated = make_trainer(train_dataset=tiny.make_dataset(8), eval_dataset=tiny.make_dataset(4), **more, **when)
    evaluated.train()
    alone = make_trainer(
        train_dataset=tiny.make_dataset(8), **more, **{k: v for k, v in when.items() if not k.startswith("eval")}
    )
    alone.train()
    ours, theirs = (
        [without_times(entry) for entry in one.state.log_history if not any(k.startswith("eval_") for k in entry)]
        for one in (evaluated, alone)
    )
    assert len(ours) == len(theirs) and "train_loss" in ours[-1]
    assert any("num_tokens" in one and "kd_loss" in one for one in ours[-2:])
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5, nan_ok=True)
    facts = [gather_run_facts(one)["training"] for one in (evaluated, alone)]
    assert facts[0]["tokens"] == facts[1]["tokens"] and facts[0]["answer_tokens"] == facts[1]["answer_tokens"]


def test_all_values_of_an_evaluation_bear_its_name(make_trainer: MakeTrainer) -> None:
    sets = {"first": tiny.make_dataset(4, seed=1), "second": tiny.make_dataset(6, seed=2)}
    trainer = make_trainer(eval_dataset=sets)
    both = trainer.evaluate()
    assert all(name == "epoch" or name.startswith(("eval_first_", "eval_second_")) for name in both), list(both)
    other = trainer.evaluate(sets["second"], metric_key_prefix="test")
    assert all(name == "epoch" or name.startswith("test_") for name in other), list(other)
    alone = make_trainer(eval_dataset=sets["second"]).evaluate()
    for name in (*TEACHER_METRICS, "entropy", "mean_token_accuracy", "num_tokens", "ce_loss", "loss"):
        assert both[f"eval_second_{name}"] == other[f"test_{name}"] == alone[f"eval_{name}"], name
    assert both["eval_first_entropy"] != both["eval_second_entropy"]


def test_of_several_evaluation_sets_one_is_named_to_choose_the_best_checkpoint(make_trainer: MakeTrainer) -> None:
    sets = {"first": tiny.make_dataset(4, seed=1), "second": tiny.make_dataset(4, seed=2)}
    best = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    for metric in (None, "ce_loss", "eval_loss", "third_ce_loss", "first_accuracy", "eval_second_"):
        with pytest.raises(
            ValueError, match="names none of the evaluation sets 'first', 'second', .* set it to 'first_ce_loss'"
        ):
            make_trainer(eval_dataset=sets, metric_for_best_model=metric, **best)
    trainer = make_trainer(eval_dataset=sets, metric_for_best_model="second_ce_loss", greater_is_better=False, **best)
    trainer.train()
    assert trainer.state.best_metric == logs_with(trainer, "eval_second_ce_loss")[0]["eval_second_ce_loss"]
    assert trainer.state.best_metric != logs_with(trainer, "eval_first_ce_loss")[0]["eval_first_ce_loss"]
    make_trainer(eval_dataset=sets["first"], **best)  # control: of one set there is no question


def test_a_value_that_no_evaluation_gives_cannot_choose_the_best_checkpoint(make_trainer: MakeTrainer) -> None:
    """The control: every value that one gives, and a value of the user's own."""
    one = tiny.make_dataset(4, seed=1)
    best = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, "eval_dataset": one}
    with pytest.raises(
        ValueError, match="metric_for_best_model='eval_ce_los' is none of the values .*: did you mean 'ce_loss'"
    ):
        make_trainer(metric_for_best_model="eval_ce_los", **best)
    with pytest.raises(
        ValueError, match="'accuracy-of-mine' is none of the values that an evaluation gives: known are loss, "
    ):
        make_trainer(metric_for_best_model="accuracy-of-mine", **best)
    make_trainer(
        metric_for_best_model="accuracy-of-mine", compute_metrics=lambda prediction: {"accuracy-of-mine": 1.0}, **best
    )
    trainer = make_trainer(metric_for_best_model="eval_ce_loss", **best, anchor="before")
    given = {name.removeprefix("eval_") for name in trainer.evaluate() if name != "epoch"}
    assert given <= set(EVALUATED), given - set(EVALUATED)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # what TRL says about logits
def test_evaluation_without_training_takes_streams_new_sets_and_compute_metrics(make_trainer: MakeTrainer) -> None:
    shapes: list[tuple[int, ...]] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"rows": float(len(prediction.label_ids))}

    dataset = tiny.make_dataset(4, images=False)
    trainer = make_trainer(train_dataset=dataset, compute_metrics=compute_metrics)
    expected = trainer.evaluate(dataset)
    vocabulary = len(tiny.make_tokenizer(extra=True))
    assert expected["eval_rows"] == 4.0 and shapes[0][-1] == vocabulary, "logits over the student's vocabulary"
    streamed = trainer.evaluate(dataset.to_iterable_dataset())
    assert streamed["eval_kd_loss"] == expected["eval_kd_loss"]


# --------------------------------------------------------------------------------------------------------------------
# Logs on disk, checkpoints
# --------------------------------------------------------------------------------------------------------------------
def test_tensorboard_files_hold_the_distillation_metrics(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(report_to="tensorboard", max_steps=2)
    trainer.train()
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.out.*")).parent)).Reload()
    logged = [event.value for event in events.Scalars("train/kd_loss")]
    assert logged == pytest.approx([log["kd_loss"] for log in logs_with(trainer, "kd_loss")], rel=1e-6)
    assert {"train/ce_loss", "train/confident_share", "train/teacher_ce"} <= set(events.Tags()["scalars"])


def test_trackio_holds_the_distillation_metrics(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = pytest.importorskip("trackio.utils")
    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    trainer = make_trainer(report_to="trackio", project="lingudistill", max_steps=2)
    trainer.train()
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        entries = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    logged = [entry["train/kd_loss"] for entry in entries if "train/kd_loss" in entry]
    assert logged == pytest.approx([log["kd_loss"] for log in logs_with(trainer, "kd_loss")], rel=1e-6)


class Interruption(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.after


def test_two_steps_and_two_resumed_equal_four_bit_for_bit(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_dataset": tiny.make_dataset(16),
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2,
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    cut = {"output_dir": str(tmp_path / "cut"), **settings}
    make_trainer(callbacks=[Interruption(2)], **cut).train()
    # Another initialisation: whatever is equal at the end came from the checkpoint
    resumed = make_trainer(model=tiny.make_vlm(5), **cut)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ours, theirs = logs_with(resumed, "kd_loss"), logs_with(whole, "kd_loss")
    assert len(theirs) == 4
    for our_log, their_log in zip(ours, theirs, strict=True):
        assert {name: our_log[name] for name in TEACHER_METRICS} == {name: their_log[name] for name in TEACHER_METRICS}

    other_order = make_trainer(**{**settings, "save_strategy": "no", "data_seed": 7})
    other_order.train()
    assert not torch.equal(weights(other_order), weights(whole)), "the order of rows must matter, or none was restored"


class StepCounter(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self.steps.append(state.global_step)


def test_resume_in_the_config_resumes(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Trainer itself ignores this field; here it lifts the check of `output_dir`, so it must not start anew."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**settings, callbacks=[Interruption(1)]).train()
    counter = StepCounter()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    make_trainer(**settings, callbacks=[counter], resume_from_checkpoint=checkpoint).train()
    assert counter.steps == [2]


# --------------------------------------------------------------------------------------------------------------------
# output_dir
# --------------------------------------------------------------------------------------------------------------------
def test_output_dir_of_another_run_is_refused_before_anything_is_trained(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(**settings).train()
    held = sorted((tmp_path / "out").rglob("*"))

    refused = make_trainer(**settings)
    before = weights(refused)
    with pytest.raises(ValueError, match=r"holds a run's files \(checkpoint-1\).*--overwrite_output_dir"):
        refused.train()
    assert torch.equal(weights(refused), before) and sorted((tmp_path / "out").rglob("*")) == held

    resumed = make_trainer(**{**settings, "max_steps": 2})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    overwriting = make_trainer(**settings, overwrite_output_dir=True)
    overwriting.train()
    assert overwriting.state.global_step == 1


@pytest.mark.parametrize(
    "mark", ["model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "trainer_state.json"]
)
def test_files_that_mark_another_run(make_trainer: MakeTrainer, tmp_path: Path, mark: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    make_trainer().train()  # a folder with other files is no run
    (tmp_path / "out" / mark).touch()
    with pytest.raises(ValueError, match=f"holds a run's files \\({mark}\\)"):
        make_trainer().train()


# --------------------------------------------------------------------------------------------------------------------
# Warnings
# --------------------------------------------------------------------------------------------------------------------
def _marked_images() -> Dataset:
    dataset = tiny.make_dataset(4)
    return Dataset.from_list([{**row, "distill": True} for row in tiny.make_rows(4)], features=dataset.features)


@pytest.mark.parametrize(
    ("settings", "dataset", "warns"),
    [
        ({"ce_weight": 0.0, "distill_tokens": "all"}, _marked_images, True),
        ({"ce_weight": 0.0, "distill_tokens": "all"}, lambda: _marked_images().remove_columns("distill"), True),
        ({"ce_weight": 0.0, "distill_tokens": "all"}, lambda: _marked_images().to_iterable_dataset(), True),
        ({"ce_weight": 0.0, "distill_tokens": "all", "kv_sharing": "none"}, _marked_images, True),
        ({"ce_weight": 0.0, "distill_tokens": "confident"}, _marked_images, False),
        ({"ce_weight": 0.1, "distill_tokens": "all"}, _marked_images, False),
        ({"ce_weight": 0.0, "distill_tokens": "all"}, lambda: tiny.make_dataset(4), False),
        ({"ce_weight": 0.0, "distill_tokens": "all"}, lambda: tiny.make_dataset(4, images=False), False),
    ],
    ids=["marked", "no column", "stream", "blind", "confident", "with CE", "only text marked", "only text"],
)
def test_divergence_alone_on_image_rows_warns(
    make_trainer: MakeTrainer,
    caplog: pytest.LogCaptureFixture,
    settings: dict,
    dataset: Callable[[], Any],
    warns: bool,
) -> None:
    make_trainer(train_dataset=dataset(), **settings)
    assert ("erases what the student knows about images" in caplog.text) == warns
    blind = settings.get("kv_sharing") == "none"
    assert ("because the teacher cannot see them" in caplog.text) == (warns and blind)
    assert ("because the teacher sees only what it reads" in caplog.text) == (warns and not blind)


@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
def test_rows_are_grouped_by_a_length_that_is_there(make_trainer: MakeTrainer, images: bool) -> None:
    grouped = {"train_sampling_strategy": "group_by_length"}
    dataset = tiny.make_dataset(4, images=images)
    with pytest.raises(ValueError, match=r"needs the length of every row in a column 'length'.*found "):
        make_trainer(train_dataset=dataset, **grouped)
    make_trainer(train_dataset=dataset)  # controls: no grouping; a length; another name of it
    make_trainer(train_dataset=dataset.add_column("length", [4, 3, 2, 1]), **grouped).train()
    make_trainer(train_dataset=dataset.add_column("n", [4, 3, 2, 1]), length_column_name="n", **grouped).train()


@pytest.mark.parametrize(
    ("spoilt", "distill_tokens", "warns"), [(True, "all", 1), (True, "confident", 0), (False, "all", 0)]
)
def test_teacher_that_is_worse_than_the_student_warns_once(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, spoilt: bool, distill_tokens: str, warns: int
) -> None:
    teacher = tiny.make_lm(1, tie_word_embeddings=False)
    if spoilt:
        teacher.lm_head.weight.data *= 10  # as sure of itself as it is wrong
    else:
        teacher.lm_head.weight.data *= 0.1  # near uniform: better than a student that is sure and wrong
    make_trainer(teacher_model=teacher, distill_tokens=distill_tokens, max_steps=3).train()
    assert sum("predicts the labels worse" in record.getMessage() for record in caplog.records) == warns


@pytest.mark.parametrize(
    ("settings", "named", "left_out"),
    [
        ({"kv_sharing": "vision", "ce_weight": 0.5}, ["confident"], ["ce_weight > 0", "kv_sharing="]),
        ({"kv_sharing": "vision", "ce_weight": 0.0}, ["ce_weight > 0", "confident"], ["kv_sharing="]),
        (
            {"kv_sharing": "prompt", "ce_weight": 0.5},
            ["kv_sharing='vision' or 'none'", "confident"],
            ["ce_weight > 0"],
        ),
    ],
    ids=str,
)
def test_what_may_help_against_a_worse_teacher_is_not_set_already(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, settings: dict, named: list[str], left_out: list[str]
) -> None:
    teacher = tiny.make_lm(1, tie_word_embeddings=False)
    teacher.lm_head.weight.data *= 10
    make_trainer(teacher_model=teacher, distill_tokens="all", **settings).train()
    (said,) = [
        r.getMessage() for r in caplog.records if "predicts the labels worse than the student" in r.getMessage()
    ]
    assert "`lingudistill diagnose` measures the pair" in said
    assert [word in said for word in named] == [True] * len(named) and not any(word in said for word in left_out)


def _fluent_teacher(trainer: Any) -> Any:
    """The trainer's own teacher, taught the labels of its first batch: good alone, whatever it is with another's K/V."""
    teacher, batch = trainer.teacher.model, first_batch(trainer)
    parameters = [p.requires_grad_(True) for p in teacher.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(60):
        loss = teacher(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return teacher


@pytest.mark.parametrize("drifted", [True, False])
def test_student_whose_keys_make_its_teacher_worse_warns(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, drifted: bool
) -> None:
    rows = tiny.make_dataset(4, images=False)
    student = tiny.make_vlm(0)
    trainer = make_trainer(model=student, train_dataset=rows, kv_sharing="full", distill_tokens="all", ce_weight=0.0)
    teacher = _fluent_teacher(trainer)
    if not drifted:  # control: the student's language is the teacher's
        own = student.model.text_model.state_dict()
        for name, value in teacher.model.state_dict().items():
            own[name][: len(value)].copy_(value)
    trainer.train()
    assert ("makes the teacher worse" in caplog.text) == drifted
    batch = first_batch(trainer)
    logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    shared_ids = batch["labels"].where(batch["labels"] < trainer.teacher.vocabulary.shared_size, -100)
    plain = torch.nn.functional.cross_entropy(
        logits[:, :-1, : trainer.teacher.vocabulary.shared_size].flatten(0, 1),
        shared_ids[:, 1:].flatten(),
        ignore_index=-100,
    )
    assert trainer.teacher_ce_unshared == pytest.approx(plain.item(), abs=1e-4)


def test_rows_with_images_alone_are_no_measure_of_an_unshared_teacher(make_trainer: MakeTrainer) -> None:
    images = tiny.make_dataset(8).filter(lambda row: len(row["images"]) > 0).remove_columns("distill")
    trainer = make_trainer(train_dataset=images, kv_sharing="full")
    trainer.train()
    assert trainer.teacher_ce_unshared is None


# --------------------------------------------------------------------------------------------------------------------
# Bad rows
# --------------------------------------------------------------------------------------------------------------------
def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def rows_with_bad_ones() -> Dataset:
    """Rows 2 (not an image), 4 (truncated image) and 5 (blank answer) of eight cannot be trained on."""
    rows = tiny.make_rows(8)
    for row in rows:
        row["images"] = [{"bytes": png(image), "path": None} for image in row["images"]]
    rows[2]["images"] = [{"bytes": b"not an image", "path": None}]
    rows[4]["images"] = [{"bytes": rows[4]["images"][0]["bytes"][:60], "path": None}]
    rows[5]["completion"] = [{"role": "assistant", "content": " "}]
    return Dataset.from_list(rows, features=tiny.make_dataset(1).features)


BAD_ROWS = {"image unreadable": 2, "empty answer": 1}
ORDERED = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1, "max_steps": 8}


@pytest.mark.parametrize("stream", [False, True], ids=["map-style", "stream"])
def test_unreadable_image_stops_the_run_and_names_its_row(make_trainer: MakeTrainer, stream: bool) -> None:
    dataset = rows_with_bad_ones()
    trainer = make_trainer(train_dataset=dataset.to_iterable_dataset() if stream else dataset, **ORDERED)
    with pytest.raises(ValueError, match="Row 2: an image cannot be read .*--skip_bad_rows"):
        trainer.train()
    assert 1 <= trainer.state.global_step <= 2, "two rows before it are good, and accelerate reads one batch ahead"


def test_unreadable_image_names_its_row_from_a_worker_process_too(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(train_dataset=rows_with_bad_ones(), dataloader_num_workers=1, **ORDERED)
    with pytest.raises(ValueError, match="Row 2: an image cannot be read"):
        trainer.train()


@pytest.mark.parametrize("stream", [False, True], ids=["map-style", "stream"])
def test_bad_rows_are_skipped_and_counted_by_reason(make_trainer: MakeTrainer, stream: bool) -> None:
    dataset = rows_with_bad_ones()
    good = [0, 1, 3, 6, 7]
    trainer = make_trainer(
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        skip_bad_rows=True,
        **{**ORDERED, "max_steps": len(good)},
    )
    if not stream:
        assert len(trainer.train_dataset) == len(good)
    trainer.train()
    assert trainer.skipped_rows == BAD_ROWS
    only_good = make_trainer(train_dataset=dataset.select(good), **{**ORDERED, "max_steps": len(good)})
    only_good.train()
    assert torch.equal(weights(trainer), weights(only_good))


def test_bad_rows_of_an_evaluation_set_are_skipped_as_well(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="Row 2"):
        make_trainer(eval_dataset=rows_with_bad_ones()).evaluate()
    dataset = rows_with_bad_ones()
    skipping = make_trainer(eval_dataset=dataset, skip_bad_rows=True)
    expected = make_trainer(eval_dataset=dataset.select([0, 1, 3, 6, 7])).evaluate()
    assert skipping.evaluate()["eval_kd_loss"] == pytest.approx(expected["eval_kd_loss"], rel=1e-6)


def test_answer_cut_off_by_max_length_is_an_error_that_names_the_row(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_length=20, **ORDERED)
    with pytest.raises(ValueError, match="Row 0 has no token to train on within max_length=20: all labels are masked"):
        trainer.train()
    assert_distils(make_trainer(max_length=64))


def test_text_only_dataset_whose_answers_are_all_cut_off_is_an_error(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="max_length=4"):
        make_trainer(train_dataset=tiny.make_dataset(4, images=False), max_length=4)


# --------------------------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------------------------
def test_dataset_without_a_marked_row_is_refused(make_trainer: MakeTrainer) -> None:
    rows = [{**row, "distill": False} for row in tiny.make_rows(4)]
    with pytest.raises(ValueError, match="No row is marked for distillation: column 'distill' is false in all 4 rows"):
        make_trainer(train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize("value", ["yes", None])
def test_flag_that_is_no_boolean_is_refused(make_trainer: MakeTrainer, value: Any) -> None:
    rows = [{**row, "distill": value if index == 1 else value and "no"} for index, row in enumerate(tiny.make_rows(4))]
    with pytest.raises(ValueError, match="Column 'distill' must hold true or false in every row"):
        make_trainer(train_dataset=Dataset.from_list(rows))


def test_misfit_is_refused_with_the_sentence_of_the_check_before_weights_load(
    make_trainer: MakeTrainer, saved_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deeper = tmp_path / "deeper"
    tiny.make_lm(1, layers=3).save_pretrained(deeper)
    tiny.make_tokenizer(extra=False).save_pretrained(deeper)
    with pytest.raises(ValueError) as expected:
        check_compatibility(str(saved_pair[0]), str(deeper)).raise_for_misfit()

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded before the check")

    monkeypatch.setattr(teacher_module, "load_teacher_model", loaded)
    monkeypatch.setattr(SFTTrainer, "__init__", loaded)
    with pytest.raises(ValueError) as found:
        make_trainer(model=str(saved_pair[0]), teacher_model=str(deeper))
    assert str(found.value) == str(expected.value) and "3" in str(found.value)
    with pytest.raises(AssertionError):  # the fitting teacher gets past the check
        make_trainer(model=str(saved_pair[0]), teacher_model=str(saved_pair[1]))


@pytest.mark.parametrize("role", ["model", "teacher_model"])
@pytest.mark.parametrize("given", [5, [1], 3.0, Path("vlm")], ids=str)
def test_what_is_no_model_and_no_name_is_said_to_be_none(make_trainer: MakeTrainer, role: str, given: Any) -> None:
    with pytest.raises(TypeError, match=f"^{role} must be a model, or the text of a folder or Hub id; got"):
        make_trainer(**{role: given})


def test_a_model_that_is_to_teach_itself_is_said_to_have_nothing_to_teach(
    make_trainer: MakeTrainer, saved_pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under whatever name. Controls: its LM; the VLM before, whole, which sees."""
    student, teacher = saved_pair
    (tmp_path / "linked").symlink_to(student)
    said = "Student and teacher are the same model"
    for name, settings, expected in (
        (student, {}, True),
        (tmp_path / "linked", {}, True),
        (teacher, {}, False),
        (student, {"kv_sharing": "images"}, False),
    ):
        caplog.clear()
        make_trainer(model=str(student), teacher_model=str(name), **settings)
        assert (said in caplog.text) == expected


@pytest.mark.parametrize("images", [True, False], ids=["processor", "tokenizer"])
def test_a_conversation_needs_a_chat_template(make_trainer: MakeTrainer, tmp_path: Path, images: bool) -> None:
    processor = tiny.make_processor()
    template, processor.chat_template = processor.chat_template, None
    processor.tokenizer.chat_template = None
    rows = [{**row, "distill": True} for row in tiny.make_rows(8) if bool(row["images"]) == images]
    if not images:
        rows = [{name: value for name, value in row.items() if name != "images"} for row in rows]
    with pytest.raises(
        ValueError,
        match=r"^Row \d+ is a conversation, and the student has no chat template: pass --chat_template_path",
    ):
        trainer = make_trainer(processing_class=processor, train_dataset=rows)
        trainer.train()
    (tmp_path / "t.jinja").write_text(template)
    given = {"chat_template_path": str(tmp_path / "t.jinja")}
    make_trainer(processing_class=processor, train_dataset=rows, **given).train()  # control


def test_a_processor_takes_a_template_from_a_file_alone(
    make_trainer: MakeTrainer, saved_pair: tuple[Path, Path]
) -> None:
    """TRL takes it from another model for tokenizers only, and fails late."""
    for given in (str(saved_pair[0]), "org/model"):
        with pytest.raises(ValueError, match=r"^chat_template_path must be a file \.jinja"):
            make_trainer(chat_template_path=given)


def test_student_without_a_named_teacher_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="teacher_model_name_or_path is not set"):
        make_trainer(teacher_model=None, teacher_tokenizer=None)


def test_teacher_in_the_config_is_used(make_trainer: MakeTrainer, saved_pair: tuple[Path, Path]) -> None:
    path = str(saved_pair[1])
    named = make_trainer(teacher_model=None, teacher_tokenizer=None, teacher_model_name_or_path=path)
    assert_distils(named)
    in_memory = make_trainer()
    assert_distils(in_memory)
    assert torch.equal(weights(named), weights(in_memory))


@pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_of_virtual_tokens_are_refused(make_trainer: MakeTrainer, adapter: type) -> None:
    """Their K/V have no token that the teacher could read, and shift every position."""
    peft_config = adapter(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="virtual tokens"):
        make_trainer(peft_config=peft_config, train_dataset=tiny.make_dataset(4, images=False)).train()


def test_a_student_that_is_frozen_is_refused_when_it_is_to_be_trained(make_trainer: MakeTrainer) -> None:
    student = tiny.make_vlm(0).requires_grad_(False)
    trainer = make_trainer(model=student, eval_dataset=tiny.make_dataset(4))
    assert trainer.evaluate()  # which needs no gradient
    with pytest.raises(ValueError, match="^Nothing can be trained: all parameters of the student are frozen"):
        trainer.train()
    next(iter(student.lm_head.parameters())).requires_grad_(True)
    trainer.train()  # control


def test_own_loss_function_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="compute_loss_func cannot be combined with distillation"):
        make_trainer(compute_loss_func=lambda *_, **__: torch.zeros(()))


def test_config_of_another_trainer_is_refused(tmp_path: Path) -> None:
    from trl import SFTConfig

    with pytest.raises(TypeError, match="args must be a LinguDistillConfig, got SFTConfig"):
        LinguDistillTrainer(model=tiny.make_vlm(0), args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False))


# --------------------------------------------------------------------------------------------------------------------
# What outlives a trainer, and what travels
# --------------------------------------------------------------------------------------------------------------------
def test_a_student_keeps_neither_its_teacher_nor_an_earlier_trainer(make_trainer: MakeTrainer) -> None:
    student: Any = tiny.make_vlm(0)
    gone = []
    for _ in range(2):
        trainer = make_trainer(model=student, kv_sharing="vision", kv_source="before")
        gone += [weakref.ref(trainer.step.teacher.model), weakref.ref(trainer.before.model), weakref.ref(trainer.step)]
        trainer.train()
        assert all(ref() is not None for ref in gone[-3:])  # control: while it is there, so are they
        del trainer
        gc.collect()
        assert not any(ref() for ref in gone)
    row = tiny.make_processor()(text="hello", return_tensors="pt")
    assert (
        torch.isfinite(student.eval()(**row).logits).all() and student.generate(**row, max_new_tokens=2).shape[1] > 2
    )


@pytest.mark.parametrize("options", [{}, {"kv_sharing": "none", "teacher_cache": True}], ids=["plain", "cached"])
def test_a_collator_travels_to_a_worker_that_is_spawned(make_trainer: MakeTrainer, options: dict[str, Any]) -> None:
    """macOS, Windows and later Pythons start workers anew: what they get is pickled."""
    trainer = make_trainer(**options)
    rows = [trainer.train_dataset[0], trainer.train_dataset[1]]
    ours, theirs = trainer.data_collator(rows), pickle.loads(pickle.dumps(trainer.data_collator))(rows)
    assert torch.equal(ours["labels"], theirs["labels"]) and torch.equal(ours["queries"].rows, theirs["queries"].rows)
    assert len(pickle.dumps(trainer.data_collator.plan)) < 10_000  # no model goes with it


def test_a_template_of_the_run_says_how_a_turn_ends(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    template = tiny.CHATML.replace("<|im_end|>", "<end_of_utterance>")
    (tmp_path / "t.jinja").write_text(template)
    own = tiny.make_processor()
    own.chat_template = own.tokenizer.chat_template = template
    texts = tiny.make_dataset(4, images=False)
    expected = make_trainer(processing_class=own, train_dataset=texts, kv_sharing="vision")
    given = make_trainer(chat_template_path=str(tmp_path / "t.jinja"), train_dataset=texts, kv_sharing="vision")
    assert given.teacher.vocabulary.aliases == expected.teacher.vocabulary.aliases != ()
    assert make_trainer(train_dataset=texts).teacher.vocabulary.aliases == ()  # control: the template without it
    plan, whole = (trainer.data_collator([trainer.train_dataset[0]])["queries"] for trainer in (given, expected))
    assert plan.num_loss == whole.num_loss == plan.num_labels


def test_a_teacher_that_is_the_student_is_refused(make_trainer: MakeTrainer) -> None:
    student: Any = tiny.make_vlm(0)
    with pytest.raises(ValueError, match="^teacher_model is the student itself"):
        make_trainer(model=student, teacher_model=student, teacher_tokenizer=tiny.make_processor())
    made_of_it = tiny.make_lm(1)
    made_of_it.model = student.model.text_model
    with pytest.raises(ValueError, match="made of its weights"):
        make_trainer(model=student, teacher_model=made_of_it)
    assert all(weight.requires_grad for weight in student.parameters())
    make_trainer(model=student, teacher_model=tiny.make_vlm(0), teacher_tokenizer=tiny.make_processor())  # control


@pytest.mark.parametrize("joining", ["padding_free", "eval_packing"])
def test_rows_are_joined_only_where_that_can_be_held(make_trainer: MakeTrainer, joining: str) -> None:
    texts = tiny.make_dataset(4, images=False)
    with pytest.raises(ValueError, match=f"cannot keep packed documents apart .*{joining}=False"):
        make_trainer(train_dataset=texts, kv_sharing="none", max_length=64, **{joining: True})
    if joining == "padding_free":
        half = texts.map(lambda _, number: {"distill": number % 2 == 0}, with_indices=True)
        with pytest.raises(
            ValueError, match="padding_free joins rows, and column 'distill' differs between them \\(50% are marked"
        ):
            make_trainer(train_dataset=half, kv_sharing="prompt", max_length=None, padding_free=True)


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "the completion"])
def test_a_completion_beside_conversations_is_labelled_as_it_is_alone(make_trainer: MakeTrainer, whole: bool) -> None:
    pair = {"prompt": "tell me about the sea.", "completion": " the sea is deep"}
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "it is"}]
    rows: list[dict[str, Any]] = [{**pair, "messages": None}, {"prompt": None, "completion": None, "messages": turns}]
    common = {"completion_only_loss": not whole, "per_device_train_batch_size": 1}
    mixed = make_trainer(train_dataset=Dataset.from_list(rows), **common).train_dataset[0]
    alone = make_trainer(train_dataset=Dataset.from_list([pair]), **common).train_dataset[0]
    assert mixed["labels"] == alone["labels"] and (mixed["labels"] == mixed["input_ids"]) is whole


@pytest.mark.parametrize("dispatched", [None, True], ids=["each reads its own", "one reads for all"])
def test_batches_that_are_handed_out_in_slices_are_planned_by_the_step(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, dispatched: bool | None
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    trainer = make_trainer(accelerator_config={"dispatch_batches": dispatched})
    assert trainer.accelerator.dispatch_batches is bool(dispatched)
    assert (trainer.data_collator.plan is None) is bool(dispatched)


def test_padding_to_multiples_is_refused_where_trl_cannot(make_trainer: MakeTrainer) -> None:
    with pytest.raises(
        ValueError, match="^pad_to_multiple_of does not go with prompts and completions that have images"
    ):
        make_trainer(pad_to_multiple_of=8)
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "it is"}]
    rows = [{"messages": turns, "images": row["images"]} for row in tiny.make_rows(2)]
    trainer = make_trainer(train_dataset=rows, pad_to_multiple_of=8)  # control
    assert trainer.data_collator([trainer.train_dataset[0]])["input_ids"].shape[1] % 8 == 0


def test_a_flag_column_that_was_named_must_be_there(make_trainer: MakeTrainer) -> None:
    rows = tiny.make_dataset(4).rename_column("distill", "is_long")
    with pytest.raises(ValueError, match="^distill_column='is_lng' names no column of the data .*, found .*is_long"):
        make_trainer(train_dataset=rows, distill_column="is_lng")
    assert make_trainer(train_dataset=rows, distill_column="is_long").has_distill_column
    assert make_trainer(train_dataset=rows).has_distill_column is False  # control: nobody named one
