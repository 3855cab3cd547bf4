"""A teacher that is a VLM: its text half against the LM that it was built from, and with eyes of its own against the VLM's plain forward."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_on_policy
import tiny
import torch
from families import FAMILY_NAMES, Family, Inputs, build_family, with_other_pixels
from planning import KV_SHARING_MODES, plan_queries, teacher_pass
from test_trainer import (
    CLEARLY,
    IMAGE_TOKEN,
    TOLERANCE,
    Batch,
    difference,
    generalised_jsd,
    gradients_of,
    mixed_rows,
    step,
)
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    CLIPVisionConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)

from hf_lingudistill import LinguDistillConfig, OnPolicyLinguDistillTrainer, check_compatibility, teacher_mixin
from hf_lingudistill.cli import main as cli
from hf_lingudistill.hub.card import render_card
from hf_lingudistill.losses import Weights
from hf_lingudistill.queries import Vocabulary
from hf_lingudistill.scripts.distill import startup_summary
from hf_lingudistill.self_check import self_check
from hf_lingudistill.sharing import sharing
from hf_lingudistill.step import DistillStep
from hf_lingudistill.student_kv import recording
from hf_lingudistill.teacher import load_teacher_model, prepare_teacher

MakeTrainer = Callable[..., Any]


def another(vlm: PreTrainedModel, seed: int = 7) -> PreTrainedModel:
    """The same VLM with other weights, tower and language model."""
    other, generator = copy.deepcopy(vlm), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim > 1:
                parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other.eval()


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


# --------------------------------------------------------------------------------------------------------------------
# Its text half
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_text_half_of_a_vlm_says_what_its_lm_says(name: str, tmp_path: Path, caplog: Any) -> None:
    family = build_family(name)
    vlm = another(family.student)
    lm = dataclasses.replace(family, student=vlm).make_teacher(identical=True)
    vlm.save_pretrained(tmp_path)
    half = load_teacher_model(str(tmp_path), quantization="none")
    text = {id(p) for part in (half.get_decoder(), half.get_output_embeddings()) for p in part.parameters()}
    beside = [parameter for parameter in half.parameters() if id(parameter) not in text]
    assert sum(parameter.numel() for parameter in beside) < 100, "the tower was loaded"
    assert "UNEXPECTED" not in caplog.text

    inputs = family.make_inputs("left", seed=0)
    with torch.no_grad(), recording(family.student, keep_inputs=True) as shared:
        family.student(**inputs)
    for mode in (mode for mode in KV_SHARING_MODES if (name, mode) != ("qwen3_vl", "inputs")):
        plan = planned(family, inputs, mode)
        ours, theirs = (teacher_pass(teacher, shared, plan) for teacher in (half, lm))
        assert off(ours, theirs) < 1e-5, mode
    # Rows of very different lengths: an LM reads them packed into one
    ragged = {"input_ids": torch.arange(5, 65).view(2, 30), "attention_mask": torch.ones(2, 30, dtype=torch.long)}
    ragged["attention_mask"][1, 8:] = 0
    ragged["labels"] = ragged["input_ids"].masked_fill(ragged["attention_mask"] == 0, -100)
    plan = planned(family, ragged, "none")
    assert plan.num_queries < 0.8 * plan.slots.numel()
    plain = [
        lm.model(input_ids=row[None, :length]).last_hidden_state[0, :-1]
        for row, length in zip(ragged["input_ids"], (30, 8), strict=True)
    ]
    assert off(teacher_pass(half, shared, plan), torch.cat(plain)) < 1e-5
    whole, alone = (
        model(input_ids=ragged["input_ids"][:1], attention_mask=ragged["attention_mask"][:1]) for model in (vlm, half)
    )
    assert torch.equal(whole.logits, alone.logits)
    # Control: the student's own text half, which is another
    assert off(teacher_pass(family.student, shared, plan), torch.cat(plain)) > CLEARLY


def planned(family: Family, inputs: Inputs, mode: str, **settings: Any) -> Any:
    return plan_queries(
        inputs["input_ids"],
        inputs["labels"],
        kv_sharing=mode,
        shared_vocab_size=family.text_vocab_size,
        unreadable_token_ids=family.image_token_ids,
        attention_mask=inputs["attention_mask"],
        **settings,
    )


def mistral_4() -> Mistral3Config:
    """A Mistral 3 around the latent attention of Mistral 4, an LM that AutoModelForCausalLM does not load."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "v_head_dim": 8}
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    both = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    vision = {"model_type": "pixtral", "num_attention_heads": 4, "head_dim": 16, "image_size": 32, "patch_size": 8}
    text = CONFIG_MAPPING["mistral4"](vocab_size=352, pad_token_id=0, **both, **heads, **latent, **experts)
    return Mistral3Config(text_config=text, vision_config={**both, **vision}, image_token_index=336)


