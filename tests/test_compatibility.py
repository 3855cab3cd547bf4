"""Which pairs fit, which do not and why, and what `guess_teacher` finds. Configs and tokenizers only, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import PARTS_TEMPLATE, TEXT_TEMPLATE, word_tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    BertConfig,
    Blip2Config,
    BloomConfig,
    CLIPVisionConfig,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    Idefics3Config,
    InstructBlipConfig,
    InternVLConfig,
    JambaConfig,
    Lfm2Config,
    Lfm2VlConfig,
    Llama4Config,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    MambaConfig,
    MistralConfig,
    MllamaConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
    T5Config,
)

from hf_lingudistill.compatibility import (
    TABLE_WIDTH,
    Check,
    CompatibilityReport,
    UnreadableModelError,
    check_compatibility,
    guess_teacher,
)
from hf_lingudistill.compatibility.configs import Side

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


@pytest.fixture(scope="session")
def tokenizers() -> Tokenizers:
    """A pair as the parameters of `check_compatibility`: the student's has the image token on top."""
    return {
        "student_tokenizer": word_tokenizer(VOCAB, extra=("<image>",)),
        "teacher_tokenizer": word_tokenizer(VOCAB),
    }


def statuses(report: CompatibilityReport, status: str) -> set[str]:
    return {check.name for check in report.checks if check.status == status}


def only(report: CompatibilityReport, name: str) -> Check:
    (check,) = (check for check in report.checks if check.name == name)
    return check


def messages(report: CompatibilityReport, name: str) -> list[str]:
    return [check.message for check in report.checks if check.name == name and check.reason]


# --- families --------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits_the_lm_it_was_built_from(family: str, tokenizers: Tokenizers) -> None:
    student, teacher, notes = FAMILIES[family]()
    report = check_compatibility(student, teacher, **tokenizers)
    assert report.misfits == []
    assert statuses(report, "note") == notes | {"vocabulary"}
    assert report.image_token_ids == (IMAGE,)
    assert (report.shared_vocab_size, report.student_vocab_size, report.teacher_vocab_size) == (48, 49, 48)
    report.raise_for_misfit()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_fits_an_lm_with_one_layer_less(family: str, tokenizers: Tokenizers) -> None:
    """Control of the test above."""
    student, teacher, _ = FAMILIES[family]()
    arguments = {name: value for name, value in teacher.to_dict().items() if name not in ("model_type", "layer_types")}
    shorter = type(teacher)(**{**arguments, "num_hidden_layers": LAYERS - 1})
    report = check_compatibility(student, shorter, **tokenizers)
    assert statuses(report, "misfit") == {"decoder layers"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_swapped_pair_is_recognised(family: str, tokenizers: Tokenizers) -> None:
    student, teacher, _ = FAMILIES[family]()
    report = check_compatibility(teacher, student, **tokenizers)
    assert [check.name for check in report.checks] == ["roles"]
    with pytest.raises(ValueError, match="The student and teacher look swapped: "):
        report.raise_for_misfit()


def test_a_model_is_judged_by_its_config_and_stays_untouched(tokenizers: Tokenizers) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(vlm())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert check_compatibility(model, llama(), **tokenizers).fits
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


# --- misfits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "name", "message"),
    [
        (
            {"num_hidden_layers": 2},
            "decoder layers",
            "Teacher has 2 layers, the student's language model has 3: KV sharing pairs layers one to one.",
        ),
        (
            {"num_hidden_layers": 1},
            "decoder layers",
            "Teacher has 1 layer, the student's language model has 3: KV sharing pairs layers one to one.",
        ),
        (
            {"num_key_value_heads": 4},
            "KV heads",
            "Teacher has 4 KV heads, the student's language model has 2: the teacher's queries attend to the "
            "student's keys and values head by head.",
        ),
        (
            {"head_dim": 16},
            "head_dim",
            "Teacher has 16 dimensions a head, the student's language model has 8: the teacher's queries and the "
            "student's keys must have the same size.",
        ),
    ],
)
def test_each_shape_that_differs_is_refused_with_the_fix(
    teacher: dict[str, Any], name: str, message: str, tokenizers: Tokenizers
) -> None:
    report = check_compatibility(vlm(), llama(**teacher), **tokenizers)
    assert statuses(report, "misfit") == {name}
    with pytest.raises(ValueError) as error:
        report.raise_for_misfit()
    assert str(error.value) == f"{message} {USE_THE_ORIGINAL_LM}"


