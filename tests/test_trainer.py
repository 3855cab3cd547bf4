"""The training step: its loss and gradients against plain torch, what it calls and leaves behind, and its metrics."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from planning import KV_SHARING_MODES, plan_queries, teacher_pass
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    BitsAndBytesConfig,
    GemmaConfig,
    GemmaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

import hf_lingudistill.step as step_module
import hf_lingudistill.step_mixin as step_mixin
from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer
from hf_lingudistill._internals import checkpoint_activations
from hf_lingudistill.sharing.base import Sharing
from hf_lingudistill.student_kv import SharedKV, recording

Batch = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor | None]
MakeTrainer = Callable[..., Any]

SHARED_VOCAB = len(tiny.make_tokenizer(extra=False))
IMAGE_TOKEN = tiny.make_tokenizer(extra=True).convert_tokens_to_ids("<image>")
TOLERANCE = 5e-6  # fp32, relative to the largest gradient of the parameter; measured: at most 1.4e-6
CLEARLY = 1e-2  # relative: what a control must differ by
BETAS = (0.0, 0.5, 1.0)


# --------------------------------------------------------------------------------------------------------------------
# The reference: full logits, one loop over the tokens
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class Reference:
    """loss: scalar. ce to teacher_entropy: sums over tokens. gate: of each candidate, whether it is distilled."""

    loss: torch.Tensor
    labels: int
    ce: float
    kd: float
    teacher_ce: float
    student_ce: float
    agreement: int
    teacher_entropy: float
    gate: list[bool]


def is_readable(token: int) -> bool:
    return 0 <= token < SHARED_VOCAB and token != IMAGE_TOKEN


def candidates(batch: Batch) -> list[tuple[int, int]]:
    """(row, position) of every next-token prediction that the teacher may be asked about."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    return [
        (b, t)
        for b, t in itertools.product(range(len(ids)), range(len(ids[0]) - 1))
        if batch["distill"][b] and is_readable(ids[b][t]) and is_readable(labels[b][t + 1])
    ]


def teacher_logits(
    teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch, kv_sharing: str, vocab: int
) -> torch.Tensor:
    """(N, vocab) double, in the order of `candidates`. Tokens that the teacher lacks are all but impossible."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "distill", "queries")}
    with torch.no_grad(), recording(student, keep_inputs=True) as shared:
        student(**inputs)
    plan = plan_queries(
        batch["input_ids"],
        batch["labels"],
        batch["distill"],
        kv_sharing=kv_sharing,  # type: ignore[arg-type]
        shared_vocab_size=SHARED_VOCAB,
        unreadable_token_ids=(IMAGE_TOKEN,),
        attention_mask=batch["attention_mask"],
    )
    assert list(zip(plan.loss_rows.tolist(), plan.loss_positions.tolist(), strict=True)) == candidates(batch)
    with torch.no_grad():  # a head that is not frozen would keep what the pass made in inference mode
        logits = teacher.lm_head(teacher_pass(teacher, shared, plan)).double()
    return torch.cat([logits, torch.full((logits.shape[0], vocab - logits.shape[1]), -100.0).double()], dim=1)


def generalised_jsd(student_log_p: torch.Tensor, teacher_log_p: torch.Tensor, beta: float) -> torch.Tensor:
    p_s, p_t = student_log_p.exp(), teacher_log_p.exp()
    if beta == 0.0:
        return (p_t * (teacher_log_p - student_log_p)).sum()
    if beta == 1.0:
        return (p_s * (student_log_p - teacher_log_p)).sum()
    log_m = ((1 - beta) * p_s + beta * p_t).log()
    return beta * (p_t * (teacher_log_p - log_m)).sum() + (1 - beta) * (p_s * (student_log_p - log_m)).sum()


def reference(
    model: nn.Module,
    batch: Batch,
    *,
    kv_sharing: str = "prompt",
    distill_tokens: str = "confident",
    beta: float = 0.0,
    temperature: float = 1.0,
    ce_weight: float = 0.5,
    distill_weight: float = 1.0,
    distill_margin: float = 0.0,
    teacher: PreTrainedModel | None = None,
    student: PreTrainedModel | None = None,
) -> Reference:
    """model: what the optimizer trains (PEFT-wrapped or not). student: the plain VLM inside, if it is wrapped."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "distill", "queries")}
    logits = model(**inputs).logits.double()
    log_p = logits.log_softmax(dim=-1)
    says = teacher_logits(teacher or tiny.make_lm(1), student or model, batch, kv_sharing, logits.shape[-1])  # type: ignore[arg-type]
    result = Reference(torch.zeros(()).double(), 0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, [])
    places = {place: index for index, place in enumerate(candidates(batch))}
    labels = batch["labels"]
    for b, t in itertools.product(range(labels.shape[0]), range(labels.shape[1] - 1)):
        label = int(labels[b, t + 1])
        if label == -100:
            continue
        result.labels += 1
        ce = -log_p[b, t, label]
        result.ce += ce.item()
        if (b, t) not in places:
            result.loss = result.loss + ce
            continue
        teacher_log_p = says[places[b, t]].log_softmax(dim=-1)
        result.teacher_ce -= float(teacher_log_p[label])
        result.student_ce += ce.item()
        result.agreement += int(teacher_log_p.argmax() == log_p[b, t].argmax())
        result.teacher_entropy -= float((teacher_log_p.exp() * teacher_log_p).sum())
        result.gate.append(distill_tokens == "all" or float(teacher_log_p[label]) >= -ce.item() + distill_margin)
        if not result.gate[-1]:
            result.loss = result.loss + ce
            continue
        kd = generalised_jsd(
            (logits[b, t] / temperature).log_softmax(dim=-1),
            (says[places[b, t]] / temperature).log_softmax(dim=-1),
            beta,
        )
        result.kd += kd.item()
        result.loss = result.loss + ce_weight * ce + distill_weight * kd
    result.loss = result.loss / result.labels
    return result


