"""A teacher that reads answers about pictures twice: against the definition, and where it reads once all the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_caches import alike, trainer_of
from test_kv_source import twin
from test_losses import BETAS, difference, gradients, make_problem, reference_divergence
from test_losses import difference as far
from test_trainer import (
    TOLERANCE,
    candidates,
    counted,
    generalised_jsd,
    gradients_of,
    mixed_batch,
    step,
    teacher_logits,
)
from test_trainer import difference as gradients_differ
from tiny import moved

from hf_lingudistill import LinguDistillConfig, OnPolicyLinguDistillConfig
from hf_lingudistill.losses import Weights, score
from hf_lingudistill.row_cache import StaleCache
from hf_lingudistill.sharing import MODES

MakeTrainer = Callable[..., Any]


# --------------------------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("blind", [0.5, 0.2])
@pytest.mark.parametrize("beta", BETAS)
def test_the_teacher_says_the_mixture_of_its_two_readings(beta: float, blind: float, temperature: float) -> None:
    problem, N = make_problem(), make_problem().count
    second = torch.randn_like(problem.teacher_hidden)
    weights = Weights(beta=beta, temperature=temperature, blind=blind, cross_entropy=0.3)

    def ours(readings: torch.Tensor) -> Any:
        return score(problem.hidden, problem.head, problem.labels, readings, problem.teacher_head, weights)

    def mixed(T: float) -> torch.Tensor:
        both = [
            F.softmax(hidden.double() @ problem.teacher_head.matrix.double().T / T, dim=-1)
            for hidden in (problem.teacher_hidden, second)
        ]
        return ((1 - blind) * both[0] + blind * both[1]).log()

    found = ours(torch.stack([problem.teacher_hidden, second], dim=1))
    log_p = F.log_softmax(problem.logits, dim=-1)
    ce = -log_p.gather(1, problem.labels[:, None])[:, 0]
    # Log-probabilities that are divided by T and normalised again are not those of the mixture of softened readings
    kd = reference_divergence(problem.logits[:N] / temperature, mixed(temperature), beta)
    expected = torch.cat([0.3 * ce[:N] + kd, ce[N:]])
    assert difference(found.loss, expected) < 1e-5
    wanted = gradients(expected, problem)
    for actual, target in zip(gradients(found.total, problem), wanted, strict=True):
        assert difference(actual, target) < 3e-4
    sharp = mixed(1.0)
    assert difference(found.teacher_log_prob, sharp.gather(1, problem.labels[:N, None])[:, 0]) < 1e-5
    assert difference(found.teacher_entropy, -(sharp.exp() * sharp).sum(dim=-1)) < 1e-5
    # Controls: either reading alone, and one reading twice, which is that reading
    for alone in (problem.teacher_hidden, second):
        assert far(ours(alone).loss[:N], expected[:N]) > 1e-2
    twice = torch.stack([second, second], dim=1)
    assert difference(ours(twice).loss, ours(second).loss) < 1e-6


# --------------------------------------------------------------------------------------------------------------------
# The step
# --------------------------------------------------------------------------------------------------------------------
def expected_loss(model: Any, source: Any, batch: Any, mode: str, blind: float, temperature: float = 1.0) -> Any:
    """The mean token loss by its definition: `distill_tokens` all, `ce_weight` .5."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "distill", "queries")}
    logits, labels = model(**inputs).logits.double(), batch["labels"]
    V = logits.shape[-1]
    sees, alone = (teacher_logits(tiny.make_lm(1), source, batch, name, V) for name in (mode, "none"))
    places = {place: index for index, place in enumerate(candidates(batch))}
    has_image = (batch["input_ids"] == model.config.image_token_id).any(dim=1)  # not any token of the VLM's own
    total, count = torch.zeros(()).double(), 0
    for b, t in (labels[:, 1:] != -100).nonzero().tolist():
        ce = -logits[b, t].log_softmax(dim=-1)[labels[b, t + 1]]
        count += 1
        if (b, t) not in places:
            total = total + ce
            continue
        says = (sees[places[b, t]] / temperature).softmax(dim=-1)
        if has_image[b]:
            says = (1 - blind) * says + blind * (alone[places[b, t]] / temperature).softmax(dim=-1)
        kd = generalised_jsd((logits[b, t] / temperature).log_softmax(dim=-1), says.log(), 0.0)
        total = total + 0.5 * ce + kd
    return total / count