def test_a_head_dim_that_the_config_leaves_out_follows_from_the_width(tokenizers: Tokenizers) -> None:
    teacher = Qwen2Config(**sizes(hidden_size=64))
    assert getattr(teacher, "head_dim", None) is None, "control: it is not stated"
    report = check_compatibility(vlm(Qwen2Config(**sizes(vocab_size=49))), teacher, **tokenizers)
    assert statuses(report, "misfit") == {"head_dim"}
    assert (only(report, "head_dim").student, only(report, "head_dim").teacher) == ("8", "16")


def test_all_misfits_are_told_at_once(tokenizers: Tokenizers) -> None:
    report = check_compatibility(vlm(), llama(num_hidden_layers=2, num_key_value_heads=1), **tokenizers)
    with pytest.raises(ValueError) as error:
        report.raise_for_misfit()
    assert str(error.value) == (
        "2 reasons why the teacher does not fit:\n"
        "- Teacher has 2 layers, the student's language model has 3: KV sharing pairs layers one to one. "
        f"{USE_THE_ORIGINAL_LM}\n"
        "- Teacher has 1 KV head, the student's language model has 2: the teacher's queries attend to the student's "
        f"keys and values head by head. {USE_THE_ORIGINAL_LM}"
    )


SHAPES = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 4),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([4, 8, 16]),
        "hidden_size": st.sampled_from([32, 64]),
        "num_attention_heads": st.sampled_from([4, 8]),
        "rope_theta": st.sampled_from([1e4, 1e5]),
        "sliding_window": st.sampled_from([None, 4, 8]),
    }
)


@given(ours=SHAPES, theirs=SHAPES)
def test_random_pairs_fit_if_and_only_if_their_kv_shapes_agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    student = vlm(MistralConfig(**sizes(**ours, vocab_size=VOCAB + 1)))
    teacher = MistralConfig(**sizes(**theirs))
    report = check_compatibility(
        student, teacher, student_tokenizer=_STUDENT_TOKENIZER, teacher_tokenizer=_TEACHER_TOKENIZER
    )
    must_agree = {"num_hidden_layers": "decoder layers", "num_key_value_heads": "KV heads", "head_dim": "head_dim"}
    may_differ = {
        "hidden_size": "hidden_size",
        "num_attention_heads": "query heads",
        "rope_theta": "RoPE",
        "sliding_window": "sliding window",
    }
    assert statuses(report, "misfit") == {name for key, name in must_agree.items() if ours[key] != theirs[key]}
    expected = {name for key, name in may_differ.items() if ours[key] != theirs[key]} | {"vocabulary"}
    if ours["num_hidden_layers"] != theirs["num_hidden_layers"]:  # a window over other layers is another window
        expected |= {"sliding window"} if ours["sliding_window"] else set()
    assert statuses(report, "note") == expected
    json.dumps(report.to_dict())
    assert max(map(len, str(report).splitlines())) <= TABLE_WIDTH


_STUDENT_TOKENIZER, _TEACHER_TOKENIZER = word_tokenizer(VOCAB, extra=("<image>",)), word_tokenizer(VOCAB)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            BertConfig(**IDS, architectures=["BertForMaskedLM"]),
            "Teacher bert was saved as BertForMaskedLM: it has no language-model head.",
        ),
        (
            llama(architectures=["LlamaForSequenceClassification"]),
            "Teacher llama was saved as LlamaForSequenceClassification: it has no language-model head.",
        ),
        (T5Config(), "Teacher t5 is an encoder-decoder: KV sharing needs decoder-only models."),
        (CLIPVisionConfig(), "Teacher clip_vision_model is not a model that AutoModelForCausalLM loads."),
    ],
    ids=["masked-lm", "classifier", "encoder-decoder", "vision-encoder"],
)
def test_a_teacher_that_is_no_text_only_lm_is_refused(
    teacher: PreTrainedConfig, message: str, tokenizers: Tokenizers
) -> None:
    roles = only(check_compatibility(vlm(), teacher, **tokenizers), "roles")
    assert roles.status == "misfit"
    assert roles.reason == message


def test_a_student_without_vision_is_refused(tokenizers: Tokenizers) -> None:
    report = check_compatibility(llama(), llama(), **tokenizers)
    assert messages(report, "roles") == [
        "Student llama has no vision config: it is a text-only model. Pass the vision-language model as the student."
    ]