def reference_step(model: nn.Module, batch: Batch, **settings: Any) -> tuple[float, Gradients]:
    model.zero_grad()
    loss = reference(model, batch, **settings).loss
    loss.backward()
    return loss.item(), gradients_of(model)


# --------------------------------------------------------------------------------------------------------------------
# The step under test
# --------------------------------------------------------------------------------------------------------------------
def gradients_of(model: nn.Module) -> Gradients:
    """Keyed by the plain model's parameter names; cloned."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def step(trainer: Any, batch: Batch) -> tuple[float, Gradients]:
    """Loss and gradients of one batch, as `training_step` takes them."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), gradients_of(trainer.model)


def mixed_rows() -> list[dict]:
    """Distilled: an image row and two texts of different lengths, one with a token that only the student has.

    Not distilled: an image row.
    """
    rows = tiny.make_rows(4)
    rows[0]["distill"] = True
    rows[1]["completion"][0]["content"] += f"{tiny.EXTRA_TOKENS[-1]} yes."
    return rows


def mixed_batch(trainer: Any, rows: list[dict] | None = None) -> Batch:
    batch = dict(trainer.data_collator(mixed_rows() if rows is None else rows))
    if rows is None:
        assert (batch["labels"] >= SHARED_VOCAB).any(), "a label that the teacher lacks must be among them"
    del batch["queries"]  # planned anew in the step, so that a test may change the batch
    return batch


def difference(ours: Gradients, theirs: Gradients) -> float:
    """Largest difference of a gradient, relative to the largest entry of that parameter's gradient.

    Biases of key projections are left out: they shift all scores of a query alike, so that their gradient is rounding.
    """
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, ours_p in ours.items():
        if name.endswith("k_proj.bias"):
            continue
        theirs_p = theirs[name]
        assert (ours_p is None) == (theirs_p is None), name
        if ours_p is not None and theirs_p is not None:
            scale = float(theirs_p.abs().max())
            assert scale > 0, f"{name} has a zero gradient: nothing would be compared"
            worst = max(worst, float((ours_p - theirs_p).abs().max()) / scale)
    return worst


@contextmanager
def counted(module: nn.Module) -> Iterator[list[Any]]:
    """The positional and keyword arguments of every forward of `module` in the context."""
    calls: list[Any] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


# --------------------------------------------------------------------------------------------------------------------
# Loss and gradients
# --------------------------------------------------------------------------------------------------------------------
# Every mode with and without the gate; the divergences themselves are held to their definition in test_losses.py
@pytest.mark.parametrize(
    ("kv_sharing", "distill_tokens", "beta"),
    [
        (mode, tokens, BETAS[(m + t) % len(BETAS)])
        for m, mode in enumerate(KV_SHARING_MODES)
        for t, tokens in enumerate(("all", "confident"))
    ],
)
def test_loss_and_every_gradient_equal_plain_torch(
    make_trainer: MakeTrainer, kv_sharing: str, distill_tokens: str, beta: float
) -> None:
    settings = {"kv_sharing": kv_sharing, "distill_tokens": distill_tokens, "beta": beta}
    trainer = make_trainer(**settings)
    batch = mixed_batch(trainer)
    loss, gradients = step(trainer, batch)
    expected, expected_gradients = reference_step(tiny.make_vlm(0).train(), batch, **settings)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert difference(gradients, expected_gradients) < TOLERANCE
    gate = reference(trainer.model, batch, **settings).gate
    assert any(gate) and (all(gate) == (distill_tokens == "all")), "the batch must exercise the gate"


def test_control_every_setting_changes_the_loss_and_its_gradient() -> None:
    """Otherwise the test above would pass on a trainer that ignores them."""
    student = tiny.make_vlm(0)
    batch = _collated(mixed_rows())
    results = [
        reference_step(student, batch, kv_sharing=mode, distill_tokens=tokens, beta=beta)
        for mode, tokens, beta in itertools.product(KV_SHARING_MODES, ("all", "confident"), BETAS)
    ]
    for (loss, gradients), (other, other_gradients) in itertools.combinations(results, 2):
        assert abs(loss - other) > 5e-6 * other, "rounding is below 1e-6"
        assert difference(gradients, other_gradients) > 50 * TOLERANCE


