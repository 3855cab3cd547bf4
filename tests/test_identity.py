"""What kept answers are said to belong to: every weight, every setting of a config, and all that makes a row's tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hf_lingudistill import identity
from hf_lingudistill._internals import own_name
from hf_lingudistill.anchor import make_before
from hf_lingudistill.batch import DistillCollator
from hf_lingudistill.identity import config_facts, processor_facts, reading_digest, weights_digest

LAYERS = ["q_proj", "v_proj"]


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------
def test_weights_are_known_by_every_bit() -> None:
    vlm = tiny.make_vlm(0)
    digest = weights_digest(vlm)
    assert digest == weights_digest(tiny.make_vlm(0)) != weights_digest(tiny.make_vlm(1))
    with torch.no_grad():
        next(vlm.parameters()).view(-1)[-1] += 1e-6
    assert weights_digest(vlm) != digest


class Named(nn.Module):
    """A model with a part of that name."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__()
        self.language = nn.Linear(2, 2)
        self.add_module(name, nn.Linear(2, 2))
        for p in self.parameters():
            nn.init.constant_(p, 1.0)
        nn.init.constant_(self.get_submodule(name).weight, value)


@pytest.mark.parametrize(
    "name",
    ["vision_adapter", "mm_soft_emb_norm", "adapter", "img_lora_proj", "base_layer", "modules_to_save", "ia3_l"],
)
def test_no_part_of_a_model_is_left_out_for_its_name(name: str) -> None:
    assert weights_digest(Named(name, 1.0)) != weights_digest(Named(name, 2.0))
    assert weights_digest(Named(name, 1.0)) == weights_digest(Named(name, 1.0))
    assert own_name(Named(name, 1.0), f"{name}.weight") == f"{name}.weight"


ADAPTERS: dict[str, Any] = {
    "LoRA": LoraConfig(target_modules=LAYERS, init_lora_weights=False),
    "DoRA": LoraConfig(target_modules=LAYERS, init_lora_weights=False, use_dora=True),
    "LoRA and a head": LoraConfig(target_modules=LAYERS, init_lora_weights=False, modules_to_save=["lm_head"]),
    "LoRA and tokens": LoraConfig(target_modules=LAYERS, init_lora_weights=False, trainable_token_indices=[1, 2]),
    "IA3": IA3Config(target_modules=LAYERS, feedforward_modules=[]),
    "OFT": OFTConfig(target_modules=LAYERS, oft_block_size=4, r=0),
    "VeRA": VeraConfig(target_modules=["q_proj"]),
    "LoHa": LoHaConfig(target_modules=LAYERS),
    "LoKr": LoKrConfig(target_modules=LAYERS),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_an_adapter_adds_is_no_part_of_the_model(kind: str) -> None:
    digest = weights_digest(tiny.make_vlm(0))
    adapted = get_peft_model(tiny.make_vlm(0), ADAPTERS[kind])
    student = adapted.get_base_model()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1)
    assert weights_digest(student, adapter_off=True) == digest
    assert weights_digest(student) != digest  # but where it answers
    make_before(adapted, student, torch.float32)  # nothing under it is trained
    # Control: what is under it counts
    own = {own_name(student, name): p for name, p in student.named_parameters()}
    weight = own["model.text_model.layers.1.self_attn.q_proj.weight"]
    with torch.no_grad():
        weight[0, 0] += 1e-3
    assert weights_digest(student, adapter_off=True) != digest
    weight.requires_grad_(True)
    with pytest.raises(ValueError, match="1 parameters under the adapter are trained too"):
        make_before(adapted, student, torch.float32)