# --- attention -------------------------------------------------------------------------------------------------------

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
    found = messages(report, "attention")
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


# --- what is noted ---------------------------------------------------------------------------------------------------


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


# --- vocabulary ------------------------------------------------------------------------------------------------------


def check_tokenizers(student: Any, teacher: Any, rows: tuple[int, int] | None = None) -> CompatibilityReport:
    """rows: of the student's and the teacher's embedding, by default as many as there are tokens."""
    ours, theirs = rows or (len(student), len(teacher))
    return check_compatibility(
        vlm(llama(vocab_size=ours)),
        llama(vocab_size=theirs),
        student_tokenizer=student,
        teacher_tokenizer=teacher,
    )


def test_equal_tokenizers_share_every_id() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB))
    assert only(report, "vocabulary").status == "fits"
    assert report.shared_vocab_size == VOCAB


def test_one_id_that_differs_in_the_middle_is_found() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB, renamed={20: "other"}))
    assert statuses(report, "misfit") == {"vocabulary"}
    assert messages(report, "vocabulary") == [
        "1 token id differs between the tokenizers, the first is 20 ('w20' for the student, 'other' for the teacher): "
        "what the teacher says would be read as something else. Use the LM that the student was built from, with its "
        "own tokenizer."
    ]
    assert report.shared_vocab_size == 20


@given(
    st.dictionaries(st.integers(4, VOCAB - 1), st.sampled_from(["x", "y", "z"]), max_size=4), st.integers(40, VOCAB)
)
def test_the_shared_prefix_is_what_a_comparison_id_by_id_gives(renamed: dict[int, str], student_size: int) -> None:
    renamed = {index: f"{token}{index}" for index, token in renamed.items()}
    student, teacher = word_tokenizer(student_size), word_tokenizer(VOCAB, renamed=renamed)
    report = check_tokenizers(student, teacher)
    common = range(min(len(student), len(teacher)))
    different = [i for i in common if student.convert_ids_to_tokens(i) != teacher.convert_ids_to_tokens(i)]
    assert report.shared_vocab_size == (different[0] if different else len(common))
    assert report.fits == (not different)
    if different:
        assert messages(report, "vocabulary")[0].startswith(f"{len(different)} token id")


def test_swapped_tokens_are_found_although_the_sets_agree() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB, renamed={10: "w11", 11: "w10"}))
    assert report.shared_vocab_size == 10
    assert messages(report, "vocabulary")[0].startswith("2 token ids differ between the tokenizers, the first is 10 ")


def test_extra_student_tokens_are_counted() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB, extra=("<image>", "<row>", "<tile>")), word_tokenizer(VOCAB))
    assert report.fits
    assert messages(report, "vocabulary") == [
        "Student has 3 tokens that the teacher lacks (id 48: '<image>'). Positions with labels from id 48 on get "
        "cross-entropy only."
    ]
    assert report.shared_vocab_size == VOCAB


def test_extra_teacher_tokens_are_counted() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB, extra=("<tool>",)))
    assert report.fits
    assert messages(report, "vocabulary") == [
        "Teacher has 1 token that the student lacks (id 48: '<tool>'): what it predicts there is left out."
    ]
    assert report.shared_vocab_size == VOCAB


def test_a_reserved_id_that_the_student_took_over_is_a_note() -> None:
    """Reserved ids behind the teacher's last word: all of its language is shared. Control: the word test above."""
    teacher = word_tokenizer(VOCAB, extra=("<reserved_0>", "<reserved_1>"))
    report = check_tokenizers(word_tokenizer(VOCAB, extra=("<reserved_0>", "<image>")), teacher)
    assert report.fits
    assert messages(report, "vocabulary") == [
        "1 token id differs between the tokenizers, the first is 49 ('<image>' for the student, '<reserved_1>' for "
        "the teacher), all among ids that the teacher keeps in reserve. Positions with labels from id 49 on get "
        "cross-entropy only."
    ]
    assert report.shared_vocab_size == 49


def test_padding_rows_of_the_embeddings_are_not_shared_tokens() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB), rows=(64, 56))
    assert only(report, "vocabulary").status == "fits"
    assert (report.shared_vocab_size, report.student_vocab_size, report.teacher_vocab_size) == (48, 64, 56)


