"""The VLM before as a second parent: its loss and gradients against two models in plain torch, and what it may not touch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_losses
import tiny
import torch
import torch.nn.functional as F
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from test_trainer import SHARED_VOCAB, TOLERANCE, Batch, counted, difference, gradients_of, mixed_rows, reference, step

from hf_lingudistill import LinguDistillConfig, losses
from hf_lingudistill._internals import Head
from hf_lingudistill.anchor import Before, _adapter_off_by_peft, adapter_off, evaluating, make_before
from hf_lingudistill.losses import Anchor, Weights, score
from hf_lingudistill.scripts.distill import end_summary, startup_summary

MakeTrainer = Callable[..., Any]
WEIGHT = 0.3


def make_batch(trainer: Any) -> Batch:
    """Distilled: an image row, and a text with a label that the teacher lacks. Not distilled: an image row and a text."""
    rows = mixed_rows()
    rows[3]["distill"] = False
    batch = dict(trainer.data_collator(rows))
    del batch["queries"]
    return batch


def anchored_places(batch: Batch) -> list[tuple[int, int]]:
    labels = batch["labels"]
    return [
        (b, t)
        for b, t in itertools.product(range(labels.shape[0]), range(labels.shape[1] - 1))
        if labels[b, t + 1] != -100 and not batch["distill"][b]
    ]


def two_models(
    model: Any, before: Any, batch: Batch, weight: float, student: Any = None
) -> tuple[torch.Tensor, float]:
    """The loss, token by token in float64, and the mean KL(before || student) of anchored tokens."""
    whole = reference(model, batch, student=student)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "distill")}
    log_p = model(**inputs).logits.double().log_softmax(dim=-1)
    with torch.no_grad():
        log_b = before(**inputs).logits.double().log_softmax(dim=-1)
    loss, kls, places = whole.loss * whole.labels, [], anchored_places(batch)
    for b, t in places:
        kls.append((log_b[b, t].exp() * (log_b[b, t] - log_p[b, t])).sum())
        loss = loss + weight * (kls[-1] + log_p[b, t, batch["labels"][b, t + 1]])
    return loss / whole.labels, sum(kl.item() for kl in kls) / len(places)


def lora(**kwargs: Any) -> LoraConfig:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, **kwargs}
    return LoraConfig(**settings)


# --------------------------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------------------------
def test_loss_and_every_gradient_equal_two_models_in_plain_torch(make_trainer: MakeTrainer) -> None:
    trainer = tiny.moved(make_trainer(anchor="before", anchor_weight=WEIGHT))
    batch = make_batch(trainer)
    marked = [b for b in range(4) if batch["distill"][b]]
    assert any(reference(trainer.model, batch).gate) and len(anchored_places(batch)) > 5
    assert (batch["labels"][marked] >= SHARED_VOCAB).any(), "a marked row must have a label that is not distilled"
    other = copy.deepcopy(tiny.make_vlm(0)).train()
    other.load_state_dict(trainer.model.state_dict())
    loss, gradients = step(trainer, batch)
    expected, kl = two_models(other, tiny.make_vlm(0), batch, WEIGHT)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert difference(gradients, gradients_of(other)) < TOLERANCE
    assert kl > 0.01
    metrics = log_of(trainer)
    assert metrics["anchor_kl"] == pytest.approx(kl, rel=1e-5)
    assert metrics["anchored_tokens"] == len(anchored_places(batch))
    # Control: another model as anchor, and another weight
    for change in ("anchor", "weight"):
        control = tiny.moved(make_trainer(anchor="before", anchor_weight=WEIGHT if change == "anchor" else 0.6))
        if change == "anchor":
            vlm = tiny.make_vlm(7)
            control.step.judge = make_before(vlm, vlm, torch.float32)
        its_loss, its_gradients = step(control, batch)
        assert its_loss != pytest.approx(loss, rel=1e-3) and difference(its_gradients, gradients) > 1e-2


def log_of(trainer: Any) -> dict[str, float]:
    trainer.meter.accepted()
    return trainer.meter.read(training=True)


def test_an_unchanged_student_is_at_zero_and_pulled_nowhere(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(anchor="before", anchor_weight=1.0)
    batch = make_batch(trainer)
    batch["distill"] = torch.zeros_like(batch["distill"])
    loss, gradients = step(trainer, batch)
    assert abs(loss) < 1e-6 and abs(log_of(trainer)["anchor_kl"]) < 1e-6
    assert max(float(g.abs().max()) for g in gradients.values() if g is not None) < 1e-5
    # Control: a changed one
    changed, its_gradients = step(tiny.moved(trainer), batch)
    assert changed > 0.01 and max(float(g.abs().max()) for g in its_gradients.values() if g is not None) > 1e-2


def test_weight_zero_and_none_train_alike_bit_for_bit(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """And weight zero measures: that is what it is for."""
    runs = {}
    for name, settings in {
        "none": {},
        "zero": {"anchor": "before", "anchor_weight": 0.0},
        "half": {"anchor": "before"},
    }.items():
        trainer = make_trainer(max_steps=3, output_dir=str(tmp_path / name), **settings)
        trainer.train()
        runs[name] = trainer
    none, zero, half = (list(runs[name].model.parameters()) for name in ("none", "zero", "half"))
    assert all(torch.equal(a, b) for a, b in zip(none, zero, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(none, half, strict=True))
    logs = {name: [log for log in run.state.log_history if "ce_loss" in log] for name, run in runs.items()}
    assert [log["loss"] for log in logs["none"]] == [log["loss"] for log in logs["zero"]]
    assert runs["none"].before is None and not any("anchor_kl" in log for log in logs["none"])
    assert logs["zero"][0]["anchor_kl"] == pytest.approx(0, abs=1e-6) and logs["zero"][-1]["anchor_kl"] > 1e-4
    assert logs["half"][-1]["anchor_kl"] < logs["zero"][-1]["anchor_kl"], "the anchor must hold the student back"


@pytest.mark.parametrize("elements", [37, 37 * 2, 2**25], ids=["a row", "two rows", "one chunk"])
@pytest.mark.parametrize("count", [0, 3], ids=["no teacher", "a teacher"])
def test_in_chunks_with_bias_scale_and_softcap(elements: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK", elements)
    problem = test_losses.make_problem((8, count, 37, 8, 6), bias=True, scales=(0.5, 1.0), softcaps=(9.0, None))
    head = Head(torch.randn(37, 5), torch.randn(37), 0.5, 9.0)
    asked = torch.arange(8 - count) % 3 != 1
    anchor = Anchor(torch.randn(8 - count, 5), head, asked)
    weights = Weights(anchor=WEIGHT)
    said = score(
        problem.hidden,
        problem.head,
        problem.labels,
        problem.teacher_hidden,
        problem.teacher_head,
        weights,
        anchor=anchor,
    )
    plain = test_losses.reference(problem, weights)
    log_p = problem.logits[count:].log_softmax(dim=-1)
    log_b = test_losses.reference_logits(anchor.hidden, head).log_softmax(dim=-1)
    kl = F.kl_div(log_p, log_b, log_target=True, reduction="none").sum(-1)
    held = (1 - WEIGHT) * plain[count:] + WEIGHT * kl
    expected = torch.cat([plain[:count], torch.where(asked, held, plain[count:])])
    assert test_losses.difference(said.loss, expected) < 1e-5
    assert torch.allclose(said.anchor_kl.double(), torch.where(asked, kl, 0.0), rtol=1e-4)
    assert torch.equal(said.anchored, asked)
    for got, wanted in zip(
        test_losses.gradients(said.total, problem), test_losses.gradients(expected, problem), strict=True
    ):
        assert test_losses.difference(got, wanted) < 3e-4


# --------------------------------------------------------------------------------------------------------------------
# Which model it is
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["adapters", "adapters and head"])
def test_an_adapters_base_answers_as_a_copy_of_the_same_weights(
    make_trainer: MakeTrainer, modules_to_save: list[str] | None
) -> None:
    """With dropout, of which the VLM before has none: neither path draws a random number."""
    tied = modules_to_save is None

    def make() -> Any:
        trainer = make_trainer(
            model=tiny.make_vlm(0, tie_word_embeddings=tied, attention_dropout=0.3),
            peft_config=lora(lora_dropout=0.3, modules_to_save=modules_to_save),
            anchor="before",
            anchor_weight=WEIGHT,
        )
        return tiny.moved(trainer)

    ours, theirs = make(), make()
    theirs.model.load_state_dict(ours.model.state_dict())
    assert ours.before.footprint == 0 and ours.before.model is ours.step.student
    plain = tiny.make_vlm(0, tie_word_embeddings=tied)
    theirs.step.judge = Before(plain, nullcontext, 0)
    batch, results = make_batch(ours), []
    for trainer in (ours, theirs):
        torch.manual_seed(5)
        results.append((*step(trainer, batch), log_of(trainer)["anchor_kl"]))
    (loss, gradients, kl), (other_loss, other_gradients, other_kl) = results
    assert loss == pytest.approx(other_loss, rel=1e-7) and kl == pytest.approx(other_kl, rel=1e-6)
    assert difference(gradients, other_gradients) < TOLERANCE
    assert kl > 0.01, "the adapter must matter"
    # Control: the adapter left on
    ours.step.judge = Before(ours.step.student, nullcontext, 0)
    step(ours, batch)
    assert log_of(ours)["anchor_kl"] < 0.9 * kl


def test_lora_equals_two_models_in_plain_torch(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(peft_config=lora(), anchor="before", anchor_weight=WEIGHT)
    batch = make_batch(trainer)
    other = get_peft_model(tiny.make_vlm(0), lora()).train()
    other.load_state_dict(trainer.model.state_dict())
    loss, gradients = step(trainer, batch)
    expected, kl = two_models(other, tiny.make_vlm(0), batch, WEIGHT, student=other.get_base_model())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6) and kl > 0.01
    assert difference(gradients, gradients_of(other)) < TOLERANCE


def test_asking_leaves_modes_and_frozen_adapters_as_they_were(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(peft_config=lora(), anchor="before")
    batch = make_batch(trainer)
    trainer.model.train()
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_B" in name)
    trainer.model.base_model.model.model.vision_model.eval()

    def state() -> Any:
        modes = [module.training for module in trainer.model.modules()]
        return modes, [parameter.requires_grad for parameter in trainer.model.parameters()]

    found = state()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    assert state() == found and True in found[1]
    trainer.step.student.base_model.register_forward_hook(fails_once := FailsOnce())
    with pytest.raises(KeyboardInterrupt):
        trainer.compute_loss(trainer.model, dict(batch))
    assert fails_once.failed and state() == found


class FailsOnce:
    failed = False

    def __call__(self, *_: Any) -> None:
        if not self.failed:
            self.failed = True
            raise KeyboardInterrupt


def test_the_copy_is_frozen_apart_and_in_the_dtype_that_the_student_computes_in(make_trainer: MakeTrainer) -> None:
    for bf16 in (False, True):
        trainer = make_trainer(anchor="before", bf16=bf16)
        frozen, student = trainer.before.model, trainer.model
        assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16 if bf16 else torch.float32}
        assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
        assert frozen.get_output_embeddings().weight is frozen.get_input_embeddings().weight
        assert not {p.data_ptr() for p in frozen.parameters()} & {p.data_ptr() for p in student.parameters()}
        size = sum(p.numel() for p in student.parameters())
        assert trainer.before.footprint == size * (2 if bf16 else 4)
        kept = [p.clone() for p in frozen.parameters()]
        trainer.train()
        assert all(torch.equal(a, b) for a, b in zip(kept, frozen.parameters(), strict=True))
        log = next(log for log in trainer.state.log_history if "anchor_kl" in log)
        assert abs(log["anchor_kl"]) < (0.02 if bf16 else 1e-6)


def test_one_that_is_read_and_never_speaks_has_no_head_of_its_own(make_trainer: MakeTrainer) -> None:
    """Loss and gradients bit for bit those of a whole copy."""
    settings: dict[str, Any] = {"kv_sharing": "vision", "kv_source": "before"}
    for anchor in ("none", "before"):
        pair = [
            tiny.moved(make_trainer(model=tiny.make_vlm(0, tie_word_embeddings=False), anchor=anchor, **settings))
            for _ in range(2)
        ]
        ours, theirs = pair
        whole = tiny.make_vlm(0, tie_word_embeddings=False)
        theirs.before = make_before(whole, whole, torch.float32)
        assert theirs.before.footprint == whole.num_parameters() * 4
        theirs.step.source, theirs.step.judge = theirs.before, theirs.before if anchor == "before" else None
        head = ours.before.model.get_output_embeddings().weight
        assert head.is_meta == (anchor == "none")
        left_out = head.numel() if anchor == "none" else 0
        assert ours.before.footprint == 4 * (whole.num_parameters() - left_out)
        (loss, gradients), (other_loss, other_gradients) = (step(trainer, make_batch(ours)) for trainer in pair)
        assert loss == other_loss and difference(gradients, other_gradients) == 0.0
    # Control: a head that the embeddings are cannot be left out
    assert not make_trainer(anchor="none", **settings).before.model.get_output_embeddings().weight.is_meta


def test_it_is_asked_only_about_batches_with_unmarked_rows(make_trainer: MakeTrainer, caplog: Any) -> None:
    trainer = make_trainer(anchor="before")
    batch = make_batch(trainer)
    with counted(trainer.before.model.base_model) as calls:
        step(trainer, batch)
        assert len(calls) == 1
        step(trainer, {**batch, "distill": torch.ones_like(batch["distill"])})
        assert len(calls) == 1
    assert "changes nothing" not in caplog.text
    make_trainer(anchor="before", train_dataset=tiny.make_dataset(4).remove_columns("distill"))
    assert "there are none" in caplog.text


def test_a_resumed_run_is_anchored_to_the_same_model_bit_for_bit(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {"anchor": "before", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 4}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "cut"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = (next(log for log in run.state.log_history if "anchor_kl" in log) for run in (resumed, whole))
    assert {n: ours[n] for n in ("anchor_kl", "anchored_tokens")} == {
        n: theirs[n] for n in ("anchor_kl", "anchored_tokens")
    }
    # Control: the checkpoint's student, taken for the one before
    other = make_trainer(output_dir=str(tmp_path / "other"), model=copy.deepcopy(whole.model), **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert not all(torch.equal(a, b) for a, b in zip(other.model.parameters(), whole.model.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------------------------
# What cannot be held
# --------------------------------------------------------------------------------------------------------------------
def test_what_is_not_the_vlm_before_is_refused() -> None:
    vlm = tiny.make_vlm(0)
    split: Any = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"), is_fsdp2=True)
    with pytest.raises(ValueError, match="asked before training, needs the whole student on every process"):
        make_before(vlm, vlm, torch.float32, accelerator=split, kept=False)
    packed = tiny.make_vlm(0)
    packed.hf_quantizer = SimpleNamespace()
    with pytest.raises(ValueError, match="packed .quantised. weights are not copied"):
        make_before(packed, packed, torch.float32)
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the weights under the adapter"):
        pissa = get_peft_model(tiny.make_vlm(0), lora(init_lora_weights="pissa"))
        make_before(pissa, pissa.get_base_model(), torch.float32)
    partly = get_peft_model(tiny.make_vlm(0), lora())
    make_before(partly, partly.get_base_model(), torch.float32)
    partly.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="1 parameters under the adapter are trained too"):
        make_before(partly, partly.get_base_model(), torch.float32)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"anchor": "after"}, "anchor must be one of none, before; got 'after'."),
        ({"anchor": True}, "anchor must be one of none, before; got True."),
        ({"anchor_weight": 1.5}, "anchor_weight must be in .0.0, 1.0. .*; got 1.5."),
        ({"anchor_weight": float("nan")}, "anchor_weight must be in .*; got nan."),
        ({"anchor_weight": "half"}, "anchor_weight must be a number; got 'half'."),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        LinguDistillConfig(output_dir=str(tmp_path), **settings)


def test_the_summary_before_training_says_what_is_minimised(make_trainer: Any) -> None:
    said = startup_summary(make_trainer(anchor="before", anchor_weight=0.25, kv_source="before"), "tiny")
    assert "0.75 x CE + 0.25 x KL(VLM before || student) on unmarked rows, CE elsewhere" in said
    assert "kv_source=before" in said
    assert "vision tower stays as it is" in startup_summary(make_trainer(freeze_vision=True), "tiny")
    without = startup_summary(make_trainer(kv_source="student"), "tiny")  # control
    assert "tower" not in without
    assert "VLM before" not in without and "kv_source=student" in without


def test_the_commands_that_a_run_prints_have_their_arguments(
    make_trainer: Any, saved_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """An adapter's card names the model under it: of a folder here the Hub knows nothing, and publishing would be refused."""
    student, teacher = (str(folder) for folder in saved_pair)
    pair = {"model": student, "teacher_model": teacher}
    trainer = make_trainer(**pair, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    said = startup_summary(trainer, student)
    assert f"lingudistill check --student {student} --teacher {teacher}` shows" in said
    trainer.save_model()
    assert "--dry_run --before ORG/VLM" in end_summary(trainer, 1.0)
    whole = make_trainer(**pair, output_dir=str(tmp_path / "whole"))
    whole.save_model()
    assert "--before" not in end_summary(whole, 1.0)


# --------------------------------------------------------------------------------------------------------------------
# The adapter off
# --------------------------------------------------------------------------------------------------------------------
PROJECTIONS = ["q_proj", "v_proj"]
ADAPTERS = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "saved modules": lambda: lora(modules_to_save=["norm"]),
    "trained tokens": lambda: lora(trainable_token_indices=[5, 6]),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=PROJECTIONS, init_weights=False),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "IA3": lambda: IA3Config(target_modules=PROJECTIONS, feedforward_modules=[], init_ia3_weights=False),
    "OFT": lambda: OFTConfig(target_modules=PROJECTIONS, oft_block_size=4, init_weights=False),
    "norms, which do more": lambda: LNTuningConfig(target_modules=".*norm"),
}


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_the_adapter_is_off_as_peft_turns_it_off_and_no_flag_is_touched(kind: str) -> None:
    """Answers are PEFT's and the base model's; what is trained stays so inside and after, dropout too. Control: with it they differ."""
    ids = torch.arange(8, 20)[None]
    base = tiny.make_lm(3)
    with torch.no_grad():
        plain = base(ids).logits
        model = get_peft_model(base, ADAPTERS[kind]()).train()
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3)
        modes = {name: module.training for name, module in model.named_modules()}
        flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
        assert any(flags.values()) and not torch.allclose(model(ids).logits, plain, atol=1e-3)

        def untouched() -> bool:
            return flags == {name: weight.requires_grad for name, weight in model.named_parameters()}

        for off in (adapter_off, _adapter_off_by_peft):
            with_it = model(ids).logits
            with off(model), evaluating(model):
                found = model(ids).logits
                assert untouched() and not any(module.training for module in model.modules())
            assert torch.equal(found, plain), off.__name__
            assert untouched() and modes == {name: module.training for name, module in model.named_modules()}
            assert torch.equal(model(ids).logits, with_it)


def test_a_module_that_does_more_than_to_set_its_mode_is_told() -> None:
    told: list[bool] = []

    class Own(torch.nn.Linear):
        def train(self, mode: bool = True) -> Any:
            told.append(mode)
            return super().train(mode)

    model = torch.nn.Sequential(torch.nn.Dropout(0.5), Own(2, 2))
    frozen = torch.nn.Sequential(torch.nn.Dropout(0.5)).eval()
    with evaluating(model), evaluating(frozen):
        assert told == [False] and not model[0].training
    assert model[0].training and model[1].training and not frozen[0].training
