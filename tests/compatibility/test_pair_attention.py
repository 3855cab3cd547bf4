"""Which layers can be shared: softmax attention, and mixers that can be followed. Configs and tokenizers only, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pairs import IDS, IMAGE, LAYERS, Tokenizers, llama, messages, only, sizes, statuses, vlm
from transformers import (
    CONFIG_MAPPING,
    Blip2Config,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    GptOssConfig,
    InstructBlipConfig,
    JambaConfig,
    Lfm2Config,
    Lfm2VlConfig,
    Llama4Config,
    LlavaConfig,
    MambaConfig,
    MllamaConfig,
    PreTrainedConfig,
    Qwen3_5Config,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from hf_lingudistill.compatibility import check_compatibility
from hf_lingudistill.compatibility.configs import Side

USE_SOFTMAX = "Use a VLM and LM with plain softmax self-attention in every layer (Llama, Qwen2, Qwen3, Gemma, ...)."


def lfm2(**other: Any) -> Lfm2Config:
    return Lfm2Config(**sizes(**{"layer_types": ["conv", "full_attention", "conv"], **other}))


def newer(model_type: str) -> Any:
    """The config class of a family that the oldest supported transformers may not know."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers does not know {model_type}")
    return CONFIG_MAPPING[model_type]


def mla(**other: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**sizes(kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, **other))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (
            lambda: MllamaConfig(text_config=sizes(cross_attention_layers=[1, 7])),
            llama,
            [
                "Student's language model has 1 of 3 layers with cross-attention (layer 1): a plain LM has no layer "
                "to pair with them."
            ],
        ),
        (
            vlm,
            lambda: newer("qwen4_exp")().get_text_config(),
            [
                "Teacher has 10 of 40 layers of kind 'indexed_attention' (layers 3, 7, 11, 15, ...): an indexer of its own picks the keys "
                "of each query, which the other model's queries cannot follow.",
            ],
        ),
        (
            vlm,
            lambda: JambaConfig(**sizes(attn_layer_period=3, attn_layer_offset=1)),
            [
                "Teacher has 2 of 3 layers of kind 'linear_attention' (layers 0, 2): they do not keep the plain keys "
                "and values that KV sharing passes on."
            ],
        ),
        (
            vlm,
            lambda: FalconH1Config(**sizes(mamba_d_ssm=64, mamba_n_heads=4)),
            [
                "Teacher has 3 of 3 layers of kind 'hybrid' (layers 0, 1, 2): they do not keep the plain keys and "
                "values that KV sharing passes on."
            ],
        ),
        (
            vlm,
            lambda: llama(index_topk=8),
            [
                "Teacher has sparse attention (index_topk=8): an indexer of its own picks the keys of each query, which the other "
                "model's queries cannot follow."
            ],
        ),
        (
            vlm,
            lambda: FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=48, **IDS),
            [
                "Teacher (falcon) computes attention without transformers' attention interface: its K/V cannot be "
                "recorded."
            ],
        ),
        (
            vlm,
            lambda: MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=48, **IDS),
            [
                "Teacher has 3 of 3 layers of kind 'linear_attention' (layers 0, 1, 2): they do not keep the plain "
                "keys and values that KV sharing passes on.",
                "Teacher (mamba) names no attention heads: it has no keys or values.",
            ],
        ),
    ],
    ids=["mllama", "indexed", "jamba", "falcon-h1", "indexer", "falcon", "mamba"],
)
def test_layers_without_plain_keys_and_values_are_refused(
    student: Callable[[], PreTrainedConfig],
    teacher: Callable[[], PreTrainedConfig],
    expected: list[str],
    tokenizers: Tokenizers,
) -> None:
    report = check_compatibility(student(), teacher(), **tokenizers)
    assert not report.fits
    seeing = (
        " Or give it a teacher of its own class that sees, such as the VLM before: kv_sharing=images shares nothing."
    )
    found = [
        message.replace("qwen_sparse_attention", "indexed_attention") for message in messages(report, "attention")
    ]
    assert found == [f"{reason} {USE_SOFTMAX}{seeing if 'Student' in reason else ''}" for reason in expected]


def qwen3_5(**other: Any) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(**sizes(num_hidden_layers=8, **other))


def qwen3_next(**other: Any) -> Qwen3NextConfig:
    return Qwen3NextConfig(**sizes(num_hidden_layers=8, **other))