def test_tokens_without_a_row_are_not_shared() -> None:
    report = check_tokenizers(word_tokenizer(VOCAB), word_tokenizer(VOCAB), rows=(VOCAB, VOCAB - 2))
    assert report.fits
    assert messages(report, "vocabulary") == [
        "The smaller embedding has rows for 46 of the 48 shared tokens. Positions with labels from id 46 on get "
        "cross-entropy only."
    ]
    assert report.shared_vocab_size == VOCAB - 2


def test_a_missing_tokenizer_is_a_misfit_and_shares_nothing() -> None:
    report = check_compatibility(vlm(), llama(), student_tokenizer=word_tokenizer(VOCAB))
    assert messages(report, "vocabulary") == [
        "Vocabularies cannot be compared for lack of the teacher's tokenizer: none was given, and the config does not "
        "say where it came from. Pass a folder or Hub id that has one, or teacher_tokenizer."
    ]
    assert report.shared_vocab_size == 0


def test_a_processor_stands_for_its_tokenizer() -> None:
    class Processor:
        tokenizer = word_tokenizer(VOCAB, extra=("<image>",))
        chat_template = PARTS_TEMPLATE

    teacher = word_tokenizer(VOCAB, chat_template=TEXT_TEMPLATE)
    report = check_compatibility(vlm(), llama(), student_tokenizer=Processor(), teacher_tokenizer=teacher)
    assert report.shared_vocab_size == VOCAB
    assert only(report, "chat template").status == "fits"


# --- image tokens, chat templates ------------------------------------------------------------------------------------


def test_image_and_video_tokens_are_read_from_the_config(tokenizers: Tokenizers) -> None:
    student = Qwen2VLConfig(text_config=sizes(), image_token_id=40, video_token_id=41)
    assert check_compatibility(student, Qwen2Config(**sizes()), **tokenizers).image_token_ids == (40, 41)


def test_an_image_token_without_a_row_is_noted(tokenizers: Tokenizers) -> None:
    report = check_compatibility(vlm(llama(vocab_size=VOCAB)), llama(), **tokenizers)
    assert messages(report, "image tokens") == ["Student's embedding has 48 rows and none for image token id 48."]


def test_a_student_that_names_no_image_token_is_noted(tokenizers: Tokenizers) -> None:
    student = CONFIG_MAPPING["blip-2"](text_config=llama(vocab_size=49))
    report = check_compatibility(student, llama(), **tokenizers)
    assert report.image_token_ids == ()
    assert messages(report, "image tokens") == [
        "Student's config names no image token: vision and none cannot tell images from text. Use kv_sharing=full or "
        "prompt."
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (None, None, []),
        (PARTS_TEMPLATE, TEXT_TEMPLATE, []),  # another template, the same text
        (
            PARTS_TEMPLATE,
            None,
            [
                "Teacher has no chat template, the student has one: turn markers may be new to the teacher. If there "
                "is an instruct LM that the student was built from, use that one."
            ],
        ),
        (
            None,
            TEXT_TEMPLATE,
            [
                "Student has no chat template, the teacher has one: the teacher expects turn markers and sees none. "
                "If there is a base LM that the student was built from, use that one."
            ],
        ),
        (
            PARTS_TEMPLATE,
            TEXT_TEMPLATE.replace("<eos>", "<end>"),
            [
                "Chat formats differ (student: '<|user|>Question<eos><|assistant|>Answer<eos>'; teacher: "
                "'<|user|>Question<end><|assistant|>Answer<end>'): the teacher reads the student's."
            ],
        ),
    ],
    ids=["neither", "same-text", "base-teacher", "base-student", "other-markers"],
)
def test_chat_formats_are_compared_by_what_they_write(
    ours: str | None, theirs: str | None, expected: list[str]
) -> None:
    student = word_tokenizer(VOCAB, extra=("<image>",), chat_template=ours)
    report = check_tokenizers(student, word_tokenizer(VOCAB, chat_template=theirs))
    assert report.fits
    assert messages(report, "chat template") == expected


# --- folders ---------------------------------------------------------------------------------------------------------


def save(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast | None) -> str:
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folders(tmp_path: Path, tokenizers: Tokenizers) -> tuple[str, str]:
    """A VLM and its LM on disk: configs and tokenizers, no weights."""
    return (
        save(tmp_path / "vlm", vlm(), tokenizers["student_tokenizer"]),
        save(tmp_path / "lm", llama(), tokenizers["teacher_tokenizer"]),
    )


