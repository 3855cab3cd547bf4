"""On-policy: what is sampled, who judges it, and the loss against two models in plain torch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import oracle
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from planning import KV_SHARING_MODES
from test_trainer import IMAGE_TOKEN, SHARED_VOCAB, TOLERANCE, Batch, difference, generalised_jsd, gradients_of

from hf_lingudistill import OnPolicyLinguDistillTrainer

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


def moved(trainer: Any) -> Any:
    """The trainer, its student another one than before."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return trainer


def two_models(
    model: Any,
    before: Any,
    batch: Batch,
    *,
    kv_sharing: str = "prompt",
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
            student or model,
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


# --------------------------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kv_sharing", "settings"),
    [
        *((mode, {}) for mode in KV_SHARING_MODES),
        ("vision", {"beta": 0.0}),
        ("prompt", {"beta": 0.3, "temperature": 1.7, "distill_weight": 0.6}),
    ],
    ids=str,
)
def test_loss_and_every_gradient_equal_two_models_in_plain_torch(
    make: Make, kv_sharing: str, settings: dict[str, float]
) -> None:
    rows = prompts()
    rows[2]["distill"] = True  # an image that the LM is asked about
    trainer = moved(make(train_dataset=rows, kv_sharing=kv_sharing, **settings))
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