def test_an_lm_without_a_causal_class_is_refused_and_the_vlm_that_is_named_teaches(tmp_path: Path) -> None:
    student, tokenizer = Mistral3ForConditionalGeneration(mistral_4()).eval(), tiny.make_tokenizer(extra=False)
    tokenizers = {"student_tokenizer": tokenizer, "teacher_tokenizer": tokenizer}
    if type(student.config.text_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        pytest.skip("this transformers loads it")
    (refused,) = check_compatibility(student, student.config.text_config, **tokenizers).misfits
    assert refused.message == (
        "Teacher mistral4 is of the type of the student's language model, and transformers has no causal LM of this type. Use a VLM of "
        "type mistral3 as the teacher, such as the one that the student was tuned from: its text half teaches."
    )
    assert check_compatibility(student, student, **tokenizers).fits
    another(student).save_pretrained(tmp_path)
    half = load_teacher_model(str(tmp_path), quantization="none")
    self_check(
        student, half, torch.arange(5, 45)[None]
    )  # raises where keys and values of the one would mean something else to the other
    # Control: a teacher of another type, of which nothing like this is said
    other = check_compatibility(student, CLIPVisionConfig(), **tokenizers).misfits[0]
    assert other.reason == "Teacher clip_vision_model is not a model that AutoModelForCausalLM loads."


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A VLM of the tiny student's class with other weights, and its processor. Read-only."""
    folder = tmp_path_factory.mktemp("vlm-teacher")
    another(tiny.make_vlm(0)).save_pretrained(folder)
    tiny.make_processor().save_pretrained(folder)
    return str(folder)


def seen_by(teacher: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """(B, T, V) log-probabilities of the VLM on everything."""
    with torch.no_grad():
        return (
            teacher(**{n: v for n, v in batch.items() if n not in ("labels", "distill")})
            .logits.double()
            .log_softmax(-1)
        )


def read_by(teacher: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The same of a teacher that gets the row without what stands for an image, row by row; NaN there."""
    ids, found = (
        batch["input_ids"],
        torch.full((*batch["input_ids"].shape, teacher.config.text_config.vocab_size), torch.nan).double(),
    )
    for b, row in enumerate(ids):
        read = (row != IMAGE_TOKEN) & batch["attention_mask"][b].bool()
        with torch.no_grad():
            found[b, read] = teacher(input_ids=row[read][None]).logits[0].double().log_softmax(-1)
    return found


def plain_loss(model: Any, batch: Batch, teacher_log_p: torch.Tensor) -> torch.Tensor:
    """With the default options, token by token in float64."""
    log_p = model(**{n: v for n, v in batch.items() if n not in ("labels", "distill")}).logits.double().log_softmax(-1)
    losses = []
    for b, t in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        label, p, q = batch["labels"][b, t + 1], log_p[b, t], teacher_log_p[b, t]
        losses.append(-p[label])
        if batch["distill"][b] and batch["input_ids"][b, t] != IMAGE_TOKEN and q[label] >= p[label].detach():
            losses[-1] = -0.5 * p[label] + (q.exp() * (q - p)).sum()
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("kv_sharing", "said", "control"), [("images", seen_by, read_by), ("none", read_by, seen_by)])
def test_loss_and_every_gradient_equal_two_vlms_in_plain_torch(
    make_trainer: MakeTrainer, vlm_folder: str, kv_sharing: str, said: Any, control: Any
) -> None:
    trainer = make_trainer(teacher_model=vlm_folder, kv_sharing=kv_sharing)
    batch = dict(trainer.data_collator(mixed_rows()))
    del batch["queries"]
    assert (batch["distill"] & (batch["input_ids"] == IMAGE_TOKEN).any(dim=1)).any(), "an image row must be distilled"
    teacher = SmolVLMForConditionalGeneration.from_pretrained(vlm_folder)
    loss, gradients = step(trainer, batch)
    assert trainer.meter._step.tolist()[3] > 5, "the gate must let tokens through"
    trainer.model.zero_grad()
    expected = plain_loss(trainer.model, batch, said(teacher, batch))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert difference(gradients, gradients_of(trainer.model)) < TOLERANCE
    # Controls: the other way to read the row, and other pixels
    others = [control(teacher, batch).nan_to_num(-20.0)]
    if kv_sharing == "images":
        others.append(seen_by(teacher, with_other_pixels(batch, seed=1)))
    for other in others:
        trainer.model.zero_grad()
        wrong = plain_loss(trainer.model, batch, other)
        wrong.backward()
        assert wrong.item() != pytest.approx(loss, rel=1e-4)
        assert difference(gradients, gradients_of(trainer.model)) > CLEARLY


def test_a_vlm_in_memory_teaches_by_its_text_half_and_keeps_its_tower(
    make_trainer: MakeTrainer, vlm_folder: str
) -> None:
    given = SmolVLMForConditionalGeneration.from_pretrained(vlm_folder).eval()
    losses = []
    for teacher in (vlm_folder, given):
        trainer = make_trainer(teacher_model=teacher, teacher_tokenizer=tiny.make_processor())
        batch = dict(trainer.data_collator(mixed_rows()))
        losses.append(step(trainer, batch)[0])
    assert losses[0] == losses[1] and trainer.teacher.model is given
    assert given.model.vision_model is not None


@pytest.mark.parametrize(("kv_sharing", "part"), [("prompt", "text half"), ("images", "whole")])
def test_log_summary_record_and_card_say_what_taught(
    make_trainer: MakeTrainer, vlm_folder: str, caplog: Any, tmp_path: Path, kv_sharing: str, part: str
) -> None:
    with caplog.at_level(logging.INFO, logger="hf_lingudistill"):
        trainer = make_trainer(teacher_model=vlm_folder, kv_sharing=kv_sharing, teacher_quantization="nf4")
    said = {"text half": "a VLM, its text half (nf4", "whole": "a VLM, whole (nf4"}[part]
    assert said in caplog.text and said in startup_summary(trainer, "tiny")
    assert ("both processors make the same tensors" in caplog.text) == (part == "whole")
    sizes = {
        part: sum(p.numel() for n, p in trainer.teacher.model.named_parameters() if "vision" in n) for part in [part]
    }
    assert (sizes[part] > 0) == (part == "whole")
    trainer.train()
    assert trainer.state.log_history[0]["distilled_tokens"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    facts = json.loads((tmp_path / "saved/lingudistill.json").read_text())
    assert facts["teacher"]["part"] == part
    card = " ".join(str(render_card(facts, {})).split())
    wanted = {
        "text half": "The frozen teacher is the text half of a VLM, without its tower: layer by layer it reads the student's keys",
        "whole": "The frozen teacher is a VLM that reads the images itself; nothing of the student is shared with it.",
    }
    assert wanted[part] in card and "has never seen an image" not in card
    assert "the language model that it was built from" not in card


# --------------------------------------------------------------------------------------------------------------------
# With eyes of its own
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_with_its_own_eyes_a_vlm_gives_its_plain_forward(name: str) -> None:
    family = build_family(name)
    teacher, inputs = another(family.student), family.make_inputs("left", seed=0)
    given = {n: v for n, v in inputs.items() if n != "labels"}
    plan = planned(family, inputs, "images")
    with torch.no_grad(), sharing("images").recording(family.student) as shared:
        family.student.base_model(**given, use_cache=False)
    assert not shared.keys and not shared.masks
    hidden = teacher_pass(teacher, shared, plan)
    with torch.no_grad():
        places = plan.loss_rows, plan.loss_positions
        wanted, blind = (teacher(**x).logits[places] for x in (given, with_other_pixels(given, seed=3)))
        assert off(teacher.get_output_embeddings()(hidden.clone()), wanted) < 1e-6 or family.name == "gemma3"
        direct = teacher.base_model(**given).last_hidden_state[places]
    assert torch.equal(hidden, direct)
    # Controls: other pixels, and the student
    assert off(blind, wanted) > 1e-3
    with torch.no_grad():
        assert off(family.student(**given).logits[places], wanted) > CLEARLY
    shared.release()
    assert shared.inputs is None
    nothing = planned(family, inputs, "images", distill=torch.zeros(2, dtype=torch.bool))
    assert teacher_pass(teacher, shared, nothing).shape == (0, hidden.shape[1])


def test_a_student_whose_layers_are_no_softmax_attention_is_taught_by_itself() -> None:
    """Qwen3.5 mixes tokens by linear attention in most layers: no keys and values to share, and no LM without a tower."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    }
    config = Qwen3_5Config(
        text_config={**sizes, **linear, "vocab_size": 60, "head_dim": 16, "pad_token_id": 0},
        vision_config=vision,
        image_token_id=58,
        video_token_id=59,
        vision_start_token_id=56,
        vision_end_token_id=57,
    )
    student, teacher = (Qwen3_5ForConditionalGeneration(config).eval() for _ in range(2))
    step = DistillStep(student, prepare_teacher(teacher, Vocabulary(60, 60, (58, 59))), sharing("images"), Weights())
    step.install()
    ids = torch.arange(2, 50).view(2, 24)
    labels = ids.clone()
    labels[:, :10] = -100
    mask, distill = torch.ones_like(ids), torch.ones(2, dtype=torch.bool)
    output = student(input_ids=ids, attention_mask=mask, labels=labels, distill=distill, fused_lm_head=True)
    with torch.no_grad():
        log_p, log_q = (
            model(input_ids=ids, attention_mask=mask).logits[:, :-1].double().log_softmax(-1)
            for model in (student, teacher)
        )
    kept = labels[:, 1:] != -100
    ce = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    expected = (0.5 * ce + (log_q.exp() * (log_q - log_p)).sum(-1))[kept].sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() != pytest.approx(ce[kept].sum().item(), rel=1e-2)


# --------------------------------------------------------------------------------------------------------------------
# What does not fit
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def pair(vlm_folder: str, saved_pair: tuple[Path, Path]) -> SimpleNamespace:
    return SimpleNamespace(student=str(saved_pair[0]), lm=str(saved_pair[1]), vlm=vlm_folder)


def test_check_says_what_a_vlm_as_teacher_means(pair: Any, capsys: Any) -> None:
    assert cli(["check", pair.student, pair.vlm]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Teacher is a VLM: its text half teaches, loaded without the tower. With kv_sharing=images it is run whole"
        in said
    )
    assert cli(["check", pair.student, pair.vlm, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["teacher_is_vlm"] is True
    assert check_compatibility(pair.student, pair.lm).teacher_is_vlm is False


def test_a_teacher_that_cannot_be_given_the_images_is_refused_by_the_check(pair: Any) -> None:
    def misfits(teacher: Any, **given: Any) -> list[str]:
        return [c.message for c in check_compatibility(pair.student, teacher, kv_sharing="images", **given).misfits]

    assert misfits(pair.vlm) == []
    (lm,) = misfits(pair.lm)
    assert (
        "kv_sharing=images gives the teacher the images themselves, and" in lm
        and "is a text-only LM. Name a VLM" in lm
    )
    llava = build_family("llava").student.config
    assert any(
        "llava does not read those of smolvlm" in said
        for said in misfits(llava, teacher_tokenizer=tiny.make_tokenizer(True))
    )
    other = copy.deepcopy(tiny.make_vlm(5).config)
    other.image_token_id += 1
    (ids,) = misfits(other, teacher_tokenizer=tiny.make_tokenizer(True))
    assert "the two mark images by other tokens" in ids
    (short,) = misfits(tiny.make_vlm(5).config, teacher_tokenizer=tiny.make_tokenizer(False))
    assert "it does not know 4 tokens of the student's" in short


def test_layers_need_not_agree_where_nothing_is_shared() -> None:
    config = tiny.make_vlm(0, layers=3, num_key_value_heads=4).config
    tokenizers = {"student_tokenizer": tiny.make_tokenizer(True), "teacher_tokenizer": tiny.make_tokenizer(True)}
    student = tiny.make_vlm(0).config
    assert check_compatibility(student, config, kv_sharing="images", **tokenizers).fits
    assert {c.name for c in check_compatibility(student, config, **tokenizers).misfits} == {
        "decoder layers",
        "KV heads",
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_mean": [0.1, 0.2, 0.3]}, "prepare them differently: of two pictures, pixel_values is off by 0"),
        (
            {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 64}},
            r"pixel_values is \(\d.* for the student and \(",
        ),
        (None, "only one of them makes pixel_attention_mask, pixel_values"),
    ],
    ids=["mean", "size", "none"],
)
def test_a_teacher_whose_processor_prepares_other_images_is_refused(
    make_trainer: MakeTrainer, vlm_folder: str, change: dict[str, Any] | None, sentence: str
) -> None:
    theirs: Any = tiny.make_processor()
    for name, value in (change or {}).items():
        setattr(theirs.image_processor, name, value)
    teacher = tiny.make_vlm(5)
    if change is None:
        theirs, teacher.config._name_or_path = theirs.tokenizer, ""
    settings = {"teacher_model": teacher, "teacher_tokenizer": theirs, "kv_sharing": "images"}
    with pytest.raises(ValueError, match=sentence):
        make_trainer(**settings)
    make_trainer(**settings, self_check=False)
    settings["teacher_tokenizer"] = tiny.make_processor()
    make_trainer(**settings)  # the control


def test_a_teacher_whose_tower_makes_other_features_is_refused(make_trainer: MakeTrainer) -> None:
    config = copy.deepcopy(tiny.make_vlm(5).config)
    config.scale_factor = 4
    teacher = SmolVLMForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="it does not read them"):
        make_trainer(teacher_model=teacher, teacher_tokenizer=tiny.make_processor(), kv_sharing="images")


def test_what_images_cannot_do_is_refused_in_a_sentence(
    make_trainer: MakeTrainer, vlm_folder: str, monkeypatch: Any
) -> None:
    with pytest.raises(ValueError, match="kv_sharing=images gives the teacher the images themselves"):
        make_trainer(kv_sharing="images")
    text = tiny.make_dataset(4, images=False).remove_columns("distill")
    with pytest.raises(ValueError, match="kv_sharing='images' cannot keep packed documents apart"):
        make_trainer(kv_sharing="images", teacher_model=vlm_folder, train_dataset=text, packing=True)
    make_trainer(kv_sharing="images", teacher_model=vlm_folder, train_dataset=text).train()
    monkeypatch.setattr(teacher_mixin, "sharding_of", lambda _: "fsdp2")
    with pytest.raises(ValueError, match="FSDP2 and ZeRO-3 are not told how to split"):
        make_trainer(kv_sharing="images", teacher_model=vlm_folder)


def test_offloaded_and_quantised_the_whole_vlm_teaches_the_same(make_trainer: MakeTrainer, vlm_folder: str) -> None:
    losses = {}
    for name, settings in {
        "plain": {},
        "offloaded": {"teacher_offload": "cpu"},
        "int8": {"teacher_quantization": "int8"},
    }.items():
        trainer = make_trainer(kv_sharing="images", teacher_model=vlm_folder, **settings)
        losses[name] = step(trainer, dict(trainer.data_collator(mixed_rows())))[0]
    assert losses["offloaded"] == losses["plain"]
    assert losses["int8"] == pytest.approx(losses["plain"], rel=0.05) and losses["int8"] != losses["plain"]


def test_the_config_takes_the_mode(tmp_path: Path) -> None:
    assert LinguDistillConfig(output_dir=str(tmp_path), kv_sharing="images").kv_sharing == "images"


def test_on_the_students_own_answers_a_vlm_with_eyes_is_the_judge(make_trainer: MakeTrainer, vlm_folder: str) -> None:
    rows = test_on_policy.prompts()
    rows[2]["distill"] = True  # an image
    trainer = make_trainer(
        OnPolicyLinguDistillTrainer,
        train_dataset=rows,
        teacher_model=vlm_folder,
        kv_sharing="images",
        max_completion_length=8,
    )
    inputs = test_on_policy.sampled(trainer, rows)
    batch = trainer._batch(inputs)
    loss, gradients = test_on_policy.step(trainer, inputs)
    teacher, before = SmolVLMForConditionalGeneration.from_pretrained(vlm_folder), tiny.make_vlm(0)

    def plain(judges: dict[bool, torch.Tensor]) -> torch.Tensor:
        log_p = (
            trainer.model(**{n: v for n, v in batch.items() if n not in ("labels", "distill")})
            .logits.double()
            .log_softmax(-1)
        )
        places = (batch["labels"][:, 1:] != -100).nonzero().tolist()
        return sum(
            generalised_jsd(log_p[b, t], judges[bool(batch["distill"][b])][b, t], 1.0) for b, t in places
        ) / len(places)

    trainer.model.zero_grad()
    judged_by_before = seen_by(before, batch)
    expected = plain({True: seen_by(teacher, batch), False: judged_by_before})
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=2e-6)
    assert difference(gradients, gradients_of(trainer.model)) < TOLERANCE
    for wrong in (seen_by(teacher, with_other_pixels(batch, seed=1)), judged_by_before):  # the controls
        assert plain({True: wrong, False: judged_by_before}).item() != pytest.approx(loss, rel=1e-4)


def test_what_quantisation_costs_a_teacher_with_eyes_is_measured(make_trainer: MakeTrainer, vlm_folder: str) -> None:
    for kv_sharing in ("images", "vision"):
        trainer = make_trainer(
            teacher_model=vlm_folder,
            kv_sharing=kv_sharing,
            teacher_quantization="nf4",
            measure_teacher_quantization=True,
        )
        trainer.train()
        assert 1e-4 < trainer.teacher_quantization_kl < 5


def test_a_run_with_a_teacher_with_eyes_resumes_bit_for_bit(
    make_trainer: MakeTrainer, vlm_folder: str, tmp_path: Path
) -> None:
    settings = {
        "teacher_model": vlm_folder,
        "kv_sharing": "images",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "cut"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_diagnose_reads_a_vlm_as_the_original(pair: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text("the sea is deep, wide and full of salt. the cat sat on the mat. " * 12)
    command = ["diagnose", "--student", pair.student, "--teacher", pair.vlm, "--output_dir", str(tmp_path / "out")]
    assert cli([*command, "--texts", str(tmp_path / "text.txt")]) == 0, capsys.readouterr().err
    assert "Recommended: kv_sharing=" in capsys.readouterr().out