def test_folders_without_weights_are_enough(folders: tuple[str, str]) -> None:
    for folder in folders:
        suffixes = {path.suffix for path in Path(folder).iterdir()}
        assert suffixes <= {".json", ".jinja"}, "control: there is nothing here that could hold weights"
    report = check_compatibility(*folders)
    assert report.fits
    assert report.shared_vocab_size == VOCAB
    assert report.student == f"{folders[0]} (llava; language model llama)"


def test_weights_that_are_there_are_not_read(folders: tuple[str, str]) -> None:
    for folder in folders:
        Path(folder, "model.safetensors").write_bytes(b"no weights")
    assert check_compatibility(*folders).fits
    with pytest.raises(Exception, match="header"):  # control: reading them would not have gone unnoticed
        AutoModelForImageTextToText.from_pretrained(folders[0])


def test_a_config_remembers_where_its_tokenizer_is(folders: tuple[str, str]) -> None:
    student, teacher = (PreTrainedConfig.get_config_dict(folder)[0] for folder in folders)
    configs = LlavaConfig(**student, name_or_path=folders[0]), LlamaConfig(**teacher, name_or_path=folders[1])
    assert check_compatibility(*configs).shared_vocab_size == VOCAB


def test_a_folder_without_tokenizer_is_a_misfit(folders: tuple[str, str], tmp_path: Path) -> None:
    bare = save(tmp_path / "bare", llama(), None)
    report = check_compatibility(folders[0], bare)
    assert messages(report, "vocabulary") == [
        f"Vocabularies cannot be compared for lack of the teacher's tokenizer: {bare} holds none. Pass a folder or "
        "Hub id that has one, or teacher_tokenizer."
    ]


def test_a_vlm_template_of_an_older_processor_is_read(folders: tuple[str, str]) -> None:
    assert only(check_compatibility(*folders), "chat template").student == "none"
    Path(folders[0], "chat_template.json").write_text(json.dumps({"chat_template": PARTS_TEMPLATE}))
    assert only(check_compatibility(*folders), "chat template").student == "yes"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "The teacher '{}' does not exist. Pass a folder that holds a config.json, or a Hub id."),
        ({}, "The teacher folder '{}' holds no config.json. Pass the folder that save_pretrained wrote."),
        (
            {"adapter_config.json": "{}"},
            "The teacher folder '{}' holds an adapter, not a model. Merge it into its base first.",
        ),
        ({"config.json": "{"}, "The config of the teacher '{}' cannot be read: It looks like the config file at"),
        ({"config.json": "{}"}, "The config of the teacher '{}' cannot be read: Unrecognized model in"),
        (
            {"config.json": '{"model_type": "llama", "num_hidden_layers": "three"}'},
            "The config of the teacher '{}' cannot be read: Validation error for field 'num_hidden_layers'",
        ),
        (
            {"config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}'},
            "The teacher '{}' runs code from its repository. Read it, and pass trust_remote_code if you trust it.",
        ),
    ],
    ids=["missing", "empty", "adapter", "broken", "unknown", "wrong-type", "code"],
)
def test_a_model_that_cannot_be_read_is_named_in_one_line(
    files: dict[str, str] | None, message: str, folders: tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    with pytest.raises(UnreadableModelError) as error:
        check_compatibility(folders[0], folder)
    assert str(error.value).startswith(message.format(folder))
    assert "\n" not in str(error.value)


def test_code_of_a_repository_runs_only_when_trusted(folders: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    proof = tmp_path / "it_ran"
    (folder / "configuration_mine.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(proof)!r}).touch()\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    auto_map = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps({**sizes(), "model_type": "mine", "auto_map": auto_map}))
    word_tokenizer(VOCAB).save_pretrained(folder)
    with pytest.raises(UnreadableModelError):
        check_compatibility(folders[0], folder)
    assert not proof.exists()
    assert check_compatibility(folders[0], folder, trust_remote_code=True).fits
    assert proof.exists()


def test_a_repository_that_is_not_there_is_bad_input(folders: tuple[str, str]) -> None:
    with pytest.raises(UnreadableModelError, match="^The config of the student 'nobody/nothing' cannot be read: "):
        check_compatibility("nobody/nothing", folders[1])


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="student must be a path, a Hub id, a config or a model, got int."):
        check_compatibility(3, llama())  # type: ignore[arg-type]


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_is_json(tokenizers: Tokenizers) -> None:
    report = check_compatibility(vlm(), llama(num_hidden_layers=2), **tokenizers)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["fits"] is False
    assert content["shared_vocab_size"] == VOCAB
    assert content["image_token_ids"] == [IMAGE]
    assert {
        "name": "decoder layers",
        "status": "misfit",
        "student": "3",
        "teacher": "2",
        "reason": "Teacher has 2 layers, the student's language model has 3: KV sharing pairs layers one to one.",
        "fix": USE_THE_ORIGINAL_LM,
    } in content["checks"]


def test_the_table_reads_at_100_columns(tokenizers: Tokenizers) -> None:
    long = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "beta_fast": 32.0}}
    report = check_compatibility(vlm(llama(vocab_size=49, **long)), llama(num_hidden_layers=2), **tokenizers)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= TABLE_WIDTH
    header = next(line for line in lines if line.startswith("check"))
    row = next(line for line in lines if line.startswith("decoder layers"))
    for word, value in (("status", "misfit"), ("student", "3"), ("teacher", "2")):
        assert row[header.index(word) :].startswith(value), "columns are aligned"
    assert lines[lines.index(row) + 1 : lines.index(row) + 3] == [
        "    Teacher has 2 layers, the student's language model has 3: KV sharing pairs layers one to one.",
        "    Fix: Use the LM that the student was built from.",
    ]
    assert lines[-1] == "Does not fit: 1 misfit, 2 notes."