def _collated(rows: list[dict]) -> Batch:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collator = DataCollatorForVisionLanguageModeling(tiny.make_processor(), completion_only_loss=True)
    flags = torch.tensor([row["distill"] for row in rows])
    plain = [{key: value for key, value in row.items() if key != "distill"} for row in rows]
    return {**collator(plain), "distill": flags}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 2.5, "beta": 0.3, "distill_tokens": "all"},
        {"ce_weight": 0.0, "distill_weight": 0.7, "distill_tokens": "all"},
        {"ce_weight": 1.5, "distill_weight": 0.0},
        {"distill_margin": 0.8},
        {"distill_margin": -1.5},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_weights_temperature_and_margin_mean_what_they_say(make_trainer: MakeTrainer, settings: dict) -> None:
    trainer = make_trainer(**settings)
    batch = mixed_batch(trainer)
    loss, gradients = step(trainer, batch)
    student = tiny.make_vlm(0).train()
    expected, expected_gradients = reference_step(student, batch, **settings)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert difference(gradients, expected_gradients) < TOLERANCE
    assert abs(reference(student, batch).loss.item() - expected) > 1e-3, "the defaults would have given the same"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_head_gradient_equals_the_reference_with_tied_and_untied_heads(make_trainer: MakeTrainer, tied: bool) -> None:
    trainer = make_trainer(
        model=tiny.make_vlm(0, tie_word_embeddings=tied), teacher_model=tiny.make_lm(1, tie_word_embeddings=tied)
    )
    batch = mixed_batch(trainer)
    student = tiny.make_vlm(0, tie_word_embeddings=tied).train()
    loss, gradients = step(trainer, batch)
    expected, expected_gradients = reference_step(student, batch, teacher=tiny.make_lm(1, tie_word_embeddings=tied))
    assert ("lm_head.weight" in expected_gradients) == (not tied)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert difference(gradients, expected_gradients) < TOLERANCE

    head = student.get_output_embeddings().weight
    name = next(name for name, parameter in student.named_parameters() if parameter is head)
    _, of_ce = reference_step(student, batch, ce_weight=1.0, distill_weight=0.0)
    assert difference({name: gradients[name]}, {name: of_ce[name]}) > CLEARLY, "CE alone reaches the head as well"


def test_teacher_gets_no_gradient_and_does_not_change(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=2)
    trainer.train()
    original = tiny.make_lm(1).state_dict()
    teacher = trainer.teacher.model
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor[: len(original[name])], original[name]), name
        assert not tensor[len(original[name]) :].any(), f"{name}: rows of tokens that the teacher lacks must be zero"


@pytest.mark.parametrize("kv_sharing", KV_SHARING_MODES)
def test_loss_and_gradients_are_unchanged_by_padding_and_row_order(make_trainer: MakeTrainer, kv_sharing: str) -> None:
    trainer = make_trainer(kv_sharing=kv_sharing)
    batch = mixed_batch(trainer)
    loss, gradients = step(trainer, batch)

    order = torch.tensor([2, 0, 3, 1])
    changed = {
        "rows": {name: value[order] for name, value in batch.items()},
        "right": _padded(batch, right=7),
        "left": _padded(batch, left=7),
    }
    for name, other in changed.items():
        other_loss, other_gradients = step(trainer, other)
        assert other_loss == pytest.approx(loss, rel=2e-6), name
        assert difference(other_gradients, gradients) < 1e-4, name

    seen = _padded(batch, left=7)
    seen["attention_mask"] = torch.ones_like(seen["attention_mask"])
    assert abs(step(trainer, seen)[0] - loss) > 1e-3, "padding that is attended to must matter"


def _padded(batch: Batch, *, left: int = 0, right: int = 0) -> Batch:
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: F.pad(value, (left, right), value=fill[name]) if name in fill else value for name, value in batch.items()
    }


@pytest.mark.parametrize("counts", [True, False], ids=["the class counts labels", "the class says that it does not"])
def test_accumulation_changes_neither_loss_nor_weights(make_trainer: MakeTrainer, counts: bool) -> None:
    """Same global batches of 4 in 4, 2 and 1 micro-batches; the control averages the means of the micro-batches. Qwen2.5-VL and two dozen
    others declare `accepts_loss_kwargs = False`: transformers then counts no labels unless it is told to."""

    def run(accumulation: int, **kwargs: Any) -> tuple[list[float], torch.Tensor, dict[str, float]]:
        student: Any = tiny.make_vlm(0)
        if not counts:
            student.accepts_loss_kwargs = False
        trainer = make_trainer(
            model=student,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            **kwargs,
        )
        if kwargs:
            trainer._get_num_items_in_batch = lambda *_: None
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        return [entry["loss"] for entry in logs], weights, logs[-1]

    start = torch.cat([p.detach().flatten() for p in tiny.make_vlm(0).parameters()])
    losses, weights, metrics = run(1)
    moved = float((weights - start).abs().max())
    assert len(losses) == 2 and moved > 1e-3
    for accumulation in (2, 4):
        other_losses, other_weights, other_metrics = run(accumulation)
        assert other_losses == pytest.approx(losses, rel=1e-5)
        assert float((other_weights - weights).abs().max()) < 1e-4 * moved
        for name in ("ce_loss", "kd_loss", "distilled_tokens", "confident_share", "teacher_ce"):
            assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-5), name
    local_losses, local_weights, _ = run(4, average_tokens_across_devices=False)
    assert local_losses != pytest.approx(losses, rel=1e-3)
    assert float((local_weights - weights).abs().max()) > CLEARLY * moved