@pytest.mark.parametrize("source", ["before", "student"])
@pytest.mark.parametrize("mode", ["vision", "prompt", "full", "inputs"])
def test_loss_and_gradients_are_those_of_the_mixture(make_trainer: MakeTrainer, mode: str, source: str) -> None:
    given = {"kv_sharing": mode, "kv_source": source, "distill_tokens": "all", "temperature": 1.3}
    trainer = moved(make_trainer(**given, blind_weight=0.4))
    batch = mixed_batch(trainer)
    other = twin(trainer)
    loss, found = step(trainer, batch)
    expected = expected_loss(other, tiny.make_vlm(0) if source == "before" else other, batch, mode, 0.4, 1.3)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert gradients_differ(found, gradients_of(other)) < TOLERANCE
    # Control: one reading
    once = moved(make_trainer(**given, blind_weight=0.0))
    its_loss, its_gradients = step(once, batch)
    assert its_loss != pytest.approx(loss, rel=1e-4) and gradients_differ(its_gradients, found) > 1e-3


def test_rows_of_text_are_read_once(make_trainer: MakeTrainer) -> None:
    trainer = moved(make_trainer(kv_sharing="vision", distill_tokens="all", blind_weight=0.5))
    batch = mixed_batch(trainer)
    plan = trainer.step.planner(batch)
    image = torch.isin(batch["input_ids"], torch.tensor(trainer.compatibility.image_token_ids)).any(dim=1)
    assert plan.blind is not None and plan.blind_loss is not None
    assert plan.blind.asked_rows.tolist() == (image & batch["distill"]).nonzero().flatten().tolist() != []
    assert len(plan.blind_loss) == plan.blind.num_loss < plan.num_loss
    assert plan.blind.num_queries < plan.num_queries
    decoder = trainer.teacher.model.model
    step(trainer, batch)  # the first batch is looked at once more
    with counted(decoder) as calls:
        step(trainer, batch)
    texts = mixed_batch(trainer, [row for row in tiny.make_rows(4) if not row["images"]])
    assert trainer.step.planner(texts).blind is None
    with counted(decoder) as of_text:
        step(trainer, texts)
    assert len(calls) == 2 * len(of_text) == 2


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_a_text_with_a_word_of_the_vlms_own_has_no_image(
    make_trainer: MakeTrainer, tmp_path: Path, cached: bool
) -> None:
    given = {"kv_sharing": "vision", "kv_source": "before", "teacher_cache": cached}
    trainer = trainer_of(make_trainer, tmp_path / "twice", blind_weight=0.5, **given)
    once = trainer_of(make_trainer, tmp_path / "once", blind_weight=0.0, **given)
    rows = [row for row in trainer.train_dataset if row["distill"]]
    batch = trainer.data_collator(rows)
    plan, image = batch["queries"], torch.tensor([bool(row["images"]) for row in rows])
    own = ~image & ~plan.text_only
    assert own.any() and image.any()  # such a text is there, and images are
    assert plan.has_image.tolist() == image.tolist()
    assert plan.blind.asked_rows.tolist() == image.nonzero().flatten().tolist()
    texts = [row for row, seen in zip(rows, image.tolist(), strict=True) if not seen]
    losses = [step(one, one.data_collator([dict(row) for row in texts]))[0] for one in (trainer, once)]
    assert losses[0] == losses[1]
    # Control: rows with an image are told something else
    seen = [row for row, has in zip(rows, image.tolist(), strict=True) if has]
    losses = [step(one, one.data_collator([dict(row) for row in seen]))[0] for one in (trainer, once)]
    assert abs(losses[0] - losses[1]) > 1e-5