def test_the_last_line_says_whether_it_fits(tokenizers: Tokenizers) -> None:
    assert str(check_compatibility(vlm(), llama(), **tokenizers)).endswith("\nFits, with 1 note.")
    same = word_tokenizer(VOCAB + 1)
    report = check_compatibility(vlm(), llama(vocab_size=49), student_tokenizer=same, teacher_tokenizer=same)
    assert str(report).endswith("\nFits.")


# --- guessing the teacher --------------------------------------------------------------------------------------------

LM, VISION = {"model_type": "llama"}, {"model_type": "siglip", "vision_config": {}, "text_config": {}}
Repositories = dict[str, dict[str, Any]]


def card(*base_model: str) -> str:
    names = "".join(f"\n- {name}" for name in base_model)
    return f"---\nlicense: apache-2.0\nbase_model:{names}\n---\n# A model\n"


def vlm_files(text_config: dict[str, Any] | None = None, readme: str | None = None, **other: Any) -> dict[str, Any]:
    config = {
        "model_type": "llava",
        "vision_config": {},
        "text_config": {"model_type": "llama", **(text_config or {})},
    }
    return {"config.json": {**config, **other}, "README.md": readme}


class Hub:
    """Stands in for the Hub: repositories by name, each a mapping of file names to content."""

    def __init__(self, root: Path, repositories: Repositories) -> None:
        self.root, self.requests, self.down = root, 0, False
        for repository, files in repositories.items():
            write(root / repository, files)

    def download(self, repo_id: str, filename: str, **_: Any) -> str:
        self.requests += 1
        if self.down:
            raise LocalEntryNotFoundError("cannot connect")
        path = self.root / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)


def write(folder: Path, files: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Repositories], Hub]:
    def build(repositories: Repositories) -> Hub:
        hub = Hub(tmp_path / "hub", repositories)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        return hub

    return build


@pytest.mark.parametrize(
    "student",
    [
        vlm_files({"_name_or_path": "org/lm"}),
        vlm_files(readme=card("org/lm")),
        vlm_files(readme=card("org/encoder", "org/lm")),
        vlm_files(readme="---\nbase_model: org/lm\n---\n"),
        {"config.json": {"lm_model_type": "org/lm", "vit_model_type": "org/encoder", "lm_tokenizer": "org/other"}},
        {"config.json": {"model_type": "llava_llama", "mm_vision_tower": "org/encoder", "_name_or_path": "org/lm"}},
        vlm_files(readme=card("org/other-vlm")),
        vlm_files({"_name_or_path": "/fsx/run_7/checkpoint"}, readme=card("org/lm")),
        vlm_files({"_name_or_path": "None"}, readme=card("org/lm")),
        vlm_files({"_name_or_path": "org/encoder"}, readme=card("org/lm")),
    ],
    ids=[
        "text-config",
        "card-list-of-one",
        "card-list",
        "card-string",
        "nanovlm",
        "llava",
        "through-another-vlm",
        "path-of-a-cluster",
        "the-string-none",
        "wrong-kind",
    ],
)
@pytest.mark.parametrize("where", ["hub", "folder"])
def test_the_lm_is_found(
    student: dict[str, Any], where: str, hub: Callable[[Repositories], Hub], tmp_path: Path
) -> None:
    hub(
        {
            "org/lm": {"config.json": LM},
            "org/other": {"config.json": LM},
            "org/encoder": {"config.json": VISION},
            "org/other-vlm": vlm_files({"_name_or_path": "org/lm"}),
            "me/vlm": student,
        }
    )
    assert guess_teacher("me/vlm" if where == "hub" else write(tmp_path / "vlm", student)) == "org/lm"