# --------------------------------------------------------------------------------------------------------------------
# Selection
# --------------------------------------------------------------------------------------------------------------------
def test_batch_without_marked_rows_is_trained_as_by_sft(make_trainer: MakeTrainer) -> None:
    ours, theirs = make_trainer(), make_trainer(SFTTrainer)
    rows = [{**row, "distill": False} for row in tiny.make_rows(4)]
    batch = ours.data_collator(rows)
    assert not batch["distill"].any()
    with counted(ours.teacher.model.model) as teacher_calls:
        loss, gradients = step(ours, batch)
        assert teacher_calls == []
        marked = {**batch, "distill": torch.ones(4, dtype=torch.bool), "queries": None}
        marked_loss, _ = step(ours, marked)
        assert len(teacher_calls) == 2 and marked_loss != loss, "the same rows, marked, must reach the teacher"
        assert step(ours, marked)[0] == marked_loss
        assert len(teacher_calls) == 3, "the comparison with an unshared teacher is made once"
    theirs_batch = theirs.data_collator([{k: v for k, v in row.items() if k != "distill"} for row in rows])
    sft_loss, sft_gradients = step(theirs, theirs_batch)
    # The sums of TRL's head over all positions, in another order
    assert loss == pytest.approx(sft_loss, rel=1e-6)
    for name, gradient in sft_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kv_sharing", KV_SHARING_MODES)
def test_a_plan_of_the_collator_gives_the_step_that_the_batch_gives(
    make_trainer: MakeTrainer, kv_sharing: str
) -> None:
    trainer = make_trainer(kv_sharing=kv_sharing)
    batch = trainer.data_collator(mixed_rows())
    unplanned = {name: value for name, value in batch.items() if name != "queries"}
    with_plan, without = step(trainer, dict(batch)), step(trainer, unplanned)
    assert with_plan[0] == without[0] and difference(with_plan[1], without[1]) == 0.0
    # A mark that was taken away since counts; one that was added is refused, since nobody was asked about its row
    fewer = {"distill": torch.tensor([False, True, False, False])}
    assert step(trainer, {**batch, **fewer})[0] == pytest.approx(step(trainer, {**unplanned, **fewer})[0], rel=1e-6)
    marked = trainer.data_collator([{**row, "distill": False} for row in mixed_rows()])
    with pytest.raises(ValueError, match="changed after its queries were planned"):
        step(trainer, {**marked, "distill": torch.ones(4, dtype=torch.bool)})


@pytest.mark.parametrize("kv_sharing", KV_SHARING_MODES)
def test_teacher_sees_the_marked_rows_only(make_trainer: MakeTrainer, kv_sharing: str) -> None:
    trainer = make_trainer(kv_sharing=kv_sharing)
    trainer.first_batch.batches_to_compare = 0  # the comparison on the first batch would add a pass
    batch = mixed_batch(trainer)
    batch["distill"] = torch.tensor([False, True, False, False])
    with counted(trainer.teacher.model.model) as calls:
        step(trainer, batch)
        step(trainer, {**batch, "distill": torch.tensor([False, True, False, True])})
    of_rows = [batch["input_ids"][[1]], batch["input_ids"][[1, 3]]]
    if kv_sharing == "inputs":  # embeddings, over the whole rows
        shown = [kwargs["inputs_embeds"].shape[1] for _, kwargs in calls]
        assert shown[0] < of_rows[0].numel() and shown[0] < shown[1] <= of_rows[1].numel()
        return
    shown = [kwargs["input_ids"] for _, kwargs in calls]
    assert shown[0].numel() < shown[1].numel()
    for ids, of in zip(shown, of_rows, strict=True):
        assert set(ids.flatten().tolist()) <= set(of.flatten().tolist()) and IMAGE_TOKEN not in ids


