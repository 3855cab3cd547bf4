"""Configs of small pairs, and what a report says about one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from hf_lingudistill.compatibility import Check, CompatibilityReport

VOCAB, IMAGE = 48, 48  # the LM's tokens; the VLM's image token follows them
LAYERS = 3
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
USE_THE_ORIGINAL_LM = "Use the LM that the student was built from."


def sizes(**other: Any) -> dict[str, Any]:
    """Arguments that every language model config takes."""
    plain = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
    }
    return {**plain, **IDS, **other}


def llama(**other: Any) -> LlamaConfig:
    return LlamaConfig(**sizes(**other))


def vlm(text: PreTrainedConfig | None = None, **other: Any) -> LlavaConfig:
    """A LLaVA around any language model: the class that makes the fewest assumptions about it."""
    text = llama(vocab_size=VOCAB + 1) if text is None else text
    vision = CLIPVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, **other)


Tokenizers = dict[str, PreTrainedTokenizerFast]


def statuses(report: CompatibilityReport, status: str) -> set[str]:
    return {check.name for check in report.checks if check.status == status}


def only(report: CompatibilityReport, name: str) -> Check:
    (check,) = (check for check in report.checks if check.name == name)
    return check


def messages(report: CompatibilityReport, name: str) -> list[str]:
    return [check.message for check in report.checks if check.name == name and check.reason]


MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": IMAGE}

# name: (student's config, its LM's config, what is worth a note beside the image token that the LM does not know)
FAMILIES: dict[str, Callable[[], tuple[PreTrainedConfig, PreTrainedConfig, set[str]]]] = {
    "smolvlm": lambda: (
        SmolVLMConfig(text_config=llama(vocab_size=49), vision_config={"hidden_size": 16}, image_token_id=IMAGE),
        llama(),
        set(),
    ),
    "idefics3": lambda: (
        Idefics3Config(text_config=llama(vocab_size=49), vision_config={"hidden_size": 16}, image_token_id=IMAGE),
        llama(),
        set(),
    ),
    "llava-llama": lambda: (vlm(), llama(), set()),
    "llava-qwen2": lambda: (vlm(Qwen2Config(**sizes(vocab_size=49))), Qwen2Config(**sizes()), set()),
    "llava-onevision": lambda: (
        LlavaOnevisionConfig(
            text_config=Qwen2Config(**sizes(vocab_size=49)), image_token_index=IMAGE, video_token_index=IMAGE
        ),
        Qwen2Config(**sizes()),
        set(),
    ),
    "qwen2-vl": lambda: (
        Qwen2VLConfig(
            text_config=sizes(vocab_size=49, rope_parameters=dict(MROPE)), vision_config=QWEN_VISION, **QWEN_IDS
        ),
        Qwen2Config(**sizes(rope_theta=1e6)),
        {"RoPE"},
    ),
    "qwen2.5-vl": lambda: (
        Qwen2_5_VLConfig(
            text_config=sizes(vocab_size=49, rope_parameters=dict(MROPE)), vision_config=QWEN_VISION, **QWEN_IDS
        ),
        Qwen2Config(**sizes(rope_theta=1e6)),
        {"RoPE"},
    ),
    "qwen3-vl": lambda: (
        Qwen3VLConfig(
            text_config=sizes(vocab_size=49, head_dim=8, rope_parameters=dict(MROPE)),
            vision_config=QWEN_VISION,
            **QWEN_IDS,
        ),
        Qwen3Config(**sizes(head_dim=8, rope_theta=1e6)),
        {"RoPE"},
    ),
    "internvl": lambda: (
        InternVLConfig(text_config=Qwen2Config(**sizes(vocab_size=49)), image_token_id=IMAGE),
        Qwen2Config(**sizes()),
        set(),
    ),
    "gemma3": lambda: (
        Gemma3Config(
            text_config=Gemma3TextConfig(**sizes(vocab_size=49, head_dim=8, sliding_window=4)), image_token_index=IMAGE
        ),
        Gemma3TextConfig(**sizes(head_dim=8, sliding_window=4)),
        set(),
    ),
    "paligemma": lambda: (
        PaliGemmaConfig(text_config=GemmaConfig(**sizes(vocab_size=49, head_dim=8)), image_token_index=IMAGE),
        GemmaConfig(**sizes(head_dim=8)),
        {"attention"},
    ),
}


def save(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast | None) -> str:
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)