@pytest.mark.parametrize(
    "student",
    [
        vlm_files(),
        vlm_files({"_name_or_path": "me/vlm"}),
        vlm_files(readme=card("me/vlm")),
        vlm_files(readme=card("me/VLM")),
        vlm_files(readme=card("org/circle")),
        vlm_files(readme=card("org/encoder")),
        vlm_files(readme="---\nbase_model: [org/lm\n---\n"),
        vlm_files(readme="no front matter, base_model: org/lm"),
        vlm_files(_name_or_path="me/vlm"),
        {"config.json": "{"},
        {},
    ],
    ids=[
        "nothing",
        "itself",
        "itself-in-card",
        "other-case",
        "circle",
        "encoder",
        "bad-yaml",
        "no-yaml",
        "own-name",
        "bad-json",
        "empty",
    ],
)
def test_where_no_lm_is_named_none_is_guessed(student: dict[str, Any], hub: Callable[[Repositories], Hub]) -> None:
    hub(
        {
            "org/lm": {"config.json": LM},
            "org/encoder": {"config.json": VISION},
            "org/circle": vlm_files({"_name_or_path": "me/vlm"}),
            "me/vlm": student,
        }
    )
    assert guess_teacher("me/vlm") is None


def test_a_local_lm_is_found(tmp_path: Path) -> None:
    lm = write(tmp_path / "lm", {"config.json": LM})
    folder = write(tmp_path / "vlm", vlm_files({"_name_or_path": lm}))
    assert guess_teacher(folder) == lm
    assert guess_teacher(Path(folder)) == lm


def test_a_config_or_model_names_its_lm_too(tmp_path: Path) -> None:
    lm = write(tmp_path / "lm", {"config.json": LM})
    config = vlm(llama(name_or_path=lm))
    assert guess_teacher(config) == lm
    with torch.device("meta"):
        assert guess_teacher(AutoModelForImageTextToText.from_config(config)) == lm
    assert guess_teacher(vlm()) is None


def test_the_only_name_that_is_no_vision_encoder_is_taken(hub: Callable[[Repositories], Hub], tmp_path: Path) -> None:
    """Neither config can be read (a gated LM, say): names decide, if they leave exactly one."""
    hub({})
    folder = tmp_path / "vlm"
    write(folder, vlm_files(readme=card("google/siglip-base-patch16-512", "org/gated-lm")))
    assert guess_teacher(folder) == "org/gated-lm"
    write(folder, vlm_files(readme=card("org/gated-lm", "org/something-else")))
    assert guess_teacher(folder) is None
    write(folder, vlm_files(readme=card("org/perhaps-a-vlm")))
    assert guess_teacher(folder) is None


def test_without_network_there_is_no_guess_and_one_attempt(hub: Callable[[Repositories], Hub], tmp_path: Path) -> None:
    stand_in = hub({"org/lm": {"config.json": LM}, "me/vlm": vlm_files(readme=card("org/lm"))})
    assert guess_teacher("me/vlm") == "org/lm"  # control: the same question with a network

    stand_in.down, stand_in.requests = True, 0
    assert guess_teacher("me/vlm") is None
    assert stand_in.requests == 1
    stand_in.requests = 0
    assert guess_teacher(write(tmp_path / "vlm", vlm_files(readme=card("org/lm")))) is None
    assert stand_in.requests == 1


def test_the_guess_is_what_the_check_takes(tmp_path: Path, tokenizers: Tokenizers) -> None:
    lm = save(tmp_path / "lm", llama(), tokenizers["teacher_tokenizer"])
    folder = save(tmp_path / "vlm", vlm(), tokenizers["student_tokenizer"])
    write(Path(folder), {"README.md": f"---\nbase_model: {lm}\n---\n"})
    guess = guess_teacher(folder)
    assert guess is not None
    assert check_compatibility(folder, guess).fits