def test_unmarked_rows_get_cross_entropy_of_weight_one(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(ce_weight=0.0, distill_tokens="all", train_dataset=tiny.make_dataset(8))
    batch = mixed_batch(trainer)
    batch["distill"] = torch.tensor([False, True, False, True])
    loss, _ = step(trainer, batch)
    expected = reference(trainer.model, batch, ce_weight=0.0, distill_tokens="all").loss.item()
    assert loss == pytest.approx(expected, rel=1e-6)
    batch["distill"] = torch.ones(4, dtype=torch.bool)
    assert abs(step(trainer, batch)[0] - expected) > CLEARLY, "marking the image rows must matter"


def test_dataset_without_the_column_is_distilled_whole_and_says_so_once(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> int:
        return sum("every row is distilled" in record.getMessage() for record in caplog.records)

    with caplog.at_level(logging.INFO):
        with_column = make_trainer()
        with_column.train()
        assert said() == 0 and with_column.has_distill_column and with_column.distill_share == 0.5
        without = make_trainer(train_dataset=tiny.make_dataset(8).remove_columns("distill"), max_steps=2)
        without.train()
    assert said() == 1 and not without.has_distill_column
    batch = next(iter(without.get_train_dataloader()))
    assert batch["distill"].tolist() == [True] * 4


def test_another_column_can_hold_the_flag(make_trainer: MakeTrainer) -> None:
    dataset = tiny.make_dataset(8).rename_column("distill", "is_language")
    trainer = make_trainer(train_dataset=dataset, distill_column="is_language", train_sampling_strategy="sequential")
    assert next(iter(trainer.get_train_dataloader()))["distill"].tolist() == [False, True, False, True]


# --------------------------------------------------------------------------------------------------------------------
# What a step calls and leaves behind
# --------------------------------------------------------------------------------------------------------------------
def test_step_takes_one_student_forward_and_builds_no_logits(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(model=tiny.make_vlm(0, tie_word_embeddings=False))
    trainer.first_batch.batches_to_compare = 0  # the comparison on the first batch would add a pass
    batch = mixed_batch(trainer)
    student, teacher = trainer.model, trainer.teacher.model
    with (
        counted(student.model) as backbone,
        counted(student.get_decoder()) as decoder,
        counted(student.lm_head) as head,
        counted(teacher.model) as teacher_decoder,
        counted(teacher.lm_head) as teacher_head,
    ):
        step(trainer, batch)
        calls = [len(c) for c in (backbone, decoder, head, teacher_decoder, teacher_head)]
        assert calls == [1, 1, 0, 1, 0]
        student(**{name: value for name, value in batch.items() if name not in ("distill", "queries")})
        assert (len(backbone), len(head)) == (2, 1), "a plain call must show in the count"


def test_recorded_keys_and_values_are_freed_before_the_divergence(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at inside the divergence, which allocates most: checkpointing keeps no K/V of its own there."""
    alive: list[int] = []
    storages: list[StorageWeakRef] = []
    records: list[SharedKV] = []

    def watched_pass(sharing: Sharing, teacher: Any, shared: SharedKV, plan: Any) -> torch.Tensor:
        records.append(shared)
        for tensor in (*shared.keys.values(), *shared.values.values()):
            storages.append(StorageWeakRef(tensor.untyped_storage()))
        return original(sharing, teacher, shared, plan)

    def watched_score(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(not storage.expired() for storage in storages))
        return score(*args, **kwargs)

    original, score = Sharing.teacher_pass, step_module.score
    monkeypatch.setattr(Sharing, "teacher_pass", watched_pass)
    monkeypatch.setattr(step_module, "score", watched_score)
    trainer = make_trainer(activation_checkpointing=True)
    batch = mixed_batch(trainer)
    checkpoint_activations(trainer.model)
    step(trainer, batch)
    assert len(storages) == 4 and alive == [0]
    assert not records[0].keys and not records[0].values

    monkeypatch.setattr(SharedKV, "release", lambda self: None)
    storages.clear()
    step(trainer, batch)
    assert alive[1] == 4, "kept on purpose, they must be found alive"


def _implementations(*models: PreTrainedModel) -> list[str]:
    return [
        module.config._attn_implementation
        for model in models
        for module in model.modules()
        if hasattr(module, "config")
    ]


@pytest.mark.parametrize(
    ("kv_sharing", "attn_implementation"), [*((mode, "sdpa") for mode in KV_SHARING_MODES), ("prompt", "eager")]
)
def test_step_leaves_no_trace_in_the_models_even_when_it_raises(
    make_trainer: MakeTrainer, kv_sharing: str, attn_implementation: str
) -> None:
    student = tiny.make_vlm(0)
    student.set_attn_implementation(attn_implementation)
    trainer = make_trainer(model=student, kv_sharing=kv_sharing)
    teacher = trainer.teacher.model
    batch = mixed_batch(trainer)
    before = _implementations(student, teacher)
    assert attn_implementation in before
    during: list[str] = []

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (*student.modules(), *teacher.modules())]

    hooks_before = hooks()

    def broken(module: nn.Module, *_: Any) -> None:
        during.extend([student.get_decoder().config._attn_implementation, teacher.config._attn_implementation])
        raise RuntimeError("on purpose")

    expected, _ = step(trainer, batch)
    assert _implementations(student, teacher) == before and hooks() == hooks_before
    for layer in (student.get_decoder().layers[1], teacher.model.layers[1]):
        hook = layer.register_forward_hook(broken)
        with pytest.raises(RuntimeError, match="on purpose"):
            step(trainer, batch)
        hook.remove()
        assert _implementations(student, teacher) == before and hooks() == hooks_before
        assert "forward" not in vars(teacher.model.rotary_emb)
    assert any(name.startswith("lingudistill_record") for name in during), "it must have been switched"
    assert any(name == "lingudistill_replay" for name in during) == (kv_sharing != "none")
    assert step(trainer, batch)[0] == expected


def test_generation_and_plain_forwards_of_the_student_are_untouched(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    batch = mixed_batch(trainer)
    inputs = {name: batch[name][:, :30] for name in ("input_ids", "attention_mask")} | {
        name: batch[name] for name in ("pixel_values", "pixel_attention_mask")
    }
    plain, student = tiny.make_vlm(0), trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(student(**inputs).logits, plain(**inputs).logits)
        ours = student.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(ours, plain.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert ours.shape[1] > inputs["input_ids"].shape[1]


# --------------------------------------------------------------------------------------------------------------------
# Checkpointing, adapters, quantisation, precision
# --------------------------------------------------------------------------------------------------------------------
class FirstGradients(TrainerCallback):
    """Keeps the gradients that the first optimizer step uses, and how often the first decoder layer ran."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}
        self.layer_calls = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        # Not on the layer itself: its own forward is what checkpointing calls again, without its hooks
        plain.get_decoder().layers[0].self_attn.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.layer_calls += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.gradients:
            self.gradients = gradients_of(model)


CHECKPOINTING = {
    "off": {"activation_checkpointing": False},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kv_sharing", ["prompt", "vision"])
def test_checkpointing_changes_no_gradient(make_trainer: MakeTrainer, kv_sharing: str, adapter: bool) -> None:
    results = {}
    for name, settings in CHECKPOINTING.items():
        first = FirstGradients()
        arguments = {"callbacks": [first], "peft_config": _lora() if adapter else None, **copy.deepcopy(settings)}
        make_trainer(kv_sharing=kv_sharing, **arguments).train()
        results[name] = first
    expected = results.pop("off")
    assert expected.layer_calls == 1
    for name, result in results.items():
        assert result.layer_calls == 2, f"{name}: nothing was recomputed"
        assert difference(result.gradients, expected.gradients) < TOLERANCE, name


def _lora(**kwargs: Any) -> LoraConfig:
    # With B at zero, as PEFT starts by default, A has no gradient
    return LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], init_lora_weights=False, **kwargs
    )


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["adapters", "adapters and head"])
def test_lora_trains_only_adapters_with_the_gradients_of_the_reference(
    make_trainer: MakeTrainer, modules_to_save: list[str] | None
) -> None:
    tied = modules_to_save is None
    trainer = make_trainer(
        model=tiny.make_vlm(0, tie_word_embeddings=tied), peft_config=_lora(modules_to_save=modules_to_save)
    )
    batch = mixed_batch(trainer)
    other = get_peft_model(tiny.make_vlm(0, tie_word_embeddings=tied), _lora(modules_to_save=modules_to_save))
    other.load_state_dict(trainer.model.state_dict())
    loss, gradients = step(trainer, batch)
    expected, expected_gradients = reference_step(other.train(), batch, student=other.get_base_model())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert difference(gradients, expected_gradients) < TOLERANCE
    trained = {name for name, gradient in gradients.items() if gradient is not None}
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)

    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= trained
    plain = tiny.make_vlm(0, tie_word_embeddings=tied).train()
    assert reference(plain, batch).loss.item() != pytest.approx(loss, rel=1e-3), "the adapters must matter"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there bitsandbytes puts the student on the accelerator")
def test_qlora_on_cpu_changes_adapters_only(make_trainer: MakeTrainer, saved_pair: Any, cpu_mode: str) -> None:
    student, teacher = map(str, saved_pair)
    trainer = make_trainer(
        model=student,
        teacher_model=teacher,
        teacher_quantization="nf4",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=_lora(),
        learning_rate=1.0,  # bf16 adapters: a smaller step may round to none
        max_steps=2,
        activation_checkpointing=True,
    )
    assert trainer.model.get_base_model().is_loaded_in_4bit and trainer.teacher.model.is_loaded_in_4bit
    packed = [p for p in trainer.model.parameters() if p.dtype == torch.uint8]
    assert packed, "no weight was quantised"
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logs = trainer.state.log_history[1]
    assert logs["kd_loss"] > 0 and logs["loss"] > 0
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_teacher_is_close_to_the_whole_one_and_its_cost_is_measured(
    make_trainer: MakeTrainer, saved_pair: Any, quantization: str, cpu_mode: str
) -> None:
    arguments = {
        "teacher_model": str(saved_pair[1]),
        "measure_teacher_quantization": True,
        "distill_tokens": "all",
        "train_sampling_strategy": "sequential",
    }
    quantised = make_trainer(teacher_quantization=quantization, **arguments)
    whole = make_trainer(teacher_quantization="none", **arguments)
    assert quantised.teacher.footprint < whole.teacher.footprint
    quantised.train()
    whole.train()
    kl, none = (t.state.log_history[0]["teacher_quantization_kl"] for t in (quantised, whole))
    assert none == 0.0 < kl < 1.0
    assert quantised.state.log_history[0]["kd_loss"] == pytest.approx(whole.state.log_history[0]["kd_loss"], rel=0.25)
    assert quantised.state.log_history[0]["kd_loss"] != whole.state.log_history[0]["kd_loss"]


@pytest.mark.parametrize("case", ["autocast", "bf16 student", "bf16 teacher"])
@pytest.mark.parametrize("kv_sharing", ["prompt", "none"])
def test_bf16_is_close_to_fp32(make_trainer: MakeTrainer, kv_sharing: str, case: str) -> None:
    settings: dict[str, Any] = {"distill_tokens": "all", "kv_sharing": kv_sharing}
    exact = make_trainer(**settings)
    exact.train()
    if case == "autocast":
        rough = make_trainer(bf16=True, **settings)
    elif case == "bf16 student":
        rough = make_trainer(model=tiny.make_vlm(0).to(torch.bfloat16), **settings)
    else:
        rough = make_trainer(teacher_model=tiny.make_lm(1).to(torch.bfloat16), **settings)
    rough.train()
    ours, theirs = rough.state.log_history[0], exact.state.log_history[0]
    for name in ("loss", "kd_loss", "student_ce", "teacher_ce"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.02), name
    assert ours["kd_loss"] != theirs["kd_loss"], "nothing was computed in bf16"


# --------------------------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------------------------
METRICS = {
    "ce_loss",
    "kd_loss",
    "distilled_tokens",
    "teacher_ce",
    "student_ce",
    "teacher_agreement",
    "teacher_entropy",
    "confident_share",
}


def test_metrics_are_token_means_over_micro_batches_of_unequal_size(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, train_sampling_strategy="sequential"
    )
    rows = tiny.make_rows(4)
    parts = [reference(tiny.make_vlm(0), mixed_batch(trainer, rows[i : i + 2])) for i in (0, 2)]
    assert parts[0].labels != parts[1].labels and len(parts[0].gate) != len(parts[1].gate)

    trainer.train()
    logs = trainer.state.log_history[0]

    def total(name: str) -> float:
        return sum(getattr(part, name) for part in parts)

    labels, offered = total("labels"), sum(len(part.gate) for part in parts)
    distilled = sum(sum(part.gate) for part in parts)
    expected = {
        "ce_loss": total("ce") / labels,
        "kd_loss": total("kd") / distilled,
        "distilled_tokens": distilled,
        "teacher_ce": total("teacher_ce") / offered,
        "student_ce": total("student_ce") / offered,
        "teacher_agreement": total("agreement") / offered,
        "teacher_entropy": total("teacher_entropy") / offered,
        "confident_share": distilled / offered,
        "loss": sum(part.loss.item() * part.labels for part in parts) / labels,
    }
    assert {name: logs[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < logs["confident_share"] < 1
    mean_of_means = sum(part.ce / part.labels for part in parts) / 2
    assert abs(mean_of_means - logs["ce_loss"]) > 1e-3, "a mean of means must be told apart"


def test_metrics_start_anew_after_each_log_and_span_the_steps_between(make_trainer: MakeTrainer) -> None:
    common = {"max_steps": 4, "train_sampling_strategy": "sequential", "learning_rate": 0.0}
    each, pairs = make_trainer(logging_steps=1, **common), make_trainer(logging_steps=2, **common)
    each.train()
    pairs.train()
    singles = [log["distilled_tokens"] for log in each.state.log_history if "distilled_tokens" in log]
    doubles = [log["distilled_tokens"] for log in pairs.state.log_history if "distilled_tokens" in log]
    assert len(singles) == 4 and doubles == [singles[0] + singles[1], singles[2] + singles[3]]


def test_steps_without_marked_rows_log_no_teacher_metrics(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(per_device_train_batch_size=1, max_steps=2, train_sampling_strategy="sequential")
    trainer.train()
    image_row, text_row = trainer.state.log_history[:2]
    assert METRICS & set(image_row) == {"ce_loss", "distilled_tokens"} and image_row["distilled_tokens"] == 0
    assert set(text_row) >= METRICS and text_row["distilled_tokens"] > 0


def test_trainer_is_an_sft_trainer_with_tags_of_its_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    assert isinstance(trainer, SFTTrainer) and type(trainer) is LinguDistillTrainer
    assert {"lingudistill", "trl"} <= set(trainer.model.model_tags)


def test_a_prefix_lm_is_trained_on_answers_that_it_does_not_see(make_trainer):
    """A PaliGemma student whose collator gives no token types: its CE must not know the answer's next token."""
    sizes = {
        "vocab_size": len(tiny.make_tokenizer(extra=True)),
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
    }
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    vision = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    image_token = tiny.make_vlm(0).config.image_token_id
    config = PaliGemmaConfig(vision_config=vision, text_config=GemmaConfig(**sizes), image_token_index=image_token)
    torch.manual_seed(0)
    student = PaliGemmaForConditionalGeneration(config)
    rows = [row for row in tiny.make_dataset(16) if not row["images"]]
    dataset = Dataset.from_list([{name: row[name] for name in ("prompt", "completion", "distill")} for row in rows])
    trainer = make_trainer(
        model=student,
        teacher_model=GemmaForCausalLM(GemmaConfig(**sizes | {"vocab_size": len(tiny.make_tokenizer(extra=False))})),
        train_dataset=dataset,
        processing_class=tiny.make_tokenizer(extra=True),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    first = (batch["labels"] != -100).int().argmax(dim=1)
    assert [row.tolist().index(1) for row in batch["token_type_ids"]] == first.tolist()
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert not make_trainer(output_dir=str(trainer.args.output_dir) + "_2").data_collator.prefix_lm


@pytest.mark.parametrize("name", step_mixin.MADE_OF)
def test_an_option_of_the_step_that_is_changed_too_late_is_refused(make_trainer: MakeTrainer, name: str) -> None:
    trainer = make_trainer()
    batch = mixed_batch(trainer)
    step(trainer, batch)  # control
    trainer.args.logging_steps += 1  # nor does another option matter
    step(trainer, batch)
    setattr(trainer.args, name, "another")
    with pytest.raises(ValueError, match=f"args.{name} was .* and is 'another' now"):
        step(trainer, batch)


@pytest.mark.parametrize("left", [{}, {"freeze_vision": None}, {"kv_sharing": "vision", "kv_source": None}])
def test_what_is_left_to_the_pair_leaves_the_options_the_callers(
    make_trainer: MakeTrainer, left: dict[str, Any]
) -> None:
    """What is set on them afterwards is the trainer's as well, as in transformers, or refused."""
    options: LinguDistillConfig = make_trainer(**left).args
    pissa = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    models = {"processing_class": tiny.make_processor(), "teacher_tokenizer": tiny.make_tokenizer(extra=False)}
    trainer = LinguDistillTrainer(
        tiny.make_vlm(0),
        options,
        teacher_model=tiny.make_lm(1),
        train_dataset=tiny.make_dataset(8),
        peft_config=pissa,
        **models,
    )
    assert trainer.args is options
    asked = {name: getattr(options, name) for name in left}
    assert set(asked.values()) <= {None, "vision", "before"} and None not in trainer.decided.values()
    options.max_steps = 1
    trainer.train()
    assert trainer.state.global_step == 1
    options.ce_weight += 0.25
    with pytest.raises(ValueError, match=r"args.ce_weight was .* when the trainer was made"):
        step(trainer, mixed_batch(trainer))


def test_what_a_callback_logs_takes_none_of_the_trainers_sums(make_trainer: MakeTrainer) -> None:
    """And asks no other process: one that logs on the first alone, as plain trainers may, would wait for ever."""
    trainer = make_trainer(max_steps=2, logging_steps=2)

    class Own(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            read, trainer.meter.read = trainer.meter.read, lambda **_: pytest.fail("the meter was read")
            trainer.log({"mine": 1.0})
            trainer.meter.read = read

    trainer.add_callback(Own())
    trainer.train()
    plain = make_trainer(max_steps=2, logging_steps=2)
    plain.train()
    ours, theirs = (next(log for log in t.state.log_history if "loss" in log) for t in (trainer, plain))
    assert ours["ce_loss"] == theirs["ce_loss"] and ours["answer_tokens"] == theirs["answer_tokens"]
    assert [log["mine"] for log in trainer.state.log_history if "mine" in log] == [1.0, 1.0]


def test_options_of_two_trainers_give_way_in_one_of_them_alone(make_trainer: MakeTrainer) -> None:
    made = make_trainer(kv_sharing="vision", kv_source=None)
    args: LinguDistillConfig = made.args
    models = {"processing_class": tiny.make_processor(), "teacher_tokenizer": tiny.make_tokenizer(extra=False)}

    def trainer(**more: Any) -> LinguDistillTrainer:
        data = tiny.make_dataset(4)
        return LinguDistillTrainer(
            tiny.make_vlm(0), args, teacher_model=tiny.make_lm(1), train_dataset=data, **models, **more
        )

    first = trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    second = trainer()
    assert (first.decided["kv_source"], second.decided["kv_source"], args.kv_source) == ("student", "before", "before")
    for one in (second, first, second):
        step(one, mixed_batch(one))  # neither is told that its options were changed


def test_a_prediction_before_an_evaluation_adds_nothing_to_it(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(eval_dataset=tiny.make_dataset(4))
    first = trainer.evaluate()
    trainer.predict(tiny.make_dataset(8, images=True))
    again = trainer.evaluate()
    names = [name for name in first if name.startswith("eval_") and "runtime" not in name and "per_second" not in name]
    assert {name: again[name] for name in names} == pytest.approx({name: first[name] for name in names})


def test_a_compiled_teacher_is_the_teacher(make_trainer: MakeTrainer) -> None:
    compiled = make_trainer(teacher_model=torch.compile(tiny.make_lm(1), backend="eager"))
    plain = make_trainer()
    assert step(compiled, mixed_batch(compiled))[0] == pytest.approx(step(plain, mixed_batch(plain))[0])


@pytest.mark.parametrize("other", ["ours", "TRL's"])
def test_a_student_that_another_trainer_has_taken_over_trains_nothing_else_in_silence(
    make_trainer: MakeTrainer, tmp_path: Path, other: str
) -> None:
    model = tiny.make_vlm(0)
    first = make_trainer(model=model)
    batch = mixed_batch(first)
    loss, _ = step(first, batch)
    if other == "ours":
        second = make_trainer(model=model, ce_weight=0.0)
        assert step(second, batch)[0] != pytest.approx(loss)  # control: the newest trainer has the student
    else:
        SFTTrainer(model, SFTConfig(str(tmp_path / "sft"), use_cpu=True, bf16=False, report_to="none"),
                   train_dataset=tiny.make_dataset(8).remove_columns("distill"), processing_class=tiny.make_processor())  # fmt: skip
    with pytest.raises(ValueError, match="another trainer was made with the same student"):
        step(first, batch)