def test_without_images_it_is_said_to_change_nothing(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(kv_sharing="vision", blind_weight=0.5)
    assert "blind_weight" not in caplog.text
    make_trainer(kv_sharing="vision", blind_weight=0.5, train_dataset=tiny.make_dataset(8, images=False))
    assert "blind_weight=0.5 changes nothing: the training set has no images." in caplog.text


def test_the_plan_is_made_by_the_collator_and_travels_whole(make_trainer: MakeTrainer) -> None:
    trainer = moved(make_trainer(kv_sharing="vision", distill_tokens="all", blind_weight=0.5))
    rows = tiny.make_rows(4)
    rows[0]["distill"] = True
    batch = dict(trainer.data_collator(rows))
    moved_plan = batch["queries"].to("cpu")
    assert moved_plan.blind.rows.equal(batch["queries"].blind.rows)
    loss, found = step(trainer, {**batch, "queries": moved_plan})
    del batch["queries"]
    again, theirs = step(trainer, batch)
    assert loss == again and gradients_differ(found, theirs) == 0.0
    elsewhere = moved_plan.to("meta")
    assert {part.device.type for part in (elsewhere.rows, elsewhere.blind.rows, elsewhere.blind_loss)} == {"meta"}


@pytest.mark.parametrize("source", ["before", "student"])
def test_cached_answers_are_both_readings(make_trainer: MakeTrainer, tmp_path: Path, source: str) -> None:
    """Those of the VLM before: of all rows. Of the student: of rows of text, which are read once, beside live ones that are read twice."""
    given = {"kv_sharing": "vision", "kv_source": source, "blind_weight": 0.4}
    live = trainer_of(make_trainer, tmp_path / "live", **given)
    cached = trainer_of(make_trainer, tmp_path / "kept", teacher_cache=True, **given)
    assert alike(cached, live)
    # What is kept does not hang on the weight, but a cache of one reading is another
    where = {"cache_dir": str(tmp_path / "kept" / "caches"), "teacher_cache": True}
    other = trainer_of(make_trainer, tmp_path / "other", **where, **{**given, "blind_weight": 0.7})
    assert alike(other, trainer_of(make_trainer, tmp_path / "live7", **{**given, "blind_weight": 0.7}))
    assert not alike(other, live)
    with pytest.raises(StaleCache, match="reads twice"):
        trainer_of(make_trainer, tmp_path / "once", **where, **{**given, "blind_weight": 0.0})


def test_the_judge_on_policy_reads_twice_too(tmp_path: Path) -> None:
    config = OnPolicyLinguDistillConfig(output_dir=str(tmp_path), blind_weight=0.3)
    assert config.blind_weight == 0.3 and OnPolicyLinguDistillConfig(output_dir=str(tmp_path)).blind_weight == 0.0


# --------------------------------------------------------------------------------------------------------------------
# The option
# --------------------------------------------------------------------------------------------------------------------
def test_left_out_it_follows_the_mode_and_rows_that_are_joined() -> None:
    for name, mode in MODES.items():
        assert LinguDistillConfig(output_dir="out", kv_sharing=name).blind_weight == mode.blind
        assert mode.blind == 0.0 or mode.reads_student
    assert LinguDistillConfig(output_dir="out", kv_sharing="vision", padding_free=True).blind_weight == 0.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"blind_weight": 1.0}, "below 1"),
        ({"blind_weight": -0.1}, "at least 0"),
        ({"blind_weight": math.nan}, "at least 0"),
        ({"blind_weight": True}, "must be a number"),
        ({"blind_weight": "half"}, "must be a number"),
        ({"blind_weight": 0.5, "kv_sharing": "none"}, "answers once"),
        ({"blind_weight": 0.5, "kv_sharing": "images"}, "answers once"),
        ({"blind_weight": 0.5, "padding_free": True}, "padding_free=True joins rows"),
        ({"blind_weight": 0.5, "packing": True}, "packing=True joins rows"),
    ],
)
def test_what_it_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LinguDistillConfig(output_dir="out", **given)
    kept = {name: value for name, value in given.items() if name != "blind_weight"}
    LinguDistillConfig(output_dir="out", **kept)  # control