def test_a_part_that_is_called_like_an_adapter_is_trained_under_it() -> None:
    student = tiny.make_vlm(0)
    student.model.oft_norm = nn.LayerNorm(4)
    adapted = get_peft_model(student, ADAPTERS["OFT"])
    student.model.oft_norm.requires_grad_(False)  # PEFT 0.19 takes it for the adapter's, and trains it
    make_before(adapted, student, torch.float32)
    student.model.oft_norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="1 parameters under the adapter are trained too .model.oft_norm.weight."):
        make_before(adapted, student, torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_behind_the_vocabulary_are_padding(tied: bool) -> None:
    lm = tiny.make_lm(1, vocab_size=330, tie_word_embeddings=tied)
    whole, cut = weights_digest(lm), weights_digest(lm, vocabulary=320)
    shorter = copy.deepcopy(lm)
    shorter.resize_token_embeddings(320, mean_resizing=False)
    assert cut == weights_digest(shorter) == weights_digest(shorter, vocabulary=320) != whole
    with torch.no_grad():
        lm.get_input_embeddings().weight[325] += 1.0
    assert weights_digest(lm, vocabulary=320) == cut
    with torch.no_grad():
        lm.get_input_embeddings().weight[319] += 1.0
    assert weights_digest(lm, vocabulary=320) != cut


# --------------------------------------------------------------------------------------------------------------------
# Configs
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [tiny.make_vlm, tiny.make_lm], ids=["VLM", "LM"])
def test_every_value_of_a_config_counts_but_those_that_are_named(make: Callable[[int], Any]) -> None:
    config = make(0).config
    facts = config_facts("model", config)
    changed = 0
    for part in (
        config,
        *(getattr(config, name) for name in ("text_config", "vision_config") if hasattr(config, name)),
    ):
        for name, value in list(vars(part).items()):
            if name in identity._VOLATILE or name.startswith("_") or type(value) not in (int, float, bool):
                continue
            object.__setattr__(part, name, not value if isinstance(value, bool) else value + 1)
            assert config_facts("model", config) != facts, name
            object.__setattr__(part, name, value)
            changed += 1
    assert changed > 8 and config_facts("model", config) == facts
    config.get_text_config().rope_parameters = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    new = config_facts("model", config).items() - facts.items()
    assert {name.rpartition(".")[2]: value for name, value in new} == {"rope_type": "linear", "factor": 8.0}


def test_what_says_nothing_of_the_answers_does_not_count() -> None:
    vlm = tiny.make_vlm(0)
    facts = config_facts("model", vlm.config)
    vlm.config._name_or_path, vlm.config.use_cache, vlm.config.text_config.use_cache = "elsewhere", False, False
    vlm.config.text_config._attn_implementation = "eager"
    vlm.config.output_hidden_states, vlm.config.text_config.eos_token_id = True, 5
    assert config_facts("model", vlm.config) == facts


def test_all_that_makes_images_counts_and_nothing_of_the_tokenizer() -> None:
    processor = tiny.make_processor()
    facts = processor_facts(processor)
    assert facts["processor: image_processor.size.longest_edge"] == 32
    processor.tokenizer.add_tokens(["<new>"])
    processor.chat_template = "another"
    assert processor_facts(processor) == facts and processor_facts(processor.tokenizer) == {}
    processor.image_processor.image_mean = (0.4, 0.5, 0.5)
    assert processor_facts(processor) != facts


# --------------------------------------------------------------------------------------------------------------------
# How rows are read
# --------------------------------------------------------------------------------------------------------------------
def reading(change: Callable[[Any], None] | None = None, **settings: Any) -> str | None:
    processor = tiny.make_processor()
    of_trl = {name: settings.pop(name) for name in ("chat_template", "pad_to_multiple_of") if name in settings}
    if change is not None:
        change(processor)
    return reading_digest(
        DistillCollator(DataCollatorForVisionLanguageModeling(processor, **of_trl), **settings), processor
    )


def test_what_makes_other_tokens_labels_or_pixels_is_another_reading() -> None:
    def template(processor: Any) -> None:
        processor.chat_template += " "

    def words(processor: Any) -> None:
        processor.tokenizer.add_tokens(["<new>"])

    def special(processor: Any) -> None:
        processor.tokenizer.pad_token = "the"

    def size(processor: Any) -> None:
        processor.image_processor.size = {"longest_edge": 16}

    settings: list[dict[str, Any]] = [
        {"answers_only": False},
        {"completion_only": False},
        {"max_length": 64},
        {"prefix_lm": True},
        {"distill_column": "other"},
        {"chat_template": "another"},
        {"pad_to_multiple_of": 8},
    ]
    found = [reading(), *(reading(**one) for one in settings), *map(reading, (template, words, special, size))]
    assert None not in found and len(set(found)) == len(found)
    used = tiny.make_processor()
    used.tokenizer("some words", padding="max_length", max_length=50, truncation=True)  # which it remembers
    assert reading() == found[0] == reading_digest(DistillCollator(DataCollatorForVisionLanguageModeling(used)), used)


def test_nothing_is_known_of_a_collator_of_the_callers_own() -> None:
    assert reading_digest(DistillCollator(lambda rows: {}), tiny.make_processor()) is None
