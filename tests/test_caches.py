"""What is computed once, before training: equal to what a live model says, found again by row, refused where it is another's."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_losses
import tiny
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from test_anchor import log_of, lora
from test_trainer import counted, difference, step
from tiny import moved

from hf_lingudistill import (
    LinguDistillConfig,
    LinguDistillTrainer,
    OnPolicyLinguDistillConfig,
    cache_mixin,
    losses,
    row_cache,
)
from hf_lingudistill._internals import Head
from hf_lingudistill.folders import NotOurs
from hf_lingudistill.hub.card import render_card
from hf_lingudistill.hub.run_facts import gather_run_facts
from hf_lingudistill.losses import Anchor, KeptAnchor, Weights, score
from hf_lingudistill.row_cache import COMPLETE, HEADER, RowCache, StaleCache, row_key
from hf_lingudistill.top_k import TopK, divergence_from, top_k

MakeTrainer = Callable[..., Any]
ALL = 1 << 20  # k above any vocabulary
CLOSE = 1e-5
ANCHORED = {"anchor": "before", "anchor_weight": 0.6}


def mixed_dataset(count: int = 8, *, seed: int = 0) -> Dataset:
    """Of each four rows: an image row and a text to distil, and one of either kind that is not."""
    rows = tiny.make_rows(count, seed=seed)
    for index, row in enumerate(rows):
        row["distill"] = index % 4 < 2
    rows[1]["completion"][0]["content"] += f"{tiny.EXTRA_TOKENS[-1]} yes."
    message = List({"role": Value("string"), "content": Value("string")})
    features = {"prompt": message, "completion": message, "distill": Value("bool"), "images": List(Image())}
    return Dataset.from_list(rows, features=Features(features))


def trainer_of(make_trainer: MakeTrainer, where: Path, **settings: Any) -> Any:
    settings = {"model": tiny.make_vlm(0), "train_dataset": mixed_dataset(), "distill_tokens": "all", **settings}
    return make_trainer(output_dir=str(where), **settings)


def scored(trainer: Any, rows: slice = slice(0, 6)) -> tuple[float, dict[str, Any], dict[str, float]]:
    """(loss, gradients, metrics) of a batch of the training set, and nothing left of it."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows.start, rows.stop)])
    batch.pop("lingudistill_row", None)
    trainer.model.zero_grad()
    return (*step(trainer, batch), log_of(trainer))


def alike(ours: Any, theirs: Any) -> bool:
    (loss, gradients, metrics), (other, other_gradients, other_metrics) = scored(ours), scored(theirs)
    assert metrics.keys() == other_metrics.keys()
    return (
        other == pytest.approx(loss, rel=CLOSE)
        and difference(gradients, other_gradients) < CLOSE
        and all(other_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in metrics.items())
    )


# --------------------------------------------------------------------------------------------------------------------
# k tokens and the rest
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 5, 20, 37])
def test_k_tokens_and_the_rest_as_one_event_and_what_is_missing(k: int) -> None:
    """Value and gradient of k + 1 events in float64; the whole divergence is that and the stated rest; the gradient's stated bound."""
    logits, own = 3 * torch.randn(9, 37), (3 * torch.randn(9, 37)).requires_grad_()
    log_p, log_s = logits.log_softmax(-1), own.log_softmax(-1)
    kept = top_k(log_p, k)
    value, gradient = divergence_from(kept, log_s.detach(), log_s.detach().exp())

    inside = torch.zeros(9, 37, dtype=torch.bool).scatter(1, kept.ids, True)
    exact_p, exact_s = logits.double().log_softmax(-1), own.double().log_softmax(-1)

    def rest(log_q: torch.Tensor) -> torch.Tensor:
        return log_q.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)

    def events(log_q: torch.Tensor) -> torch.Tensor:
        return torch.cat([log_q.gather(1, kept.ids), *([rest(log_q)] if k < 37 else [])], dim=1)

    p, s = events(exact_p), events(exact_s)
    expected = (p.exp() * (p - s)).sum(-1)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), own, retain_graph=True)
    assert torch.allclose(value.double(), expected, atol=1e-5)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)

    whole = (exact_p.exp() * (exact_p - exact_s)).sum(-1)
    (whole_gradient,) = torch.autograd.grad(whole.sum(), own)
    lost = kept.log_rest.exp()
    if k == 37:
        assert torch.allclose(value.double(), whole, atol=1e-5) and not lost.any()
        return
    outside_p, outside_s = (torch.where(inside, 0.0, (q - rest(q)).exp()) for q in (exact_p, exact_s))
    ratio = torch.where(inside, 0.0, (exact_p - rest(exact_p)) - (exact_s - rest(exact_s)))
    missing = lost * (outside_p * ratio).sum(-1)
    assert torch.allclose(value.double() + missing, whole, atol=1e-5) and (missing > 0).all()
    off = (gradient - whole_gradient).abs().sum(-1)
    assert (off <= 2 * lost + 1e-5).all()
    # Control: the bound says something, and leaving the rest out altogether breaks it
    without, _ = divergence_from(TopK(kept.ids, kept.log_p, torch.full((9,), -torch.inf)), log_s, log_s.exp())
    assert off.max() > 0.01 * lost.max()
    assert not torch.allclose(without.double(), expected, atol=1e-3)
    assert outside_s.sum() > 0


