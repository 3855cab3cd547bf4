"""What may differ, and is noted. Configs and tokenizers only, no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pairs import FAMILIES, IDS, USE_THE_ORIGINAL_LM, Tokenizers, llama, messages, only, sizes, statuses, vlm
from transformers import (
    CONFIG_MAPPING,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from hf_lingudistill.compatibility import Check, check_compatibility


@pytest.mark.parametrize(
    ("student", "teacher", "name", "message"),
    [
        (
            {},
            {"hidden_size": 64, "head_dim": 8},
            "hidden_size",
            "Hidden sizes differ (student 32, teacher 64): allowed, only K/V are shared.",
        ),
        (
            {},
            {"num_attention_heads": 8, "head_dim": 8},
            "query heads",
            "Query heads differ (student 4, teacher 8): allowed, only K/V are shared.",
        ),
        (
            {"rope_theta": 1e5},
            {},
            "RoPE",
            "RoPE differs (student / teacher: rope_theta 100000.0 / 10000.0): the teacher reuses the student's cos "
            "and sin in full, prompt and vision, and its own with kv_sharing=none. If this is not the LM that the "
            "student was built from, use that one.",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            {},
            "RoPE",
            "RoPE differs (student / teacher: factor 2.0 / none; rope_type linear / default): the teacher reuses the "
            "student's cos and sin in full, prompt and vision, and its own with kv_sharing=none. If this is not the "
            "LM that the student was built from, use that one.",
        ),
        (
            {},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantisation",
            "Teacher is quantised already (gptq): teacher_quantization does not apply, and it teaches what is left. "
            "Prefer the full-precision weights of the same LM.",
        ),
    ],
    ids=["hidden_size", "query-heads", "rope_theta", "rope_type", "quantised"],
)
def test_what_may_differ_is_noted(
    student: dict[str, Any], teacher: dict[str, Any], name: str, message: str, tokenizers: Tokenizers
) -> None:
    report = check_compatibility(vlm(llama(vocab_size=49, **student)), llama(**teacher), **tokenizers)
    assert report.fits
    assert statuses(report, "note") == {name, "vocabulary"}
    assert messages(report, name) == [message]


def test_a_sliding_window_is_noted_where_the_two_differ(tokenizers: Tokenizers) -> None:
    def mistral(**other: Any) -> MistralConfig:
        return MistralConfig(**sizes(head_dim=8, **other))

    differ = check_compatibility(
        vlm(mistral(vocab_size=49, sliding_window=4)), mistral(sliding_window=None), **tokenizers
    )
    assert messages(differ, "sliding window") == [
        "Sliding windows differ (student: 4 in 3 of 3; teacher: none): the teacher follows the student's masks in "
        "full, prompt and vision, and its own with kv_sharing=none."
    ]
    agree = check_compatibility(vlm(mistral(vocab_size=49, sliding_window=4)), mistral(sliding_window=4), **tokenizers)
    assert only(agree, "sliding window").status == "fits"


def test_windows_of_the_same_width_in_other_layers_are_noted(tokenizers: Tokenizers) -> None:
    def gemma(*kinds: str, **other: Any) -> Gemma3TextConfig:
        layer_types = [f"{kind}_attention" for kind in kinds]
        return Gemma3TextConfig(**sizes(head_dim=8, sliding_window=4, layer_types=layer_types, **other))

    student = vlm(gemma("full", "sliding", "full", vocab_size=49))
    assert only(check_compatibility(student, gemma("full", "full", "sliding"), **tokenizers), "sliding window").reason
    same = check_compatibility(student, gemma("full", "sliding", "full"), **tokenizers)
    assert not only(same, "sliding window").reason


def test_soft_capping_is_noted(tokenizers: Tokenizers) -> None:
    def gemma2(**other: Any) -> Gemma2Config:
        return Gemma2Config(**sizes(head_dim=8, **other))

    capped = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    same = check_compatibility(vlm(gemma2(vocab_size=49, **capped)), gemma2(**capped), **tokenizers)
    assert messages(same, "soft-capping") == [
        "Student and teacher cap their logits (attn 50, final 30): capped attention runs without SDPA, which is "
        "slower."
    ]
    differ = check_compatibility(vlm(gemma2(vocab_size=49, **capped)), gemma2(**uncapped), **tokenizers)
    assert messages(differ, "soft-capping") == [
        "Soft-capping differs (student: attn 50, final 30; teacher: none): each model keeps its own. If this is not "
        "the LM that the student was built from, use that one."
    ]
    neither = check_compatibility(vlm(gemma2(vocab_size=49, **uncapped)), gemma2(**uncapped), **tokenizers)
    assert only(neither, "soft-capping").status == "fits"


def test_another_architecture_is_noted(tokenizers: Tokenizers) -> None:
    report = check_compatibility(vlm(), Qwen2Config(**sizes()), **tokenizers)
    assert messages(report, "architecture") == [
        "Student's language model is of type llama, the teacher of type qwen2: their shapes can agree where norms, "
        "biases or the order of rotary dimensions do not. If this is not the LM that the student was built from, use "
        "that one."
    ]


@pytest.mark.parametrize(
    "teacher",
    [
        lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=48, **IDS),
        lambda: BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=48, **IDS),
        lambda: FalconConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=48, alibi=True, **IDS
        ),
    ],
    ids=["learned", "alibi", "alibi-flag"],
)
def test_a_teacher_without_rotary_embedding_is_refused(
    teacher: Callable[[], PreTrainedConfig], tokenizers: Tokenizers
) -> None:
    config = teacher()
    assert messages(check_compatibility(vlm(), config, **tokenizers), "RoPE") == [
        f"Teacher ({config.model_type}) names no rotary position embedding (rope_parameters): the student's keys are "
        f"rotated, its queries would not be. {USE_THE_ORIGINAL_LM}"
    ]


def test_falcon_with_rope_passes_that_check(tokenizers: Tokenizers) -> None:
    """Control of the alibi flag above."""
    config = FalconConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=48, alibi=False, **IDS
    )
    assert only(check_compatibility(vlm(), config, **tokenizers), "RoPE").status != "misfit"


def test_mrope_is_noted_without_doubt_about_the_teacher(tokenizers: Tokenizers) -> None:
    student, teacher, _ = FAMILIES["qwen2.5-vl"]()
    assert messages(check_compatibility(student, teacher, **tokenizers), "RoPE") == [
        "RoPE differs (student / teacher: mrope_section [2, 1, 1] / none): the teacher reuses the student's cos and "
        "sin in full, prompt and vision, and its own with kv_sharing=none."
    ]


def test_layers_of_different_shape_are_compared_one_by_one(tokenizers: Tokenizers) -> None:
    def gemma4(global_head_dim: int, **other: Any) -> PreTrainedConfig:
        layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
        return CONFIG_MAPPING["gemma4_text"](
            **sizes(head_dim=8, global_head_dim=global_head_dim, layer_types=layer_types, **other)
        )

    student = vlm(gemma4(16, vocab_size=49))
    assert only(check_compatibility(student, gemma4(16), **tokenizers), "head_dim") == Check(
        "head_dim", "fits", "8 / 16", "8 / 16"
    )
    assert only(check_compatibility(student, gemma4(32), **tokenizers), "head_dim").reason == (
        "Teacher has 32 dimensions a head in layer 2, the student's language model has 16: the teacher's queries and "
        "the student's keys must have the same size."
    )