@pytest.mark.parametrize(
    ("student", "text", "kind", "where"),
    [
        (Lfm2VlConfig, lfm2, "conv", "2 of 3 layers"),
        (Qwen3_5Config, qwen3_5, "linear_attention", "6 of 8 layers"),
        (LlavaConfig, qwen3_next, "linear_attention", "6 of 8 layers"),
    ],
    ids=["lfm2-vl", "qwen3.5", "qwen3-next"],
)
def test_convolutions_and_delta_rules_are_followed_and_named(
    student: Any, text: Callable[..., PreTrainedConfig], kind: str, where: str, tokenizers: Tokenizers
) -> None:
    """`test_mixers.py` runs them."""
    vlm_ = student(text_config=text(vocab_size=49), image_token_id=IMAGE)
    report = check_compatibility(vlm_, text(), **tokenizers)
    assert report.fits, str(report)
    assert messages(report, "attention") == [
        f"Student's language model has {where} of kind {kind!r}: what tokens write to their state is shared, and the teacher runs "
        "them over whole rows (docs/families.md)."
    ]
    # Controls: another kind of layer at the same place, and a state of another size
    softmax = check_compatibility(vlm_, text(layer_types=["full_attention"] * len(text().layer_types)), **tokenizers)
    assert "Student and teacher mix tokens in different ways (layers 0, " in messages(softmax, "attention")[-1]
    name, value = ("hidden_size", 64) if kind == "conv" else ("linear_num_value_heads", 64)
    other = check_compatibility(vlm_, text(**{name: value}), **tokenizers)
    assert not other.fits and f"its {kind} layers write must be what the student's read" in messages(other, name)[0]


@pytest.mark.parametrize(
    "text", [mla, lambda **other: GptOssConfig(**sizes(head_dim=8, **other))], ids=["mla", "sinks"]
)
def test_expanded_latent_attention_and_sinks_are_not_refused(
    text: Callable[..., PreTrainedConfig], tokenizers: Tokenizers
) -> None:
    """Both reach the attention interface; `test_self_check.py` runs them."""
    report = check_compatibility(vlm(text(vocab_size=49)), text(), **tokenizers)
    assert report.fits, str(report)


def test_latent_attention_is_compared_as_it_is_expanded(tokenizers: Tokenizers) -> None:
    report = check_compatibility(vlm(mla(vocab_size=49)), llama(), **tokenizers)
    assert only(report, "head_dim").student == "16" and only(report, "KV heads").student == "4"
    wider = check_compatibility(vlm(mla(vocab_size=49)), mla(num_attention_heads=8), **tokenizers)
    assert messages(wider, "KV heads")[0].startswith("Teacher has 8 KV heads, the student's language model has 4")


@pytest.mark.parametrize(
    ("student", "reason"),
    [
        (
            lambda: InstructBlipConfig(text_config=llama().to_dict()),
            "runs its language model with its head inside its own forward",
        ),
        (
            lambda: Blip2Config(text_config=llama().to_dict()),
            "runs its language model with its head inside its own forward",
        ),
        (lambda: Llama4Config(), "does not give access to its decoder"),
        (lambda: newer("diffusion_gemma")(), "is no autoregressive model"),
        (lambda: newer("nemotron_h_omni")(), "does not give access to its decoder"),
        (lambda: newer("shieldgemma2")(), "under names that it does not find again"),
        (lambda: newer("evolla")(), "has no vision config that tells where its images go"),
        (lambda: newer("udop")(), "has no vision config that tells where its images go"),
    ],
    ids=["instructblip", "blip-2", "llama4", "diffusion-gemma", "nemotron-h", "shieldgemma2", "evolla", "udop"],
)
def test_students_that_cannot_be_followed_are_refused_with_their_reason(
    student: Callable[[], PreTrainedConfig], reason: str, tokenizers: Tokenizers
) -> None:
    report = check_compatibility(student(), llama(), **tokenizers)
    assert reason in only(report, "roles").reason and not report.fits


def test_a_text_half_without_a_causal_lm_is_named_as_such(tokenizers: Tokenizers) -> None:
    student = newer("deepseek_ocr2")()
    roles = only(check_compatibility(student, student.get_text_config(), **tokenizers), "roles")
    assert roles.reason == (
        "Teacher deepseek_ocr2_text is the text half of a vision-language model, and transformers has no causal LM of this type."
    )


def test_reference_sliding_attention_is_softmax(tokenizers: Tokenizers) -> None:
    student = newer("unlimited_ocr")()
    assert {layer.kind for layer in Side.load("student", student, None, False, None).layers} == {
        "reference_sliding_attention"
    }
    assert not [
        m for m in messages(check_compatibility(student, llama(), **tokenizers), "attention") if "of kind" in m
    ]


def test_lfm2_with_attention_everywhere_is_not_refused(tokenizers: Tokenizers) -> None:
    """Control: it is the layers that count, not the name of the family."""
    full = {"layer_types": ["full_attention"] * LAYERS}
    student = Lfm2VlConfig(text_config=Lfm2Config(**sizes(vocab_size=49, **full)), image_token_id=IMAGE)
    assert check_compatibility(student, Lfm2Config(**sizes(**full)), **tokenizers).fits


def test_every_language_model_that_transformers_knows_gets_an_answer(tokenizers: Tokenizers) -> None:
    """No config, however unusual, ends in an exception, and each kind of layer without K/V is refused."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    answered = 0
    for config_class in dict.fromkeys(CONFIG_MAPPING.values()):
        if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        try:
            teacher = config_class()
        except Exception:  # a config without defaults
            continue
        report = check_compatibility(vlm(), teacher, **tokenizers)
        json.dumps(report.to_dict())
        str(report)
        kinds = set(getattr(teacher.get_text_config(decoder=True), "layer_types", None) or [])
        if kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
            assert "attention" in statuses(report, "misfit"), config_class.__name__
        answered += 1
    assert answered > 100