@pytest.mark.parametrize("elements", [37 * 2, 2**25], ids=["two rows", "one chunk"])
def test_in_chunks_beside_a_teacher(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK", elements)
    problem = test_losses.make_problem((8, 3, 37, 8, 6), bias=True, scales=(0.5, 1.0), softcaps=(9.0, None))
    head = Head(torch.randn(37, 5), torch.randn(37), 0.5, 9.0)
    hidden, asked = torch.randn(5, 5), torch.arange(5) % 3 != 1
    kept = losses.top_k(hidden, head, ALL)
    # What is not asked may be anything finite
    kept = TopK(
        torch.where(asked[:, None], kept.ids, 0),
        torch.where(asked[:, None], kept.log_p, 0.0),
        torch.where(asked, kept.log_rest, -torch.inf),
    )
    arguments = (problem.hidden, problem.head, problem.labels, problem.teacher_hidden, problem.teacher_head)
    results = []
    for anchor in (Anchor(hidden, head, asked), KeptAnchor(kept, asked)):
        said = score(*arguments, Weights(anchor=0.3), anchor=anchor)
        results.append((said, test_losses.gradients(said.total, problem)))
    (live, live_gradients), (cached, gradients) = results
    assert torch.allclose(live.loss, cached.loss, atol=1e-5) and torch.equal(live.anchored, cached.anchored)
    assert torch.allclose(live.anchor_kl, cached.anchor_kl, atol=1e-5) and live.anchor_kl.max() > 0.1
    for ours, theirs in zip(live_gradients, gradients, strict=True):
        assert test_losses.difference(theirs, ours) < CLOSE


# --------------------------------------------------------------------------------------------------------------------
# Cached equals live
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_an_anchor_of_all_tokens_is_the_live_one(make_trainer: MakeTrainer, tmp_path: Path, adapter: bool) -> None:
    def make(where: str, **cached: Any) -> Any:
        torch.manual_seed(1)
        extra = {"peft_config": lora()} if adapter else {}
        return moved(trainer_of(make_trainer, tmp_path / where, **ANCHORED, **extra, **cached))

    live, cached = make("live"), make("cached", anchor_cache=True, anchor_cache_k=ALL)
    assert cached.before is None and cached.step.judge is None
    assert live.before.footprint == (0 if adapter else live.before.model.num_parameters() * 4)
    assert scored(live)[2]["anchor_kl"] > 0.01
    assert alike(live, cached)
    # Control: the answers of another VLM
    other = make("other", anchor_cache=True, anchor_cache_k=ALL, model=tiny.make_vlm(7))
    other.model.load_state_dict(live.model.state_dict())
    assert not alike(live, other)


MODES = ["none", "vision", "inputs", "images"]


def teacher_of(mode: str) -> dict[str, Any]:
    if mode != "images":
        return {"kv_sharing": mode}
    return {"kv_sharing": mode, "teacher_model": tiny.make_vlm(3), "teacher_tokenizer": tiny.make_processor()}


@pytest.mark.parametrize("mode", MODES)
def test_a_teacher_that_reads_nothing_that_moves_is_asked_once(
    make_trainer: MakeTrainer, tmp_path: Path, mode: str
) -> None:
    """Where it reads images of the student, it is asked live on those rows alone, and stays."""
    live = moved(trainer_of(make_trainer, tmp_path / "live", **teacher_of(mode)))
    cached = moved(trainer_of(make_trainer, tmp_path / "cached", teacher_cache=True, **teacher_of(mode)))
    needed = mode in ("vision", "inputs")
    assert (next(cached.teacher.model.parameters()).device.type == "meta") != needed
    assert alike(live, cached)
    batch = cached.data_collator([cached.train_dataset[i] for i in range(6)])
    answers = batch["cached"]
    assert answers.kept.any() and answers.kept.all() != needed
    assert (answers.live.num_loss > 0) == needed
    # Row 1 has a token that the teacher cannot read: there, it reads the student
    assert answers.live.loss_rows.unique().tolist() == ([0, 1, 4] if needed else [])
    assert answers.live.num_loss + answers.teacher.shape[0] == batch["queries"].num_loss
    head = cached.teacher.head.weight
    if needed:
        assert cached.teacher.footprint == live.teacher.footprint
    else:
        assert cached.teacher.footprint == head.numel() * head.element_size() < live.teacher.footprint
        with torch.no_grad():
            shared = live._read(
                {k: v for k, v in batch.items() if k not in ("labels", "distill", "queries", "cached")}
            )
            hidden = live.step.sharing.teacher_pass(live.teacher.model, shared, batch["queries"])
        assert (hidden - answers.teacher).abs().max() < CLOSE * hidden.abs().max()
    # Control: another teacher's
    other = {**teacher_of(mode), "teacher_model": tiny.make_vlm(5) if mode == "images" else tiny.make_lm(5)}
    theirs = moved(trainer_of(make_trainer, tmp_path / "other", teacher_cache=True, **other))
    assert not alike(live, theirs)


@pytest.mark.parametrize("mode", ["full", "vision"])
def test_with_the_eyes_of_the_vlm_before_nothing_live_is_left(
    make_trainer: MakeTrainer, tmp_path: Path, mode: str
) -> None:
    settings = {"kv_source": "before", "kv_sharing": mode, **ANCHORED}
    live = moved(trainer_of(make_trainer, tmp_path / "live", **settings))
    cached = trainer_of(
        make_trainer, tmp_path / "cached", **settings, teacher_cache=True, anchor_cache=True, anchor_cache_k=ALL
    )
    assert cached.before is None and cached.step.source is None
    assert next(cached.teacher.model.parameters()).device.type == "meta"
    assert alike(live, moved(cached))
    # Control: a teacher that reads the student, which has moved
    reading = moved(trainer_of(make_trainer, tmp_path / "reading", kv_sharing=mode, **ANCHORED))
    assert not alike(live, reading)


def test_a_teacher_with_padding_is_the_same_offloaded(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Parked in CPU memory, it loses the rows of its head that the student has no tokens for."""

    def make(where: str, lm: Any, offload: str) -> Any:
        settings = {"kv_sharing": "none", "teacher_cache": True, "cache_dir": str(tmp_path / "kept")}
        return trainer_of(make_trainer, tmp_path / where, teacher_model=lm, teacher_offload=offload, **settings)

    size = len(tiny.make_tokenizer(extra=True)) + 8
    one, two = (make(offload, tiny.make_lm(1, vocab_size=size), offload) for offload in ("none", "cpu"))
    assert len(one.teacher_cached) == len(two.teacher_cached) and alike(one, two)
    other = tiny.make_lm(1, vocab_size=size)
    with torch.no_grad():
        other.get_input_embeddings().weight[300] += 1.0
    with pytest.raises(StaleCache, match="was computed with teacher = "):
        make("other", other, "cpu")


def test_an_offloaded_teacher_is_asked_once_too(make_trainer: MakeTrainer, tmp_path: Path, saved_pair: Any) -> None:
    settings = {"teacher_model": str(saved_pair[1]), "kv_sharing": "none", "teacher_offload": "cpu"}
    live = moved(trainer_of(make_trainer, tmp_path / "live", **settings))
    cached = moved(trainer_of(make_trainer, tmp_path / "cached", teacher_cache=True, **settings))
    assert next(cached.teacher.model.parameters()).device.type == "meta" and not cached.step.offload
    assert alike(live, cached)


def test_a_quantised_teacher_is_asked_once_too_and_measured(
    make_trainer: MakeTrainer, tmp_path: Path, saved_pair: Any
) -> None:
    settings = {"teacher_model": str(saved_pair[1]), "kv_sharing": "none", "teacher_quantization": "nf4"}
    live = moved(trainer_of(make_trainer, tmp_path / "live", **settings))
    settings |= {"teacher_cache": True, "cache_dir": str(tmp_path / "kept")}
    cached = moved(trainer_of(make_trainer, tmp_path / "cached", **settings))
    assert cached.teacher_quantization_kl is None
    assert alike(live, cached)
    # All is in, and the measurement is made all the same
    again = trainer_of(make_trainer, tmp_path / "again", measure_teacher_quantization=True, **settings)
    assert again.teacher_quantization_kl > 0 and next(again.teacher.model.parameters()).device.type == "meta"


def test_a_run_that_asked_before_is_the_run_that_asks_live(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Losses and metrics of four steps, with workers and an evaluation; and the forwards that are saved."""
    settings = {
        **ANCHORED,
        "kv_sharing": "none",
        "max_steps": 4,
        "learning_rate": 0.02,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": mixed_dataset(4, seed=9),
    }
    live = trainer_of(make_trainer, tmp_path / "live", **settings)
    cached = trainer_of(
        make_trainer,
        tmp_path / "cached",
        **settings,
        anchor_cache=True,
        anchor_cache_k=ALL,
        teacher_cache=True,
        dataloader_num_workers=1,
    )
    with counted(live.before.model.base_model) as asked:
        live.train()
    assert len(asked) > 4
    cached.train()
    ours, theirs = (
        [log for log in run.state.log_history if "eval_loss" in log or "loss" in log] for run in (live, cached)
    )
    assert len(ours) == 6
    timed = ("runtime", "per_second", "grad_norm")
    for one, other in zip(ours, theirs, strict=True):
        names = [name for name in one if not any(part in name for part in timed)]
        assert {n: other[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-3, abs=1e-5)
    # Only what was promised is there
    with pytest.raises(
        ValueError, match="is not in the anchor cache in .*: pass every evaluation set when the trainer is made"
    ):
        cached.evaluate(mixed_dataset(4, seed=11))


def test_weight_zero_trains_bit_for_bit_as_without(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    runs = {}
    for name, settings in {
        "none": {},
        "zero": {"anchor": "before", "anchor_weight": 0.0, "anchor_cache": True},
    }.items():
        runs[name] = trainer_of(make_trainer, tmp_path / name, max_steps=3, **settings)
        runs[name].train()
    pairs = zip(runs["none"].model.parameters(), runs["zero"].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    logs = [log["anchor_kl"] for log in runs["zero"].state.log_history if "anchor_kl" in log]
    assert logs[0] == pytest.approx(0, abs=1e-6) and logs[-1] > 1e-4
    assert runs["none"].data_collator.answers is None and runs["none"]._caches == []


def test_what_is_lost_is_what_a_plain_forward_says(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="hf_lingudistill"):
        trainer = trainer_of(make_trainer, tmp_path, **ANCHORED, anchor_cache=True, anchor_cache_k=3)
    lost = []
    for row in trainer.train_dataset:
        if row["distill"]:
            continue
        batch = {k: v for k, v in trainer.data_collator([row]).items() if isinstance(v, torch.Tensor)}
        labels = batch["labels"][0, 1:] != -100
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "distill", "lingudistill_row")}
        with torch.no_grad():
            p = tiny.make_vlm(0)(**inputs).logits[0, :-1][labels].softmax(-1)
        lost += (1 - p.topk(3).values.sum(-1)).tolist()
    facts = trainer.cache_facts(trainer.anchor_cached)
    assert facts["tokens"] == len(lost) and facts["rows"] == 4 and facts["k"] == 3
    assert facts["lost"] == pytest.approx(sum(lost) / len(lost), rel=1e-4) and facts["lost"] > 0.05
    assert "Outside of the 3 most likely tokens lies" in caplog.text
    assert "anchor_cache_k=3 leaves out" in caplog.text
    facts = gather_run_facts(trainer)
    assert facts["anchor"]["cache"]["k"] == 3 and facts["anchor"]["mib"] == 0 and "cache" not in facts["teacher"]
    assert "VLM before || student, of its 3 most likely tokens with" in str(render_card(facts, {})).replace("\\", "")


# --------------------------------------------------------------------------------------------------------------------
# Found again, taken up, refused
# --------------------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    pass


def test_a_pass_that_was_cut_short_goes_on_where_it_stopped(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        **ANCHORED,
        "kv_sharing": "none",
        "anchor_cache": True,
        "teacher_cache": True,
        "cache_dir": str(tmp_path / "kept"),
        "per_device_eval_batch_size": 1,
    }
    asked: list[int] = []

    def make(limit: int, where: str, **other: Any) -> Any:
        asked.clear()

        def ask(self: Any, *args: Any) -> None:
            if len(asked) == limit:
                raise Killed
            asked.append(1)
            real(self, *args)

        real = cache_mixin.CacheMixin._ask
        with monkeypatch.context() as patched:
            patched.setattr(cache_mixin.CacheMixin, "_ask", ask)
            return trainer_of(make_trainer, tmp_path / where, **{**settings, **other})

    monkeypatch.setattr(row_cache, "PART_BYTES", 1)
    with pytest.raises(Killed):
        make(5, "first")
    parts = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert len(parts) == 5
    resumed = make(99, "second")
    assert len(asked) == 8 - 5 and [part.exists() for part in parts] == [True] * 5
    whole = trainer_of(make_trainer, tmp_path / "whole", **{**settings, "cache_dir": None})
    assert (tmp_path / "whole/caches/anchor" / HEADER).is_file(), "left out, it lies in output_dir"
    assert alike(whole, resumed)
    for cache, other in zip(resumed._caches, whole._caches, strict=True):
        assert len(cache) == len(other) == 4 and cache.measured == pytest.approx(other.measured)
    # A third run asks about nothing, with any batch size
    make(0, "third", per_device_eval_batch_size=3)
    # Other rows are asked about; those that are in are not
    more = mixed_dataset(12)
    make(99, "more", train_dataset=more)
    assert len(asked) == 4


def test_a_killed_write_leaves_no_part_and_a_dead_one_is_named(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {**ANCHORED, "anchor_cache": True, "cache_dir": str(tmp_path / "kept")}
    trainer_of(make_trainer, tmp_path / "one", **settings)
    (part,) = (tmp_path / "kept").rglob("*.safetensors")
    whole = part.read_bytes()
    part.write_bytes(whole[:-7])
    with pytest.raises(
        StaleCache, match="part-00000.safetensors.* of the anchor cache cannot be read .*: remove it and"
    ):
        trainer_of(make_trainer, tmp_path / "two", **settings)
    part.unlink()
    (tmp_path / "kept/anchor" / COMPLETE).unlink()
    again = trainer_of(make_trainer, tmp_path / "three", **settings)
    assert len(again.anchor_cached) == 4


def long_mixture() -> Dataset:
    """Many prompts and completions, and one conversation, of which `answers_only` decides what is trained on."""
    turns = [
        [
            {"role": "user", "content": f"tell me of the sea {i}"},
            {"role": "assistant", "content": "it is deep and wide."},
        ]
        for i in range(16)
    ]
    rows = [
        {"prompt": pair[:1], "completion": pair[1:], "messages": None, "distill": True, "images": []} for pair in turns
    ]
    rows[5] |= {"prompt": None, "completion": None, "messages": turns[5]}
    message = List({"role": Value("string"), "content": Value("string")})
    names = {"prompt": message, "completion": message, "messages": message}
    return Dataset.from_list(rows, features=Features({**names, "distill": Value("bool"), "images": List(Image())}))


def test_a_finished_cache_is_gone_through_again_where_rows_are_read_otherwise(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of many has other labels, and is none of those that are looked at."""
    monkeypatch.setattr(cache_mixin, "LOOKED_AT", 2)
    given = {"kv_sharing": "none", "teacher_cache": True, "train_dataset": long_mixture()}

    def make(where: str, **settings: Any) -> Any:
        return trainer_of(make_trainer, tmp_path / where, **given, **settings)

    shared = {"cache_dir": str(tmp_path / "kept")}
    assert len(make("one", **shared).teacher_cached) == 16
    other = make("two", **shared, answers_only=False)
    assert len(other.teacher_cached) == 17
    scored(other, slice(4, 8))
    # Control: without what says how rows are read, that row is missing when its turn comes
    monkeypatch.setattr(cache_mixin, "reading_digest", lambda *_: "alike")
    shared = {"cache_dir": str(tmp_path / "believed")}
    make("three", **shared)
    believed = make("four", **shared, answers_only=False)
    with pytest.raises(ValueError, match="Row 5 is not in the teacher cache"):
        scored(believed, slice(4, 8))


def test_a_collator_of_the_callers_own_is_never_believed_to_read_alike(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_mixin, "LOOKED_AT", 2)
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling as Theirs

    class Reader(Theirs):
        """Of the caller's own."""

        read = 0

        def __call__(self, rows: list[Any]) -> Any:
            Reader.read += len(rows)
            return super().__call__(rows)

    given = {"kv_sharing": "none", "teacher_cache": True, "cache_dir": str(tmp_path / "kept")}
    counts = []
    for where in ("one", "two"):
        Reader.read = 0
        processor = tiny.make_processor()
        collator = Reader(processor, completion_only_loss=True)
        made = trainer_of(make_trainer, tmp_path / where, processing_class=processor, data_collator=collator, **given)
        counts.append((Reader.read, len(made.teacher_cached)))
    assert counts[0] == counts[1] and not (tmp_path / "kept/teacher" / COMPLETE).exists()


def test_what_is_said_to_be_complete_is_looked_at(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tokens of the same dataset are asked about, not taken for known, even where nothing tells that rows are read otherwise."""
    monkeypatch.setattr(cache_mixin, "reading_digest", lambda *_: "alike")
    settings = {**ANCHORED, "anchor_cache": True, "cache_dir": str(tmp_path / "kept")}
    trainer_of(make_trainer, tmp_path / "one", **settings)
    processor = tiny.make_processor()
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "<|im_end|> ", 1)
    other = trainer_of(make_trainer, tmp_path / "two", processing_class=processor, **settings)
    assert len(other.anchor_cached) == 8
    assert scored(other)[2]["anchored_tokens"] > 0


def scaled(model: Any) -> Any:
    """The same weights under another config."""
    model.config.get_text_config().rope_parameters = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    return model


@pytest.mark.parametrize(
    ("made", "used", "sentence"),
    [
        (
            {},
            {"anchor_cache_k": 4},
            "was computed with k = 64, and this run has 4: remove that folder, or set another",
        ),
        (
            {},
            {"model": tiny.make_vlm(1)},
            "was computed with VLM before = 'in memory, weights .*', and this run has 'in",
        ),
        ({}, {"teacher_model": tiny.make_lm(2)}, "The teacher cache in .* was computed with teacher = 'in memory, we"),
        ({}, {"kv_sharing": "vision"}, "was computed with kv_sharing = 'none', and this run has 'vision'"),
        (
            {"model": "student", "model_init_kwargs": {"revision": "a"}},
            {"model": "student"},
            "was computed with VLM before = 'student at a, weights .*', and this run has 'student, weights",
        ),
        ({"teacher_model_revision": "a"}, {}, "was computed with teacher = 'in memory at a, weights"),
        ({}, {"image_size": 16}, "with processor: image_processor.size.longest_edge = 32, and this run has 16"),
        (
            {},
            {"model": scaled(tiny.make_vlm(0))},
            "was computed with VLM before's config: text_config.rope_parameters.rope_type = 'default', and this run has 'linear'",
        ),
        (
            {},
            {"teacher_model": scaled(tiny.make_lm(1))},
            "was computed with teacher's config: rope_parameters.rope_type = 'default', and this run has 'linear'",
        ),
    ],
    ids=["k", "student", "teacher", "mode", "revision", "teacher's revision", "images", "config", "teacher's config"],
)
def test_a_stale_cache_is_refused_in_a_sentence(
    make_trainer: MakeTrainer,
    tmp_path: Path,
    saved_pair: tuple[Path, Path],
    made: dict[str, Any],
    used: dict[str, Any],
    sentence: str,
) -> None:
    common = {"anchor_cache": True, "teacher_cache": True, "kv_sharing": "none", "cache_dir": str(tmp_path / "kept")}

    def make(where: str, image_size: int = 32, **settings: Any) -> Any:
        processor = tiny.make_processor()
        processor.image_processor.size = {"longest_edge": image_size}
        if settings.get("model") == "student":
            settings["model"] = str(saved_pair[0])
        settings = {**ANCHORED, **common, "processing_class": processor, **settings}
        return trainer_of(make_trainer, tmp_path / where, **settings)

    def files() -> dict[Path, int]:
        found = (path for path in (tmp_path / "kept").rglob("*") if path.is_file() and path.suffix != ".lock")
        return {path: path.stat().st_mtime_ns for path in found}

    make("one", **made)
    written = files()
    with pytest.raises(StaleCache, match=sentence):
        make("two", **used)
    make("control", **made)
    assert files() == written


def test_a_run_that_resumes_needs_the_student_it_began_with(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {
        **ANCHORED,
        "anchor_cache": True,
        "kv_sharing": "none",
        "teacher_cache": True,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 4,
    }
    whole = trainer_of(make_trainer, tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer_of(make_trainer, tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(StaleCache, match="was computed with VLM before"):
        trainer_of(make_trainer, tmp_path / "whole", **{**settings, "model": copy.deepcopy(whole.model)})


def test_nothing_of_anybody_elses_is_touched(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    mine = tmp_path / "kept/anchor/notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(NotOurs, match="holds 'notes.txt' and was not made by this command"):
        trainer_of(make_trainer, tmp_path / "one", **ANCHORED, anchor_cache=True, cache_dir=str(tmp_path / "kept"))
    assert mine.read_text() == "mine" and sorted(p.name for p in mine.parent.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_cache_never_lies_in_the_folder_of_a_model_that_it_asks(
    make_trainer: MakeTrainer, saved_pair: Any, tmp_path: Path, role: str
) -> None:
    for name, folder in zip(("student", "teacher"), saved_pair, strict=True):
        shutil.copytree(folder, tmp_path / name)
    pair = {"model": str(tmp_path / "student"), "teacher_model": str(tmp_path / "teacher")}
    before = sorted(path.name for path in (tmp_path / role).rglob("*"))
    for place in (tmp_path / role, tmp_path / role / "kept"):
        with pytest.raises(ValueError, match=f"cache_dir .* is the folder of the {role}, or lies in it"):
            trainer_of(make_trainer, tmp_path / "one", **pair, **ANCHORED, anchor_cache=True, cache_dir=str(place))
    assert sorted(path.name for path in (tmp_path / role).rglob("*")) == before
    trainer_of(make_trainer, tmp_path / "two", **pair, **ANCHORED, anchor_cache=True, cache_dir=str(tmp_path / "kept"))


def test_a_row_is_known_by_what_it_holds_wherever_it_stands(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    image = PILImage.new("RGB", (4, 4), "grey")
    ids, labels = torch.arange(6), torch.tensor([-100, -100, 2, 3, 4, 5])
    key = row_key(ids, labels, [image])
    assert key == row_key(ids.int(), labels.clone(), [image.copy()]) and len(key) == 16
    other = image.copy()
    other.putpixel((3, 3), (0, 0, 1))
    changed = [
        row_key(ids.flip(0), labels, [image]),
        row_key(ids, labels.roll(1), [image]),
        row_key(ids, labels, [other]),
        row_key(ids, labels, [image, image]),
        row_key(ids, labels, []),
        row_key(ids, labels, [image.resize((2, 8))]),
        row_key(ids, labels, [image.convert("L")]),
    ]
    assert len({key, *changed}) == 8
    # Padding is none of it, nor are the rows beside it
    trainer = trainer_of(make_trainer, tmp_path)
    trainer.data_collator.answers = cache_mixin.keys_of
    rows = [trainer.train_dataset[i] for i in range(4)]
    together = trainer.data_collator(rows)["cached"]
    assert together == [trainer.data_collator([row])["cached"][0] for row in rows] and len(set(together)) == 4


def test_two_rows_of_one_half_key_are_two_rows(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "c", "anchor cache", {})
    cache.begin()
    keys = [bytes(8) + bytes([n] * 8) for n in range(3)] + [bytes([9] * 16)]
    for n, key in enumerate(keys):
        cache.add(key, {"states": torch.full((n + 1, 2), float(n))}, {"tokens": n + 1.0})
    assert keys[0] in cache and cache.get(keys[0]) is None
    cache.flush()
    cache.read()
    for n, key in enumerate(keys):
        assert torch.equal(cache.get(key)["states"], torch.full((n + 1, 2), float(n)))
    assert cache.get(bytes([1] * 16)) is None and len(cache) == 4 and cache.measured == {"tokens": 10.0}
    assert json.loads((tmp_path / "c" / HEADER).read_text()) == {"format": 2}


# --------------------------------------------------------------------------------------------------------------------
# What cannot be had
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"anchor_cache": True},
            "anchor_cache=True keeps what the VLM before says, and anchor='none' does not ask it",
        ),
        (
            {"anchor_cache": True, "anchor": "before", "kv_source": "before"},
            "frees nothing where kv_source='before' asks the VLM before in every step: set teacher_cache=True as well",
        ),
        (
            {"teacher_cache": True, "kv_sharing": "prompt"},
            "with kv_sharing='prompt' the teacher reads the student's keys and values on every row",
        ),
        ({"teacher_cache": True, "kv_sharing": "full"}, "with kv_sharing='full' the teacher reads the student's keys"),
        ({"teacher_cache": "yes"}, "teacher_cache must be true or false; got 'yes'."),
        ({"anchor_cache": 1}, "anchor_cache must be true or false; got 1."),
        ({"anchor_cache_k": 0}, "anchor_cache_k must be a number of tokens of at least 1; got 0."),
        ({"anchor_cache_k": 2.5}, "anchor_cache_k must be a number of tokens of at least 1; got 2.5."),
        ({"cache_dir": " "}, "cache_dir must be a name or path, or left out; got ' '."),
        ({"anchor_cache": True, "anchor": "before", "packing": True}, "packing=True joins rows"),
    ],
    ids=str,
)
def test_settings_are_checked(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        LinguDistillConfig(output_dir=str(tmp_path), **settings)


def test_streams_and_sampled_answers_are_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the train set is a IterableDataset: pass a datasets.Dataset"):
        trainer_of(
            make_trainer,
            tmp_path,
            **ANCHORED,
            anchor_cache=True,
            train_dataset=mixed_dataset().to_iterable_dataset(),
        )
    with pytest.raises(ValueError, match="teacher_cache has no meaning on-policy"):
        OnPolicyLinguDistillConfig(output_dir=str(tmp_path), teacher_cache=True)


@pytest.mark.parametrize(
    "settings", [{"teacher_cache": True}, {**ANCHORED, "anchor_cache": True}], ids=["teacher", "anchor"]
)
def test_batches_that_one_process_reads_for_all_are_refused(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """As on two processes with `dispatch_batches`: such a batch has no plan."""
    monkeypatch.setattr(LinguDistillTrainer, "_splits_batches", lambda _: True)
    with pytest.raises(ValueError, match="dispatch_batches=True lets one read for all: leave dispatch_batches out of"):
        trainer_of(make_trainer, tmp_path, kv_sharing="none", **settings)
    assert not (tmp_path / "caches").exists()
    trainer_of(make_trainer, tmp_path, kv_sharing="none")  # control


def test_a_teacher_in_pieces_cannot_be_asked_by_each_process_for_itself(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_trainer, tmp_path, kv_sharing="none")
    trainer.args.teacher_cache, trainer.step.sharded = True, True
    with pytest.raises(ValueError, match="this one is split: set teacher_sharding='replicate'"):
        trainer.prepare_caches()
    trainer.step.sharded = False
    monkeypatch.setattr(cache_mixin, "sharding_of", lambda _: "fsdp2")
    vision = trainer_of(make_trainer, tmp_path, kv_sharing="vision")
    vision.args.teacher_cache = True
    with pytest.raises(ValueError, match="with kv_sharing='vision' needs the whole student on every process"):
        vision.prepare_caches()
